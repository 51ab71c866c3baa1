"""An exported program computes what the model does, to the bit, on batches of any size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, BlocksTrainer, laid_out
from support import Points, TinyTrainer, differences, exact_state, run_ranks, tiny, weights
from torch import Tensor, nn

from dream_trainer.errors import ConfigError

pytestmark = [
    pytest.mark.may_leave("rng"),
    # torch.export's own
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

MONITORED = {"monitor": "val/loss", "mode": "max", "n_epochs": 3}


class Exports(TinyTrainer):
    def configure_models(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(self.config.dropout), nn.Linear(8, 1)
        )

    def export_example(self, batch: Any) -> Any:
        return batch["x"]


def program(path: Path) -> Any:
    return torch.export.load(path).module()


def points(number: int) -> Tensor:
    return Points(number, seed=9).x.float()


@pytest.mark.parametrize("checkpoint", [None, "best", "last"])
def test_a_program_is_its_model_on_the_weights_that_were_asked_for(
    tmp_path: Path, checkpoint: str | None
) -> None:
    trainer = tiny(tmp_path, Exports, dropout=0.3, **MONITORED)
    trainer.fit()
    own = exact_state(trainer)
    path = trainer.export(tmp_path / "out/net.pt2", checkpoint=checkpoint)
    assert path == tmp_path / "out/net.pt2"
    assert differences(own, exact_state(trainer)) == []
    store = trainer.checkpointer.store
    stored = store.best("max", "val/loss") if checkpoint == "best" else store.newest()
    other = tiny(tmp_path, Exports, experiment="other", resume=str(stored.path), enable=False)
    other.validate()
    model = other.named_models()["net"].eval()
    for number in (1, 4, 7):
        with torch.no_grad():
            assert torch.equal(program(path)(points(number)), model(points(number)))
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["net.pt2"]


def test_a_fresh_trainer_exports_what_fit_would_continue_from(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, Exports, n_epochs=1)
    trainer.fit()
    again = tiny(tmp_path, Exports, n_epochs=1)
    path = again.export(tmp_path / "net.pt2")
    live = trainer.named_models()["net"].eval()
    with torch.no_grad():
        assert torch.equal(program(path)(points(5)), live(points(5)))
    again.export(tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt")
    assert differences(weights(trainer), {f"/net/{k}": v for k, v in flat_values(loaded)}) == []


def flat_values(state: Any) -> Any:
    from support import flat

    return [(key[1:], value) for key, value in flat(state).items()]


class Two(TinyTrainer):
    """Two models; one is called with names, and with something that is no row a sample."""

    def configure_models(self) -> None:
        super().configure_models()
        self.gate = Gate()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.net.parameters(), *self.gate.parameters()], lr=0.1)

    def export_example(self, batch: Any) -> Any:
        return {"x": batch["x"], "scale": torch.tensor([2.0]), "both": (batch["y"], batch["index"])}


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, scale: Tensor, both: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"made": x * self.weight * scale, "sum": both[0] + both[1].unsqueeze(1)}


def test_one_of_several_models_with_arguments_by_name(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, Two, n_epochs=1, enable=False)
    with pytest.raises(ConfigError, match="there are several models"):
        trainer.export(tmp_path / "gate.pt2")
    with pytest.raises(ConfigError, match=r"no model 'gat'.*\n.*net, gate"):
        trainer.export(tmp_path / "gate.pt2", model="gat")
    made = program(trainer.export(tmp_path / "gate.pt2", model="gate"))
    data = Points(5, seed=3)
    inputs = {"x": data.x.float(), "scale": torch.tensor([0.5]), "both": (data.y, torch.arange(5))}
    results = made(**inputs)
    assert torch.equal(results["made"], data.x.float() / 2)
    assert torch.equal(results["sum"], data.y + torch.arange(5).unsqueeze(1))
    trainer.export(tmp_path / "both.pt")
    assert torch.load(tmp_path / "both.pt").keys() == {"net", "gate"}
    trainer.export(tmp_path / "gate.safetensors", model="gate")
    from safetensors.torch import load_file

    assert load_file(tmp_path / "gate.safetensors").keys() == {"weight"}


class Decides(Exports):
    def configure_models(self) -> None:
        self.net = nn.Sequential(Branch(), nn.Linear(3, 1))


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: math.floor(len(x) / 4) * 4].reshape(4, -1)


class Draws(Exports):
    def configure_models(self) -> None:
        self.net = nn.Sequential(nn.Linear(3, 1), Noise())


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_what_cannot_be_exported_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    def refused(kind: type[TinyTrainer], match: str, name: str = "net.pt2", **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            tiny(tmp_path, kind, enable=False).export(tmp_path / name, **options)

    (tmp_path / "there.pt2").write_text("mine")
    refused(TinyTrainer, r"export_example does not say.*\n.*return batch\[0\]")
    refused(Exports, "is there already", "there.pt2")
    refused(Exports, r"ends in '.ckpt', not in .pt2.*export_checkpoint writes .ckpt", "net.ckpt")
    refused(Exports, "the example has 1 samples", example=torch.ones(1, 3))
    refused(Exports, "the example has 0 samples", example=3.0)
    refused(Decides, r"torch.export cannot follow the model(.|\n)*must not depend on values")
    refused(Draws, r"computes something else than the model: by up to 0\.\d")
    assert (tmp_path / "there.pt2").read_text() == "mine"
    assert [one.name for one in tmp_path.iterdir()] == ["there.pt2"]
    tiny(tmp_path, Exports, enable=False).export(tmp_path / "there.pt2", overwrite=True)
    assert program(tmp_path / "there.pt2")(points(2)).shape == (2, 1)


def test_without_a_validation_loader_an_example_is_asked_for(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, Exports, enable=False, has_validation=False)
    with pytest.raises(ConfigError, match=r"no validation loader to take an example from"):
        trainer.export(tmp_path / "net.pt2")
    trainer.export(tmp_path / "net.pt2", example=points(2))


# ---------------------------------------------------------------------- on ranks


class ExportsBlocks(BlocksTrainer):
    def export_example(self, batch: Any) -> Any:
        return batch["x"]


def _on_ranks(root: Path, layout: str) -> dict[str, Any]:
    trainer = laid_out(root, layout, ExportsBlocks, enable=True, n_epochs=1, num_val_samples=8)
    trainer.fit()
    own = exact_state(trainer)
    trainer.export(root / f"{layout}.pt2")
    trainer.export(root / f"{layout}.pt")
    assert differences(own, exact_state(trainer)) == []
    return own


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp"])
def test_sharded_weights_are_gathered(tmp_path: Path, layout: str) -> None:
    run_ranks(2, _on_ranks, tmp_path, layout)
    model = _model_of(tmp_path, layout)
    made = program(tmp_path / f"{layout}.pt2")(points(6))
    with torch.no_grad():
        assert torch.equal(made, model(points(6)))
    saved = torch.load(tmp_path / f"{layout}.pt")
    assert differences(flat_of(saved), flat_of(model.state_dict())) == []


def flat_of(state: Any) -> dict[str, Any]:
    from support import flat

    return flat(dict(state))


def _model_of(root: Path, layout: str) -> nn.Module:
    (path,) = (root / "default/default" / LAYOUTS[layout].name / "checkpoints").glob("step-*")
    trainer = laid_out(root, "single", ExportsBlocks, resume=str(path))
    trainer.validate()
    model: nn.Module = trainer.named_models()["net"]
    return model.eval()
