"""What the driver is for: it sees a run that does not resume exactly, or not at all."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import driver
import pytest
from driver import End, Job
from killable_run import Run


class WithoutStreams(Run):
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        state = {key: value for key, value in state_dict.items() if key != "rng"}
        with pytest.warns(UserWarning, match="rng"):
            super().load_state_dict(state, strict=False)


class WithoutMomentum(Run):
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        super().load_state_dict(state_dict, strict)
        (optimizer,) = self.named_optimizers().values()
        optimizer.state.clear()


@pytest.mark.parametrize(
    ("kind", "lost"), [(WithoutStreams, "/rng/torch"), (WithoutMomentum, "exp_avg")]
)
def test_what_a_restart_forgets_is_seen(
    kind: type[Run], lost: str, tmp_path: Path, straight: Callable[..., End]
) -> None:
    job = Job(tmp_path, "forgets", "dropout", kind=kind)
    job.killed("step:3")
    found = job.finish().differences(straight("dropout"))
    assert any(lost in path for path in found)
    assert any("/models/" in path for path in found)
    assert "metrics.jsonl" in found[-1]


class Fresh(Run):
    """Starts from nothing each time: it ends like the others, but resumes nothing."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        pass


def test_a_run_that_starts_afresh_is_seen(tmp_path: Path) -> None:
    job = Job(tmp_path, "fresh", kind=Fresh)
    job.killed("step:4")
    with pytest.raises(AssertionError, match=r"started at step \[0\], its newest was [1-3]"):
        job.finish()


def test_a_rank_that_hangs_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "SECONDS", 1)
    with pytest.raises(AssertionError, match=r"ranks \[0\] hang") as caught:
        driver.Processes(signal.pause).wait()
    assert "in _child" in str(caught.value)  # where it hangs


def test_a_moment_that_is_never_reached_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="step:99 was not reached"):
        Job(tmp_path, "alive").killed("step:99")
