"""CallbackList: calls the hooks that someone overrides, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from dream_trainer.callbacks.callback import HOOKS, Callback
from dream_trainer.errors import ConfigError

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

Kind = TypeVar("Kind", bound=Callback)


class CallbackList(Callback):
    """Callbacks by name, called in order. Has every hook of `Callback` itself.

    Which callback overrides which hook is found out once, here: calling a hook that nobody
    overrides is one empty function.

    Args:
        callbacks: name -> callback; None leaves a name out.
        foreign: objects of any class, registered on a ``Fabric``; they are called for the hooks
            they happen to define.

    Raises:
        ConfigError: a value is no callback, or a callback has two names.
    """

    def __init__(
        self, callbacks: Mapping[str, Callback | None], foreign: Iterable[object] = ()
    ) -> None:
        self._callbacks = {name: one for name, one in callbacks.items() if one is not None}
        problems = [
            f"{name} is a {type(one).__name__}"
            for name, one in self._callbacks.items()
            if not isinstance(one, Callback)
        ]
        if problems:
            raise ConfigError("callbacks", problems, "Derive it from dream_trainer.Callback.")
        names: dict[int, list[str]] = {}
        for name, one in self._callbacks.items():
            names.setdefault(id(one), []).append(name)
        if problems := [
            f"{' and '.join(same)} are one object, whose hooks would be called {len(same)} times"
            for same in names.values()
            if len(same) > 1
        ]:
            raise ConfigError("callbacks", problems, "Make one for each name, or leave names out.")
        # One that is registered both here and on the Fabric is called once.
        self._foreign = list(foreign)
        own = set(map(id, self._callbacks.values()))
        everyone = [*self._callbacks.values(), *(one for one in foreign if id(one) not in own)]
        self._listeners: dict[str, list[Any]] = {}
        for hook in HOOKS:
            inherited = getattr(Callback, hook)
            listeners = [
                method
                for one in everyone
                if callable(method := getattr(one, hook, None))
                and getattr(type(one), hook, None) is not inherited
            ]
            self._listeners[hook] = listeners
        self._around: list[Callable[[str, Callable[..., None]], Callable[..., None]]] = []
        self.surround(None)

    def __reduce__(self) -> tuple[Any, ...]:
        # Dispatchers do not pickle, and ranks that are spawned make their own.
        return type(self), (self._callbacks, self._foreign)

    def surround(
        self, around: Callable[[str, Callable[..., None]], Callable[..., None]] | None
    ) -> None:
        """Put something around every call of a hook, to time it for example.

        Args:
            around: given the name of a hook and the method of one callback, what is called in its
                place, outside of what is around it already; None takes all of it away.
        """
        self._around = [] if around is None else [*self._around, around]
        for hook, listeners in self._listeners.items():
            called = listeners
            for outer in self._around:
                called = [outer(hook, one) for one in called]
            is_end = hook == "close" and len(called) > 1
            setattr(self, hook, _at_the_end(called) if is_end else _dispatcher(called))

    def overrides(self, hook: str) -> bool:
        """Whether any callback has a hook of its own."""
        return bool(self._listeners[hook])

    def holding_weights(self) -> dict[str, Any]:
        """The callbacks, by name, whose state holds weights for evaluations."""
        return {name: one for name, one in self._callbacks.items() if one.holds_weights}

    def of_kind(self, kind: type[Kind]) -> dict[str, Kind]:
        """The callbacks, by name, that are of a class."""
        return {name: one for name, one in self._callbacks.items() if isinstance(one, kind)}

    def preceded_by(self, name: str, callback: Callback) -> CallbackList:
        """The same callbacks, after another one."""
        return type(self)({name: callback, **self._callbacks}, self._foreign)

    def followed_by(self, name: str, callback: Callback) -> CallbackList:
        """The same callbacks, before another one."""
        return type(self)({**self._callbacks, name: callback}, self._foreign)

    def __getitem__(self, name: str) -> Callback:
        return self._callbacks[name]

    def __contains__(self, name: object) -> bool:
        return name in self._callbacks

    def __iter__(self) -> Any:
        return iter(self._callbacks)

    def __len__(self) -> int:
        return len(self._callbacks)

    def state_dict(self) -> dict[str, Any]:
        """State of the callbacks that have one, by name."""
        return {
            name: one.state_dict()
            for name, one in self._callbacks.items()
            if hasattr(one, "state_dict")
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *, copies: bool = True) -> None:
        """Restore the callbacks that have a state in ``state_dict``.

        Args:
            state_dict: what `state_dict` gave.
            copies: False lets callbacks keep what they are given, and change it later.
        """
        for name, one in self._callbacks.items():
            if name in state_dict and hasattr(one, "load_state_dict"):
                state = state_dict[name]
                one.load_state_dict(copy.deepcopy(state) if copies else state)

    @contextmanager
    def evaluation(self, trainer: BaseTrainer, phase: str) -> Iterator[None]:
        """What callbacks put around the batches of an evaluation.

        Those that have ``evaluation(trainer, phase)``, a context manager, are left again however
        it ends: a state is never taken in between.

        Args:
            trainer: that evaluates.
            phase: ``"val"``, ``"test"``, ``"predict"``, ``"sanity"`` or ``"export"``.
        """
        with ExitStack() as stack:
            for one in self._callbacks.values():
                if (around := getattr(one, "evaluation", None)) is not None:
                    stack.enter_context(around(trainer, phase))
            yield


def _dispatcher(listeners: list[Callable[..., None]]) -> Callable[..., None]:
    if len(listeners) == 1:
        return listeners[0]

    def call(*args: Any) -> None:
        for listener in listeners:
            listener(*args)

    return call if listeners else _nothing


def _at_the_end(listeners: list[Callable[..., None]]) -> Callable[..., None]:
    """All of them are called, also after one that has failed: each has something to put back."""

    def call(*args: Any) -> None:
        with ExitStack() as stack:
            for listener in reversed(listeners):
                stack.callback(listener, *args)

    return call


def _nothing(*args: Any) -> None:
    pass
