"""Averages are sharded as the weights are, and any layout goes on with those of any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, Blocks, BlocksTrainer, Layout, in_double, laid_out
from support import TinyTrainer, differences, exact_state, flat, run_ranks, tiny
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from dream_trainer import EMA, SWA, Callback

# Loading what starts ranks draws.
pytestmark = [pytest.mark.distributed, pytest.mark.may_leave("rng")]

THREE = Layout("three", 3, {"dp_shard": 3})


def whole(tensor: Tensor) -> Tensor:
    # A shard of one rank is whole already, and not copied.
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).clone()


def weights_now(trainer: Any) -> dict[str, Tensor]:
    model = trainer.components.models["net"]
    return {f"net.{name}": whole(value.detach()) for name, value in model.named_parameters()}


class CountingEMA(EMA):
    """Counts the collectives of a step and of putting the averages in place."""

    collectives = 0

    def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        with CommDebugMode() as counted:
            super().pre_optimizer_step(trainer, optimizer)
            super().post_optimizer_step(trainer, optimizer)
        self.collectives += counted.get_total_counts()


class ByHand(Callback):
    """Whole weights averaged on every rank."""

    def pre_fit(self, trainer: Any) -> None:
        self.expected = weights_now(trainer)
        self.seen: list[bool] = []

    def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        now = weights_now(trainer)
        self.expected = {n: old.lerp(now[n], 1 - 0.9) for n, old in self.expected.items()}

    def pre_validation_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(flat(weights_now(trainer)) == flat(self.expected))


def average_under(root: Path, name: str) -> dict[str, Any]:
    in_double()
    ema, hand = CountingEMA(0.9), ByHand()
    trainer = laid_out(root, name, callbacks={"ema": ema, "hand": hand}, dropout=0.2)
    trainer.fit()
    own = trainer.components.models["net"].eval()
    same_layout = [
        average.to_local().shape == parameter.to_local().shape
        and average.placements == parameter.placements
        for parameter, average in zip(own.parameters(), ema.average().values(), strict=True)
        if isinstance(parameter, DTensor)
    ]
    x = torch.ones(2, 3)
    with torch.no_grad():
        # The model as it was made: what FSDP gathers for it nobody gives back.
        before = own(x)
        with ema.swapped(trainer):
            inside = own(x)
        after = own(x)
        whole_model = Blocks().eval()
        whole_model.load_state_dict({n.removeprefix("net."): v for n, v in hand.expected.items()})
        # Layers that are split add up in another order.
        is_average = torch.allclose(inside, whole_model(x), rtol=1e-12)
    plain = laid_out(root, name, dropout=0.2)
    plain.fit()
    return {
        "is_right": flat(ema.average()) == flat(hand.expected),
        "seen": hand.seen,
        "comes_and_goes": is_average and torch.equal(before, after),
        "collectives": ema.collectives,
        "same_layout": same_layout,
        "untouched": flat(weights_now(plain)) == flat(weights_now(trainer)),
    }


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp", "tp", "fsdp-tp"])
def test_averages_are_those_of_whole_weights_without_a_collective(
    name: str, tmp_path: Path
) -> None:
    for found in run_ranks(LAYOUTS[name].size, average_under, tmp_path, name):
        assert found["is_right"]
        assert len(found["seen"]) >= 2
        assert all(found["seen"])
        assert found["comes_and_goes"]
        assert found["collectives"] == 0
        assert all(found["same_layout"])
        assert bool(found["same_layout"]) == (name != "ddp")
        assert found["untouched"]


def write(root: Path, layout: Layout) -> dict[str, Any]:
    in_double()
    trainer = laid_out(root, layout, callbacks={"ema": EMA(0.9)}, n_epochs=1)
    trainer.fit()
    trainer.save_checkpoint(root / f"by-{layout.name}")
    return flat(trainer.state_dict()["callbacks"]["ema"])


def read(root: Path, writer: str, layout: Layout) -> tuple[dict[str, Any], list[bool], bool]:
    in_double()
    ema = EMA(0.9)
    trainer = laid_out(root, layout, callbacks={"ema": ema}, n_epochs=2, samples_per_batch=6)
    trainer.load_checkpoint(root / f"by-{writer}")
    state = flat(trainer.state_dict()["callbacks"]["ema"])
    sharded = [isinstance(one, DTensor) for one in ema.average().values()]
    trainer.fit()  # goes on averaging
    return state, sharded, flat(ema.average()) != state


READERS = {
    "fsdp": (LAYOUTS["single"], LAYOUTS["ddp"], THREE, LAYOUTS["fsdp-tp"]),
    "single": (LAYOUTS["fsdp"], THREE),
    "ddp": (LAYOUTS["fsdp"],),
    "tp": (LAYOUTS["single"], LAYOUTS["fsdp"]),
}


@pytest.mark.parametrize("writer", READERS)
def test_any_layout_goes_on_with_the_averages_of_another(writer: str, tmp_path: Path) -> None:
    layout = LAYOUTS[writer]
    written = run_ranks(layout.size, write, tmp_path, layout)
    assert len({str(sorted(one.items())) for one in written}) == 1
    for reader in READERS[writer]:
        for state, sharded, goes_on in run_ranks(reader.size, read, tmp_path, writer, reader):
            assert differences(state, written[0]) == []
            assert any(sharded) == (reader.name not in ("single", "ddp"))
            assert goes_on


class Normed(BlocksTrainer):
    """With batch norm, whose statistics are those of a rank's own samples."""

    def configure_models(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)
        )


