from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch

from dream_trainer.checkpointing import Checkpointer
from dream_trainer.configs import CheckpointParameters
from dream_trainer.errors import CheckpointError, ConfigError


def state_at(step: int) -> dict:
    return {
        "trainer": {"step": step, "metrics": {"sum": torch.tensor(float(step))}},
        "models": {"net": {"w": torch.full((3,), float(step))}},
        "rng": {"torch": torch.arange(4, dtype=torch.uint8)},
        "dataloaders": {"train": {"position": step}},
    }


@pytest.fixture
def checkpointer(tmp_path: Path) -> Checkpointer:
    return Checkpointer(
        tmp_path / "checkpoints", parameters=CheckpointParameters(keep_last=9, async_save=False)
    )


@pytest.fixture
def three(checkpointer: Checkpointer) -> Checkpointer:
    for step in (1, 2, 3):
        checkpointer.save(state_at(step), step=step, epoch=step // 2)
    return checkpointer


def names(checkpointer: Checkpointer) -> list[str]:
    directory = checkpointer.store.directory
    return sorted(path.name for path in directory.iterdir() if not path.is_symlink())


def damage(checkpointer: Checkpointer, step: int, name: str = "__0_0.distcp") -> None:
    path = checkpointer.store.directory / f"step-{step:08d}" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def step_of(loaded) -> int:
    step = loaded.state["trainer"]["step"]
    assert torch.equal(loaded.state["models"]["net"]["w"], torch.full((3,), float(step)))
    assert loaded.state["dataloaders"] == {"train": {"position": step}}
    assert torch.equal(loaded.state["trainer"]["metrics"]["sum"], torch.tensor(float(step)))
    assert torch.equal(loaded.state["rng"]["torch"], torch.arange(4, dtype=torch.uint8))
    assert loaded.manifest.step == step
    assert loaded.path.name.startswith(f"step-{step:08d}")
    return step


def test_a_save_is_loaded_by_its_path(checkpointer: Checkpointer) -> None:
    path = checkpointer.save(state_at(7), step=7, epoch=2, monitored=0.5)
    loaded = checkpointer.load(path)
    assert step_of(loaded) == 7
    assert loaded.state.keys() == state_at(7).keys()
    assert (loaded.manifest.epoch, loaded.manifest.monitored) == (2, 0.5)


def test_saving_leaves_the_state_as_it_is(checkpointer: Checkpointer) -> None:
    state = state_at(1)
    tensor, kept = state["models"]["net"]["w"], copy.deepcopy(state)
    checkpointer.save(state, step=1)
    assert state["models"]["net"]["w"] is tensor
    assert repr(state) == repr(kept)


def test_a_save_that_fails_keeps_every_older_one_and_says_so(three: Checkpointer) -> None:
    before = names(three)
    with pytest.raises(CheckpointError, match="Older checkpoints are untouched"):
        three.save({"models": {"net": torch.ones(2, device="meta")}}, step=4)
    with pytest.raises(TypeError, match=r"models is a builtins\.object"):
        three.save({"models": object()}, step=4)
    assert names(three) == before


def test_retention_is_applied_after_the_commit(tmp_path: Path) -> None:
    parameters = CheckpointParameters(
        monitor="m", mode="max", keep_last=1, keep_top_k=1, async_save=False
    )
    one = Checkpointer(tmp_path, parameters=parameters)
    for step, value in enumerate((-1.0, float("nan"), -2.0, None, float("-inf")), start=1):
        one.save(state_at(step), step=step, monitored=value)
    assert names(one) == ["step-00000001", "step-00000005"]
    assert one.store.newest().manifest.monitored == "-inf"


def test_auto_takes_the_newest(three: Checkpointer) -> None:
    assert step_of(three.resume("auto")) == 3
    assert step_of(three.resume()) == 3


def test_auto_starts_afresh_where_there_is_nothing(checkpointer: Checkpointer) -> None:
    assert checkpointer.resume("auto") is None
    assert not checkpointer.store.directory.exists()


def test_never_starts_afresh_and_refuses_to_mix_two_runs(three: Checkpointer, tmp_path) -> None:
    assert Checkpointer(tmp_path / "other").resume("never") is None
    before = names(three)
    with pytest.raises(ConfigError) as caught:
        three.resume("never")
    assert "has 3 checkpoints" in str(caught.value)
    assert str(caught.value).endswith("or resume='auto' to continue this one.")
    assert names(three) == before


def test_must_fails_where_there_is_nothing_with_the_next_move(three, tmp_path) -> None:
    assert step_of(three.resume("must")) == 3
    with pytest.raises(ConfigError) as caught:
        Checkpointer(tmp_path / "other").resume("must")
    assert str(tmp_path / "other") in str(caught.value)
    assert str(caught.value).endswith("Check project, group and experiment, or use resume='auto'.")


def test_a_path_takes_that_one_and_the_later_ones_no_longer_count(three: Checkpointer) -> None:
    path = three.store.directory / "step-00000002"
    assert step_of(three.resume(str(path))) == 2
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003.superseded-1"]
    assert step_of(three.resume("auto")) == 2


def test_a_path_of_another_run_sets_this_one_aside_and_changes_nothing_there(
    three: Checkpointer, tmp_path: Path
) -> None:
    other = Checkpointer(tmp_path / "other")
    path = other.save(state_at(9), step=9)
    other.wait()
    assert step_of(three.resume(str(path))) == 9
    assert names(three) == [f"step-0000000{step}.superseded-1" for step in (1, 2, 3)]
    assert names(other) == ["step-00000009"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_path_that_cannot_be_read_is_an_error_and_stays(
    three: Checkpointer, is_there: bool
) -> None:
    path = three.store.directory / ("step-00000002" if is_there else "step-00000009")
    if is_there:
        damage(three, 2)
    before = names(three)
    with pytest.raises(CheckpointError, match=path.name):
        three.resume(str(path))
    assert names(three) == before


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_damaged_newest_is_reported_and_set_aside_and_the_one_before_is_taken(
    three: Checkpointer, name: str
) -> None:
    damage(three, 3, name)
    with pytest.warns(UserWarning, match="trying the one before") as caught:
        assert step_of(three.resume("auto")) == 2
    (warning,) = caught
    assert name in str(warning.message)
    assert "It is now step-00000003.damaged-1" in str(warning.message)
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003.damaged-1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step_of(three.resume("auto")) == 2


def test_two_damaged_ones_are_passed_over(three: Checkpointer) -> None:
    damage(three, 3)
    damage(three, 2, ".metadata")
    with pytest.warns(UserWarning, match="damaged") as caught:
        assert step_of(three.resume("must")) == 1
    assert len(caught) == 2


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_with_none_left_the_error_lists_each_and_nothing_is_deleted(
    three: Checkpointer, resume: str
) -> None:
    damage(three, 1)
    damage(three, 2, ".metadata")
    (three.store.directory / "step-00000003" / "manifest.json").unlink()
    before = names(three)
    with pytest.raises(CheckpointError) as caught:
        three.resume(resume)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        "step-00000003",
        "step-00000002",
        "step-00000001",
    ]
    assert "__0_0.distcp does not match its checksum" in caught.value.problems[2]
    assert caught.value.next_move.endswith("Move the directory away to start afresh.")
    assert names(three) == before


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh_by_itself(
    three: Checkpointer,
) -> None:
    for step in (1, 2, 3):
        damage(three, step)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="No whole checkpoint is left"):
            three.resume("auto")


