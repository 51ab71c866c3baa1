"""`ResumableRun` in loops of one's own: what it keeps, how it ends, what it refuses."""

from __future__ import annotations

import contextlib
import io
import os
import random
import runpy
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from support import RankError, free_port, run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset

from dream_trainer import (
    CheckpointParameters,
    DreamFabric,
    MeshStrategy,
    ResumableLoader,
    ResumableRun,
)
from dream_trainer.coordination import Interrupted, Preempted
from dream_trainer.errors import ConfigError, StateError
from dream_trainer.loggers import JsonlLog
from dream_trainer.randomness import seed_everything

pytestmark = pytest.mark.may_leave("rng")


class Numbers(Dataset[Tensor]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)])


def loader(**options: Any) -> DataLoader[Tensor]:
    return DataLoader(Numbers(), **{"batch_size": 2, "shuffle": True} | options)


def every(steps: int | None = None, **options: Any) -> CheckpointParameters:
    return CheckpointParameters(**{"every_n_steps": steps, "async_save": False} | options)


class Program:
    """A model that learns a number, and what its loop has seen."""

    def __init__(self, folder: Path, kind: type[Fabric] = Fabric, size: int = 1, **options: Any):
        strategy: Any = options.pop("strategy", "ddp" if size > 1 else "auto")
        self.fabric = kind(accelerator="cpu", devices=size, strategy=strategy)
        self.fabric.launch()
        seed_everything(3)
        # Wide enough for sums over three ranks to round differently in another order.
        own = nn.Linear(1, 64), nn.Tanh(), nn.Dropout(0.2), nn.Linear(64, 64), nn.Linear(64, 1)
        self.model = self.fabric.setup_module(nn.Sequential(*own))
        # Made from the parameters that a sharding strategy leaves behind.
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2, momentum=0.9)
        self.optimizer = self.fabric.setup_optimizers(optimizer)
        self.progress = {"seen": 0}
        named = {"model": self.model, "optimizer": self.optimizer, "progress": self.progress}
        self.run = ResumableRun(self.fabric, folder / "run", **{**named, **options})
        self.samples: list[int] = []

    def train(self, batch: Tensor) -> None:
        self.samples += batch.flatten().int().tolist()
        self.progress["seen"] += len(batch)
        loss = (self.model(batch) - 1).square().mean()
        self.run.log({"loss": loss})
        self.fabric.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fit(
        self, data: Any, epochs: int = 2, stop_at: int | None = None, send: int | None = None
    ) -> list[int]:
        """Train.

        Args:
            data: the loader.
            epochs: how many.
            stop_at: step in which there is an error of the program,
            send: or a signal comes.
        """
        for _ in self.run.epochs(epochs):
            for batch in self.run.batches(data):
                if self.run.step == stop_at and send is None:
                    raise ZeroDivisionError
                self.train(batch)
                if self.run.step == stop_at and send is not None:
                    os.kill(os.getpid(), send)
        return self.samples

    @property
    def weights(self) -> list[bytes]:
        found = [p.detach() for p in self.model.parameters()]
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in found]
        return [p.numpy().tobytes() for p in whole]


def test_an_error_leaves_the_last_checkpoint_and_the_log_has_no_gap(tmp_path: Path) -> None:
    straight = Program(tmp_path / "a", checkpoints=every(5))
    seen = straight.fit(loader())

    failed = Program(tmp_path / "b", checkpoints=every(5))
    with pytest.raises(ZeroDivisionError), failed.run:
        failed.fit(loader(), stop_at=18)
    resumed = Program(tmp_path / "b", checkpoints=every(5))
    assert seen[2 * 15 :] == resumed.fit(loader())
    assert resumed.weights == straight.weights
    assert resumed.progress == {"seen": 48}
    logs = [(tmp_path / name / "run" / "metrics.jsonl").read_bytes() for name in "ab"]
    assert logs[0] == logs[1]
    rows = JsonlLog(tmp_path / "b" / "run" / "metrics.jsonl").read()
    assert [row["step"] for row in rows] == list(range(1, 25))


