"""EMA and SWA are what a loop by hand averages, to the bit, and never in the model's place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    Points,
    TinyTrainer,
    differences,
    exact_state,
    flat,
    mlp,
    tiny,
    weights,
)
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from dream_trainer import EMA, SWA, Callback, WeightAveraging
from dream_trainer.errors import ConfigError


class ByHand(Callback):
    """Averages as a loop of one's own would, beside what is tested."""

    def __init__(self, every: int = 1, **options: Any) -> None:
        self.every, self.options = every, options

    def pre_fit(self, trainer: Any) -> None:
        self.model = AveragedModel(trainer.components.models["net"], **self.options)
        self.model.update_parameters(trainer.components.models["net"])

    def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        first = next(iter(trainer.named_optimizers().values()))
        if optimizer is first and trainer.global_step % self.every == 0:
            self.model.update_parameters(trainer.components.models["net"])


def by_name(callback: WeightAveraging) -> dict[str, Any]:
    return flat(callback.average())


def of_module(model: nn.Module, name: str = "net") -> dict[str, Any]:
    return flat({f"{name}.{key}": value for key, value in model.state_dict().items()})


@pytest.mark.parametrize("every", [1, 3])
def test_ema_is_what_a_loop_by_hand_averages(every: int, tmp_path: Path) -> None:
    ema = EMA(0.9, every_n_steps=every)
    hand = ByHand(every, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    trainer = tiny(tmp_path, callbacks={"ema": ema, "hand": hand})
    trainer.fit()

    assert by_name(ema) == of_module(hand.model.module)
    assert by_name(ema) != weights(trainer)


def test_a_decay_that_warms_up_is_tensorflows(tmp_path: Path) -> None:
    ema = EMA(0.5, warm_up=True)
    assert [ema.decay_after(n) for n in (0, 1, 7, 8, 80)] == [1 / 10, 2 / 11, 8 / 17, 0.5, 0.5]

    values: list[Tensor] = []

    class Watch(Callback):
        def pre_fit(self, trainer: Any) -> None:
            values.append(trainer.net.weight.detach().clone())

        def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
            values.append(trainer.net.weight.detach().clone())

    trainer = tiny(tmp_path, Plain, callbacks={"ema": ema, "watch": Watch()}, max_steps=3)
    trainer.fit()
    expected = values[0]
    for n, value in enumerate(values[1:]):
        expected = torch.lerp(expected, value, 1 - (1 + n) / (10 + n))
    assert torch.equal(ema.average()["net.weight"], expected)


class Plain(TinyTrainer):
    def configure_models(self) -> None:
        self.net = nn.Linear(3, 1)


def test_an_average_that_starts_late_begins_with_the_weights_of_then(tmp_path: Path) -> None:
    ema, held = EMA(0.9, start_step=4), []

    class Watch(Callback):
        def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
            own = {f"net.{n}": p for n, p in trainer.components.models["net"].named_parameters()}
            held.append((len(ema.average()), by_name(ema) == flat(own)))

    tiny(tmp_path, callbacks={"ema": ema, "watch": Watch()}, max_steps=5).fit()
    assert held == [(0, False), (0, False), (0, False), (4, True), (4, False)]


def test_the_validation_sees_the_average_and_the_training_does_not(tmp_path: Path) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.seen: list[bool] = []

        def pre_validation_epoch(self, trainer: Any) -> None:
            self.own = weights(trainer)
            self.average = flat(trainer.callbacks["average"].state_dict()["models"])

        def pre_validation_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
            now = flat({"net": trainer.components.models["net"].state_dict()})
            self.seen.append(now == self.average and now != self.own)

        def post_validation_epoch(self, trainer: Any, results: Any) -> None:
            self.seen.append(weights(trainer) == self.own)

    watch = Watch()
    with_it = tiny(
        tmp_path, experiment="a", callbacks={"average": EMA(0.9), "watch": watch}, dropout=0.2
    )
    with_it.fit()
    assert watch.seen
    assert all(watch.seen)

    without = tiny(tmp_path, experiment="b", dropout=0.2)
    without.fit()
    assert weights(with_it) == weights(without)
    assert with_it.validation_results != without.validation_results

    beside = tiny(
        tmp_path,
        experiment="c",
        dropout=0.2,
        callbacks={"average": EMA(0.9, evaluate_with="model")},
    )
    beside.fit()
    assert beside.validation_results == without.validation_results
    assert by_name(beside.callbacks["average"]) == by_name(with_it.callbacks["average"])


def test_test_and_predict_use_the_average_after_fit_and_in_another_process(tmp_path: Path) -> None:
    class Trainer(TinyTrainer):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch["x"])

    def run(trainer: Any) -> tuple[Any, ...]:
        loader = DataLoader(Points(6, seed=8), 3)
        results = trainer.test(loader), trainer.validate(), flat(trainer.predict(loader))
        return (*results, weights(trainer))

    trainer = tiny(tmp_path, Trainer, callbacks={"ema": EMA(0.9)}, experiment="one")
    trainer.fit()
    first = run(trainer)
    again = run(tiny(tmp_path, Trainer, callbacks={"ema": EMA(0.9)}, experiment="one"))
    assert first == again
    assert first[1] == trainer.validation_results
    plain = run(tiny(tmp_path, Trainer, experiment="one"))  # the average is passed over
    assert plain[3] == first[3]
    assert [a != b for a, b in zip(plain[:3], first[:3], strict=True)] == [True] * 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_validation_that_fails_leaves_the_models_own_weights(
    error: type[BaseException], tmp_path: Path
) -> None:
    class Fails(TinyTrainer):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.callbacks["ema"].evaluate_with == "average"
            raise error("in a validation")

    trainer = tiny(tmp_path, Fails, callbacks={"ema": EMA(0.9)}, experiment="fails")
    with pytest.raises(error):
        trainer.fit()
    other = tiny(tmp_path, experiment="whole", n_epochs=1, has_validation=False)
    other.fit()
    assert weights(trainer) == weights(other)


