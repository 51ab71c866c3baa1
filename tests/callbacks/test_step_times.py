"""StepTimes: where the time of a step goes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support import TinyTrainer, differences, exact_state, run_ranks, tiny

from dream_trainer import Callback, StepTimes
from dream_trainer.callbacks.phase_times import PHASES, PhaseClock, Spread, StepSpreads, as_table
from dream_trainer.coordination import Place
from dream_trainer.errors import ConfigError


class Ticks:
    """A clock that a test turns."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_seconds_count_to_the_phase_that_they_pass_in() -> None:
    ticks = Ticks()
    clock = PhaseClock(clock=ticks)

    def hook(seconds: float) -> None:
        ticks.now += seconds

    for phase, seconds in (("loader", 2), ("training_step", 3), ("restore", 5)):
        clock.enter(phase)
        ticks.now += seconds
    clock.enter("backward")
    clock.around("callbacks", hook)(7)
    ticks.now += 11
    taken = {phase: one for phase, one in clock.take().items() if one}
    assert taken == {"loader": 2, "training_step": 3, "other": 5, "callbacks": 7, "backward": 11}
    ticks.now += 1
    assert {phase: one for phase, one in clock.take().items() if one} == {"backward": 1}


def test_quantiles_are_right_to_a_hundredth() -> None:
    spread = Spread()
    values = [0.001 * 1.01**n for n in range(1000)]
    for value in values:
        spread.add(value)
    for share in (0.5, 0.95):
        exact = values[math.ceil(share * 1000) - 1]
        assert abs(spread.quantile(share) / exact - 1) < 0.0101


def test_a_place_tells_its_phases_only_while_it_is_observed() -> None:
    place, told = Place(), []
    place.enter("loader")
    place.observe(told.append)
    place.enter("save")
    place.enter_step(3, 1, 2)
    assert place.phase == "training_step"
    place.observe(None)
    place.enter("loader")
    assert told == ["save", "training_step"]
    assert place.phase == "loader"


class Slow(TinyTrainer):
    """Its clock goes on by a second in each phase that a test can reach."""

    ticks: Ticks

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.ticks.now += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.ticks.now += 10
        return super().validation_step(batch, batch_idx)


class SlowHook(Callback):
    def __init__(self, ticks: Ticks) -> None:
        self.ticks = ticks

    def pre_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        self.ticks.now += 100


def test_a_runs_phases_add_up_to_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = Ticks()
    monkeypatch.setattr(PhaseClock.__init__, "__defaults__", (None, ticks))
    times = StepTimes(skip=0)
    Slow.ticks = ticks
    trainer = tiny(tmp_path, Slow, callbacks={"slow": SlowHook(ticks), "times": times})
    trainer.fit()  # 12 steps in two epochs; three batches in a validation
    found = {one.phase: one for one in times.summary}
    assert {name: (one.mean, one.steps) for name, one in found.items()} == {
        "training_step": (1.0, 12),
        "callbacks": (100.0, 12),
        # The validation of the last epoch comes after the last step.
        "validation": (30 / 12, 1),
        "step": (101 + 30 / 12, 12),
    }
    said = capsys.readouterr().out
    assert "where the time of a step goes, over 12 steps on cpu" in said
    assert "training_step (forward, loss)" in said


def test_all_phases_of_a_run_are_told_and_the_run_is_the_same(tmp_path: Path) -> None:
    plain = tiny(tmp_path / "plain", dropout=0.3)
    plain.fit()
    times = StepTimes(skip=2)
    timed = tiny(tmp_path / "timed", callbacks={"times": times}, dropout=0.3)
    timed.fit()
    assert differences(exact_state(plain), exact_state(timed)) == []
    told = {one.phase for one in times.summary}
    assert {"loader", "training_step", "backward", "optimizer step", "callbacks"} <= told
    assert {"validation", "save", "step"} <= told
    whole = times.summary[-1]
    assert whole.phase == "step"
    assert math.isclose(sum(one.mean for one in times.summary[:-1]), whole.mean)
    assert whole.steps == 10
    # Nothing is left of it.
    assert "enter" not in vars(timed.place)
    assert timed.callbacks.on_boundary.__name__ != "counted"


class Moving(TinyTrainer):
    def batch_to_device(self, batch: Any) -> Any:
        return dict(batch)


def test_moving_a_batch_is_a_phase_of_its_own_where_batches_move(tmp_path: Path) -> None:
    times = StepTimes()
    trainer = tiny(tmp_path, Moving, callbacks={"times": times})
    trainer.fit()
    assert {one.phase: one.steps for one in times.summary}["to device"] == 11
    assert "batch_to_device" not in vars(trainer)


class Rows:
    """A logger."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, set[str]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if names := {name for name in metrics if name.startswith("time/")}:
            assert step is not None
            self.rows.append((step, names))

    def finalize(self, status: str) -> None:
        pass


def test_loggers_get_rows_and_the_exact_log_none(tmp_path: Path) -> None:
    rows = Rows()
    times = StepTimes(log_every_n_steps=4, skip=1, print_table=False)
    tiny(tmp_path, callbacks={"times": times}, loggers={"rows": rows}).fit()
    assert [step for step, _ in rows.rows] == [5, 9]
    expected = {f"time/{phase.replace(' ', '_')}" for phase in (*PHASES, "step")}
    assert all(names == expected for _, names in rows.rows)
    assert "time/" not in (tmp_path / "default/default/tiny/metrics.jsonl").read_text()


def test_a_run_that_fails_tells_what_it_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 5:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    trainer = tiny(tmp_path, Failing, callbacks={"times": StepTimes()})
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert "over 4 steps on cpu" in capsys.readouterr().out
    assert "enter" not in vars(trainer.place)


def test_two_of_them_both_see_every_phase(tmp_path: Path) -> None:
    # As where `profile` measures a trainer that has one of its own.
    both = {"times": StepTimes(print_table=False), "others": StepTimes(print_table=False)}
    trainer = tiny(tmp_path, callbacks=both)
    trainer.fit()
    one, other = ([phase.phase for phase in times.summary] for times in both.values())
    assert one == other
    assert {"loader", "training_step", "backward", "callbacks", "save"} <= set(one)
    assert "enter" not in vars(trainer.place)
    assert "batch_to_device" not in vars(trainer)


def test_a_run_without_a_timed_step_says_so() -> None:
    assert as_table(StepSpreads().summary(), "title") == "title: no step was timed"


def test_numbers_that_cannot_work_are_told_together() -> None:
    with pytest.raises(ConfigError, match=r"log_every_n_steps is 0.*\n.*skip is -1"):
        StepTimes(log_every_n_steps=0, skip=-1)


def timed(root: Path) -> tuple[list[str], list[Any]]:
    times = StepTimes(synchronize=True)
    tiny(root, callbacks={"times": times}, devices=2, dp_shard=2).fit()
    return [one.phase for one in times.summary], [one.slowest for one in times.summary]


@pytest.mark.distributed
def test_ranks_are_compared_at_the_end(tmp_path: Path) -> None:
    (phases, slowest), (_, other) = run_ranks(2, timed, tmp_path)
    assert phases[-1] == "step"
    assert slowest == other
    assert all(rank in (0, 1) and mean > 0 for rank, mean in slowest)
