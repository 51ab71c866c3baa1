"""CallbackList calls those who listen, in order, and nobody else."""

from __future__ import annotations

from typing import Any

import pytest

from dream_trainer.callbacks import Callback, CallbackList
from dream_trainer.callbacks.callback import HOOKS
from dream_trainer.errors import ConfigError


class Says(Callback):
    def __init__(self, name: str, into: list[Any]) -> None:
        self.name, self.into = name, into

    def pre_fit(self, trainer: Any) -> None:
        self.into.append((self.name, trainer))

    def state_dict(self) -> dict[str, Any]:
        return {"into": list(self.into)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.into = state["into"]


def test_callbacks_are_called_in_the_order_of_their_names() -> None:
    heard: list[Any] = []
    CallbackList({"b": Says("b", heard), "a": Says("a", heard)}).pre_fit("trainer")
    assert heard == [("b", "trainer"), ("a", "trainer")]


def test_one_object_under_two_names_is_refused() -> None:
    twice, other = Says("a", []), Says("b", [])
    with pytest.raises(ConfigError, match=r"a and c are one object.*\nMake one for each name"):
        CallbackList({"a": twice, "b": other, "c": twice})


def test_a_hook_that_nobody_overrides_is_one_and_the_same_empty_function() -> None:
    quiet, said = CallbackList({"a": Callback()}), CallbackList({"a": Says("a", [])})
    assert len({id(getattr(quiet, hook)) for hook in HOOKS}) == 1
    nothing = quiet.pre_fit
    assert [hook for hook in HOOKS if getattr(said, hook) is not nothing] == ["pre_fit"]
    assert nothing("anything", 1, 2) is None


def test_one_listener_is_called_directly() -> None:
    one = Says("a", [])
    assert CallbackList({"a": one}).pre_fit == one.pre_fit


def test_the_list_has_every_hook_itself() -> None:
    assert all(callable(getattr(CallbackList({}), hook)) for hook in HOOKS)
    assert isinstance(CallbackList({}), Callback)


def test_none_leaves_a_name_out() -> None:
    callbacks = CallbackList({"a": None, "b": Callback()})
    assert list(callbacks) == ["b"]
    assert len(callbacks) == 1
    assert "a" not in callbacks
    assert type(callbacks["b"]) is Callback


def test_what_is_no_callback_is_refused_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        CallbackList({"a": 1, "b": Callback(), "c": "x"})  # type: ignore[dict-item]
    assert caught.value.problems == ("a is a int", "c is a str")


def test_foreign_objects_are_called_for_what_they_define() -> None:
    heard: list[Any] = []

    class Foreign:
        pre_epoch = None

        def pre_fit(self, trainer: Any) -> None:
            heard.append("foreign")

    ours = Says("ours", heard)
    callbacks = CallbackList({"ours": ours}, foreign=[Foreign(), ours, Says("other", heard)])
    callbacks.pre_fit("t")
    callbacks.pre_epoch("t")
    assert heard == [("ours", "t"), "foreign", ("other", "t")]


def test_states_are_kept_by_name_and_copied() -> None:
    first = CallbackList({"a": Says("a", [1]), "plain": Callback()})
    state = first.state_dict()
    assert state == {"a": {"into": [1]}}
    second = CallbackList({"a": Says("a", []), "new": Says("new", [2])})
    second.load_state_dict(state | {"gone": {"x": 1}})
    second["a"].into.append(3)  # type: ignore[attr-defined]
    assert state == {"a": {"into": [1]}}
    assert second.state_dict() == {"a": {"into": [1, 3]}, "new": {"into": [2]}}