def test_leftovers_of_killed_saves_are_removed_when_resuming(three: Checkpointer) -> None:
    leftover = three.store.directory / ".step-00000004.0a1b2c3d.tmp"
    leftover.mkdir()
    (leftover / ".metadata").write_bytes(b"half")
    assert step_of(three.resume("auto")) == 3
    assert not leftover.exists()


def test_loading_does_not_read_what_is_damaged(three: Checkpointer) -> None:
    damage(three, 2)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        three.load(three.store.directory / "step-00000002")


def test_many_saves_at_one_step_resume_from_the_last(tmp_path: Path) -> None:
    one = Checkpointer(tmp_path, parameters=CheckpointParameters(keep_last=1, async_save=False))
    for value in range(4):
        one.save({"value": value}, step=5)
    assert one.resume("auto").state == {"value": 3}


def test_a_word_that_is_no_way_to_resume_is_told_so(three: Checkpointer) -> None:
    with pytest.raises(ConfigError, match="resume='always' is neither 'auto', 'never', 'must'"):
        three.resume("always")


def test_reading_only_passes_over_damage_and_renames_nothing(three: Checkpointer) -> None:
    damage(three, 3)
    before = names(three)
    with pytest.warns(UserWarning, match="It is left there; trying the one before"):
        assert step_of(three.resume("auto", read_only=True)) == 2
    assert names(three) == before
