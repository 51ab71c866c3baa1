from __future__ import annotations

from pathlib import Path

import pytest

from dream_trainer.checkpointing import CheckpointStore
from dream_trainer.configs import CheckpointParameters
from dream_trainer.storage import Manifest

NAN, INF = "nan", "inf"


def put(
    store: CheckpointStore, step: int, value: float | str | None = None, monitor: str = "val/loss"
) -> Path:
    """A checkpoint with nothing but a manifest: all that the store looks at."""
    path = store.path_for(step)
    path.mkdir(parents=True)
    Manifest(files={}, step=step, epoch=0, world_size=1, monitor=monitor, monitored=value).write(
        path
    )
    return path


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir() if not path.is_symlink())


def steps(store: CheckpointStore) -> list[int]:
    return [stored.manifest.step for stored in store.list()]


def kept(store: CheckpointStore, values: list[float | str | None], **rules) -> list[int]:
    """Steps that are left after saving and pruning, as a run does, at steps 1, 2, 3, ..."""
    parameters = CheckpointParameters(monitor="val/loss", **rules)
    for step, value in enumerate(values, start=1):
        put(store, step, value)
        store.prune(parameters)
    return steps(store)


def test_nothing_is_in_a_directory_that_does_not_exist(store: CheckpointStore) -> None:
    assert (store.paths(), store.list(), store.newest(), store.best("min")) == ([], [], None, None)
    store.clean()
    assert list(store.prune(CheckpointParameters())) == []


def test_checkpoints_are_listed_by_step_whatever_the_number_of_digits(
    store: CheckpointStore,
) -> None:
    for step in (2, 10**9, 10, 10**8, 1):
        put(store, step)
    assert steps(store) == [1, 2, 10, 10**8, 10**9]
    assert store.newest().manifest.step == 10**9


def test_what_is_not_named_like_a_checkpoint_is_none(store: CheckpointStore) -> None:
    put(store, 1)
    for name in ("step-2", "step-00000003.damaged-1", ".step-00000004.ab.tmp", "best", "step-x"):
        (store.directory / name).mkdir()
    (store.directory / "step-00000005").write_text("a file")
    assert [path.name for path in store.paths()] == ["step-00000001"]


def test_a_checkpoint_without_a_readable_manifest_has_a_path_but_is_not_listed(
    store: CheckpointStore,
) -> None:
    put(store, 1)
    (put(store, 2) / "manifest.json").unlink()
    (put(store, 3) / "manifest.json").write_text("{")
    assert len(store.paths()) == 3
    assert steps(store) == [1]
    assert store.newest().manifest.step == 1


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("min", [3.0, 1.0, 2.0], 2),
        ("max", [3.0, 1.0, 2.0], 1),
        ("min", [0.0, -1.0, -2.0], 3),
        ("max", [-3.0, -1.0, -2.0], 2),
        ("min", [0.0, 1.0], 1),
        ("max", [-1.0, 0.0], 2),
        ("min", [NAN, 5.0, NAN], 2),
        ("max", [NAN, 5.0, NAN], 2),
        ("min", [None, 5.0, None], 2),
        ("max", [None, 5.0, None], 2),
        ("min", [INF, 5.0], 2),
        ("max", [INF, 5.0], 1),
        ("min", ["-inf", 5.0], 1),
        ("max", ["-inf", 5.0], 2),
        ("min", [INF], 1),
        ("min", [1.0, 1.0, 2.0], 2),
        ("max", [2.0, 2.0, 1.0], 2),
        ("min", [None, NAN], None),
    ],
)
def test_the_best_is_chosen_by_value_and_mode_and_the_newer_of_two_equal_ones(
    store: CheckpointStore, mode: str, values: list, best: int | None
) -> None:
    for step, value in enumerate(values, start=1):
        put(store, step, value)
    found = store.best(mode, "val/loss")
    assert (found and found.manifest.step) == best


def test_values_of_another_metric_do_not_compete(store: CheckpointStore) -> None:
    put(store, 1, 0.1, monitor="val/accuracy")
    put(store, 2, 0.9)
    assert store.best("min", "val/loss").manifest.step == 2
    assert store.best("min", "val/f1") is None


