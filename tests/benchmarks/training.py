"""The same tiny training, in the loop of each tool: what is left to measure is the loop.

Each function trains on an iterable of batches, in the way that the tool's documentation shows. The
iterable keeps the time.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dream_trainer import (
    CheckpointParameters,
    DeviceParameters,
    DreamTrainer,
    DreamTrainerConfig,
    TrainingParameters,
)

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Scenario:
    """What is trained.

    Args:
        name: of the scenario in tables.
        accumulate: batches of a step.
        clip: norm of the gradients at most; None does not clip.
        precision: in Fabric's names.
        ranks: processes.
        accelerator: in Fabric's names.
    """

    name: str
    accumulate: int = 1
    clip: float | None = None
    precision: str = "32-true"
    ranks: int = 1
    accelerator: str = "cpu"

    @property
    def strategy(self) -> str:
        """In Fabric's names."""
        return "auto" if self.ranks == 1 else "ddp"

    @property
    def clock(self) -> Callable[[], float]:
        """In seconds. On several ranks that of the training thread's own work: a batch is mostly
        a wait for gloo, which varies by several times what a loop costs."""
        return time.perf_counter if self.ranks == 1 else time.thread_time


class Batches(Sequence[Batch]):
    """The same batch again and again, and the time between two of them.

    Args:
        warm_up: batches before the clock starts.
        measured: batches that are timed.
        clock: in seconds.
    """

    def __init__(
        self, warm_up: int, measured: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.warm_up, self.measured, self._clock = warm_up, measured, clock
        generator = torch.Generator().manual_seed(0)
        self.batch = torch.randn(8, 32, generator=generator), torch.randn(8, 1, generator=generator)
        self.seconds = float("nan")

    def __len__(self) -> int:
        return self.warm_up + self.measured + 1

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        if index == self.warm_up:
            self._start = self._clock()
        elif index == self.warm_up + self.measured:  # some tools do not ask for another one
            self.seconds = self._clock() - self._start
        elif index >= len(self):
            raise IndexError
        return self.batch

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            yield self[index]

    @property
    def microseconds(self) -> float:
        """Of one batch."""
        return self.seconds / self.measured * 1e6


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two layers, so little work that a loop's own cost shows."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def plain(scenario: Scenario, batches: Iterable[Batch]) -> None:
    """PyTorch alone."""
    model, optimizer = model_and_optimizer()
    wrapped: Any = DistributedDataParallel(model) if scenario.ranks > 1 else model
    for index, (x, y) in enumerate(batches, start=1):
        is_accumulating = index % scenario.accumulate != 0
        sync = wrapped.no_sync() if is_accumulating and wrapped is not model else None
        with sync or contextlib.nullcontext():
            if scenario.precision == "bf16-mixed":
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.mse_loss(wrapped(x), y)
            else:
                loss = F.mse_loss(wrapped(x), y)
            (loss / scenario.accumulate if scenario.accumulate > 1 else loss).backward()
        if not is_accumulating:
            if scenario.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), scenario.clip)
            optimizer.step()
            optimizer.zero_grad()


def fabric(scenario: Scenario, batches: Iterable[Batch]) -> None:
    """A loop written by hand on Lightning Fabric."""
    from lightning.fabric import Fabric

    tool = Fabric(
        accelerator="cpu",
        devices=scenario.ranks,
        strategy=scenario.strategy,
        precision=scenario.precision,  # type: ignore[arg-type]
    )
    tool.launch()
    model, optimizer = tool.setup(*model_and_optimizer())
    for index, (x, y) in enumerate(batches, start=1):
        is_accumulating = index % scenario.accumulate != 0
        with tool.no_backward_sync(model, enabled=is_accumulating):
            loss = F.mse_loss(model(x), y)
            tool.backward(loss / scenario.accumulate if scenario.accumulate > 1 else loss)
        if not is_accumulating:
            if scenario.clip is not None:
                tool.clip_gradients(
                    model, optimizer, max_norm=scenario.clip, error_if_nonfinite=False
                )
            optimizer.step()
            optimizer.zero_grad()