def test_a_validation_is_interrupted_in_the_middle_and_goes_on_exactly(tmp_path: Path) -> None:
    class Interrupts(TinyTrainer):
        is_asked = False

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            if self.is_asked and self.current_epoch == 0 and batch_idx == 0:
                import signal

                signal.raise_signal(signal.SIGINT)
            return super().validation_step(batch, batch_idx)

    def make(experiment: str) -> Any:
        return tiny(
            tmp_path,
            Interrupts,
            experiment=experiment,
            callbacks={"ema": EMA(0.9)},
            num_val_samples=8,
        )

    straight = make("straight")
    straight.fit()
    interrupted = make("interrupted")
    interrupted.is_asked = True
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit()
    resumed = make("interrupted")
    resumed.fit()
    assert differences(exact_state(resumed), exact_state(straight)) == []


@pytest.mark.may_leave("rng")
def test_neither_the_state_nor_a_step_is_taken_while_averages_are_in_place(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, callbacks={"ema": EMA(0.9)})
    trainer.prepare()
    with pytest.raises(RuntimeError, match="has not averaged any weights yet"):
        trainer.callbacks["ema"].swapped(trainer).__enter__()
    trainer.fit()
    ema, before = trainer.callbacks["ema"], exact_state(trainer)
    with pytest.raises(ZeroDivisionError), ema.swapped(trainer):  # noqa: PT012 - that is the point
        own = {f"net.{n}": p for n, p in trainer.components.models["net"].named_parameters()}
        assert flat(own) == by_name(ema)
        with pytest.raises(RuntimeError, match="in the place of the model's own"):
            trainer.state_dict()
        with pytest.raises(RuntimeError, match="in the place of the model's own"):
            ema.pre_optimizer_step(trainer, next(iter(trainer.named_optimizers().values())))
        with pytest.raises(RuntimeError, match="in the place of the model's own"):
            ema.swapped(trainer).__enter__()
        _ = 1 / 0
    assert exact_state(trainer) == before


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_save_under_way_is_not_torn_by_a_validation_with_the_average(tmp_path: Path) -> None:
    saved: dict[str, Any] = {}

    class Wide(TinyTrainer):
        def configure_models(self) -> None:
            # Copied for so long that the validation after the save begins before it is done.
            self.net = nn.Sequential(nn.Linear(3, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 1))

    class Watch(Callback):
        def on_boundary(self, trainer: Any) -> None:
            saved[f"{trainer.global_step}"] = weights(trainer)

    callbacks = {"ema": EMA(0.5), "watch": Watch()}
    options = {"every_n_steps": 1, "keep_last": 9, "num_samples": 4, "num_val_samples": 4}
    trainer = tiny(tmp_path, Wide, callbacks=callbacks, **options)
    trainer.fit()
    steps = trainer.checkpointer.store.list()
    assert len(steps) >= trainer.global_step
    for one in steps:
        state = trainer.checkpointer.load(one.path).state
        assert flat(state["models"]) == saved[str(one.manifest.step)]


