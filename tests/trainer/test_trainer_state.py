"""state_dict and load_state_dict of a trainer: complete, strict, and polite to their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from support import (
    RecordingCallback,
    TinyTrainer,
    deep_copy,
    differences,
    exact_state,
    flat,
    tiny,
    tiny_config,
)
from torchmetrics import MeanMetric

from dream_trainer.callbacks import Callback
from dream_trainer.data import ResumableLoader
from dream_trainer.errors import StateError
from dream_trainer.world import DreamFabric

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


class Measured(TinyTrainer):
    def configure_metrics(self) -> None:
        self.mean = MeanMetric()

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().compute_loss(batch, batch_idx)
        self.mean.update(loss)
        return loss


class Remembers(Callback):
    """Has a state that it goes on changing in place."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def post_train_step(self, trainer: Any, result: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(result["loss"].item())

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = state["losses"]


def trained(root: Path, kind: type[TinyTrainer] = Measured, **options: Any) -> Any:
    options = {"max_steps": 4, "n_epochs": None, "enable": False, "dropout": 0.3} | options
    trainer = tiny(root, kind, callbacks={"remembers": Remembers()}, **options)
    trainer.fit()
    return trainer


def test_the_state_has_the_parts_that_the_map_names(tmp_path: Path) -> None:
    state = trained(tmp_path).state_dict()
    parts = "trainer models optimizers schedulers dataloaders callbacks precision rng"
    assert list(state) == parts.split()
    assert list(state["models"]["net"]) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    names = {f"net.{name}" for name in state["models"]["net"]}
    assert set(state["optimizers"]["net"]["state"]) == names


def test_loading_leaves_its_argument_alone_then_and_later(tmp_path: Path) -> None:
    state = deep_copy(trained(tmp_path).state_dict())
    before = flat(state)
    trainer = tiny(
        tmp_path,
        Measured,
        callbacks={"remembers": Remembers()},
        max_steps=9,
        n_epochs=None,
        enable=False,
        dropout=0.3,
    )
    trainer.load_state_dict(state)
    assert differences(before, flat(state)) == []
    trainer.fit()
    assert trainer.global_step == 9
    assert differences(before, flat(state)) == []


def test_a_trainer_that_loads_a_state_goes_on_as_the_one_it_came_from(tmp_path: Path) -> None:
    first = trained(tmp_path)
    state = deep_copy(first.state_dict())
    second = tiny(
        tmp_path,
        Measured,
        callbacks={"remembers": Remembers()},
        max_steps=9,
        n_epochs=None,
        enable=False,
        dropout=0.3,
    )
    second.load_state_dict(state)
    assert differences(exact_state(first), exact_state(second)) == []
    first.training_parameters.max_steps = 9
    first.fit()
    second.fit()
    assert differences(exact_state(first), exact_state(second)) == []


def test_counters_are_right_after_a_resume_inside_an_epoch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_samples": 20, "gradient_accumulation_steps": 2, "n_epochs": 2}
    tiny(tmp_path, max_steps=4, **options).fit()
    indices: list[tuple[int, int]] = []

    class Indices(Callback):
        def pre_train_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
            indices.append((trainer.current_epoch, batch_idx))

    trainer = tiny(tmp_path, callbacks={"indices": Indices()}, **options)
    trainer.prepare()
    trainer.validate()  # restores
    progress = trainer.progress
    assert (progress.num_steps, progress.num_steps_in_epoch) == (4, 1)
    assert (progress.num_batches, progress.num_batches_in_epoch) == (7, 2)
    assert (progress.epoch, progress.in_epoch, progress.local_batches) == (1, True, 0)
    trainer.fit()
    assert indices == [(1, 2), (1, 3), (1, 4)]
    assert (trainer.global_step, trainer.current_epoch, trainer.local_batches) == (6, 2, 3)
    assert trainer.progress.num_batches == 10