def test_objects_may_be_named_before_they_are_set_up(tmp_path: Path) -> None:
    def weights(name: str, stop_at: int | None, *, early: bool) -> list[bytes]:
        program = Program(tmp_path / name, checkpoints=every(4))
        if early:
            inner: Any = program.model
            program.run = ResumableRun(
                program.fabric,
                tmp_path / name / "run",
                checkpoints=every(4),
                model=inner.module,
                optimizer=program.optimizer.optimizer,
                progress=program.progress,
            )
        try:
            with program.run:
                program.fit(loader(), stop_at=stop_at)
        except ZeroDivisionError:
            return []
        return program.weights

    straight = weights("straight", None, early=False)
    weights("early", 10, early=True)
    assert weights("early", None, early=True) == straight


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_loop_after_the_batch_and_saves(
    number: signal.Signals, tmp_path: Path
) -> None:
    outer = signal.signal(number, signal.default_int_handler)  # a job in the background ignores it
    straight = Program(tmp_path / "a", checkpoints=every())
    straight.fit(loader())
    first = Program(tmp_path / "b", checkpoints=every())
    with pytest.raises((Interrupted, Preempted)):
        first.fit(loader(), stop_at=6, send=number)
    assert signal.signal(number, outer) == signal.default_int_handler
    assert len(first.samples) == 14
    second = Program(tmp_path / "b", checkpoints=every())
    assert first.samples + second.fit(loader()) == straight.samples
    assert second.weights == straight.weights


def test_a_run_that_is_over_trains_nothing_and_gives_its_weights(tmp_path: Path) -> None:
    first = Program(tmp_path)
    first.fit(loader())
    again = Program(tmp_path)
    assert again.fit(loader()) == []
    assert again.weights == first.weights
    longer = Program(tmp_path)
    assert len(longer.fit(loader(), epochs=3)) == 24


def test_stop_ends_the_loops_and_the_run_stays_ended(tmp_path: Path) -> None:
    program = Program(tmp_path)
    for _ in program.run.epochs(2):
        for batch in program.run.batches(loader()):
            program.train(batch)
            if program.run.step == 4:
                program.run.stop("good enough")
    assert program.run.stop_reason == "good enough"
    assert len(program.samples) == 10
    assert Program(tmp_path).fit(loader()) == []
    on = Program(tmp_path, checkpoints=every(allow_changed=["stop_reason"]))
    assert len(on.fit(loader())) == 38


def test_a_loop_may_be_left_early_and_a_save_asked_for(tmp_path: Path) -> None:
    def run(name: str, stop_at: int | None) -> list[int]:
        data = loader()
        program = Program(tmp_path / name, checkpoints=every(every_n_epochs=None))
        try:
            with program.run:
                for _ in program.run.epochs(3):
                    for index, batch in program.run.batches(data).enumerate():
                        if program.run.step == stop_at:
                            raise ZeroDivisionError
                        program.train(batch)
                        if index == 3:
                            program.run.save()
                        if index == 6:
                            break
        except ZeroDivisionError:
            return []
        return program.samples

    straight = run("a", None)
    assert len(straight) == 3 * 14
    run("b", 12)
    assert run("b", None) == straight[14 + 8 :]


def test_positions_and_lengths_are_those_of_the_whole_epoch(tmp_path: Path) -> None:
    def indices(stop_at: int | None) -> list[int]:
        program = Program(tmp_path, checkpoints=every(3))
        found = []
        batches = program.run.batches(loader())
        assert len(batches) == 12
        with program.run:
            for _ in program.run.epochs(1):
                for index, batch in batches.enumerate():
                    if index == stop_at:
                        return found
                    program.train(batch)
                    found.append(index)
        return found

    assert indices(8) == list(range(8))
    assert indices(None) == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("data", ["loader", "fabric's", "own", "list", "iterable", "workers"])