# ---------------------------------------------------------------------- what is averaged


class Two(TinyTrainer):
    """A frozen part, two models, an optimizer for each that take turns."""

    def configure_models(self) -> None:
        self.net = mlp()
        self.net[0].requires_grad_(False)
        self.critic = nn.Linear(3, 1)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net.parameters(), 0.1),
            torch.optim.SGD(self.critic.parameters(), 0.1),
        ]

    def configure_schedulers(self) -> Any:
        return None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for name in ("net", "critic"):
            self.backward((getattr(self, name)(batch["x"]) - batch["y"]).square().mean())
            self.step(name)


class Unfreeze(Callback):
    def pre_train_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            trainer.components.models["net"][0].requires_grad_(True)


def test_frozen_parameters_have_no_average_until_they_are_unfrozen(tmp_path: Path) -> None:
    ema = EMA(0.9)
    tiny(tmp_path, Two, callbacks={"ema": ema}, experiment="frozen").fit()
    assert sorted(ema.average()) == [
        "critic.bias",
        "critic.weight",
        "net.3.bias",
        "net.3.weight",
    ]
    # What does not change is its own average, so a loop that averages all has the same.
    hand = ByHand(multi_avg_fn=get_ema_multi_avg_fn(0.9))
    hand_callbacks = {"un": Unfreeze(), "ema": ema, "hand": hand}
    tiny(tmp_path, Two, callbacks=hand_callbacks, experiment="thawed", max_steps=5).fit()
    mine = {name: one for name, one in ema.average().items() if name.startswith("net")}
    assert flat(mine).keys() == of_module(hand.model.module).keys()
    assert torch.equal(mine["net.3.weight"], hand.model.module[3].weight)
    # torch's lerp rounds, also between equal numbers.
    assert torch.allclose(mine["net.0.weight"], hand.model.module[0].weight, rtol=1e-6)


def test_only_the_chosen_models_are_averaged(tmp_path: Path) -> None:
    ema = EMA(0.9, models=["critic"])
    tiny(tmp_path, Two, callbacks={"ema": ema}).fit()
    assert sorted(ema.average()) == ["critic.bias", "critic.weight"]


def test_a_weight_that_models_share_is_averaged_with_the_one_that_is_chosen(
    tmp_path: Path,
) -> None:
    class Tied(Two):
        def configure_models(self) -> None:
            super().configure_models()
            self.net = nn.Sequential(nn.Linear(3, 1))
            self.critic.weight = self.net[0].weight

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.net.parameters(), self.critic.bias], 0.1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            guess = self.net(batch["x"]) + self.critic(batch["x"])
            self.backward((guess - batch["y"]).square().mean())
            self.step()

    callbacks = {"net": EMA(0.9, models=["net"]), "other": EMA(0.9, models=["critic"])}
    tiny(tmp_path, Tied, callbacks=callbacks).fit()
    average = callbacks["other"].average()
    assert sorted(average) == ["critic.bias", "critic.weight"]
    assert torch.equal(average["critic.weight"], callbacks["net"].average()["net.0.weight"])


def test_half_precision_has_a_float32_average(tmp_path: Path) -> None:
    class Half(Plain):
        def configure_models(self) -> None:
            super().configure_models()
            self.net = self.net.bfloat16()

        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            return (self.net(batch["x"].bfloat16()) - batch["y"].bfloat16()).square().mean()

    ema, values = EMA(0.75), []

    class Watch(Callback):
        def pre_fit(self, trainer: Any) -> None:
            values.append(trainer.net.weight.detach().float())

        def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
            values.append(trainer.net.weight.detach().float())

        def pre_validation_step(self, trainer: Any, batch: Any, batch_idx: int) -> None:
            average = ema.average()["net.weight"]
            assert torch.equal(trainer.net.weight, average.bfloat16())

    trainer = tiny(tmp_path, Half, callbacks={"ema": ema, "watch": Watch()})
    trainer.fit()
    expected = values[0]
    for value in values[1:]:
        expected = torch.lerp(expected, value, 0.25)
    assert torch.equal(ema.average()["net.weight"], expected)
    assert trainer.net.weight.dtype == torch.bfloat16
    own = EMA(0.75, dtype=torch.bfloat16)
    tiny(tmp_path, Half, callbacks={"ema": own}, experiment="own").fit()
    assert own.average()["net.weight"].dtype == torch.bfloat16


