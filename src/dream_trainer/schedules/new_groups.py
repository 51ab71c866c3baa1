"""Schedulers of an optimizer that has got further parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from dream_trainer.schedules.warm_up import WarmUp

#: Rates that schedulers of torch keep for each group.
_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")


def follow_new_groups(scheduler: Any, num_before: int, like: Sequence[tuple[int, float]]) -> None:
    """Let a scheduler, and those inside of it, drive groups that its optimizer has got since.

    Schedulers of torch keep a list with an entry for each group, and would pass over the new ones,
    or raise at their next step.

    Args:
        scheduler: of torch, or a `WarmUp`, with any others inside.
        num_before: groups that it knows.
        like: for each new group the index of the one whose rates it follows, and by what factor.
    """
    if scheduler is None:
        return
    own: dict[str, Any] = vars(scheduler)
    if isinstance(scheduler, WarmUp):
        rates = own["_rates"]
        scheduler.follow_new_groups([] if rates is None else [rates[i] * f for i, f in like])
        follow_new_groups(scheduler.scheduler, num_before, like)
        return
    for name in _RATES:
        found = own.get(name)
        if isinstance(found, list) and len(found) == num_before:
            own[name] = [*found, *(found[i] * factor for i, factor in like)]
    if isinstance(found := own.get("lr_lambdas"), list) and len(found) == num_before:
        own["lr_lambdas"] = [*found, *(found[i] for i, _ in like)]
    for inner in own.get("_schedulers", ()):
        follow_new_groups(inner, num_before, like)


def scale_rates(scheduler: Any, index: int, factor: float) -> None:
    """Multiply the rates that a scheduler, and those inside of it, keep for a group.

    Args:
        scheduler: of torch, or a `WarmUp`, with any others inside.
        index: of the group.
        factor: for its rates.
    """
    own: dict[str, Any] = {} if scheduler is None else vars(scheduler)
    for name in (*_RATES, "_rates"):
        if isinstance(found := own.get(name), list) and index < len(found):
            own[name] = [rate * factor if i == index else rate for i, rate in enumerate(found)]
    inside = (scheduler.scheduler,) if isinstance(scheduler, WarmUp) else own.get("_schedulers", ())
    for inner in inside:
        scale_rates(inner, index, factor)


def load_scheduler_state(scheduler: Any, state: dict[str, Any]) -> None:
    """Load a scheduler's state, also one from after its optimizer had got further groups.

    Args:
        scheduler: whose optimizer's state is loaded already.
        state: its own; it may be changed.
    """
    known = _num_groups_known(scheduler)
    number = len(scheduler.optimizer.param_groups) if hasattr(scheduler, "optimizer") else 0
    if known is not None and known < number:
        # The rates come with the state.
        follow_new_groups(scheduler, known, [(0, 1.0)] * (number - known))
    scheduler.load_state_dict(state)


def _num_groups_known(scheduler: Any) -> int | None:
    """Parameter groups that a scheduler drives; None if it keeps nothing for each of them."""
    if isinstance(scheduler, WarmUp):
        return _num_groups_known(scheduler.scheduler)
    own = vars(scheduler) if scheduler is not None else {}
    name = "min_lrs" if isinstance(scheduler, ReduceLROnPlateau) else "base_lrs"
    if isinstance(found := own.get(name), list):
        return len(found)
    known = [_num_groups_known(inner) for inner in own.get("_schedulers", ())]
    return next((number for number in known if number is not None), None)