def accelerate(scenario: Scenario, batches: Iterable[Batch]) -> None:
    """A loop on Accelerate."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()  # type: ignore[attr-defined]
    tool = Accelerator(
        cpu=True,
        mixed_precision="bf16" if scenario.precision == "bf16-mixed" else "no",
        gradient_accumulation_steps=scenario.accumulate,
    )
    model, optimizer = tool.prepare(*model_and_optimizer())
    for x, y in batches:
        with tool.accumulate(model):
            loss = F.mse_loss(model(x), y)
            tool.backward(loss)
            if scenario.clip is not None and tool.sync_gradients:
                tool.clip_grad_norm_(model.parameters(), scenario.clip)
            optimizer.step()
            optimizer.zero_grad()


def ignite(scenario: Scenario, batches: Iterable[Batch]) -> None:
    """The supervised trainer of Ignite. It has no clipping of its own."""
    from ignite.engine import Engine, create_supervised_trainer

    model, optimizer = model_and_optimizer()
    wrapped: Any = DistributedDataParallel(model) if scenario.ranks > 1 else model
    if scenario.clip is None and scenario.precision == "32-true":
        create_supervised_trainer(
            wrapped,
            optimizer,
            F.mse_loss,
            gradient_accumulation_steps=scenario.accumulate,
        ).run(batches, max_epochs=1)
        return

    def step(engine: Engine, batch: Batch) -> float:
        x, y = batch
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=scenario.precision == "bf16-mixed"):
            loss = F.mse_loss(wrapped(x), y)
        loss.backward()
        if scenario.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), scenario.clip)
        optimizer.step()
        return loss.item()

    Engine(step).run(batches, max_epochs=1)


def lightning(scenario: Scenario, batches: Iterable[Batch], **options: Any) -> None:
    """Lightning's Trainer, with options of its own."""
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, _ = model_and_optimizer()

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            x, y = batch
            return F.mse_loss(self.net(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), lr=1e-3)

    Trainer(
        accelerator="cpu",
        devices=scenario.ranks,
        strategy=scenario.strategy,
        precision=scenario.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=scenario.accumulate,
        gradient_clip_val=scenario.clip,
        max_epochs=1,
        **options,
    ).fit(Module(), batches)


def lightning_barebones(scenario: Scenario, batches: Iterable[Batch]) -> None:
    """Lightning's Trainer with everything off that it can do without."""
    if scenario.clip is not None:
        lightning(
            scenario,
            batches,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        return
    lightning(scenario, batches, barebones=True)


class Regression(DreamTrainer):
    """Ours."""

    batches: Iterable[Batch]

    def configure_models(self) -> None:
        self.net, _ = model_and_optimizer()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=1e-3)

    def configure_dataloaders(self) -> Any:
        return self.batches, None

    def compute_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)


def ours(scenario: Scenario, batches: Iterable[Batch], **options: Any) -> None:
    """`DreamTrainer`, with options of its own."""
    trainer = Regression(
        DreamTrainerConfig(
            seed=1,
            device_parameters=DeviceParameters(
                accelerator=scenario.accelerator,
                devices=scenario.ranks,
                strategy=None if scenario.ranks == 1 else "ddp",
                precision=scenario.precision,  # type: ignore[arg-type]
            ),
            training_parameters=TrainingParameters(
                n_epochs=1,
                gradient_accumulation_steps=scenario.accumulate,
                gradient_clip_val=scenario.clip,
            ),
            **options,
        )
    )
    trainer.batches = batches
    trainer.fit()


def ours_bare(scenario: Scenario, batches: Iterable[Batch]) -> None:
    """`DreamTrainer` without callbacks and files."""
    ours(
        scenario,
        batches,
        callbacks=dict.fromkeys(("lr", "metrics", "progress", "checkpoint", "timeline")),
        checkpoint_parameters=CheckpointParameters(enable=False),
    )


def ours_as_it_is(scenario: Scenario, batches: Iterable[Batch]) -> None:
    """`DreamTrainer` with its default callbacks: rates, JSONL log, progress, checkpoints."""
    ours(scenario, batches)


PLAIN, FABRIC, OURS, OURS_AS_IT_IS = "plain PyTorch", "Fabric by hand", "ours, bare", "ours"
LIGHTNING = "Lightning Trainer"
TOOLS: dict[str, Callable[[Scenario, Iterable[Batch]], None]] = {
    PLAIN: plain,
    FABRIC: fabric,
    OURS: ours_bare,
    OURS_AS_IT_IS: ours_as_it_is,
    "Ignite": ignite,
    "Accelerate": accelerate,
    "Lightning, barebones": lightning_barebones,
    LIGHTNING: lightning,
}


def microseconds_of_a_batch(
    tool: str, scenario: Scenario, warm_up: int = 200, measured: int = 1_000
) -> float:
    """Train with a tool in the current folder, and say how long a batch took."""
    batches = Batches(warm_up, measured, scenario.clock)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, warnings.catch_warnings():  # noqa: PTH123
        warnings.simplefilter("ignore")
        # Progress bars draw, as in a terminal that nobody looks at.
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            TOOLS[tool](scenario, batches)
    if dist.is_initialized():
        dist.barrier()
    return batches.microseconds