def resumed_and_straight(root: Path, name: str, kind: type[TinyTrainer]) -> list[str]:
    in_double()

    def run(experiment: str, **options: Any) -> Any:
        callbacks = {
            "ema": EMA(0.9, average_buffers=True),
            "swa": SWA(start_epoch=1, every=2, evaluate_with="model"),
        }
        trainer = laid_out(
            root,
            name,
            kind,
            enable=True,
            experiment=experiment,
            callbacks=callbacks,
            num_val_samples=8,
            **{"n_epochs": 3} | options,
        )
        trainer.fit()
        return trainer

    straight = run("straight")
    run("resumed", max_steps=9, n_epochs=3)
    resumed = run("resumed")
    found = differences(exact_state(resumed), exact_state(straight))
    logs = [(one.run_directory / "metrics.jsonl").read_text() for one in (straight, resumed)]
    measured = [one.callbacks["swa"].average() for one in (straight, resumed)]
    assert flat(measured[0]) == flat(measured[1])
    assert ("net.1.running_mean" in measured[0]) == (kind is Normed)
    # A rank's own averaged buffers are not saved, and never used: rank 0's count.
    found = [path for path in found if not path.startswith("/callbacks/ema/models/net/1.running")]
    return [*found, *(["log"] if logs[0] != logs[1] else [])]


@pytest.mark.parametrize(
    ("name", "kind"), [("ddp", Normed), ("fsdp", Normed), ("fsdp", BlocksTrainer)]
)
def test_averages_resume_exactly_on_ranks(
    name: str, kind: type[BlocksTrainer], tmp_path: Path
) -> None:
    for found in run_ranks(2, resumed_and_straight, tmp_path, name, kind):
        assert found == []


class Half(TinyTrainer):
    def configure_models(self) -> None:
        self.net = nn.Linear(3, 4).bfloat16()

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch["x"].bfloat16()).float() - batch["y"].float()).square().mean()


def half() -> tuple[bool, bool, list[str]]:
    ema, values = EMA(0.75), []

    class Watch(Callback):
        def pre_fit(self, trainer: Any) -> None:
            values.append(weights_now(trainer)["net.weight"].float())

        def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
            values.append(weights_now(trainer)["net.weight"].float())

    sizes = {"devices": 2, "dp_replicate": 1, "dp_shard": 2}
    trainer = tiny("unused", Half, enable=False, callbacks={"ema": ema, "w": Watch()}, **sizes)
    trainer.fit()
    expected = values[0]
    for value in values[1:]:
        expected = torch.lerp(expected, value, 0.25)
    average = ema.average()["net.weight"]
    own = trainer.components.models["net"].weight
    return torch.equal(whole(average), expected), isinstance(average, DTensor), [str(own.dtype)]


def test_sharded_half_precision_has_a_float32_average() -> None:
    assert run_ranks(2, half) == [(True, True, ["torch.bfloat16"])] * 2
