"""What people type into a session runs on several ranks, and its result is there afterwards."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import train
from launched import Process, ends, run, run_forks, together, wait_until

from dream_trainer.configs import DeviceParameters
from dream_trainer.errors import ConfigError
from dream_trainer.world import DreamWorld, strategy

pytestmark = [pytest.mark.may_leave("rng"), pytest.mark.distributed]

SESSION = """
import pathlib
from dream_trainer import DreamTrainer
from train import Trainer, config
class Mine(Trainer):
    "Defined here: it can be forked, not sent."

def on_two(**devices):
    return config(pathlib.Path.cwd(), device_parameters=dict(devices=2, **devices))

settings = on_two()
trainer = Mine(settings)
trainer.fit()
print("ended", trainer.global_step, trainer.config.experiment, trainer.run_directory.is_dir())
results = trainer.validation_results
print("same results", abs(trainer.validate()["val/loss"] - results["val/loss"]) < 1e-6)
trainer.fit()
settings.experiment = trainer.config.experiment
settings.training_parameters.n_epochs = 3
again = Mine(settings)
again.fit()
print("again", again.global_step, again.is_resumed)
Mine(on_two(dp_replicate=1, dp_shard=2))
Mine(on_two(strategy="ddp_spawn"))
"""


def test_a_session_forks_its_ranks(tmp_path: Path) -> None:
    output = run([sys.executable, "-i"], tmp_path, typed=SESSION)
    here, rank_1 = ends(tmp_path)  # rank 0 wrote before this process did
    assert (here["strategy"], rank_1["strategy"]) == ("SingleDeviceStrategy", "DDPStrategy")
    assert (here["size"], rank_1["size"]) == (1, 2)
    assert here["digest"] == rank_1["digest"]
    name = here["experiment"]
    assert f"ended 8 {name} True" in output
    assert "same results True" in output
    assert "the ranks of this trainer have ended; what is here is what they left." in output
    assert "again 12 True" in output
    assert "a notebook forks its ranks, which works for DDP, not for a sharded model" in output
    assert "`Fabric(strategy='ddp_spawn')` is not compatible with an interactive" in output


SCRIPT = """
from pathlib import Path
from train import Trainer, config

if __name__ == "__main__":
    trainer = Trainer(config(Path.cwd(), device_parameters={"devices": 2, "strategy": "ddp_spawn"}))
    trainer.fit()
    print("ended", trainer.global_step)
"""


@pytest.mark.faults
def test_a_script_spawns_its_ranks(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    output = run([sys.executable, "script.py"], tmp_path)
    assert "ended 8" in output
    here, rank_1 = ends(tmp_path)
    assert (here["size"], rank_1["size"]) == (1, 2)
    assert here["digest"] == rank_1["digest"]


# ---------------------------------------------------------------------- in a process of its own


class Refusing(train.Trainer):
    def configure_models(self) -> None:
        raise ConfigError("configure_models", ["nothing fits"], "Change it.")


class Breaking(train.Trainer):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ZeroDivisionError("of rank", self.world.rank)


def forking(folder: Path, kind: type[train.Trainer]) -> train.Trainer:
    """As it is chosen in a session."""
    devices = {"devices": 2, "strategy": "ddp_fork"}
    return kind(train.config(folder, device_parameters=devices))


def fail(folder: Path) -> None:
    for kind in (Refusing, Breaking):
        try:
            forking(folder, kind).fit()
        except Exception as error:  # noqa: BLE001 - to look at it
            print(f"{type(error).__name__}: {error}")
    assert "MASTER_PORT" not in os.environ


def test_what_a_rank_raises_is_raised_in_the_session(tmp_path: Path) -> None:
    output = run_forks(fail, tmp_path, folder=tmp_path, ranks=[{}])
    assert "ConfigError: configure_models: nothing fits\nChange it." in output
    assert "ZeroDivisionError: ('of rank', " in output


class Endless(train.Trainer):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        result = super().training_step(batch, batch_idx)
        (Path(self.config.ends) / f"at-{self.world.rank}").write_text(str(self.global_step))
        return result


def interrupted(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = forking(folder, Endless)
    trainer.config.training_parameters.n_epochs = 100_000
    trainer.config.checkpoint_parameters.every_n_steps = None
    try:
        trainer.fit()
    except KeyboardInterrupt:
        print("interrupted", len(list(folder.glob("runs/*/*/*/checkpoints/step-*"))) > 0)


def test_an_interrupted_session_ends_its_ranks_which_save(tmp_path: Path) -> None:
    session = Process.fork(interrupted, tmp_path, folder=tmp_path)
    with together([session]):
        assert wait_until(lambda: (tmp_path / "at-1").exists()), session.output
        session.interrupt()
        assert session.wait() == 0, session.output
    assert "interrupted True" in session.output


def test_asking_or_launching_too_early_says_what_to_call() -> None:
    world = DreamWorld(DeviceParameters(accelerator="cpu", devices=2, strategy="ddp_fork"))
    assert world.starts_functions
    with pytest.raises(RuntimeError, match=r"Call trainer.fit\(\), or world.start\(function\)"):
        world.launch()


def test_predict_says_that_each_rank_has_a_part(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"predict returns a part .*\nPredict with devices=1"):
        forking(tmp_path, train.Trainer).predict([])


def test_what_does_not_pickle_is_not_spawned(tmp_path: Path) -> None:
    devices = {"devices": 2, "strategy": "ddp_spawn"}
    trainer = train.Trainer(train.config(tmp_path, device_parameters=devices))
    trainer.extra = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r'Keep what it holds in a module, or set strategy="ddp'):
        trainer.fit()


def test_a_session_takes_one_device_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "IS_INTERACTIVE", True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert strategy.local_processes(DeviceParameters()) == 1
    assert strategy.local_processes(DeviceParameters(devices=-1)) == 8
