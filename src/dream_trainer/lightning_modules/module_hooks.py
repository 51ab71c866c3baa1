"""The hooks of a LightningModule, at their places in this package's run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from dream_trainer.callbacks import Callback
from dream_trainer.errors import ConfigError
from dream_trainer.schedules import load_scheduler_state
from dream_trainer.world.wrappers import unwrap

if TYPE_CHECKING:
    from dream_trainer.lightning_modules.schedules import Schedule
    from dream_trainer.lightning_modules.trainer import LightningModuleTrainer


class ModuleHooks(Callback):
    """Calls a module's hooks and steps its schedules; keeps what they have for a restart.

    Args:
        run: the trainer that runs the module.
    """

    def __init__(self, run: LightningModuleTrainer) -> None:
        self._run = run
        self._is_plateau_due = self._is_epoch_stepped = False

    def pre_fit(self, trainer: Any) -> None:
        """``on_fit_start``, ``on_train_start``."""
        self._run.call("on_fit_start")
        self._run.call("on_train_start")

    def pre_train_epoch(self, trainer: Any) -> None:
        """``on_train_epoch_start``."""
        self._run.journal.phase = "train"
        self._run.call("on_train_epoch_start")

    def pre_optimizer_step(self, trainer: Any, optimizer: Optimizer) -> None:
        """``on_before_optimizer_step``, and a module's own clipping."""
        run = self._run
        own = unwrap(optimizer)
        run.call("on_before_optimizer_step", own)
        if run.clips_itself:
            run.call("configure_gradient_clipping", own, run.gradient_clip_val, None)

    def post_optimizer_step(self, trainer: Any, optimizer: Optimizer) -> None:
        """``on_before_zero_grad``."""
        self._run.call("on_before_zero_grad", unwrap(optimizer))

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        """Schedules by step, ``on_train_batch_end``."""
        run = self._run
        if not trainer.window.is_accumulating:
            self._step("step", batch_idx, needs_value=False)
            self._is_plateau_due = True
        if trainer.progress.last_batch_finished:
            self._step_epoch(trainer)
        run.call("on_train_batch_end", run.outputs, batch, batch_idx)
        run.outputs, run.journal.is_in_step = None, False

    def post_train_epoch(self, trainer: Any) -> None:
        """Schedules by epoch, if nobody knew that the last batch was the last one."""
        self._step_epoch(trainer)

    def post_epoch(self, trainer: Any) -> None:
        """``on_train_epoch_end``, then schedules that look for a plateau."""
        self._run.journal.phase = "train"
        self._run.call("on_train_epoch_end")
        self._step("epoch", trainer.current_epoch, needs_value=True)
        self._is_epoch_stepped = False

    def on_boundary(self, trainer: Any) -> None:
        """After the validation of a step: schedules that look for a plateau."""
        if self._is_plateau_due:
            self._is_plateau_due = False
            self._step("step", max(trainer.progress.num_batches_in_epoch - 1, 0), needs_value=True)

    def post_fit(self, trainer: Any) -> None:
        """``on_train_end``, ``on_fit_end``."""
        self._run.call("on_train_end")
        self._run.call("on_fit_end")

    def _step_epoch(self, trainer: Any) -> None:
        if not self._is_epoch_stepped:
            self._is_epoch_stepped = True
            self._step("epoch", trainer.current_epoch, needs_value=False)

    def _step(self, interval: str, index: int, *, needs_value: bool) -> None:
        run = self._run
        if not run.module.automatic_optimization:
            return  # the module steps them
        for schedule in run.schedules:
            if schedule.is_due(interval, index, needs_value=needs_value):
                value = self._monitored(schedule) if needs_value else None
                if value is not None or not needs_value:
                    run.module.lr_scheduler_step(schedule.scheduler, value)

    def _monitored(self, schedule: Schedule) -> Any:
        assert schedule.monitor is not None
        journal = self._run.journal
        value = journal.monitored(schedule.monitor)
        if value is None and schedule.strict:
            raise ConfigError(
                "configure_optimizers",
                [f"monitor={schedule.monitor!r} was not logged before the scheduler's step"],
                f"Logged were: {', '.join(journal.latest) or 'no values'}. Log it, name another "
                'one, or set "strict": False.',
            )
        return value

    def state_dict(self) -> dict[str, Any]:
        """Schedules, and what the module and its data module add."""
        run = self._run
        datamodule = run.datamodule
        return {
            "schedules": [schedule.scheduler.state_dict() for schedule in run.schedules],
            "latest": run.journal.numbers(),  # for another layout of ranks; else each has its own
            "is_plateau_due": self._is_plateau_due,
            "is_epoch_stepped": self._is_epoch_stepped,
            "module": run.additions(),
            "datamodule": {} if datamodule is None else datamodule.state_dict(),
            "hyper_parameters": run.hyper_parameters(),
            "hparams_name": getattr(run.module, "_hparams_name", None),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        run = self._run
        for schedule, state in zip(run.schedules, state_dict["schedules"], strict=True):
            load_scheduler_state(schedule.scheduler, dict(state))
        run.journal.latest = dict(state_dict["latest"])
        self._is_plateau_due = state_dict["is_plateau_due"]
        self._is_epoch_stepped = state_dict["is_epoch_stepped"]
        run.take_additions(state_dict["module"])
        if run.datamodule is not None and state_dict["datamodule"]:
            run.datamodule.load_state_dict(state_dict["datamodule"])
