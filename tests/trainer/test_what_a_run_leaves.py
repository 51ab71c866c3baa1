"""A run leaves the process as it found it; so does a trainer on several ranks, once closed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from streams import rng_streams, same_streams
from support import (
    TinyTrainer,
    differences,
    exact_state,
    rank_environment,
    run_ranks,
    tiny,
    tiny_config,
)

from dream_trainer.callbacks import Callback, GarbageCollection, Profiler, StepTimes
from dream_trainer.coordination import Interrupted
from dream_trainer.world.gloo_threads import let_threads_finish


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[[Any], None]) -> None:
        self.step, self.action = step, action

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.action(trainer)


def settings() -> dict[str, Any]:
    """What a run may change in a process, beside random streams."""
    for thread in threading.enumerate():  # torch ends those of a loader's queues without waiting
        if thread.name == "QueueFeederThread":
            thread.join(timeout=10)
    numbers = [n for n in signal.valid_signals() if n not in (signal.SIGKILL, signal.SIGSTOP)]
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "tasks": tasks(),
        "handlers": {n: signal.getsignal(n) for n in numbers},
        "wakeup": wakeup_descriptor(),
        "files": psutil.Process().num_fds(),
        "group": dist.is_initialized(),
        "grad": (torch.is_grad_enabled(), torch.is_anomaly_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "num_threads": torch.get_num_threads(),
        "garbage": gc.isenabled(),
        "profiling": torch.autograd._profiler_enabled(),
        "hooks": (sys.excepthook, threading.excepthook, sys.gettrace(), sys.stdout, sys.stderr),
        "folder": Path.cwd(),
        "environment": dict(os.environ),
    }


def wakeup_descriptor() -> int:
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    return descriptor


def raise_error(_: Any) -> None:
    raise ZeroDivisionError


def press_ctrl_c(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


ENDS: dict[str, tuple[Callable[[Any], None], type[BaseException] | None]] = {
    "well": (lambda trainer: None, None),
    "stopped": (lambda trainer: trainer.stop("enough"), None),
    "interrupted": (press_ctrl_c, Interrupted),
    "failed": (raise_error, ZeroDivisionError),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_run_leaves_no_trace_however_it_ends(tmp_path: Path, end: str) -> None:
    action, error = ENDS[end]
    options: dict[str, Any] = {"dropout": 0.3, "deterministic": True, "detect_anomaly": True}
    options["num_workers"] = 2
    looking = {
        "gc": GarbageCollection(),
        "profiler": Profiler(wait=0, warmup=1, active=3),
        "times": StepTimes(),
    }
    # What libraries load and open once.
    tiny(tmp_path, experiment="first", callbacks=looking, **options).fit()
    trainer = tiny(tmp_path, callbacks={"at": At(3, action), **looking}, **options)
    before, streams = settings(), rng_streams()
    if error is None:
        trainer.fit()
    else:
        with pytest.raises(error):
            trainer.fit()
    assert settings() == before
    assert same_streams(streams, rng_streams())


def test_other_ways_to_run_leave_no_trace_either(tmp_path: Path) -> None:
    class Predicting(TinyTrainer):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch["x"])

    def loader() -> Any:
        return tiny(tmp_path).configure_dataloaders()[1]

    Predicting(tiny_config(tmp_path)).fit()
    trainer = Predicting(tiny_config(tmp_path))
    before, streams = settings(), rng_streams()
    trainer.validate()
    trainer.test(loader())
    trainer.predict(loader())
    assert settings() == before
    assert same_streams(streams, rng_streams())


@pytest.mark.may_leave("rng")  # draws of its own
def test_a_state_after_the_run_has_the_streams_of_the_run(tmp_path: Path) -> None:
    whole = tiny(tmp_path, experiment="whole", dropout=0.3, augment=True, n_epochs=3)
    whole.fit()
    first = tiny(tmp_path, experiment="first", dropout=0.3, augment=True, n_epochs=2)
    first.fit()
    torch.rand(3)  # the program's own
    state = first.state_dict()
    second = tiny(tmp_path, experiment="second", dropout=0.3, augment=True, n_epochs=3)
    second.load_state_dict(state)
    torch.rand(3)
    second.fit()
    # Its log begins where it does.
    different = differences(exact_state(whole), exact_state(second))
    assert [path for path in different if not path.startswith("/callbacks/metrics/")] == []


@pytest.mark.may_leave("rng")  # draws of its own
def test_fit_again_goes_on_as_if_it_had_been_one_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dropout": 0.3, "augment": True}
    whole = tiny(tmp_path, experiment="whole", n_epochs=3, **options)
    whole.fit()
    halves = tiny(tmp_path, experiment="halves", n_epochs=2, **options)
    halves.fit()
    torch.rand(3)
    halves.config.training_parameters = tiny_config(tmp_path, n_epochs=3).training_parameters
    halves.fit()
    assert differences(exact_state(whole), exact_state(halves)) == []


@pytest.mark.may_leave("rng")  # draws of its own
def test_fit_again_after_a_stop_goes_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dropout": 0.3, "augment": True}
    whole = tiny(tmp_path, experiment="whole", **options)
    whole.fit()
    parts = tiny(tmp_path, experiment="parts", callbacks={"at": At(3, press_ctrl_c)}, **options)
    with pytest.raises(Interrupted):
        parts.fit()
    torch.rand(3)
    parts.fit()
    assert differences(exact_state(whole), exact_state(parts)) == []


def test_an_error_in_the_block_is_the_one_that_is_seen(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, strategy="ddp", devices=2)  # not launched, so of no known size
    with pytest.raises(ZeroDivisionError), trainer:
        raise_error(trainer)
    assert trainer.is_closed


CELL = """
class Net(TinyTrainer):
    def configure_models(self):
        super().configure_models()