@pytest.mark.parametrize(("keep_last", "left"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_last_ones_are_kept(store: CheckpointStore, keep_last: int, left: list[int]) -> None:
    assert kept(store, [None] * 5, keep_last=keep_last, keep_top_k=0) == left


@pytest.mark.parametrize(
    ("mode", "values", "top", "left"),
    [
        ("min", [3.0, 1.0, 2.0, 4.0], 1, [2, 4]),
        ("max", [3.0, 1.0, 2.0, 1.5], 1, [1, 4]),
        ("min", [3.0, 1.0, 2.0, 4.0], 2, [2, 3, 4]),
        ("min", [-1.0, 0.0, 1.0, 2.0], 1, [1, 4]),
        ("max", [-1.0, 0.0, -3.0, -2.0], 1, [2, 4]),
        ("min", [NAN, 2.0, NAN, None], 2, [2, 4]),
        ("min", [None, None, None, None], 3, [4]),
        ("min", [1.0, 1.0, 1.0, 2.0], 1, [3, 4]),
    ],
)
def test_the_best_ones_are_kept_beside_the_last(
    store: CheckpointStore, mode: str, values: list, top: int, left: list[int]
) -> None:
    assert kept(store, values, keep_last=1, keep_top_k=top, mode=mode) == left


def test_multiples_of_a_step_are_kept_for_good(store: CheckpointStore) -> None:
    left = kept(store, [None] * 7, keep_last=1, keep_top_k=0, keep_every_n_steps=3)
    assert left == [3, 6, 7]


def test_without_a_metric_the_best_rule_keeps_nothing(store: CheckpointStore) -> None:
    for step in range(1, 5):
        put(store, step, 1.0 / step)
        store.prune(CheckpointParameters(keep_last=1, keep_top_k=3))
    assert steps(store) == [4]


def test_the_choice_is_in_the_manifests_so_a_new_process_continues_it(
    store: CheckpointStore,
) -> None:
    put(store, 1, 0.1)
    put(store, 2, 0.2)
    put(store, 3, 0.3)
    deleted = CheckpointStore(store.directory).prune(
        CheckpointParameters(monitor="val/loss", keep_last=1)
    )
    assert [path.name for path in deleted] == ["step-00000002"]
    assert steps(store) == [1, 3]


def test_pruning_leaves_damaged_and_foreign_things_alone(store: CheckpointStore) -> None:
    (put(store, 1) / "manifest.json").unlink()
    put(store, 2)
    put(store, 3)
    (store.directory / "notes.txt").write_text("mine")
    (store.directory / "step-00000000.damaged-1").mkdir()
    store.prune(CheckpointParameters(keep_last=1))
    assert names(store) == [
        "notes.txt",
        "step-00000000.damaged-1",
        "step-00000001",
        "step-00000003",
    ]


def test_of_one_step_the_newest_is_kept_and_counts_once(store: CheckpointStore) -> None:
    put(store, 1)
    put(store, 2)
    put(store, 2)
    store.prune(CheckpointParameters(keep_last=2))
    assert names(store) == ["step-00000001", "step-00000002-1"]


def test_a_save_at_a_step_that_was_pruned_before_is_the_newest_of_that_step(
    store: CheckpointStore,
) -> None:
    for _ in range(4):
        newest = put(store, 2)
        store.prune(CheckpointParameters(keep_last=1))
        assert store.newest().path == newest
        assert [stored.path for stored in store.list()] == [newest]


def test_ten_saves_of_one_step_stay_in_order(store: CheckpointStore) -> None:
    made = [put(store, 2) for _ in range(12)]
    assert store.paths() == made


def test_cleaning_removes_leftovers_of_dead_saves_and_nothing_else(store: CheckpointStore) -> None:
    put(store, 1)
    store.set_aside(put(store, 2), "damaged")
    for leftover in (".step-00000003.0a1b2c3d.tmp", ".step-00000002.tmp", ".step-00000002-1.tmp"):
        (store.directory / leftover).mkdir()
        (store.directory / leftover / "__0_0.distcp").write_bytes(b"half")
    (store.directory / ".notes.tmp").mkdir()
    (store.directory / "step-x.tmp").mkdir()
    store.clean()
    assert names(store) == [".notes.tmp", "step-00000001", "step-00000002.damaged-1", "step-x.tmp"]


def test_setting_aside_deletes_nothing_and_frees_the_name(store: CheckpointStore) -> None:
    for _ in range(2):
        store.set_aside(put(store, 1), "damaged")
    assert names(store) == ["step-00000001.damaged-1", "step-00000001.damaged-2"]
    assert store.paths() == []


def test_setting_aside_what_comes_after_spares_what_comes_before(store: CheckpointStore) -> None:
    for step in (1, 2, 2, 3, 10**8):
        put(store, step)
    store.set_aside_after(store.directory / "step-00000002")
    assert names(store) == [
        "step-00000001",
        "step-00000002",
        "step-00000002-1.superseded-1",
        "step-00000003.superseded-1",
        "step-100000000.superseded-1",
    ]


def test_a_checkpoint_elsewhere_supersedes_all_that_are_here(
    store: CheckpointStore, tmp_path: Path
) -> None:
    put(store, 3)
    other = CheckpointStore(tmp_path / "other")
    store.set_aside_after(put(other, 4))
    assert names(store) == ["step-00000003.superseded-1"]
    assert names(other) == ["step-00000004"]
