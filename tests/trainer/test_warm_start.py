"""`init_from`: a fresh run starts from the weights of a file, or changes nothing and says why."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from support import TinyTrainer, flat, mlp, tiny, weights
from torch import Tensor, nn

from dream_trainer.callbacks import Callback
from dream_trainer.errors import CheckpointError, ConfigError, StateError

safetensors_torch = pytest.importorskip("safetensors.torch")

# Runs seed the global streams.
pytestmark = pytest.mark.may_leave("rng")


def source() -> nn.Sequential:
    """The network of `TinyTrainer`, with weights that no seed gives it."""
    torch.manual_seed(99)
    return mlp()


class SeeWeights(Callback):
    weights: dict[str, Any]

    def pre_fit(self, trainer: Any) -> None:
        self.weights = weights(trainer)


def started(
    root: Path, init_from: Path, kind: type[TinyTrainer] = TinyTrainer, **options: Any
) -> Any:
    """A trainer as it is before its first step."""
    seen = SeeWeights()
    trainer = tiny(
        root,
        kind,
        max_steps=1,
        experiment="started",
        has_validation=False,
        init_from=str(init_from),
        callbacks={"seen": seen},
        **options,
    )
    trainer.fit()
    trainer.weights_at_start = seen.weights
    return trainer


def expected(model: nn.Module, name: str = "net") -> dict[str, Any]:
    return flat({name: dict(model.state_dict())})


def torch_state_dict(path: Path) -> Path:
    torch.save(source().state_dict(), path / "weights.pth")
    return path / "weights.pth"


def torch_state_dict_of_old_torch(path: Path) -> Path:
    torch.save(source().state_dict(), path / "old.pt", _use_new_zipfile_serialization=False)
    return path / "old.pt"


def fabric_file(path: Path) -> Path:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = source()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for own, wanted in zip(model.parameters(), source().parameters(), strict=True):
            own.copy_(wanted)
    state = {"model": model, "optimizer": optimizer, "step": 7, "rng": torch.get_rng_state()}
    fabric.save(path / "fabric.ckpt", state)
    return path / "fabric.ckpt"


def nested_file(path: Path) -> Path:
    torch.save({"a": {"b": [{"net": source().state_dict()}]}, "c": 1}, path / "nested.pt")
    return path / "nested.pt"


def lightning_file(path: Path) -> Path:
    state = {f"net.{name}": value for name, value in source().state_dict().items()}
    content = {
        "epoch": 1,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": state,
        "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(8, 3)}}, "param_groups": [{}]}],
    }
    torch.save(content, path / "epoch=1.ckpt")
    return path / "epoch=1.ckpt"


def safetensors_file(path: Path) -> Path:
    safetensors_torch.save_file(source().state_dict(), path / "model.safetensors")
    return path / "model.safetensors"


def hugging_face_folder(path: Path) -> Path:
    return safetensors_file(path).parent


def hugging_face_shards(path: Path) -> Path:
    folder = path / "hub"
    folder.mkdir()
    shard_of = {}
    for number, name in enumerate(source().state_dict()):
        shard_of[name] = f"model-{number // 2 + 1:05d}-of-00002.safetensors"
    for shard in sorted(set(shard_of.values())):
        own = {n: v for n, v in source().state_dict().items() if shard_of[n] == shard}
        safetensors_torch.save_file(own, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def finished_run(path: Path) -> tuple[Path, TinyTrainer]:
    trainer = tiny(path, experiment="source", keep_last=3)
    trainer.fit()
    return path / "default" / "default" / "source", trainer


FORMS: list[Callable[[Path], Path]] = [
    torch_state_dict,
    torch_state_dict_of_old_torch,
    fabric_file,
    nested_file,
    lightning_file,
    safetensors_file,
    hugging_face_folder,
    hugging_face_shards,
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_is_what_the_run_starts_from(
    tmp_path: Path, form: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = form(tmp_path)
    capsys.readouterr()
    trainer = started(tmp_path / "runs", path)
    assert trainer.weights_at_start == expected(source())
    assert f"weights from {path}: 4 of 4" in capsys.readouterr().out
    assert trainer.global_step == 1


@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/step-*12*"])
def test_a_run_a_folder_and_a_checkpoint_of_ours_give_their_weights_alone(
    tmp_path: Path, place: str
) -> None:
    run, done = finished_run(tmp_path)
    (path,) = run.glob(place) if "*" in place else [run / place]
    trainer = started(tmp_path, path)
    assert trainer.weights_at_start == weights(done)
    assert trainer.global_step == 1
    assert not list(run.glob("checkpoints/*damaged*"))


def test_of_a_run_the_newest_whole_checkpoint_is_taken_and_nothing_is_renamed(
    tmp_path: Path,
) -> None:
    run, _ = finished_run(tmp_path)
    before = sorted(run.rglob("*"))
    older, newest = sorted(run.glob("checkpoints/step-*"))
    (newest / "__0_0.distcp").write_bytes(b"")
    with pytest.warns(UserWarning, match=f"0 bytes.*\n?.*Taking {older.name}"):
        started(tmp_path, run)
    assert sorted(run.rglob("*")) == before
    (older / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="None of its checkpoints is whole") as caught:
        started(tmp_path / "again", run)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [newest.name, older.name]


def test_a_run_that_has_checkpoints_resumes_and_does_not_look_at_the_file(tmp_path: Path) -> None:
    _, done = finished_run(tmp_path)
    again = tiny(tmp_path, experiment="source", n_epochs=2, init_from="/gone")
    again.fit()
    assert weights(again) == weights(done)


class Renamed(TinyTrainer):
    """`TinyTrainer` with its two linear layers under names."""

    def configure_models(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder, self.head = nn.Linear(3, 8), nn.Linear(8, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.encoder(x).tanh())

        self.net = Net()


def test_names_are_mapped(tmp_path: Path) -> None:
    trainer = started(
        tmp_path, torch_state_dict(tmp_path), Renamed, init_rename={"0": "encoder", "3": "head"}
    )
    assert list(trainer.weights_at_start.values()) == list(expected(source()).values())


def test_a_mapping_that_matches_nothing_stops_the_run_and_lists_the_names(tmp_path: Path) -> None:
    path = torch_state_dict(tmp_path)
    with pytest.raises(ConfigError) as caught:
        started(tmp_path, path, Renamed, init_rename={"0": "encoder", "5": "head"})
    assert caught.value.problems == (f"'5' begins no name in {path}",)
    assert caught.value.next_move == "The names there: 0.weight, 0.bias, 3.weight, 3.bias."


def test_strict_lists_everything_that_does_not_fit_and_loads_nothing(tmp_path: Path) -> None:
    state = source().state_dict()
    state["4.weight"] = state.pop("3.weight")
    state["0.bias"] = torch.zeros(9)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(StateError) as caught:
        started(tmp_path, tmp_path / "odd.pt")
    assert caught.value.place == str(tmp_path / "odd.pt")
    assert caught.value.problems == (
        "4.weight: in the file, not in a model",
        "models.net.3.weight: missing in the state",
        "models.net.0.bias: shape (9,) in the state, shape (8,) in the model",
    )
    assert "Nothing was loaded" in caught.value.next_move
    assert not list(tmp_path.rglob("step-*"))


def test_without_strict_what_fits_is_loaded_and_the_rest_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = source().state_dict()
    state["3.weight"] = torch.zeros(5, 8)
    del state["3.bias"]
    torch.save(state, tmp_path / "other_head.pt")
    with pytest.warns(UserWarning, match="not loaded from") as caught:
        trainer = started(tmp_path, tmp_path / "other_head.pt", init_strict=False)
    text = str(caught[0].message)
    assert "3.weight: shape (5, 8) in the state, shape (1, 8) in the model" in text
    assert "3.bias: missing" in text
    assert "weights from" in (out := capsys.readouterr().out)
    assert ": 2 of 4" in out
    own, wanted = trainer.weights_at_start, expected(source())
    assert {name for name in own if own[name] == wanted[name]} == {"/net/0.weight", "/net/0.bias"}
    assert own["/net/3.bias"][1] == (1,)


def test_without_strict_it_is_still_an_error_if_nothing_fits(tmp_path: Path) -> None:
    torch.save({"another.weight": torch.zeros(2)}, tmp_path / "another.pt")
    with pytest.raises(StateError, match=r"another\.weight: in the file"):
        started(tmp_path, tmp_path / "another.pt", init_strict=False)


class Tied(TinyTrainer):
    def configure_models(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(3, 3, bias=False)
                self.second = nn.Linear(3, 3, bias=False)
                self.second.weight = self.first.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.second(self.first(x)).sum(1, keepdim=True)

        self.net = Net()


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_of_a_tied_weight_one_name_is_enough(tmp_path: Path, name: str) -> None:
    value = torch.arange(9.0).view(3, 3)
    safetensors_torch.save_file({name: value}, tmp_path / "tied.safetensors")
    trainer = started(tmp_path, tmp_path / "tied.safetensors", Tied)
    wanted = flat({"net": {"first.weight": value, "second.weight": value}})
    assert trainer.weights_at_start == wanted


class WithExtraState(TinyTrainer):
    def configure_models(self) -> None:
        class Net(nn.Linear):
            extra: Any = None

            def get_extra_state(self) -> Any:
                return self.extra

            def set_extra_state(self, state: Any) -> None:
                self.extra = state

        self.net = Net(3, 1)


@pytest.mark.parametrize("is_file", [False, True])
def test_extra_state_of_a_module_comes_along(tmp_path: Path, is_file: bool) -> None:
    trainer = tiny(tmp_path, WithExtraState, experiment="source", max_steps=1)
    trainer.fit()
    net = trainer.components.models["net"]
    net.extra = {"scale": 3.0, "amax": torch.tensor(2.0)}
    place = tmp_path / "saved"
    if is_file:
        torch.save(net.state_dict(), place)
    else:
        trainer.save_checkpoint(place)
    started_net = started(tmp_path, place, WithExtraState).components.models["net"]
    assert flat(started_net.extra) == flat(net.extra)


def test_weights_in_fewer_digits_are_converted(tmp_path: Path) -> None:
    torch.save(source().bfloat16().state_dict(), tmp_path / "half.pt")
    trainer = started(tmp_path, tmp_path / "half.pt")
    assert trainer.weights_at_start == expected(source().bfloat16().float())


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_would_have_to_be_unpickled_is_refused_and_does_not_run(
    tmp_path: Path, is_zip: bool
) -> None:
    ran, path = tmp_path / "ran", tmp_path / "model.pt"
    content = {"model": source().state_dict(), "hyper_parameters": Payload(ran)}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match="a pickle can run code") as caught:
        started(tmp_path, path)
    assert "weights_only=False" not in str(caught.value)
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists(), "the payload would have run"


def test_a_whole_pickled_model_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(source(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.container\.Sequential"):
        started(tmp_path, tmp_path / "model.pt")


def test_what_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.pt").write_bytes(pickle.dumps([1, 2], protocol=2))
    cut = torch_state_dict(tmp_path)
    cut.write_bytes(cut.read_bytes()[:700])
    messages = {
        tmp_path / "gone.pt": "no such file",
        folder: "neither a manifest.json nor checkpoints",
        tmp_path / "junk.safetensors": "junk.safetensors",
        tmp_path / "junk.pt": "junk.pt",
        cut: cut.name,
    }
    for path, message in messages.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            started(tmp_path / "runs", path)
        assert str(path) in str(caught.value)


def test_every_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = hugging_face_shards(tmp_path)
    shards = sorted(folder.glob("*-of-*"))
    for shard in shards:
        shard.unlink()
    with pytest.raises(CheckpointError) as caught:
        started(tmp_path, folder)
    assert caught.value.problems == tuple(f"{shard.name} is missing" for shard in shards)


def test_a_file_without_weights_is_a_state_error(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(StateError, match=r"models\.net\.0\.weight: missing"):
        started(tmp_path, tmp_path / "empty.pt")


def test_without_the_package_the_error_names_the_command_that_installs_it(tmp_path: Path) -> None:
    path = safetensors_file(tmp_path)
    code = (
        "import sys\nsys.modules['safetensors'] = sys.modules['safetensors.torch'] = None\n"
        "from pathlib import Path\nfrom dream_trainer.checkpointing.weights import open_weights\n"
        f"open_weights(Path({str(path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("\npip install 'dream-trainer[safetensors]'\n")


def test_nothing_is_said_when_everything_fits(tmp_path: Path) -> None:
    path = safetensors_file(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started(tmp_path / "runs", path)
