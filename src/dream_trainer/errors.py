"""The exceptions that this package raises on purpose."""

from __future__ import annotations

from collections.abc import Sequence


class ProblemsError(ValueError):
    """An error that lists every problem found at one place and ends with the next move.

    Args:
        place: What was looked at, in the user's own words (a config class, a file).
        problems: One sentence each; at least one.
        next_move: What to do about it.
    """

    def __init__(self, place: str, problems: Sequence[str], next_move: str = "") -> None:
        self.place = place
        self.problems = tuple(problems)
        self.next_move = next_move
        super().__init__(str(self))

    def __reduce__(self) -> tuple[type[ProblemsError], tuple[str, tuple[str, ...], str]]:
        # Rank 0 sends its errors to the others.
        return type(self), (self.place, self.problems, self.next_move)

    def __str__(self) -> str:
        head = f"{self.place}: " if len(self.problems) == 1 else f"{self.place}:\n  - "
        text = head + "\n  - ".join(self.problems)
        return f"{text}\n{self.next_move}" if self.next_move else text


class ConfigError(ProblemsError):
    """A configuration that cannot work; nothing has been run or written yet."""


class StateError(ProblemsError):
    """A state that does not fit the objects it is loaded into; nothing has been loaded."""


class CheckpointError(ProblemsError):
    """A checkpoint that cannot be read: damaged, unsafe, incomplete or of another format."""


class NonFiniteError(ArithmeticError):
    """A loss, gradient norm, parameter or optimizer state became NaN or infinite."""


class UnknownComponentError(KeyError):
    """A look-up of a model, optimizer, scheduler or module that the trainer does not have."""

    def __str__(self) -> str:
        return str(self.args[0])
