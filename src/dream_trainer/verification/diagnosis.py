"""What a difference likely comes from: a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Evidence:
    """What differs at the first moment at which anything does. Paths, in the order of a step."""

    is_resumed: bool
    """Whether the other run was resumed; else it was a second straight one."""
    is_start: bool = False
    """Whether it differs before the first step."""
    failure: str = ""
    """The exception that ended the resumed run."""
    elsewhere: str = ""
    """Where the resumed run looked for a checkpoint, if it found none."""
    course: bool = False
    """Whether the runs are at different places: one has ended, or validated, and one not."""
    batches: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    """Generators and counters of the loader, its sampler and data set that differ."""
    state: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    """Attributes that differ, and that were not restored either."""
    stateful_callbacks: frozenset[str] = frozenset()
    """Names of callbacks that have a state."""
    log: tuple[str, ...] = ()

    def attributes_of(self, kind: str) -> list[tuple[str, str]]:
        """(owner, attribute) of those of ``"callbacks"``, ``"models"`` or the ``"trainer"``."""
        found = [path.rpartition(".") for path in self.attributes]
        return [(owner, name) for owner, _, name in found if owner.partition(".")[0] == kind]

    def state_of(self, *parts: str) -> list[str]:
        """Paths of the state below some of its parts."""
        return [path for path in self.state if path.partition(".")[0] in parts]


class Rule(NamedTuple):
    """A row: the first one that applies is the cause."""

    applies: Callable[[Evidence], object]
    cause: Callable[[Evidence], str]


def _always(text: str) -> Callable[[Evidence], str]:
    return lambda _: text


#: Two runs that nobody interrupted differ.
STRAIGHT = (
    Rule(
        lambda e: e.is_start,
        _always(
            "unseeded randomness in configure_models, init_weights or __init__: what they draw "
            "from a generator of their own needs a seed, and the global generators are seeded "
            "after __init__"
        ),
    ),
    Rule(
        lambda e: e.batches,
        lambda e: (
            "unseeded randomness in the data set or loader (for example np.random.default_rng() "
            "without a seed)" + _in_the_data(e)
        ),
    ),
    Rule(
        lambda e: e.state_of("rng"),
        _always(
            "something seeds the global generators from the clock (random.seed(), torch.seed()), "
            "or draws from them a number of times that the clock decides"
        ),
    ),
    Rule(
        lambda e: e.state_of("models", "optimizers", "schedulers", "precision"),
        _always(
            "unseeded randomness in training_step or configure_*, or a nondeterministic kernel: "
            "TrainingParameters(deterministic=True) names it"
        ),
    ),
    Rule(
        lambda e: e.log,
        lambda e: (
            f"{e.log[0]} is logged from a clock or from unseeded randomness; if that is meant, "
            f"pass ignore=[{e.log[0]!r}]"
        ),
    ),
    Rule(
        lambda e: e.course,
        _always("a clock or unseeded randomness decides when the run validates or ends"),
    ),
    Rule(
        lambda e: True,
        lambda e: (
            f"{e.state[0]} holds what a clock says, or unseeded randomness; if that is meant, pass "
            f"ignore=[{e.state[0]!r}]"
        ),
    ),
)

#: The run that was killed and resumed differs from the straight one.
RESUMED = (
    Rule(
        lambda e: e.failure,
        _always(
            "restoring fails, or what comes first after it: state_dict and load_state_dict of a "
            "callback, module or loader do not fit each other, or something that only the first "
            "steps of a run make is missing"
        ),
    ),
    Rule(
        lambda e: e.elsewhere,
        lambda e: (
            f"a restart finds no checkpoint, because it looks in {e.elsewhere}: a name that is "
            "made anew in each process (a time, a random number) hides the run from itself"
        ),
    ),
    Rule(
        lambda e: e.batches,
        lambda e: (
            "the loader (or its sampler or data set object) keeps a position or generator of its "
            "own and has no state_dict; draw from the global generators, which are seeded per "
            "sample, or give the loader a state_dict and load_state_dict" + _in_the_data(e)
        ),
    ),
    Rule(
        lambda e: any(not _is_stateful(e, owner) for owner, _ in e.attributes_of("callbacks")),
        lambda e: _kept_by_callback(e, is_stateful=False),
    ),
    Rule(
        lambda e: e.attributes_of("callbacks"),
        lambda e: _kept_by_callback(e, is_stateful=True),
    ),
    Rule(
        lambda e: e.attributes_of("models"),
        lambda e: (
            "{0} keeps {1} outside of its buffers; register_buffer({1!r}, torch.tensor(...)) "
            "makes it part of the state".format(*e.attributes_of("models")[0])
        ),
    ),
    Rule(
        lambda e: e.attributes,
        lambda e: (
            "the trainer keeps {1} between steps, and its state does not; keep it in a callback "
            "with state_dict and load_state_dict, or as a buffer of a module "
            "(register_buffer)".format(*e.attributes_of("trainer")[0])
        ),
    ),
    Rule(
        lambda e: e.state_of("rng"),
        _always(
            "something draws random numbers between restore and the first step, or in code that "
            "a restart runs again: the first batch of a process, a hook (pre_fit, ...), a cache "
            "that is filled on first use"
        ),
    ),
    Rule(
        lambda e: e.state_of("models", "optimizers", "precision", "trainer"),
        _always(
            "a step depends on something outside of the trainer's state (a global variable, a "
            "closure, an object of another package), a hook that a restart calls again changes "
            "what was restored, or a kernel is nondeterministic: "
            "TrainingParameters(deterministic=True) names it"
        ),
    ),
    Rule(
        lambda e: e.state,
        lambda e: (
            f"load_state_dict of {_owner(e.state[0])} does not bring back what its state_dict "
            "gave, or something changes it afterwards"
        ),
    ),
    Rule(
        lambda e: e.course,
        _always(
            "what decides when the run validates or ends (trainer.stop(), for example) is kept "
            "where a restart loses it"
        ),
    ),
    Rule(
        lambda e: e.log,
        _always(
            "a value that is logged comes from outside of the state: a count or mean kept since "
            "the process started, for example"
        ),
    ),
    Rule(
        lambda e: True,
        _always(
            "it was restored, but something that it is made from was not: a global variable, a "
            "closure, an object of another package"
        ),
    ),
)


def diagnose(evidence: Evidence) -> str:
    """The likely cause of a difference, and what to do."""
    rules = RESUMED if evidence.is_resumed else STRAIGHT
    return next(rule.cause(evidence) for rule in rules if rule.applies(evidence))


def _in_the_data(evidence: Evidence) -> str:
    return f". It may be {evidence.data[0]}, which differs" if evidence.data else ""


def _owner(path: str) -> str:
    return " ".join(path.split(".")[:2]).replace("callbacks", "callback").replace("rs ", "r ")


def _is_stateful(evidence: Evidence, owner: str) -> bool:
    return owner.partition(".")[2] in evidence.stateful_callbacks


def _kept_by_callback(evidence: Evidence, *, is_stateful: bool) -> str:
    owner, attribute = next(
        (owner, attribute)
        for owner, attribute in evidence.attributes_of("callbacks")
        if _is_stateful(evidence, owner) == is_stateful
    )
    name = owner.partition(".")[2]
    advice = (
        "which its state_dict and load_state_dict leave out"
        if is_stateful
        else "give it state_dict and load_state_dict"
    )
    joint = "," if is_stateful else ";"
    return f"callback {name} keeps {attribute} between steps{joint} {advice}"
