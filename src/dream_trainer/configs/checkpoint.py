"""When checkpoints are made, which are kept, and from where a run starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dream_trainer.configs.numbers import is_count, not_above_zero
from dream_trainer.errors import ConfigError

_CHANGEABLE = ("seed", "dataset_length", "stop_reason")
_COUNTS = ("every_n_steps", "every_n_epochs", "keep_every_n_steps")


@dataclass(kw_only=True)
class CheckpointParameters:
    """Triggers, retention and resume of a run's checkpoints.

    Raises:
        ConfigError: with all problems of the values at once.
    """

    enable: bool = True
    """Whether the run writes checkpoints."""
    every_n_steps: int | None = None
    """Save after every n-th optimizer step."""
    every_n_epochs: int | None = 1
    """Save after every n-th epoch. The end of a run always saves."""
    every_n_minutes: float | None = None
    """Save when so many minutes have passed since the last save, by rank 0's clock."""
    after_validation: bool = False
    """Save after every validation."""
    on_interrupt: bool = True
    """Save when Ctrl-C or SIGTERM ends the run, after the batch under way."""
    monitor: str | None = None
    """The metric that ranks checkpoints, ``"val/loss"`` for example."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger monitored value is better."""
    keep_top_k: int = 1
    """Best checkpoints to keep, by ``monitor``."""
    keep_last: int = 2
    """Newest checkpoints to keep; at least 1."""
    keep_every_n_steps: int | None = None
    """Keep for good every checkpoint at a multiple of n steps."""
    async_save: bool = True
    """Let training go on while a checkpoint is written. Costs CPU memory for one more state."""
    save_frozen: bool = True
    """Whether checkpoints hold the weights that never train. If not, the program must bring the
    same ones at every start, the base model under LoRA adapters; their checksums are compared."""
    resume: str = "auto"
    """``"auto"`` continues the newest whole checkpoint of this run if there is one,
    ``"never"`` starts a fresh run directory, ``"must"`` fails without one, a path takes that."""
    allow_changed: list[str] = field(default_factory=list)
    """What may differ from the checkpoint although it ends exactness: ``"seed"``,
    ``"dataset_length"``, ``"stop_reason"`` (go on although the run was stopped)."""
    init_from: str | None = None
    """Where a fresh run takes its model weights from: a checkpoint or a run's directory of ours,
    a file of ``fabric.save`` or ``torch.save``, a Lightning ``.ckpt``, or ``.safetensors``."""
    init_from_average: str | None = None
    """Name of the callback whose averages are taken from the run in ``init_from``, ``"ema"`` for
    example, instead of the model's own weights; what it did not average is the model's."""
    init_rename: dict[str, str | int | None] = field(default_factory=dict)
    """Beginnings of names in ``init_from`` and what stands there here; null leaves a part out."""
    init_strict: bool = True
    """Whether all of ``init_from`` must fit; if not, what fits is loaded and the rest reported."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r} is not a whole number above 0"
            for name in _COUNTS
            if (value := getattr(self, name)) is not None and not is_count(value)
        ]
        problems += not_above_zero("every_n_minutes", self.every_n_minutes)
        if self.mode not in ("min", "max"):
            problems.append(f"mode={self.mode!r} is neither 'min' nor 'max'")
        if not is_count(self.keep_last):
            problems.append(f"keep_last={self.keep_last!r}: the newest checkpoint must stay")
        if self.keep_top_k != 0 and not is_count(self.keep_top_k):
            problems.append(f"keep_top_k={self.keep_top_k!r} is not a whole number from 0")
        unknown = [name for name in self.allow_changed if name not in _CHANGEABLE]
        problems += [
            f"allow_changed: {name!r} is none of {', '.join(_CHANGEABLE)}" for name in unknown
        ]
        if self.init_rename and self.init_from is None:
            problems.append("init_rename is set and init_from is not: there is nothing to rename")
        if self.init_from_average is not None and self.init_from is None:
            problems.append("init_from_average is set and init_from is not")
        problems += [
            f"init_rename: {old!r}: {new!r} is neither a name nor null"
            for old, new in self.init_rename.items()
            # Layers of a Sequential are numbers, and YAML reads them as such.
            if not isinstance(new, (str, int, type(None))) or isinstance(new, bool)
        ]
        if problems:
            raise ConfigError("checkpoint_parameters", problems)