def test_every_kind_of_loader_goes_on_where_it_was(data: str, tmp_path: Path) -> None:
    class Endless:
        def __iter__(self) -> Iterator[Tensor]:
            yield from torch.arange(24.0).view(12, 2, 1)[torch.randperm(12)]

    def made(program: Program) -> Any:
        kinds = {
            "loader": loader,
            "fabric's": lambda: program.fabric.setup_dataloaders(loader()),
            "own": lambda: ResumableLoader(loader(), seed=4),
            "list": lambda: list(torch.arange(24.0).view(12, 2, 1)),
            "iterable": Endless,
            "workers": lambda: loader(num_workers=2),
        }
        return kinds[data]()

    straight = Program(tmp_path / "a")
    straight.fit(made(straight))
    for stop_at in (7, 15):
        failed = Program(tmp_path / "b", checkpoints=every(2))
        with pytest.raises(ZeroDivisionError), failed.run:
            failed.fit(made(failed), stop_at=stop_at)
    resumed = Program(tmp_path / "b")
    if data in ("iterable", "workers"):
        with pytest.warns(UserWarning, match="reading and dropping the 2 batches"):
            resumed.fit(made(resumed))
    else:
        resumed.fit(made(resumed))
    assert resumed.samples == straight.samples[2 * 14 :]
    assert resumed.weights == straight.weights


