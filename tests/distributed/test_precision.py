"""A precision setting means the same on one device and on several, in every method of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.precision import MixedPrecision
from support import TinyTrainer, flat, run_ranks, tiny
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError
from dream_trainer.world import DreamFabric, DreamWorld, MeshStrategy

pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "ddp": (2, {"dp_replicate": 2}),
    "fsdp": (2, {"dp_replicate": 1, "dp_shard": 2}),
}
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "64-true"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x)

    def score(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)

    def sample(self, steps: int) -> Tensor:
        """Takes no tensor, calls itself, uses a parameter of the root's own directly."""
        x = torch.linspace(-1, 1, 12).reshape(4, 3)
        for _ in range(steps):
            x = x + self(x) * self.stem.weight[0].detach().to(x.dtype)
        return x

    def size(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def freeze_stem(self) -> None:
        self.stem.requires_grad_(False)

    def fail(self) -> None:
        raise KeyError("on purpose")


def world_with_net(layout: str, precision: str) -> tuple[DreamWorld, Any, Net]:
    size, sizes = LAYOUTS[layout]
    world = DreamWorld(
        DeviceParameters(accelerator="cpu", devices=size, precision=precision, **sizes)
    )
    world.launch()
    torch.manual_seed(1)
    net = Net()
    return world, world.setup(net), net


def hooks(net: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    counts = [len(getattr(part, kind)) for part in net.modules() for kind in kinds]
    return [counts, "forward" in vars(net), "_compiled_call_impl" in vars(net)]


def results(layout: str, precision: str) -> dict[str, Any]:
    world, model, net = world_with_net(layout, precision)
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    model(x)  # FSDP2 sets itself up with the first call
    before, found = hooks(net), {}
    for name in ("forward", "score"):
        call = model if name == "forward" else model.score
        output = call(x)
        world.backward(output.square().mean())
        gradients = {n: p.grad.double() for n, p in net.named_parameters()}
        found[name] = flat({"output": output, "gradients": gradients})
        found[f"{name} dtype"] = str(output.dtype)
        model.zero_grad()
    with torch.no_grad():
        found["sample"] = flat(model.sample(3))
    with pytest.raises(KeyError, match="on purpose"):
        model.fail()
    found["size"] = model.size()
    assert hooks(net) == before
    model.freeze_stem()
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == [
        "stem.weight",
        "stem.bias",
    ]
    assert all(isinstance(p, DTensor) == (layout == "fsdp") for p in net.parameters())
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_methods_compute_like_forward_on_one_device_and_on_several(precision: str) -> None:
    ((single),) = run_ranks(1, results, "single", precision)
    assert single["score"] == single["forward"]
    assert single["forward dtype"] == "torch.float32"
    for layout in ("ddp", "fsdp"):
        for found in run_ranks(2, results, layout, precision):
            assert found["score"] == found["forward"]
            assert found["forward dtype"] == "torch.float32"
            assert found["size"] == single["size"]
            if layout == "ddp" or precision != "bf16-mixed":
                # In bf16-mixed FSDP2 casts parameters once, autocast casts for each operation.
                assert found["forward"]["/output"] == single["forward"]["/output"]
                assert found["sample"] == single["sample"]


def test_a_helper_may_run_on_one_rank_of_ddp_alone() -> None:
    def rank() -> int | None:
        world, model, _ = world_with_net("ddp", "32-true")
        with torch.no_grad():
            answer = model.size() + len(model.sample(1)) if world.is_global_zero else None
        world.barrier()
        return answer

    assert run_ranks(2, rank) == [65, None]


class ByMethod(TinyTrainer):
    """Never calls ``forward``."""

    def configure_models(self) -> None:
        self.net = Net()

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return (self.net.score(batch["x"]) - batch["y"]).square().mean()


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_training_through_another_method_is_synchronised(tmp_path: Path, precision: str) -> None:
    def rank(layout: str) -> Any:
        size, sizes = LAYOUTS[layout]
        options: dict[str, Any] = {"devices": size, "batch_size": 4 // size, "enable": False}
        trainer = tiny(tmp_path, ByMethod, precision=precision, max_steps=5, **options | sizes)
        trainer.fit()
        state = trainer.state_dict()["models"]["net"]
        return {
            name: (v.full_tensor() if isinstance(v, DTensor) else v).double().tolist()
            for name, v in state.items()
        }

    # Halves have 8 bits: a step is off by up to 2 ** -8 of its size, five steps of 0.05 each.
    tolerance = 1e-10 if precision == "64-true" else 5 * 0.05 * 2**-4
    (single,) = run_ranks(1, rank, "single")
    for layout in ("ddp", "fsdp"):
        one, other = run_ranks(2, rank, layout)
        assert one == other
        for name, value in one.items():
            a, b = torch.tensor(value), torch.tensor(single[name])
            torch.testing.assert_close(a, b, rtol=1e-10, atol=tolerance)


@pytest.mark.parametrize("fused", [False, True])
def test_ranks_skip_the_same_step_when_one_of_them_overflows(fused: bool) -> None:
    def rank() -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        strategy = MeshStrategy(dp_shard=2)
        fabric = DreamFabric(accelerator="cpu", devices=2, strategy=strategy, plugins=[plugin])
        world = DreamWorld.from_fabric(fabric)
        world.launch()
        torch.manual_seed(1)
        net = Net()
        model = world.setup(net)
        optimizer = world.setup_optimizer(torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused))
        found = [world.scales_loss]
        for step in range(4):
            before = flat(model.state_dict())
            x = torch.ones(2, 3) * (1e6 if step == 1 and world.rank == 1 else 1)
            world.backward(model(x).mean())
            norm = world.clip_gradients(optimizer, max_norm=10.0)
            optimizer.step()
            optimizer.zero_grad()
            moved = flat(model.state_dict()) != before
            found.append((moved, bool(norm.isfinite()), world.precision_state()["scale"]))
        return found

    one, other = run_ranks(2, rank)
    assert one == other
    assert one == [
        True,
        (True, True, 4.0),
        (False, False, 2.0),
        (True, True, 2.0),
        (True, True, 4.0),
    ]


def test_parameters_and_reductions_have_their_types_separately() -> None:
    def rank() -> Any:
        strategy = MeshStrategy(dp_shard=2, param_dtype=torch.bfloat16, reduce_dtype=torch.float64)
        fabric = DreamFabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        model = fabric.setup(Net())
        seen = []
        model.module.blocks[0].register_forward_hook(lambda m, x, y: seen.append(y.dtype))
        output = model(torch.ones(2, 3))
        policy = strategy.fsdp_arguments["mp_policy"]
        return seen[0], output.dtype, policy.param_dtype, policy.reduce_dtype

    expected = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float64)
    assert run_ranks(2, rank) == [expected, expected]


def test_a_precision_that_a_mesh_cannot_do_is_refused_in_two_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        DreamWorld(
            DeviceParameters(
                accelerator="cpu", devices=2, dp_shard=2, precision="transformer-engine"
            )
        )
    assert str(caught.value).count("\n") <= 1
    assert "transformer-engine" in str(caught.value)
    assert "bf16-mixed" in str(caught.value)


class ManyTypes(nn.Module):
    """A buffer in float32 meets a layer in half, as one device allows it."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.register_buffer("scale", torch.full((4,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x * self.scale)).square().sum()


def test_what_trains_on_one_device_in_mixed_precision_trains_sharded() -> None:
    def rank(layout: str) -> float:
        size, sizes = LAYOUTS[layout]
        devices = DeviceParameters(accelerator="cpu", devices=size, precision="bf16-mixed", **sizes)
        world = DreamWorld(devices)
        world.launch()
        torch.manual_seed(1)
        model = world.setup(ManyTypes())
        loss = model(torch.linspace(-1, 1, 8).reshape(2, 4))
        world.backward(loss)
        return float(loss.detach())

    single, ddp, fsdp = (run_ranks(LAYOUTS[name][0], rank, name)[0] for name in LAYOUTS)
    assert single == ddp == pytest.approx(fsdp, rel=2**-7)