trainer = Net(tiny_config(root, n_epochs=2, experiment=name))
trainer.fit()
steps = trainer.global_step
"""


@pytest.mark.parametrize("name", [None, "mine"])
def test_a_cell_of_a_notebook_runs_twice(tmp_path: Path, name: str | None) -> None:
    names = {"TinyTrainer": TinyTrainer, "tiny_config": tiny_config, "root": tmp_path, "name": name}
    tiny(tmp_path / "first", experiment="first").fit()
    before = None
    for _ in range(3):
        exec(CELL, names)
        assert names["steps"] == 12
        assert before is None or settings() == before
        before = settings()
    runs = sorted(path.name for path in (tmp_path / "default" / "default").iterdir())
    assert len(runs) == (3 if name is None else 1)


# ---------------------------------------------------------------------- several ranks


def folds(root: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Two runs one after another, what they left behind, and what they found."""
    before, results, group = settings(), [], []
    streams = rng_streams()
    for fold in range(2):
        config = tiny_config(root, experiment=f"fold{fold}", dropout=0.3, devices=2, **options)
        with TinyTrainer(config) as trainer:
            trainer.fit()
            results.append(trainer.validate())
            group.append(dist.is_initialized())
        group.append(dist.is_initialized())
        with pytest.raises(RuntimeError, match="continues from the last checkpoint"):
            trainer.fit()
        weights = trainer.net.state_dict()  # an own module, or its shards
        assert "0.weight" in weights
    del trainer, weights  # shards hold on to what they are sharded over
    gc.collect()
    after = settings()
    for one in (before, after):
        # The variables of a launcher; torch's way to print errors.
        del one["environment"], one["hooks"]
        # gloo's thread for all connections that there will ever be, and what it waits with.
        del one["files"], one["tasks"]
    return {
        "changed": [name for name in before if before[name] != after[name]],
        "results": results,
        "group": group,
        "is_same": same_streams(streams, rng_streams()),
        "tasks": gloo_threads(),
    }


def tasks() -> list[str]:
    """Names of all threads, also of C++; of those of Python that are over, none."""
    let_threads_finish()
    return sorted((one / "comm").read_text().strip() for one in Path("/proc/self/task").iterdir())


