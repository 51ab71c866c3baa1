"""A checkpoint as one file: what is in it, who can read it, and what is refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, differences, flat, mlp, tiny
from torch import nn

from dream_trainer.checkpointing import Checkpointer, export_checkpoint
from dream_trainer.cli import main
from dream_trainer.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.may_leave("rng")

OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}


class TwoModels(TinyTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.critic = nn.Linear(2, 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([*self.net.parameters(), *self.critic.parameters()])

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return super().compute_loss(batch, batch_idx) + self.critic.weight.square().sum()


class Still(TwoModels):
    """Ends with the weights that it started from."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.net.parameters(), *self.critic.parameters()], lr=0.0)


def finished(root: Path, kind: type[TinyTrainer] = TinyTrainer) -> tuple[Path, Any]:
    trainer = tiny(root, kind, max_steps=2, experiment="done")
    trainer.fit()
    return root / "default" / "default" / "done", trainer


def saved(root: Path, state: dict[str, Any], step: int = 7) -> Path:
    path = root / "checkpoints" / f"step-{step:08d}"
    Checkpointer(root / "checkpoints").write(path, state, step=step)
    return path


def read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return pytest.importorskip("safetensors.torch").load_file(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt", "deep/net.pth"])
@pytest.mark.parametrize(
    "place", ["", "checkpoints", "checkpoints/step-00000002", "checkpoints/newest"]
)
def test_the_file_of_one_model_is_its_state_dict(tmp_path: Path, name: str, place: str) -> None:
    run, trainer = finished(tmp_path)
    path = export_checkpoint(run / place, str(tmp_path / name))
    assert path == tmp_path / name
    net = mlp()
    net.load_state_dict(read(path))
    wanted = trainer.components.models["net"].state_dict()
    assert differences(flat(net.state_dict()), flat(wanted)) == []
    assert [one.name for one in path.parent.iterdir() if one.is_file()] == [path.name]


def test_a_safetensors_file_says_where_it_is_from(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    run, _ = finished(tmp_path)
    with safetensors.safe_open(export_checkpoint(run, tmp_path / "a.safetensors"), "pt") as file:
        facts = file.metadata()
    assert (facts["format"], facts["step"], facts["epoch"]) == ("pt", "2", "0")
    assert facts["models"] == "net"
    assert facts["torch"] == torch.__version__
    assert {"lightning", "dream-trainer", "saved_at"} <= facts.keys()


def test_several_models_are_kept_apart_and_one_can_be_chosen(tmp_path: Path) -> None:
    run, trainer = finished(tmp_path, TwoModels)
    wanted = {name: one.state_dict() for name, one in trainer.components.models.items()}
    both = read(export_checkpoint(run, tmp_path / "both.pt"))
    assert flat(both) == flat(wanted)
    dotted = read(export_checkpoint(run, tmp_path / "both.safetensors"))
    assert flat(dotted) == flat(
        {f"{m}.{n}": v for m, own in wanted.items() for n, v in own.items()}
    )
    for name in ("critic.pt", "critic.safetensors"):
        critic = read(export_checkpoint(run, tmp_path / name, model="critic"))
        assert flat(critic) == flat(wanted["critic"])
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(run, tmp_path / "c.pt", model="discriminator")
    assert caught.value.problems == ("it has no model 'discriminator'",)
    assert caught.value.next_move == "There is: net, critic."


@pytest.mark.parametrize("name", ["both.pt", "both.safetensors"])
def test_what_was_exported_can_be_started_from(tmp_path: Path, name: str) -> None:
    run, trainer = finished(tmp_path, TwoModels)
    path = export_checkpoint(run, tmp_path / name)
    new = tiny(tmp_path, Still, experiment="new", max_steps=1, init_from=str(path))
    new.fit()
    assert flat(new.state_dict()["models"]) == flat(trainer.state_dict()["models"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_kind_of_tensor_comes_out_as_it_went_in(tmp_path: Path, suffix: str) -> None:
    tied = torch.randn(3, 3)
    weights = {
        "half": torch.randn(4, 2, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "flags": torch.tensor([True, False]),
        "double": torch.randn(2, dtype=torch.float64),
        "transposed": torch.randn(2, 3).t(),
        "tied.first": tied,
        "tied.second": tied,
        "part": tied[1],
    }
    checkpoint = saved(tmp_path, {"models": {"net": weights}, "optimizers": {}, "schedulers": {}})
    found = read(export_checkpoint(checkpoint, tmp_path / f"out{suffix}"))
    assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
        name: (one.dtype, one.shape) for name, one in weights.items()
    }
    for name, value in weights.items():
        assert found[name].equal(value), name


def test_a_checkpoint_of_a_loop_of_ones_own_is_exported_without_its_optimizer(
    tmp_path: Path,
) -> None:
    state = {"net": mlp().state_dict(), "optimizer": OPTIMIZER, "best": torch.tensor(0.5)}
    found = read(export_checkpoint(saved(tmp_path, state), tmp_path / "net.pt"))
    assert flat(found) == flat(dict(state["net"]))


def test_extra_state_that_is_no_tensor_is_in_a_pt_and_reported_for_safetensors(
    tmp_path: Path,
) -> None:
    weights = {"w": torch.ones(2), "_extra_state": {"scale": 2.0, "amax": torch.ones(1)}}
    checkpoint = saved(tmp_path, {"net": weights})
    assert flat(read(export_checkpoint(checkpoint, tmp_path / "a.pt"))) == flat(weights)
    with pytest.warns(UserWarning, match="these are none: _extra_state"):
        path = export_checkpoint(checkpoint, tmp_path / "a.safetensors")
    assert list(read(path)) == ["w"]


def test_the_whole_state_is_what_the_run_would_resume_from(tmp_path: Path) -> None:
    run, trainer = finished(tmp_path)
    found = read(export_checkpoint(run, tmp_path / "all.pt", whole_state=True))
    wanted = trainer.checkpointer.load(run / "checkpoints" / "step-00000002").state
    assert flat(found) == flat(wanted)
    assert {"models", "optimizers", "rng", "dataloaders"} <= found.keys()


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    run, _ = finished(tmp_path)
    path = tmp_path / "net.pt"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is there already"):
        export_checkpoint(run, path)
    assert path.read_text() == "precious"
    export_checkpoint(run, path, overwrite=True)
    assert list(read(path)) == list(mlp().state_dict())
    first = path.read_bytes()
    assert export_checkpoint(run, path, overwrite=True).read_bytes() == first
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(ConfigError):
        export_checkpoint(run, tmp_path / "folder.pt", overwrite=True)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_export_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = finished(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / f"net{suffix}"
    path.write_text("old")

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dream_trainer.storage.atomic.fsync_file", full)
    with pytest.raises(ConfigError, match=r"cannot be written.*No space left"):
        export_checkpoint(run, path, overwrite=True)
    assert [one.read_text() for one in folder.iterdir()] == ["old"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_others_can_read_the_file_as_the_umask_says(tmp_path: Path, suffix: str) -> None:
    run, _ = finished(tmp_path)
    before = os.umask(0o027)
    try:
        path = export_checkpoint(run, tmp_path / f"net{suffix}")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_damaged_checkpoint_is_not_exported_and_a_run_falls_back(tmp_path: Path) -> None:
    state = {"net": mlp().state_dict()}
    saved(tmp_path, state)
    newest = saved(tmp_path, state, step=8)
    data = next(newest.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        export_checkpoint(newest, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="Taking step-00000007 instead"):
        export_checkpoint(tmp_path, tmp_path / "a.pt")
    assert newest.is_dir()


def test_arguments_that_do_not_fit_are_all_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        export_checkpoint("/gone", tmp_path / "a.safetensors", model="net", whole_state=True)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["whole_state"] * 2
    with pytest.raises(
        ConfigError, match=r"ends in '\.onnx', not in \.safetensors, \.pt, \.pth or \.ckpt"
    ):
        export_checkpoint("/gone", tmp_path / "a.onnx")
    with pytest.raises(CheckpointError, match="there is no such directory"):
        export_checkpoint("/gone", tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="it holds no weights"):
        export_checkpoint(saved(tmp_path, {"step": 3}), tmp_path / "a.pt")
    assert not list(tmp_path.glob("a.*"))


# ---------------------------------------------------------------------- dream-trainer export


def test_the_command_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = finished(tmp_path, TwoModels)
    capsys.readouterr()
    path = tmp_path / "critic.pt"
    main(["export", str(run), str(path), "--model", "critic"])
    assert capsys.readouterr().out == f"{path}: {path.stat().st_size} bytes\n"
    assert list(read(path)) == ["weight", "bias"]
    main(["export", str(run), str(path), "--whole_state", "--overwrite"])
    assert "optimizers" in read(path)


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ([], 2, "CHECKPOINT"),
        (["gone", "a.pt"], 1, "dream-trainer: error: gone: there is no such directory"),
        (["gone", "a.zip"], 2, "dream-trainer: error: a.zip: ends in '.zip'"),
        (["gone", "a.pt", "--mod", "net"], 2, "--mod"),
    ],
)
def test_the_command_refuses_in_a_line(
    args: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", *args])
    assert end.value.code == status
    assert message in capsys.readouterr().err


def test_help_names_the_command_without_loading_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom dream_trainer.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for args in (["--help"], ["export", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        assert "write the weights of a checkpoint to one file" in done.stdout


WITHOUT_US = """
import sys
import torch
from lightning.fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=1)
net = fabric.setup(torch.nn.Sequential(
    torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Dropout(0), torch.nn.Linear(8, 1)
))
net.load_state_dict(fabric.load("net.pt"))  # strict
fabric.load_raw("net.pt", net)
state = fabric.load("state.pt")
assert state["trainer"]["progress"]["num_steps"] == 12
for name, value in net.state_dict().items():
    assert torch.equal(value, state["models"]["net"][name]), name
assert not any(name.startswith("dream_trainer") for name in sys.modules)
print("read")
"""


def test_a_script_without_this_package_reads_it_with_fabric_load(tmp_path: Path) -> None:
    trainer = tiny(tmp_path)
    trainer.fit()
    export_checkpoint(trainer.run_directory, tmp_path / "net.pt")
    export_checkpoint(trainer.run_directory, tmp_path / "state.pt", whole_state=True)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr
