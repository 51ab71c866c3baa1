"""The reference page of AbstractTrainer works as printed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from support import flat

from dream_trainer.configs import DeviceParameters
from dream_trainer.trainer import AbstractTrainer, AbstractTrainerConfig
from dream_trainer.world import DreamWorld

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")

PAGE = Path(__file__).parents[2] / "docs" / "trainers" / "abstract_trainer.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLE, *SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
MEMBERS = re.findall(r"^ {8}- (\w+)$", TEXT, re.MULTILINE)


def example_class() -> type[Any]:
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(EXAMPLE, str(PAGE), "exec"), namespace)
    return namespace["MyTrainer"]


def example(kind: type[Any] | None = None, **options: Any) -> Any:
    """The example's trainer, with what the page leaves open filled in."""
    config = AbstractTrainerConfig(device_parameters=DeviceParameters(accelerator="cpu"))
    trainer = (kind or example_class())(config, **options)
    trainer._train_dataloader = [torch.randn(2, 10) for _ in range(3)]
    trainer._val_dataloader = None
    trainer.configure()
    trainer.setup()
    return trainer


def train_a_step(trainer: Any) -> None:
    trainer.model(torch.randn(4, 10)).square().mean().backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


@pytest.fixture
def trainer() -> Any:
    torch.manual_seed(0)
    return example()


def test_the_page_has_its_parts() -> None:
    assert "class MyTrainer(AbstractTrainer):" in EXAMPLE
    assert len(SNIPPETS) == 3
    assert MEMBERS[0] == "__init__"
    assert len(MEMBERS) == 16


@pytest.mark.parametrize("member", MEMBERS)
def test_every_listed_member_exists_and_is_documented(member: str) -> None:
    found = inspect.getattr_static(AbstractTrainer, member)
    # mkdocstrings merges the class's docstring into __init__.
    assert member == "__init__" or inspect.getdoc(found)


def test_the_contract_cannot_be_instantiated_half_done() -> None:
    class Half(AbstractTrainer):
        def configure(self) -> None: ...

    with pytest.raises(TypeError, match="abstract"):
        Half(AbstractTrainerConfig())


def test_the_example_places_its_model_on_the_device_of_the_world(trainer: Any) -> None:
    assert trainer.model.weight.device == trainer.world.device
    assert trainer.get_module("main") is trainer.model
    assert len(list(trainer.train_dataloader)) == 3
    assert trainer.val_dataloader is None
    assert trainer.fit() is None


def test_the_state_of_the_example_round_trips_to_the_bit(trainer: Any) -> None:
    for _ in range(3):
        train_a_step(trainer)
    trainer.global_step, trainer.current_epoch = 3, 1
    saved = torch.load(_saved(trainer.state_dict()), weights_only=True)
    torch.manual_seed(1)
    other = example()
    assert flat(other.state_dict()["models"]) != flat(saved["models"])
    other.load_state_dict(saved)
    assert flat(other.state_dict()) == flat(trainer.state_dict())
    assert (other.global_step, other.current_epoch) == (3, 1)