def gloo_threads() -> list[str]:
    return [name for name in tasks() if name == "pt_gloo_runloop"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "options", [{"strategy": "ddp"}, {"dp_replicate": 2}, {"dp_shard": 2}], ids=str
)
def test_a_closed_trainer_leaves_no_group_and_no_thread(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    for rank in run_ranks(2, folds, tmp_path, options):
        assert rank["changed"] == []
        # torch's own caches hold the first mesh that there was, and the threads of its group.
        assert len(rank["tasks"]) == (2 if "dp_shard" in options else 0)
        assert rank["is_same"]
        assert rank["results"][0] == rank["results"][1]
        assert rank["group"] == [True, False, True, False]


def trained_by(fabric: Fabric, root: Path) -> None:
    group = dist.group.WORLD
    dist.all_reduce(torch.ones(1))  # its threads begin with their first task
    threads = len(gloo_threads())
    for name in ("one", "two"):
        with TinyTrainer(tiny_config(root, experiment=name), fabric=fabric) as trainer:
            trainer.fit()
    assert dist.group.WORLD is group
    assert len(gloo_threads()) == threads
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2


def inside_launch(root: Path) -> None:
    Fabric(accelerator="cpu", devices=2, strategy="ddp").launch(trained_by, root)  # type: ignore[arg-type]
    assert dist.is_initialized()


@pytest.mark.distributed
def test_the_group_of_somebody_else_stays(tmp_path: Path) -> None:
    run_ranks(2, inside_launch, tmp_path)


def trained_by_forks(fabric: Fabric, root: Path) -> list[tuple[int, dict[str, float]]]:
    found = []
    for name in ("one", "two"):
        with TinyTrainer(tiny_config(root, experiment=name), fabric=fabric) as trainer:
            trainer.fit()
            found.append((trainer.global_step, trainer.validate()))
    assert dist.is_initialized()
    return found


def forking(root: Path) -> Any:
    for name in rank_environment(0, 1, 0):
        del os.environ[name]
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    return fabric.launch(trained_by_forks, root)


@pytest.mark.distributed
def test_trainers_run_inside_a_function_that_fabric_forks(tmp_path: Path) -> None:
    # Fabric leaves the variables of its ranks behind: in a process of its own.
    (found,) = run_ranks(1, forking, tmp_path)
    assert [steps for steps, _ in found] == [6, 6]
    assert found[0] == found[1]


def held_by_somebody(root: Path) -> tuple[int, bool]:
    trainer = TinyTrainer(tiny_config(root, devices=2, strategy="ddp"))
    trainer.fit()
    net = trainer.net
    with pytest.warns(UserWarning, match="still held by something else") as caught:
        trainer.close()
    return len(caught), dist.is_initialized() and net is not None


@pytest.mark.distributed
def test_a_group_that_a_model_still_uses_stays_with_a_word(tmp_path: Path) -> None:
    assert run_ranks(2, held_by_somebody, tmp_path) == [(1, True)] * 2


def failing(root: Path) -> list[bool]:
    trainer = TinyTrainer(tiny_config(root, devices=2, strategy="ddp"))
    trainer.fit()
    with pytest.raises(ZeroDivisionError), trainer:
        raise_error(trainer)
    is_there = dist.is_initialized()
    trainer.close()
    return [is_there, dist.is_initialized()]


@pytest.mark.distributed
def test_a_block_that_fails_leaves_the_group_to_close(tmp_path: Path) -> None:
    assert run_ranks(2, failing, tmp_path) == [[True, False]] * 2


def overlapping(root: Path) -> list[bool]:
    first, second = (
        TinyTrainer(tiny_config(root, experiment=name, devices=2, strategy="ddp"))
        for name in ("first", "second")
    )
    first.fit()
    second.fit()
    first.close()
    is_there = [dist.is_initialized()]
    second.validate()
    second.close()
    return [*is_there, dist.is_initialized()]


@pytest.mark.distributed
def test_the_last_of_several_trainers_ends_the_group(tmp_path: Path) -> None:
    assert run_ranks(2, overlapping, tmp_path) == [[True, False]] * 2


#: A thread of gloo is held from dropping a tensor until the program ends.
ABORTED = """
import os, sys, tempfile, torch, torch.distributed as dist
from dream_trainer.world.gloo_threads import let_threads_finish_at_exit
sys.setswitchinterval(100)
path = sys.argv[1]
child = os.fork()
dist.init_process_group("gloo", init_method="file://" + path, rank=int(not child), world_size=2)
if sys.argv[2] == "waits":
    let_threads_finish_at_exit()
dist.barrier()
dist.broadcast(torch.zeros(3), 0, async_op=True)
for _ in range(6_000_000):
    pass
if child:
    print("status", os.waitpid(child, 0)[1])
"""


@pytest.mark.distributed
def test_a_process_that_ends_well_is_not_aborted_at_its_end(tmp_path: Path) -> None:
    for number in range(4):
        words = [sys.executable, "-c", ABORTED, str(tmp_path / str(number)), "waits"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (0, "status 0\n"), done.stderr