@pytest.mark.distributed
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 3)], ids=str)
@pytest.mark.filterwarnings("ignore:the checkpoint is of")
def test_on_other_ranks_a_resumable_loader_reads_every_sample_once(
    sizes: tuple[int, int], tmp_path: Path
) -> None:
    def rank(size: int, stop_at: int | None) -> list[int]:
        on = every(allow_changed=["stop_reason"])
        program = Program(tmp_path, DreamFabric, size, checkpoints=on)
        data = ResumableLoader(loader(batch_size=12 // size // 2), seed=4)
        for _ in program.run.epochs(1):
            for batch in program.run.batches(data):
                program.train(batch)
                if program.run.step + 1 == stop_at:
                    program.run.stop("moving")
        return program.samples

    before = run_ranks(sizes[0], rank, sizes[0], 2)
    after = run_ranks(sizes[1], rank, sizes[1], None)
    seen = [sample for of_rank in (*before, *after) for sample in of_rank]
    assert sorted(seen) == list(range(24))
    assert sum(map(len, before)) == 12


@pytest.mark.distributed
def test_an_error_on_one_rank_ends_the_others_with_its_name(tmp_path: Path) -> None:
    """Its loops are left in the middle; the other rank waits for it in a collective."""

    def rank() -> str:
        program = Program(tmp_path, Fabric, 2)
        with pytest.raises(RuntimeError) as caught, program.run:  # noqa: PT012
            for _ in program.run.epochs(1):
                for batch in program.run.batches(loader()):
                    if program.run.step == 3 and program.fabric.global_rank == 1:
                        raise RuntimeError("no such file")
                    program.train(batch)
        return f"{type(caught.value).__name__}: {caught.value}"

    alone, failed = run_ranks(2, rank, time_limit=100)
    assert failed == "RuntimeError: no such file"
    assert alone.startswith("RankFailedError: rank 1 failed")
    assert "no such file" in alone


@pytest.mark.distributed
def test_three_ddp_ranks_go_on_to_the_bit(tmp_path: Path) -> None:
    def rank(name: str, stop_at: int | None) -> list[bytes]:
        program = Program(tmp_path / name, Fabric, 3, checkpoints=every(4))
        data = program.fabric.setup_dataloaders(loader(batch_size=1))
        try:
            with program.run:
                program.fit(data, stop_at=stop_at)
        except ZeroDivisionError:
            return []
        return program.weights

    straight = run_ranks(3, rank, "a", None)
    run_ranks(3, rank, "b", 6)
    assert run_ranks(3, rank, "b", None) == straight


@pytest.mark.distributed
def test_what_rank_0_alone_logs_is_logged(tmp_path: Path) -> None:
    def rank() -> None:
        program, data = Program(tmp_path, Fabric, 2), loader()
        with program.run:
            for epoch in program.run.epochs(2):
                for batch in program.run.batches(data):
                    if program.fabric.global_rank == 0 and program.run.step % 5 == 0:
                        program.run.log({"first": batch.sum()})
                if program.fabric.global_rank == 1:
                    program.run.log({"second": epoch})

    run_ranks(2, rank)
    rows = JsonlLog(tmp_path / "run" / "metrics.jsonl").read()
    assert [(row["step"], "first" in row) for row in rows] == [
        *((1, True), (6, True), (11, True), (12, False)),
        *((16, True), (21, True), (24, False)),
    ]
    assert [row["second"] for row in rows if "second" in row] == [0, 1]


def stock() -> ModelParallelStrategy:
    """Lightning's own strategy for FSDP2."""
    return ModelParallelStrategy(
        lambda module, mesh: fully_shard(module, mesh=mesh["data_parallel"]),
        data_parallel_size=2,
        tensor_parallel_size=1,
    )


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:the checkpoint is of")
@pytest.mark.parametrize("kind", [Fabric, DreamFabric])
@pytest.mark.parametrize(
    "strategy", [stock, lambda: MeshStrategy(dp_shard=2)], ids=["stock", "mesh"]
)
def test_sharded_runs_go_on_to_the_bit_and_on_one_device(
    kind: type[Fabric], strategy: Any, tmp_path: Path
) -> None:
    def rank(name: str, stop_at: int | None, seen: int) -> list[bytes]:
        on = every(4)
        program = Program(tmp_path / name, kind, 2, checkpoints=on, strategy=strategy())
        try:
            with program.run:
                program.fit(loader(), stop_at=stop_at)
        except ZeroDivisionError:
            return []
        assert len(program.samples) == seen
        return program.weights

    straight = run_ranks(2, rank, "a", None, 48)
    run_ranks(2, rank, "b", 18, 0)
    assert run_ranks(2, rank, "b", None, 48 - 2 * 16) == straight
    alone = Program(tmp_path / "b", kind)
    assert alone.fit(loader()) == []
    assert alone.weights == straight[0]


# ---------------------------------------------------------------------- what is refused


def test_what_cannot_be_put_back_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Program(tmp_path, best=0.5, name="x", seen={1}, scale=torch.ones(1))
    for what in ("best is a float", "name is a str", "seen is a set", "scale is a Tensor"):
        assert what in str(caught.value)
    assert "progress={'best': 0.0}" in str(caught.value)


def test_a_checkpoint_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    Program(tmp_path).fit(loader())
    other = Program(tmp_path, extra={"x": 1})
    with pytest.raises(StateError, match="extra: missing in the state"), other.run:
        other.fit(loader())
    assert Program(tmp_path).fit(loader()) == []


def test_two_loops_in_an_epoch_and_loaders_without_names_are_refused(tmp_path: Path) -> None:
    program = Program(tmp_path)

    def two_loops() -> None:
        for _ in program.run.epochs(1):
            for _ in range(2):
                for batch in program.run.batches(loader()):
                    program.train(batch)

    with pytest.raises(RuntimeError, match="once an epoch"), program.run:
        two_loops()
    program = Program(tmp_path)

    def two_loaders() -> None:
        for _ in program.run.epochs(2):
            for batch in program.run.batches(loader()):
                program.train(batch)

    with pytest.raises(ConfigError, match="Name both"), program.run:
        two_loaders()


def test_loaders_with_names_may_take_turns(tmp_path: Path) -> None:
    def samples(name: str, stop_at: int | None) -> list[int]:
        odd, even = loader(), loader(batch_size=3)
        program = Program(tmp_path / name, checkpoints=every(3), odd=odd, even=even)
        try:
            with program.run:
                for epoch in program.run.epochs(4):
                    for batch in program.run.batches(odd if epoch % 2 else even):
                        if program.run.step == stop_at:
                            raise ZeroDivisionError
                        program.train(batch)
        except ZeroDivisionError:
            return []
        return program.samples

    straight = samples("a", None)
    samples("b", 13)
    rest = samples("b", None)
    assert 0 < len(rest) < len(straight)
    assert rest == straight[-len(rest) :]


@pytest.mark.distributed
def test_a_script_runs_under_fabric_run(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))
    from launched import BIN, run
    from test_resumable_run import changed

    script = tmp_path / "script.py"
    # Who is started so is launched already, says Fabric.
    script.write_text(changed("classify").replace("    fabric.launch()\n", ""))
    words = ["--accelerator", "cpu", "--devices", 2, "--strategy", "ddp"]
    command = [BIN / "fabric", "run", *words, "--main-port", free_port(), script]
    first, second = run(command, tmp_path), run(command, tmp_path)
    assert ("done at step 12, after 3 epochs" in first, "loss" in first) == (True, True)
    assert ("done at step 12, after 3 epochs" in second, "loss" in second) == (True, False)


def test_the_loggers_of_the_fabric_get_the_rows(tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.rows: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.rows.append((step, metrics))

    recorder = Recorder()
    fabric = Fabric(accelerator="cpu", devices=1, loggers=[recorder])
    fabric.launch()
    run = ResumableRun(fabric, tmp_path / "run")
    for number in run.batches([1, 2, 3]):
        run.log({"number": number})
    expected = [(step, {"number": float(step), "epoch": 0}) for step in (1, 2, 3)]
    assert recorder.rows == expected


EXAMPLE = Path(__file__).parents[2] / "examples" / "own_loop.py"


def example(folder: Path, name: str, epochs: int, kill_at: int = 0, kill_after: float = 0) -> str:
    """What the example prints; killed at a step, or so many seconds after its imports."""
    os.chdir(folder)
    main = runpy.run_path(str(EXAMPLE))["main"]
    num_steps = 0

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def count(*_: Any) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == kill_at:
            kill()

    register_optimizer_step_post_hook(count)
    if kill_after:
        threading.Timer(kill_after, kill).start()
    with contextlib.redirect_stdout(io.StringIO()) as told:
        main(name, epochs=epochs)
    return told.getvalue()


def weights_and_log(folder: Path, name: str, output: str) -> tuple[str, bytes]:
    last = output.splitlines()[-1]
    assert last.startswith("weights")
    return last, (folder / name / "metrics.jsonl").read_bytes()


def test_the_example_goes_on_after_a_kill(tmp_path: Path) -> None:
    (straight,) = run_ranks(1, example, tmp_path, "a", 3)
    with pytest.raises(RankError, match="died with exit code -9"):
        run_ranks(1, example, tmp_path, "b", 3, 100)
    (resumed,) = run_ranks(1, example, tmp_path, "b", 3)
    assert weights_and_log(tmp_path, "b", resumed) == weights_and_log(tmp_path, "a", straight)


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_killed_at_random_instants_the_example_ends_as_if_it_were_not(tmp_path: Path) -> None:
    seed = int(os.environ.get("FAULTS_SEED", "0")) or random.randrange(1_000_000)
    print(f"FAULTS_SEED={seed}")
    draw, num_kills, output = random.Random(seed), 0, ""
    (straight,) = run_ranks(1, example, tmp_path, "a", 20)
    while not output:
        # A run that saves every 20 steps gets on, however short its lives are.
        after = draw.uniform(0.3, 1.5)
        try:
            (output,) = run_ranks(1, example, tmp_path, "b", 20, 0, after)
        except RankError as error:
            assert "died with exit code -9" in str(error)  # noqa: PT017
            num_kills += 1
    print(f"{num_kills} kills")
    assert num_kills >= 2
    assert weights_and_log(tmp_path, "b", output) == weights_and_log(tmp_path, "a", straight)
