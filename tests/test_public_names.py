"""The front door: what is promised by name can be imported by that name, and costs nothing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import get_type_hints

import pytest

import dream_trainer

#: Module -> names, as the architecture's section "Names" promises them.
PROMISED = {
    "dream_trainer.trainer": (
        "AbstractTrainer",
        "AbstractTrainerConfig",
        "BaseTrainer",
        "BaseTrainerConfig",
        "DreamTrainer",
        "DreamTrainerConfig",
    ),
    "dream_trainer.configs": ("DeviceParameters", "TrainingParameters", "CheckpointParameters"),
    "dream_trainer.world": ("DreamWorld", "DreamFabric", "MeshStrategy"),
    "dream_trainer.data": ("ResumableLoader",),
    "dream_trainer.checkpointing": ("Checkpointer", "export_checkpoint"),
    "dream_trainer.callbacks": ("Callback",),
    "dream_trainer.cli": ("DreamCLI",),
    "dream_trainer.inspection": ("benchmark", "find_graph_breaks", "profile_run"),
    "dream_trainer.planning": ("RunPlan", "plan_run"),
    "dream_trainer.verification": ("ResumeReport", "verify_resume"),
}
NAMES = [(module, name) for module, names in PROMISED.items() for name in names]


def loaded_modules(statement: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_promised_name_is_where_it_is_promised_and_at_the_root(module: str, name: str) -> None:
    home = importlib.import_module(module)
    assert name in home.__all__
    assert getattr(dream_trainer, name) is getattr(home, name)


@pytest.mark.parametrize("name", dream_trainer.__all__)
def test_every_exported_name_is_importable(name: str) -> None:
    assert getattr(dream_trainer, name) is not None


def test_every_callback_that_is_shipped_is_exported() -> None:
    from dream_trainer import callbacks

    shipped = {
        name
        for name in callbacks.__all__
        if isinstance(getattr(callbacks, name), type)
        and issubclass(getattr(callbacks, name), callbacks.Callback)
    }
    shipped.remove("CallbackList")  # what the trainer keeps them in
    assert shipped <= set(dream_trainer.__all__)


def test_exported_names_are_sorted_and_all_promised_ones_are_among_them() -> None:
    # As ruff sorts them: names in capitals first.
    in_order = sorted(dream_trainer.__all__, key=lambda name: (not name.isupper(), name))
    assert list(dream_trainer.__all__) == in_order
    assert {name for _, name in NAMES} <= set(dream_trainer.__all__)


def test_dir_lists_every_exported_name() -> None:
    assert set(dream_trainer.__all__) <= set(dir(dream_trainer))


def test_an_unknown_name_is_an_attribute_error_that_says_it() -> None:
    with pytest.raises(AttributeError, match="NoSuchTrainer"):
        dream_trainer.NoSuchTrainer  # noqa: B018


def test_importing_the_package_loads_neither_torch_nor_lightning() -> None:
    loaded = {name.partition(".")[0] for name in loaded_modules("import dream_trainer")}
    assert loaded.isdisjoint({"torch", "lightning", "numpy", "rich", "jsonargparse"})


def test_configs_are_read_without_torch_and_without_lightning() -> None:
    loaded = loaded_modules("from dream_trainer import DeviceParameters; DeviceParameters.DDP()")
    assert loaded.isdisjoint({"torch", "lightning"})


@pytest.mark.parametrize("name", ["AbstractTrainer", "BaseTrainer", "DreamTrainer"])
def test_the_type_of_a_trainers_config_can_be_read(name: str) -> None:
    trainer, config = getattr(dream_trainer, name), getattr(dream_trainer, f"{name}Config")
    assert get_type_hints(trainer)["config"] is config
    assert get_type_hints(config)["seed"] == (int | None)