def test_a_state_inside_a_training_step_is_refused(tmp_path: Path) -> None:
    class Asks(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with pytest.raises(RuntimeError, match="inside a training step"):
                self.state_dict()
            return super().training_step(batch, batch_idx)

    trained(tmp_path, Asks, gradient_accumulation_steps=3)


def spoilt(state: dict[str, Any]) -> dict[str, Any]:
    state = deep_copy(state)
    del state["models"]["net"]["0.bias"]
    state["models"]["net"]["extra"] = torch.zeros(2)
    state["models"]["net"]["3.weight"] = torch.full((1, 9), 7.0)
    state["models"]["stranger"] = {}
    state["optimizers"]["net"]["state"]["net.0.weight"]["exp_avg"] = torch.zeros(8, 4)
    state["schedulers"] = {}
    state["mystery"] = {}
    del state["precision"]
    return state


PROBLEMS = (
    "models.net.0.bias: missing in the state",
    "models.net.extra: in the state, not in the model",
    "models.net.3.weight: shape (1, 9) in the state, shape (1, 8) in the model",
    "models.stranger: in the state only",
    "optimizers.net.net.0.weight.exp_avg: shape (8, 4) in the state, "
    "the parameter has shape (8, 3)",
    "schedulers.net: missing in the state",
    "mystery: in the state only",
    "precision: missing in the state",
)


def test_strict_lists_everything_that_does_not_fit_and_loads_nothing(tmp_path: Path) -> None:
    state = spoilt(trained(tmp_path).state_dict())
    trainer = tiny(tmp_path, Measured, seed=1, enable=False)
    before = exact_state(trainer)
    with pytest.raises(StateError) as caught:
        trainer.load_state_dict(state)
    assert sorted(caught.value.problems) == sorted(PROBLEMS)
    assert str(caught.value).endswith("Pass strict=False to load what fits; nothing was loaded.")
    assert differences(before, exact_state(trainer)) == []


def test_a_state_of_other_data_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    state = trained(tmp_path).state_dict()
    trainer = tiny(tmp_path, Measured, num_samples=20, enable=False)
    before = exact_state(trainer)
    with pytest.raises(StateError, match="24 samples in the state, 20 here"):
        trainer.load_state_dict(state)
    assert differences(before, exact_state(trainer)) == []


def test_not_strict_loads_what_fits_and_warns_with_the_rest(tmp_path: Path) -> None:
    first = trained(tmp_path)
    state = spoilt(first.state_dict())
    trainer = tiny(tmp_path, Measured, enable=False)
    trainer.prepare()
    bias, last = (trainer.net.state_dict()[name].clone() for name in ("0.bias", "3.weight"))
    with pytest.warns(UserWarning, match="not loaded") as caught:
        trainer.load_state_dict(state, strict=False)
    (text,) = [str(w.message) for w in caught if "not loaded" in str(w.message)]
    assert sorted(text.split("\n  - ")[1:]) == sorted(PROBLEMS)
    loaded = trainer.net.state_dict()
    assert torch.equal(loaded["0.weight"], state["models"]["net"]["0.weight"])
    assert torch.equal(loaded["0.bias"], bias)
    assert torch.equal(loaded["3.weight"], last)
    assert trainer.global_step == 4


def test_not_strict_goes_on_with_other_data_from_its_beginning(tmp_path: Path) -> None:
    state = trained(tmp_path).state_dict()
    trainer = tiny(tmp_path, Measured, num_samples=20, max_steps=6, enable=False)
    with pytest.warns(UserWarning, match="24 samples in the state, 20 here"):
        trainer.load_state_dict(state, strict=False)
    assert differences(flat(state["models"]), flat(trainer.state_dict()["models"])) == []
    assert trainer.train_dataloader.state_dict()["position"] == 0


@pytest.mark.parametrize("kind", [Fabric, DreamFabric])
def test_a_trainer_in_a_fabric_checkpoint_round_trips(tmp_path: Path, kind: type[Fabric]) -> None:
    fabric = kind(accelerator="cpu", devices=1)
    config = tiny_config(tmp_path, max_steps=4, enable=False, dropout=0.3)
    trainer = Measured(config, fabric=fabric)
    trainer.fit()
    fabric.save(tmp_path / "state.pt", {"trainer": trainer, "note": 3})
    other = Measured(tiny_config(tmp_path, seed=42, max_steps=8, enable=False, dropout=0.3))
    rest = other.world.fabric.load(tmp_path / "state.pt", {"trainer": other})
    assert rest == {"note": 3}
    assert differences(exact_state(trainer), exact_state(other)) == []
    trainer.training_parameters.max_steps = 8
    trainer.fit()
    other.fit()
    assert differences(exact_state(trainer), exact_state(other)) == []


def test_a_checkpoint_by_path_round_trips(tmp_path: Path) -> None:
    first = trained(tmp_path)
    first.save_checkpoint(tmp_path / "mine")
    second = tiny(
        tmp_path, Measured, callbacks={"remembers": Remembers()}, enable=False, dropout=0.3
    )
    second.load_checkpoint(tmp_path / "mine")
    assert differences(exact_state(first), exact_state(second)) == []


# ---------------------------------------------------------------------- seeds and configs


def test_seed_zero_is_a_seed(tmp_path: Path) -> None:
    states = []
    for seed in (0, 0, 1):
        trainer = tiny(tmp_path, seed=seed, enable=False, max_steps=2)
        trainer.fit()
        assert trainer.seed == seed
        states.append(exact_state(trainer))
    assert differences(states[0], states[1]) == []
    assert states[0]["/models/net/0.weight"] != states[2]["/models/net/0.weight"]


def test_without_a_seed_one_is_drawn_and_recorded(tmp_path: Path) -> None:
    seeds = set()
    for name in ("a", "b"):
        config = tiny_config(tmp_path, seed=None, experiment=name, max_steps=1)
        trainer = TinyTrainer(config)
        trainer.fit()
        assert config.seed is None  # another trainer draws its own
        text = (trainer.run_directory / "config.yaml").read_text()
        assert f"seed: {trainer.seed}\n" in text
        seeds.add(trainer.seed)
    assert len(seeds) == 2


def test_a_restart_without_a_seed_goes_on_with_the_one_that_was_drawn(tmp_path: Path) -> None:
    first = tiny(tmp_path, seed=None, max_steps=4, dropout=0.3)
    first.fit()
    second = tiny(tmp_path, seed=None, max_steps=8, dropout=0.3)
    second.fit()
    assert second.seed == first.seed
    straight = tiny(tmp_path, seed=first.seed, max_steps=8, dropout=0.3, enable=False)
    straight.fit()
    one, other = exact_state(second), exact_state(straight)
    own = [path for path in one if path.startswith("/callbacks")]
    assert [d for d in differences(one, other) if d not in own] == []


def test_the_configuration_is_not_changed(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, seed=None, experiment=None, max_steps=2)
    before = repr(config)
    trainer = TinyTrainer(config)
    trainer.fit()
    assert repr(config) == before
    assert trainer.run_directory.is_dir()


def test_two_trainers_of_one_configuration_do_not_share_a_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, experiment=None, max_steps=1)
    first, second = TinyTrainer(config), TinyTrainer(config)
    first.fit()
    second.fit()
    assert first.run_directory != second.run_directory
    assert not second.is_resumed


def test_a_loader_with_a_seed_of_its_own_keeps_it(tmp_path: Path) -> None:
    class Own(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            train, val = super().configure_dataloaders()
            return ResumableLoader(train, seed=9), val

    seen = []
    for seed in (1, 2):
        trainer = tiny(tmp_path, Own, seed=seed, n_epochs=1, enable=False)
        trainer.fit()
        seen.append(trainer.seen)
    assert seen[0] == seen[1]


def test_recording_callbacks_see_a_restored_state_in_pre_fit(tmp_path: Path) -> None:
    tiny(tmp_path, max_steps=3).fit()
    recording = RecordingCallback()
    tiny(tmp_path, max_steps=4, callbacks={"recording": recording}).fit()
    places = {name: place for name, *place in recording.places}
    assert places["post_setup"] == [0, 0, None]
    assert places["pre_fit"] == [3, 0, None]
