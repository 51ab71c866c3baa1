"""Leaving Fabric's detour out changes no bit, and no hook that a plugin overrides is left out.

The same training once in a loop by hand on Fabric, through its wrappers, and once by a trainer
inside that Fabric, which calls the plugins that do something and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision, Precision
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy
from support import TinyTrainer, run_ranks, tiny_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

pytestmark = pytest.mark.may_leave("rng")

Batch = tuple[Tensor, Tensor]
Calls = list[str]
STEPS, CLIP = 4, 0.5


def batches(accumulate: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(6, 3, generator=generator), torch.randn(6, 1, generator=generator))
        for _ in range(STEPS * accumulate)
    ]


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
    return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


class Trainer(TinyTrainer):
    accumulate = 1

    def configure_models(self) -> None:
        self.net, _ = model_and_optimizer()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    def configure_schedulers(self) -> Any:
        return None

    def configure_dataloaders(self) -> Any:
        return batches(self.accumulate), None

    def compute_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.net.parameters()).dtype


def weights(net: nn.Module) -> list[bytes]:
    return [p.detach().view(torch.uint8).numpy().tobytes() for p in net.parameters()]


def by_hand(fabric: Fabric, accumulate: int) -> list[bytes]:
    fabric.launch()
    net, optimizer = fabric.setup(*model_and_optimizer())
    for index, (x, y) in enumerate(batches(accumulate), start=1):
        is_accumulating = index % accumulate != 0
        is_parallel = isinstance(fabric.strategy, DDPStrategy)
        sync = fabric.no_backward_sync(net, enabled=is_accumulating) if is_parallel else None
        with sync or nullcontext():
            loss = F.mse_loss(net(x), y.to(next(net.parameters()).dtype))
            fabric.backward(loss / accumulate if accumulate > 1 else loss)
        if not is_accumulating:
            fabric.clip_gradients(net, optimizer, max_norm=CLIP, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
    return weights(net)


def by_trainer(fabric: Fabric, accumulate: int, folder: Path) -> list[bytes]:
    config = tiny_config(
        folder, n_epochs=1, gradient_accumulation_steps=accumulate, gradient_clip_val=CLIP
    )
    config.checkpoint_parameters.enable = False
    trainer = Trainer(config, fabric=fabric)
    trainer.accumulate = accumulate
    trainer.fit()
    assert trainer.global_step == STEPS
    return weights(trainer.net)


# ---------------------------------------------------------------------- plugins that do something


def noting(base: type, hook: str, *args: Any, **kwargs: Any) -> Any:
    """A plugin that notes when this hook is called, and does what its base does."""

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(hook)
        return getattr(super(kind, self), hook)(*args, **kwargs)

    kind = type(f"Noting{base.__name__}", (base,), {hook: noted})
    made = kind(*args, **kwargs)
    made.calls = []
    return made


class Doubling(Precision):
    """Every hook changes the numbers, so that one that is left out is seen in the weights."""

    def convert_input(self, data: Any) -> Any:
        return tree_map(lambda leaf: leaf * 2 if isinstance(leaf, Tensor) else leaf, data)

    def convert_output(self, data: Any) -> Any:
        return data * 0.5

    @contextmanager
    def forward_context(self) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            yield

    def backward(self, tensor: Tensor, model: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor * 3, model, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad *= 0.9
        return super().optimizer_step(optimizer, **kwargs)


PRECISION_HOOKS = (
    "convert_input",
    "forward_context",
    "convert_output",
    "pre_backward",
    "backward",
    "post_backward",
    "optimizer_step",
)
#: Options of a Fabric, made anew for each of the two.
PLUGINS: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        name: lambda name=name: {"precision": name}  # type: ignore[misc]
        for name in ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed")
    },
    "16-mixed": lambda: {
        "plugins": MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    },
    "every hook": lambda: {"plugins": Doubling()},
    "derived mixed": lambda: {"plugins": noting(MixedPrecision, "backward", "bf16-mixed", "cpu")},
    **{
        hook: lambda hook=hook: {"plugins": noting(Precision, hook)}  # type: ignore[misc]
        for hook in PRECISION_HOOKS
    },
    **{
        f"strategy's {hook}": lambda hook=hook: {  # type: ignore[misc]
            "strategy": noting(SingleDeviceStrategy, hook, device=torch.device("cpu"))
        }
        for hook in ("backward", "optimizer_step")
    },
}


def calls_of(options: dict[str, Any]) -> Calls:
    plugin = options.get("plugins", options.get("strategy"))
    return list(getattr(plugin, "calls", []))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("plugin", list(PLUGINS))
def test_a_trainer_trains_to_the_bit_as_fabrics_own_wrappers_do(
    plugin: str, accumulate: int, tmp_path: Path
) -> None:
    theirs, ours = PLUGINS[plugin](), PLUGINS[plugin]()
    common: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    if "strategy" in theirs:
        common.clear()
    expected = by_hand(Fabric(**common, **theirs), accumulate)
    assert by_trainer(Fabric(**common, **ours), accumulate, tmp_path) == expected
    assert calls_of(ours) == calls_of(theirs)
    is_noted = plugin in PRECISION_HOOKS or plugin.startswith("strategy")
    assert bool(calls_of(theirs)) == (is_noted or plugin == "derived mixed")


@pytest.mark.distributed
@pytest.mark.parametrize("plugin", ["32-true", "bf16-mixed", "every hook", "backward"])
def test_so_it_does_on_ranks_of_ddp(plugin: str, tmp_path: Path) -> None:
    def rank() -> tuple[list[bytes], list[bytes], bool]:
        common: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
        theirs, ours = PLUGINS[plugin](), PLUGINS[plugin]()
        expected = by_hand(Fabric(**common, **theirs), 2)
        found = by_trainer(Fabric(**common, **ours), 2, tmp_path)
        return expected, found, calls_of(theirs) == calls_of(ours)

    for expected, found, has_same_calls in run_ranks(2, rank):
        assert found == expected
        assert has_same_calls