def _saved(state: Any) -> Any:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_snippets_run_with_a_trainer_in_scope(
    number: int, trainer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.global_step, trainer.current_epoch, trainer.local_batches = 7, 2, 5
    namespace: dict[str, Any] = {"trainer": trainer}
    exec(SNIPPETS[number], namespace)
    printed = capsys.readouterr().out
    if number == 0:
        assert (namespace["device"], namespace["rank"]) == (torch.device("cpu"), 0)
        assert printed == ""
    elif number == 1:
        assert namespace["models"] == {"main": trainer.model}
        assert namespace["optimizers"] == {"adam": trainer.optimizer}
        assert namespace["schedulers"] is None
    else:
        assert printed == "Step: 7\nEpoch: 2\nBatches: 5\n"


def test_counters_start_at_zero_and_can_be_assigned(trainer: Any) -> None:
    names = ("global_step", "current_epoch", "local_batches")
    assert [getattr(trainer, name) for name in names] == [0, 0, 0]
    for number, name in enumerate(names, start=5):
        setattr(trainer, name, number)
    assert [getattr(trainer, name) for name in names] == [5, 6, 7]
    progress = trainer.progress
    assert (progress.num_steps, progress.epoch, progress.local_batches) == (5, 6, 7)


def test_the_world_answers_without_launch_on_one_process(trainer: Any) -> None:
    world = trainer.world
    assert isinstance(world, DreamWorld)
    assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
    assert not world.fabric._launched


def test_names_are_found_for_models_and_optimizers(trainer: Any) -> None:
    assert trainer.get_name_by_model(trainer.model) == "main"
    assert trainer.get_name_by_optimizer(trainer.optimizer) == "adam"


def test_no_schedulers_means_none_for_every_optimizer(trainer: Any) -> None:
    assert trainer.named_schedulers() is None
    assert trainer.get_scheduler_from_optimizer(trainer.optimizer) is None


def scheduled_class() -> type[Any]:
    class Scheduled(example_class()):  # type: ignore[misc]
        def configure(self) -> None:
            super().configure()
            self.plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
            self.cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)

        def setup(self) -> None:
            self.wrapped_model, self.wrapped = self.world.setup(self.model, self.optimizer)

        def named_optimizers(self) -> Any:
            return {"adam": self.optimizer, "plain": self.plain}

        def named_schedulers(self) -> Any:
            return {"cosine": self.cosine}

    return Scheduled


def test_schedulers_are_found_from_wrapped_and_unwrapped_optimizers() -> None:
    trainer = example(scheduled_class())
    assert trainer.wrapped is not trainer.optimizer
    assert trainer.get_scheduler_from_optimizer(trainer.optimizer) is trainer.cosine
    assert trainer.get_scheduler_from_optimizer(trainer.wrapped) is trainer.cosine
    assert trainer.get_scheduler_from_optimizer(trainer.plain) is None
    assert trainer.get_name_by_optimizer(trainer.wrapped) == "adam"
    assert trainer.get_name_by_model(trainer.wrapped_model) == "main"
    assert trainer.get_name_by_scheduler(trainer.cosine) == "cosine"


def test_schedulers_are_found_where_the_trainer_names_wrapped_optimizers() -> None:
    class Wrapped(scheduled_class()):  # type: ignore[misc]
        def named_optimizers(self) -> Any:
            return {"adam": self.wrapped}

        def named_models(self) -> Any:
            return {"main": getattr(self, "wrapped_model", self.model)}

    trainer = example(Wrapped)
    assert trainer.get_scheduler_from_optimizer(trainer.optimizer) is trainer.cosine
    assert trainer.get_scheduler_from_optimizer(trainer.wrapped) is trainer.cosine
    assert trainer.get_name_by_model(trainer.model) == "main"


def test_unknown_objects_raise_a_key_error_that_names_what_exists() -> None:
    trainer = example(scheduled_class())
    stranger = torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
    schedule = torch.optim.lr_scheduler.StepLR(stranger, 1)
    lookups = [
        (trainer.get_name_by_model, torch.nn.Linear(1, 1), "Linear is no model.*main"),
        (trainer.get_name_by_optimizer, stranger, "SGD is no optimizer.*adam, plain"),
        (trainer.get_scheduler_from_optimizer, stranger, "SGD is no optimizer.*adam, plain"),
        (trainer.get_name_by_scheduler, schedule, "StepLR is no scheduler.*cosine"),
    ]
    for look_up, unknown, message in lookups:
        with pytest.raises(KeyError, match=message):
            look_up(unknown)


def test_an_unknown_scheduler_of_a_trainer_without_any_says_none(trainer: Any) -> None:
    schedule = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1)
    with pytest.raises(KeyError, match="which has: none"):
        trainer.get_name_by_scheduler(schedule)


def test_the_example_runs_on_a_fabric_that_is_given() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    trainer = example(fabric=fabric)
    assert trainer.world.fabric is fabric
    assert trainer.world.device == torch.device("cpu")
