"""The averages of a run can be exported, and be what another run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, BlocksTrainer, laid_out
from support import TinyTrainer, flat, mlp, run_ranks, tiny
from torch import nn

from dream_trainer import EMA, SWA, export_checkpoint
from dream_trainer.cli import main
from dream_trainer.errors import ConfigError

pytestmark = pytest.mark.may_leave("rng")


class Two(TinyTrainer):
    """Two models of which one is averaged: it has a frozen layer, a tie and half precision."""

    def configure_models(self) -> None:
        self.net = mlp().bfloat16()
        self.net[0].requires_grad_(False)
        self.critic = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.critic[1].weight = self.critic[0].weight

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.net[3].parameters(), *self.critic.parameters()], 0.1)

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        guess = self.net(batch["x"].bfloat16()).float() + self.critic(batch["x"]).sum(1, True)
        return (guess - batch["y"]).square().mean()


def fitted(root: Path, kind: type[TinyTrainer], **callbacks: Any) -> Any:
    trainer = tiny(root, kind, experiment="done", callbacks=callbacks)
    trainer.fit()
    return trainer


def test_what_is_exported_is_the_average_where_there_is_one(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, Two, ema=EMA(0.9))
    run = trainer.run_directory
    own = torch.load(export_checkpoint(run, tmp_path / "own.pt"), weights_only=True)
    file = tmp_path / "ema.pt"
    main(["export", str(run), str(file), "--weights", "ema"])
    written = torch.load(file, weights_only=True)

    average = trainer.callbacks["ema"].average()
    assert torch.equal(written["net"]["3.weight"], average["net.3.weight"].bfloat16())
    assert torch.equal(written["critic"]["0.weight"], average["critic.0.weight"])
    assert torch.equal(written["critic"]["1.weight"], average["critic.0.weight"])
    assert torch.equal(written["net"]["0.weight"], own["net"]["0.weight"])
    assert not torch.equal(written["critic"]["0.weight"], own["critic"]["0.weight"])
    for name, state in own.items():
        trainer.components.models[name].load_state_dict(written[name])
        assert [(n, v.dtype) for n, v in state.items()] == [
            (n, v.dtype) for n, v in written[name].items()
        ]


def test_statistics_that_were_taken_for_the_average_are_exported_with_it(tmp_path: Path) -> None:
    class Normed(TinyTrainer):
        def configure_models(self) -> None:
            self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    trainer = fitted(tmp_path, Normed, swa=SWA(start_epoch=1))
    file = export_checkpoint(trainer.run_directory, tmp_path / "swa.pt", weights="swa")
    written = torch.load(file, weights_only=True)
    with trainer.callbacks["swa"].swapped(trainer):
        assert flat(written) == flat(trainer.components.models["net"].state_dict())


def test_averages_that_are_not_there_are_told(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, Two, ema=EMA(0.9, models=["critic"]))
    file, run = tmp_path / "file.pt", trainer.run_directory
    with pytest.raises(ConfigError, match="no averages named 'swa'") as error:
        export_checkpoint(run, file, weights="swa")
    assert "There is: ema" in str(error.value)
    with pytest.raises(ConfigError, match="ema has no averages of net"):
        export_checkpoint(run, file, model="net", weights="ema")
    with pytest.raises(ConfigError, match="leave out model and weights"):
        export_checkpoint(run, file, weights="ema", whole_state=True)
    options = {"experiment": "next", "init_from": str(run), "init_from_average": "swa"}
    with pytest.raises(ConfigError, match="no averages named 'swa'"):
        tiny(tmp_path, Two, **options).fit()
    with pytest.raises(ConfigError, match="init_from_average is set and init_from is not"):
        tiny(tmp_path, Two, init_from_average="ema")


class Still(BlocksTrainer):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.0)


def started(root: Path, layout: str, source: Path, rename: dict[str, Any]) -> dict[str, Any]:
    trainer = laid_out(
        root,
        layout,
        Still,
        init_from=str(source),
        init_from_average="ema",
        init_rename=rename,
        max_steps=1,
    )
    trainer.fit()
    return flat(trainer.state_dict()["models"]["net"])


@pytest.mark.distributed
def test_a_run_starts_from_averages_in_any_layout(tmp_path: Path) -> None:
    trainer = laid_out(
        tmp_path, "single", enable=True, experiment="done", callbacks={"ema": EMA(0.9)}
    )
    trainer.fit()
    run, average = trainer.run_directory, trainer.callbacks["ema"].average()
    expected = flat({name.removeprefix("net."): value for name, value in average.items()})
    assert started(tmp_path, "single", run, {}) == expected
    for layout in ("ddp", "fsdp"):
        ranks = run_ranks(LAYOUTS[layout].size, started, tmp_path, layout, run, {"net": "net"})
        assert ranks == [expected] * 2


def test_a_test_on_a_checkpoint_is_of_the_average_in_it(tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> Any:
        return tiny(tmp_path, experiment=name, every_n_steps=3, keep_last=9, n_epochs=1, **options)

    def averaged() -> dict[str, Any]:
        return {"callbacks": {"ema": EMA(decay=0.5)}}

    trainer = run("averaged", **averaged())
    trainer.fit()
    points = trainer.configure_dataloaders()[1]
    early, late = trainer.test(points, checkpoint="step-00000003"), trainer.test(points)
    assert early != late
    resumed = run("other", resume=str(trainer.checkpointer.store.paths()[0]), **averaged())
    assert resumed.test(points) == early
    without = run("plain")
    without.fit()
    added = run("plain", **averaged())
    added.fit()
    plain = added.test(points, checkpoint="step-00000003")  # knows no average
    assert plain == without.test(points, checkpoint="step-00000003")
    assert added.test(points) != plain