class Normed(TinyTrainer):
    def configure_models(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)
        )


def test_averaged_buffers_are_what_a_loop_by_hand_averages(tmp_path: Path) -> None:
    ema = EMA(0.9, average_buffers=True)
    hand = ByHand(multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    tiny(tmp_path, Normed, callbacks={"ema": ema, "hand": hand}).fit()
    expected = of_module(hand.model.module)
    expected.pop("/net.1.num_batches_tracked")
    assert by_name(ema) == expected


class Reads(TorchDispatchMode):
    """Counts the times that the host asks for a value."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("callback", [EMA(0.9, warm_up=True), SWA(start_step=1, every=1)])
def test_a_step_does_not_wait_for_the_device(callback: Any, tmp_path: Path) -> None:
    trainer = tiny(tmp_path, callbacks={"average": callback}, max_steps=3)
    trainer.fit()
    (optimizer,) = trainer.named_optimizers().values()
    trainer.progress.num_steps += 1
    before = by_name(callback)
    with torch.no_grad():
        for parameter in trainer.components.models["net"].parameters():
            parameter.add_(1)
    with Reads() as reads:
        callback.pre_optimizer_step(trainer, optimizer)
        callback.post_optimizer_step(trainer, optimizer)
        with callback.swapped(trainer):
            pass
    assert by_name(callback) != before
    assert reads.count == 0
    with Reads() as reads:
        torch.ones(()).item()
    assert reads.count == 1


def test_what_is_exported_is_what_was_validated(tmp_path: Path) -> None:
    for evaluate_with in ("average", "model"):
        ema = EMA(0.9, evaluate_with=evaluate_with)  # type: ignore[arg-type]
        trainer = tiny(tmp_path, experiment=evaluate_with, callbacks={"ema": ema})
        trainer.fit()
        own = {f"net.{k}": v.clone() for k, v in trainer.state_dict()["models"]["net"].items()}
        written = torch.load(trainer.export(tmp_path / f"{evaluate_with}.pt"), weights_only=True)
        expected = own | (ema.average() if evaluate_with == "average" else {})
        assert flat({f"net.{k}": v for k, v in written.items()}) == flat(expected)
        assert flat({f"net.{k}": v for k, v in trainer.net.state_dict().items()}) == flat(own)
        assert flat(ema.average()) != flat({k: own[k] for k in ema.average()})


def test_a_compiled_model_is_validated_with_the_average(tmp_path: Path) -> None:
    class Compiled(TinyTrainer):
        def apply_compile(self, model: nn.Module) -> None:
            model[0].compile(backend="eager")  # the code generator takes minutes

    plain = tiny(tmp_path, experiment="plain", callbacks={"ema": EMA(0.9)})
    plain.fit()
    options = {"experiment": "compiled", "compile_model": True, "callbacks": {"ema": EMA(0.9)}}
    compiled = tiny(tmp_path, Compiled, **options)
    compiled.fit()
    assert compiled.validation_results == plain.validation_results
    assert by_name(compiled.callbacks["ema"]) == by_name(plain.callbacks["ema"])


# ---------------------------------------------------------------------- SWA


def test_swa_is_the_mean_of_the_weights_at_the_end_of_late_epochs(tmp_path: Path) -> None:
    taken: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def post_train_epoch(self, trainer: Any) -> None:
            if trainer.current_epoch >= 3:
                taken.append(copy.deepcopy(trainer.components.models["net"].state_dict()))

    swa = SWA(start_epoch=0.75)
    tiny(tmp_path, callbacks={"swa": swa, "watch": Watch()}, n_epochs=5).fit()
    first, second = taken
    mean = {f"net.{name}": first[name].lerp(second[name], 1 / 2) for name in first}
    assert by_name(swa) == flat(mean)


def test_swa_takes_weights_every_n_steps_from_a_part_of_the_run_on(tmp_path: Path) -> None:
    taken: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
            if trainer.global_step in (4, 6, 8):
                taken.append(copy.deepcopy(trainer.components.models["net"].state_dict()))

    swa = SWA(start_step=0.5, every=2)
    tiny(tmp_path, callbacks={"swa": swa, "watch": Watch()}, max_steps=8, n_epochs=None).fit()
    first, second, third = taken
    mean = {n: first[n].lerp(second[n], 1 / 2).lerp(third[n], 1 / 3) for n in first}
    assert by_name(swa) == flat({f"net.{name}": value for name, value in mean.items()})


@pytest.mark.parametrize("annealing", ["cos", "linear"])
def test_the_rate_goes_where_torchs_swalr_takes_it(annealing: Any, tmp_path: Path) -> None:
    rates: list[float] = []

    class Watch(Callback):
        def pre_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    swa = SWA(start_step=3, learning_rate=0.5, anneal_steps=4, annealing=annealing)
    trainer = tiny(tmp_path, callbacks={"swa": swa, "watch": Watch()}, max_steps=10, n_epochs=9)
    trainer.fit()
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=rates[3])
    schedule = SWALR(optimizer, 0.5, anneal_epochs=4, anneal_strategy=annealing)
    expected = []
    for _ in range(7):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[3:] == pytest.approx(expected, rel=1e-12)
    assert rates[:3] == [trainer.config.lr] * 3
    assert rates[-1] == 0.5


def test_the_statistics_of_batch_norm_are_torchs_and_leave_no_trace(tmp_path: Path) -> None:
    before: dict[str, Any] = {}

    class Watch(Callback):
        def post_train_epoch(self, trainer: Any) -> None:
            if trainer.current_epoch == 2:
                before.update(weights(trainer), rng=torch.get_rng_state().tolist())

    def make(**callbacks: Any) -> Any:
        trainer = tiny(
            tmp_path,
            Normed,
            callbacks={"watch": Watch(), **callbacks},
            n_epochs=3,
            experiment="-".join(callbacks) or "none",
            has_validation=False,
        )
        trainer.fit()
        return trainer

    plain, trainer = make(), make(swa=SWA(start_epoch=1))
    mine, theirs = exact_state(trainer), exact_state(plain)
    assert [p for p in differences(mine, theirs) if not p.startswith("/callbacks/")] == []
    average = trainer.callbacks["swa"].average()
    assert {"net.1.running_mean", "net.1.running_var"} <= average.keys()

    # torch's own pass over the same batches, in the order of the next epoch.
    model = copy.deepcopy(trainer.components.models["net"])
    model.load_state_dict({n.removeprefix("net."): v for n, v in average.items()}, strict=False)
    loader = trainer.loop.train_loader
    loader.set_epoch(loader.epoch + 1)
    model[3].p = 0.0
    update_bn((batch["x"] for batch in loader), model)
    for name in ("running_mean", "running_var"):
        assert torch.equal(average[f"net.1.{name}"], getattr(model[1], name))
    # They are in the last checkpoint, though an epoch's end had saved the step already.
    newest = trainer.checkpointer.store.list()[-1]
    saved = trainer.checkpointer.load(newest.path).state["callbacks"]["swa"]
    assert torch.equal(saved["models"]["net"]["1.running_mean"], average["net.1.running_mean"])
    assert trainer.validate is not None


def test_a_model_that_is_a_batch_norm_itself_is_measured_too(tmp_path: Path) -> None:
    class Whitened(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.norm = nn.BatchNorm1d(3, affine=False)

        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            return super().compute_loss({**batch, "x": self.norm(batch["x"])}, batch_idx)

    trainer = tiny(tmp_path, Whitened, callbacks={"swa": SWA(start_epoch=0)})
    trainer.fit()
    measured = trainer.callbacks["swa"].average()["norm.running_mean"]
    assert torch.allclose(measured, trainer.loop.train_loader.loader.dataset.x.mean(0).float())


class Endless:
    """Batches without end, that know where they are."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Any:
        while True:
            self.position += 1
            x = torch.full((4, 3), float(self.position)) + torch.arange(4.0).unsqueeze(1)
            yield {"x": x, "y": x[:, :1], "index": torch.arange(4)}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def test_the_pass_ends_where_an_epoch_does_and_puts_the_loader_back(tmp_path: Path) -> None:
    class Streamed(Normed):
        def configure_dataloaders(self) -> Any:
            return Endless(), None

    def make(**callbacks: Any) -> Any:
        limits = {"train_steps_per_epoch": 3, "n_epochs": 2}
        name = "-".join(callbacks) or "none"
        trainer = tiny(tmp_path, Streamed, callbacks=callbacks, experiment=name, **limits)
        trainer.fit()
        return trainer

    plain, trainer = make(), make(swa=SWA(start_epoch=1))
    assert "net.1.running_mean" in trainer.callbacks["swa"].average()
    found = differences(exact_state(trainer), exact_state(plain))
    assert [path for path in found if not path.startswith("/callbacks/")] == []


def test_a_finished_run_does_not_measure_again_and_a_longer_one_forgets(tmp_path: Path) -> None:
    passes: list[int] = []

    class Counting(Normed):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            passes.append(self.current_epoch)
            return super().validation_step(batch, batch_idx)

    def fit(n_epochs: int) -> Any:
        passes.clear()
        trainer = tiny(
            tmp_path,
            Counting,
            n_epochs=n_epochs,
            experiment="x",
            has_validation=False,
            callbacks={"swa": SWA(start_epoch=1)},
        )
        trainer.fit()
        return trainer

    first = fit(2)
    assert set(passes) == {2}
    assert by_name(fit(2).callbacks["swa"]) == by_name(first.callbacks["swa"])
    assert passes == []
    longer = fit(3)
    assert set(passes) == {3}
    assert longer.callbacks["swa"].num_averaged == {"net": 2}


# ---------------------------------------------------------------------- resuming


def test_a_callback_that_an_older_run_did_not_have_begins_with_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(tmp_path, experiment="x", n_epochs=1).fit()
    begun: list[bool] = []

    class Watch(Callback):
        def pre_fit(self, trainer: Any) -> None:
            begun.append(
                by_name(trainer.callbacks["ema"])
                == flat(
                    {f"net.{n}": p for n, p in trainer.components.models["net"].named_parameters()}
                )
            )

    capsys.readouterr()
    callbacks = {"ema": EMA(0.9), "watch": Watch()}
    tiny(tmp_path, experiment="x", callbacks=callbacks).fit()
    assert begun == [True]
    lines = [line for line in capsys.readouterr().out.splitlines() if "averaged" in line]
    assert len(lines) == 1
    assert "EMA begins with the model's own at step" in lines[0]
    # And back: an average that only the checkpoint has is passed over.
    tiny(tmp_path, experiment="x", n_epochs=3).fit()


def test_one_configuration_serves_two_trainers(tmp_path: Path) -> None:
    callbacks = {"ema": EMA(0.9)}
    first = tiny(tmp_path, experiment="a", callbacks=callbacks)
    first.fit()
    average = copy.deepcopy(first.callbacks["ema"].average())
    second = tiny(tmp_path, experiment="b", callbacks=callbacks)
    second.fit()
    assert flat(second.callbacks["ema"].average()) == flat(average)


# ---------------------------------------------------------------------- mistakes

MISTAKES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "ema": (
        lambda: EMA(1.0, every_n_steps=0, start_step=-1, evaluate_with="both"),  # type: ignore[arg-type]
        ["decay=1.0", "every_n_steps=0", "start_step=-1", "evaluate_with='both'"],
    ),
    "swa": (
        lambda: SWA(start_epoch=1.5, start_step=3, every=0, learning_rate=-1.0, anneal_steps=-1),
        ["start_epoch=1.5", "both set", "every=0", "anneal_steps=-1", "learning_rate=-1.0"],
    ),
    "dtype": (lambda: EMA(dtype=torch.int64), ["dtype=torch.int64"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_all_mistakes_are_told_at_once(name: str) -> None:
    make, expected = MISTAKES[name]
    with pytest.raises(ConfigError) as error:
        make()
    assert len(error.value.problems) == len(expected)
    for text, problem in zip(expected, error.value.problems, strict=True):
        assert text in problem


def test_what_does_not_fit_the_trainer_is_told_before_the_run(tmp_path: Path) -> None:
    callbacks = {"a": EMA(models=["net", "nett"]), "b": EMA(0.5)}
    with pytest.raises(ConfigError) as error:
        tiny(tmp_path, callbacks=callbacks).fit()
    assert len(error.value.problems) == 2
    assert "there is no 'nett', but net" in str(error.value)
    assert "a and b are to be in place of the same weights" in str(error.value)
    with pytest.raises(ConfigError, match="no optimizer 'adam'"):
        tiny(tmp_path, callbacks={"s": SWA(learning_rate={"adam": 0.1})}).fit()
    with pytest.raises(ConfigError, match="fraction of n_epochs"):
        tiny(tmp_path, callbacks={"s": SWA()}, n_epochs=None, max_steps=3).fit()
