"""RunPlan: what a run would be, as numbers and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dream_trainer.planning.epochs import LoaderPlan, StepPlan
from dream_trainer.planning.holdings import whole_bytes
from dream_trainer.planning.layout import RankLayout
from dream_trainer.planning.memory import MemoryPlan

#: Measured: what a piece of a tensor, and a rank, add to a checkpoint at most.
_PER_PART, _PER_RANK = 2560, 32768


@dataclass(frozen=True)
class RunPlan:
    """The outcome of `plan_run`. ``str(plan)`` is a table, `as_dict` plain data."""

    layout: RankLayout
    """Ranks, nodes and groups."""
    precision: str
    """In Fabric's names."""
    memory: MemoryPlan
    """Models, optimizers, and what each rank holds."""
    train: LoaderPlan | None
    """An epoch of training; None if the data is not here."""
    val: LoaderPlan | None
    """A validation; None without one."""
    steps: StepPlan
    """Optimizer steps."""
    epochs: int | None
    """``n_epochs``."""
    notes: tuple[str, ...]
    """What is uneven, slow, or not known; a sentence each."""

    def bytes_on(self, rank: int) -> dict[str, int | None]:
        """Bytes that a rank holds.

        Returns:
            ``"parameters"``, ``"gradients"``, ``"optimizer_state"``, ``"buffers"`` and
            ``"averages"`` (of weights, by `EMA` or `SWA`); for a while only ``"gathered"`` (the
            largest part that FSDP gathers at once) and ``"window_gradients"`` (of an accumulation
            window under FSDP, before they are added up over the ranks); and ``"checkpoint"``, what
            it writes of one, at most: of equal parts one rank's is written. None is not known.

        Raises:
            IndexError: there is no such rank.
        """
        if not 0 <= rank < self.layout.num_ranks:
            raise IndexError(f"rank {rank} of {self.layout.num_ranks}")
        return self.memory.held(self.layout, rank)

    @property
    def checkpoint_bytes(self) -> int | None:
        """Bytes of the tensors in a checkpoint; None if an optimizer's state is not known.

        State that callbacks keep comes on top, except for averages of weights.
        """
        return self.memory.checkpoint_bytes(self.layout)

    @property
    def checkpoint_bytes_on_disk(self) -> int | None:
        """Bytes of a checkpoint's files, at most: headers, names and random streams included."""
        tensors, parts = self.checkpoint_bytes, self.memory.checkpoint_parts(self.layout)
        if tensors is None or parts is None:
            return None
        return tensors + _PER_PART * parts + _PER_RANK * self.layout.num_ranks

    @property
    def extremes(self) -> tuple[int, ...]:
        """The ranks that hold most and least; one of them if all hold the same."""
        # Chunks only become smaller along a dimension of the mesh, those of every tensor.
        first, last = 0, self.layout.num_ranks - 1
        return (first,) if self.bytes_on(first) == self.bytes_on(last) else (first, last)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data: numbers, texts, lists and mappings."""
        layout = self.layout
        groups = [{**asdict(group), "first": group.first} for group in layout.groups]
        return {
            "layout": {**asdict(layout), "groups": groups, "dp_size": layout.dp_size},
            "precision": self.precision,
            "models": {
                model.name: {
                    "type": model.type,
                    "trainable_parameters": model.trainable,
                    "frozen_parameters": model.frozen,
                    "bytes": whole_bytes(model.parameters),
                    "buffer_bytes": whole_bytes(model.buffers),
                    "gathered_at_once": model.gathered
                    and {"part": model.gathered[0], "bytes": model.gathered[1]},
                }
                for model in self.memory.models
            },
            "optimizers": {
                one.name: {
                    "type": one.type,
                    "state_bytes": None if one.state is None else whole_bytes(one.state),
                }
                for one in self.memory.optimizers
            },
            "bytes_per_rank": {str(rank): self.bytes_on(rank) for rank in self.extremes},
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoint_bytes_on_disk": self.checkpoint_bytes_on_disk,
            "train": self.train and asdict(self.train),
            "val": self.val and asdict(self.val),
            "steps": asdict(self.steps),
            "epochs": self.epochs,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        # Here, because a plan that is only read as numbers needs no tables.
        from dream_trainer.planning.table import as_text

        return as_text(self)
