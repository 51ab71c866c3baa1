"""Throughput: samples, tokens and steps a second, and how much of the device they use."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from dream_trainer.callbacks.callback import Callback
from dream_trainer.callbacks.flops import FlopCount, has_compiled, peak_flops
from dream_trainer.errors import ConfigError
from dream_trainer.host_values import Value, to_host

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class Throughput(Callback):
    """Measures samples, tokens, batches and steps a second, and the share of the device in use.

    Names are ``throughput/samples_per_second``, ``throughput/tokens_per_second`` and so on, and
    ``throughput/mfu``. Rates are over the seconds of training and of waiting for the loader
    between two lines of the timeline. Samples are those of all data-parallel ranks; tokens are
    those of rank 0 times these ranks.

    ``mfu`` is the share of the device's peak that the operations of forward and backward need.
    They are counted once, while the second batch after a start is trained on, which changes
    nothing of it; every batch is taken to need as many. With ``torch.compile``, give them.

    It has no state, and no part in the run: no collective, no synchronisation in a step.

    Args:
        tokens: number of tokens in a batch. Without it, the ``weight`` given to ``backward``.
        flops_per_batch: floating-point operations of forward and backward, on one device.
        peak_flops: what the device can do in a second. Without it, from a table of accelerators;
            a device that is not in it has no ``mfu``.

    Raises:
        ConfigError: a number is not above 0.
    """

    def __init__(
        self,
        *,
        tokens: Callable[[Any], Value] | None = None,
        flops_per_batch: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        given = {"flops_per_batch": flops_per_batch, "peak_flops": peak_flops}
        problems = [
            f"{name}={value!r} is not a number above 0"
            for name, value in given.items()
            if value is not None and not value > 0
        ]
        if problems:
            raise ConfigError("Throughput", problems, "Leave it out, and it is found.")
        self.flops_per_batch, self.peak_flops = flops_per_batch, peak_flops
        self._tokens_of = tokens
        self._is_measuring = False
        self._flops, self._peak = flops_per_batch, peak_flops
        self._tokens: Value = 0
        self._weight: Value | None = None
        self._has_tokens = False
        self._num_batches = self._num_samples = self._first_step = self._num_since_start = 0
        self._count: FlopCount | None = None

    def pre_fit(self, trainer: BaseTrainer) -> None:
        """Begin to count, on rank 0."""
        self._is_measuring = trainer.world.is_global_zero
        if not self._is_measuring:
            return
        world = trainer.world
        self._flops, self._peak = self.flops_per_batch, self.peak_flops
        if self._peak is None:
            self._peak = peak_flops(world.device, world.precision)
        self._num_since_start, self._has_tokens = 0, self._tokens_of is not None
        self._begin(trainer)

        def source(seconds: float) -> dict[str, float | None]:
            return self._rates(trainer, seconds)

        trainer.measured.ask("throughput", source)

    def pre_train_step(self, trainer: BaseTrainer, batch: Any, batch_idx: int) -> None:
        """Count the operations of the second batch: by then, what is compiled has been."""
        if not self._is_measuring:
            return
        self._num_since_start += 1
        if self._num_since_start == 2 and self._flops is None and self._peak is not None:
            if has_compiled():
                text = "Throughput cannot count what torch.compile makes; give flops_per_batch"
                warnings.warn(text, stacklevel=2)
                return
            self._count = FlopCount(trainer.world.tp_size)
            self._count.__enter__()  # type: ignore[no-untyped-call]

    def pre_optimizer_step(self, trainer: BaseTrainer, optimizer: Optimizer) -> None:
        """Take the weights of the window, if there are any."""
        if self._is_measuring and self._tokens_of is None:
            self._weight = trainer.window.weight

    def post_train_step(
        self, trainer: BaseTrainer, result: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch."""
        if not self._is_measuring:
            return
        if self._count is not None:
            self._flops = self._counted()
        self._num_batches += 1
        self._num_samples += trainer.loop.train_loader.num_samples_all_ranks or 0
        if self._tokens_of is not None:
            self._tokens = self._tokens + self._tokens_of(batch)
        elif self._weight is not None:
            # Not in place: the first summand is the user's own tensor.
            self._tokens, self._weight = self._tokens + self._weight, None
            self._has_tokens = True

    def close(self, trainer: BaseTrainer) -> None:
        """Count no more, if an error came while the second batch was trained on."""
        if self._count is not None:
            self._counted()

    def _counted(self) -> float | None:
        assert self._count is not None
        count, self._count = self._count, None
        count.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return count.flops or None

    def _begin(self, trainer: BaseTrainer) -> None:
        self._num_batches = self._num_samples = 0
        self._tokens, self._first_step = 0, trainer.global_step

    def _rates(self, trainer: BaseTrainer, seconds: float) -> dict[str, float | None]:
        if seconds <= 0 or not self._num_batches:
            return {}
        rates: dict[str, float | None] = {
            "samples_per_second": self._num_samples / seconds if self._num_samples else None,
            "batches_per_second": self._num_batches / seconds,
            "steps_per_second": (trainer.global_step - self._first_step) / seconds,
        }
        if self._has_tokens:
            (tokens,) = to_host([self._tokens])
            rates["tokens_per_second"] = tokens * trainer.world.dp_size / seconds
        if self._flops is not None and self._peak is not None:
            rates["mfu"] = self._flops * self._num_batches / seconds / self._peak
        self._begin(trainer)
        return {f"throughput/{name}": value for name, value in rates.items()}
