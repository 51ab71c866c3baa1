from __future__ import annotations

from dataclasses import asdict

from dream_trainer.progress import Progress


def train_epoch(progress: Progress, batches: int, window: int) -> None:
    progress.start_epoch()
    for batch in range(1, batches + 1):
        is_window_end = batch % window == 0 or batch == batches
        if is_window_end:
            progress.finish_step()
        progress.finish_batch(is_window_end=is_window_end, is_last=batch == batches)
        progress.close_step()
    progress.finish_train_epoch()


def test_counters_of_two_epochs() -> None:
    progress = Progress()
    for _ in range(2):
        train_epoch(progress, batches=5, window=2)
        progress.finish_validation()
        progress.close_epoch()
        progress.finish_epoch()
    assert asdict(progress) == {
        "num_steps": 6,
        "epoch": 2,
        "num_batches": 10,
        "num_batches_in_epoch": 0,
        "num_steps_in_epoch": 0,
        "num_batches_in_window": 0,
        "local_batches": 10,
        "seconds": 0.0,
        "in_epoch": False,
        "is_step_open": False,
        "last_batch_finished": False,
        "train_epoch_finished": False,
        "is_epoch_closing": False,
        "num_skipped_steps": 0,
        "num_skipped_in_a_row": {},
        "last_validation_step": 6,
    }


def test_counters_inside_an_epoch_and_a_window() -> None:
    progress = Progress()
    progress.start_epoch()
    for is_window_end in (False, True, False):
        if is_window_end:
            progress.finish_step()
        progress.finish_batch(is_window_end=is_window_end)
    assert progress.num_batches_in_epoch == 3
    assert progress.num_steps_in_epoch == 1
    assert progress.num_batches_in_window == 1
    assert progress.in_epoch
    assert not progress.train_epoch_finished


def test_a_state_restores_every_counter_of_the_run_and_none_of_the_process() -> None:
    progress = Progress()
    train_epoch(progress, batches=5, window=2)
    other = Progress(local_batches=77)
    other.load_state_dict(progress.state_dict())
    assert asdict(other) == asdict(progress) | {"local_batches": 77}


def test_a_state_is_a_copy_and_stays_as_it_was_when_loaded() -> None:
    progress = Progress()
    state = progress.state_dict()
    kept = dict(state)
    train_epoch(progress, batches=1, window=1)
    assert state == kept
    Progress().load_state_dict(state)
    assert state == kept


def test_counters_of_another_version_are_passed_over_and_missing_ones_stay() -> None:
    progress = Progress(epoch=3)
    progress.load_state_dict({"num_steps": 5, "unheard_of": 1})
    assert (progress.num_steps, progress.epoch) == (5, 3)
    assert not hasattr(progress, "unheard_of")
