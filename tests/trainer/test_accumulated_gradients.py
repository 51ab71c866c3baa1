"""A step's gradient is the mean over its window, however the window was cut."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Points, TinyTrainer, tiny
from torch import Tensor
from torch.utils.data import DataLoader

from dream_trainer.callbacks import Callback
from dream_trainer.errors import ConfigError

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")


class Gradients(Callback):
    """Keeps the gradients of every step of the optimizer "net", and what they belong to."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []
        self.weights: list[list[Tensor]] = []

    def pre_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        if trainer.get_name_by_optimizer(optimizer) != "net":
            return
        parameters = list(trainer.named_models()["net"].parameters())
        self.steps.append([p.grad.clone() for p in parameters])
        self.weights.append([p.detach().clone() for p in parameters])


class InOrder(TinyTrainer):
    """Not shuffled, so that the samples of each window are known."""

    def configure_dataloaders(self) -> Any:
        return self.loader(), None

    def loader(self) -> Any:
        return DataLoader(Points(self.config.num_samples), batch_size=self.config.batch_size)


def gradients_of(root: Path, kind: type[TinyTrainer], **options: Any) -> tuple[Any, Gradients]:
    recorded = Gradients()
    trainer = tiny(
        root,
        kind,
        callbacks={"gradients": recorded},
        **{"enable": False, "precision": "64-true", "n_epochs": 1} | options,
    )
    trainer.fit()
    return trainer, recorded


@pytest.fixture(autouse=True)
def in_double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_hand(trainer: Any, weights: list[Tensor], samples: Iterable[int]) -> list[Tensor]:
    """Gradient of the mean loss over samples, at given weights."""
    net = trainer.named_models()["net"]
    points = Points(trainer.config.num_samples)
    values = dict(zip([n for n, _ in net.named_parameters()], weights, strict=True))
    values = {name: value.clone().requires_grad_() for name, value in values.items()}
    batch = [points[i] for i in samples]
    x, y = (torch.stack([one[key] for one in batch]) for key in ("x", "y"))
    loss = (torch.func.functional_call(net, values, x) - y).square().mean()
    return list(torch.autograd.grad(loss, list(values.values())))


def assert_close(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_a_window_never_crosses_the_end_of_an_epoch_and_a_short_one_is_a_mean_too(
    tmp_path: Path,
) -> None:
    # 22 samples in batches of 4 are 6 batches, the last of 2; windows of 4 batches: 4 and 2.
    trainer, recorded = gradients_of(
        tmp_path, InOrder, num_samples=22, gradient_accumulation_steps=4, n_epochs=2
    )
    windows = [range(16), range(16, 22)] * 2
    assert trainer.global_step == len(recorded.steps) == len(windows)
    for samples, weights, grads in zip(windows, recorded.weights, recorded.steps, strict=True):
        assert_close(grads, by_hand(trainer, weights, samples))


class OfUnknownLength(InOrder):
    def loader(self) -> Any:
        points, size = Points(self.config.num_samples), self.config.batch_size

        class Stream:
            def __iter__(self) -> Any:
                return iter(DataLoader(points, batch_size=size))

        return Stream()


class List(InOrder):
    def loader(self) -> Any:
        return list(super().loader())


@pytest.mark.parametrize("kind", [OfUnknownLength, List])
def test_without_sample_counts_every_batch_of_a_window_counts_the_same(
    tmp_path: Path, kind: type[TinyTrainer]
) -> None:
    trainer, recorded = gradients_of(
        tmp_path, kind, num_samples=20, gradient_accumulation_steps=3, n_epochs=2
    )
    windows = [range(12), range(12, 20)] * 2
    assert trainer.global_step == len(windows)
    for samples, weights, grads in zip(windows, recorded.weights, recorded.steps, strict=True):
        assert_close(grads, by_hand(trainer, weights, samples))


class Weighted(InOrder):
    """A batch weighs as much as it has samples of an odd index (its 'tokens')."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        mask = batch["index"] % 3 != 0
        losses = (self.net(batch["x"]) - batch["y"]).square()[:, 0]
        return {"loss": losses[mask].mean(), "weight": mask.sum()}


def test_with_weights_the_gradient_is_the_one_of_a_large_batch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_samples": 28, "n_epochs": 1}
    trainer, small = gradients_of(
        tmp_path, Weighted, batch_size=4, gradient_accumulation_steps=7, **options
    )
    _, large = gradients_of(tmp_path, Weighted, batch_size=28, **options)
    assert len(small.steps) == len(large.steps) == 1
    assert_close(small.steps[0], large.steps[0])
    counting = [index for index in range(28) if index % 3]
    assert_close(small.steps[0], by_hand(trainer, small.weights[0], counting))


def test_a_weight_for_some_losses_of_a_window_only_is_an_error(tmp_path: Path) -> None:
    class Mixed(InOrder):
        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            loss = super().compute_loss(batch, batch_idx)
            return {"loss": loss, "weight": 1.0} if batch_idx % 2 else loss

    with pytest.raises(ValueError, match="Pass a weight every time, or never"):
        gradients_of(tmp_path, Mixed, gradient_accumulation_steps=2)


def test_the_global_batch_size_decides_the_window(tmp_path: Path) -> None:
    trainer, recorded = gradients_of(tmp_path, InOrder, num_samples=24, global_batch_size=12)
    assert trainer.global_step == 2
    assert_close(recorded.steps[0], by_hand(trainer, recorded.weights[0], range(12)))


def test_a_global_batch_size_that_is_no_multiple_of_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="global_batch_size=10 is not a multiple of 4"):
        gradients_of(tmp_path, InOrder, global_batch_size=10)


def test_clipping_sees_the_gradient_of_the_whole_window(tmp_path: Path) -> None:
    norms: list[Tensor] = []

    class Clipped(InOrder):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.backward(self.compute_loss(batch, batch_idx))
            norm = self.step()
            assert (norm is None) == self.is_accumulating_gradients
            if norm is not None:
                norms.append(norm)

    _, recorded = gradients_of(
        tmp_path, Clipped, gradient_accumulation_steps=3, gradient_clip_val=0.01
    )
    assert len(norms) == 2
    for norm, grads in zip(norms, recorded.steps, strict=True):
        assert (type(norm), norm.ndim) == (Tensor, 0)
        expected = torch.stack([g.norm() for g in grads]).norm()
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)


def test_no_norm_is_returned_or_logged_when_nobody_asked_for_one(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, n_epochs=1)
    trainer.fit()
    log = (trainer.run_directory / "metrics.jsonl").read_text()
    assert "grad_norm" not in log
    assert "None" not in log


def test_two_optimizers_step_side_by_side_and_count_once(tmp_path: Path) -> None:
    class Gan(InOrder):
        def configure_models(self) -> None:
            super().configure_models()
            self.critic = torch.nn.Linear(1, 1)

        def configure_optimizers(self) -> Any:
            return {
                self.net: torch.optim.SGD(self.net.parameters(), lr=0.1),
                self.critic: torch.optim.SGD(self.critic.parameters(), lr=0.1),
            }

        def configure_schedulers(self) -> Any:
            return [
                torch.optim.lr_scheduler.StepLR(one, 1, 0.5)
                for one in self.named_optimizers().values()
            ]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            generator, critic = self.named_optimizers().values()
            made = self.net(batch["x"])
            critic_loss = (self.critic(made.detach()) - batch["y"]).square().mean()
            self.backward(critic_loss)
            self.step(critic)
            loss = (made - batch["y"]).square().mean()
            self.backward(loss)
            self.step(generator)
            return {"loss": loss, "critic_loss": critic_loss}

    hooks: list[str] = []

    class Names(Callback):
        def post_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
            hooks.append(trainer.get_name_by_optimizer(optimizer))

    recorded = Gradients()
    trainer = tiny(
        tmp_path,
        Gan,
        callbacks={"gradients": recorded, "names": Names()},
        enable=False,
        precision="64-true",
        num_samples=20,
        gradient_accumulation_steps=2,
        n_epochs=1,
    )
    trainer.fit()
    assert hooks == ["critic", "net"] * 3
    assert trainer.global_step == 3
    windows = (range(8), range(8, 16), range(16, 20))
    for samples, weights, grads in zip(windows, recorded.weights, recorded.steps, strict=True):
        assert_close(grads, by_hand(trainer, weights, samples))
    rates = [one.param_groups[0]["lr"] for one in trainer.named_optimizers().values()]
    assert rates == [0.1 * 0.5**3] * 2


def test_an_optimizer_may_step_more_often_than_another(tmp_path: Path) -> None:
    class Uneven(InOrder):
        def configure_models(self) -> None:
            super().configure_models()
            self.critic = torch.nn.Linear(1, 1)

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.net.parameters(), lr=0.01),
                torch.optim.SGD(self.critic.parameters(), lr=0.01),
            ]

        def configure_schedulers(self) -> Any:
            return None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            net, critic = self.named_optimizers().values()
            for _ in range(2):
                loss = (self.critic(self.net(batch["x"]).detach()) - batch["y"]).square().mean()
                self.backward(loss)
                self.step(critic)
            self.backward((self.net(batch["x"]) - batch["y"]).square().mean())
            self.step(net)

    trainer, _ = gradients_of(tmp_path, Uneven, num_samples=12)
    assert trainer.progress.num_batches == 3
    assert trainer.global_step == 6  # the critic's


def test_step_without_an_optimizer_needs_there_to_be_one(tmp_path: Path) -> None:
    class Two(InOrder):
        def configure_models(self) -> None:
            super().configure_models()
            self.other = torch.nn.Linear(1, 1)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(m.parameters()) for m in (self.net, self.other)]

        def configure_schedulers(self) -> Any:
            return None

    with pytest.raises(KeyError, match=r"several optimizers.*: net, other"):
        gradients_of(tmp_path, Two)


def test_counting_the_steps_of_the_run_does_not_disturb_the_loader(tmp_path: Path) -> None:
    class Asks(OfUnknownLength):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.num_training_steps == 4
            return super().training_step(batch, batch_idx)

    trainer, recorded = gradients_of(
        tmp_path, Asks, num_samples=20, gradient_accumulation_steps=3, max_steps=4, n_epochs=2
    )
    assert trainer.global_step == 4
    for samples, weights, grads in zip(
        [range(12), range(12, 20)] * 2, recorded.weights, recorded.steps, strict=True
    ):
        assert_close(grads, by_hand(trainer, weights, samples))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_reads_nothing_back_from_the_device(tmp_path: Path, weighted: bool) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    read_back = torch.ops.aten._local_scalar_dense.default

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += func is read_back
            return func(*args, **(kwargs or {}))

    with Reads() as control:
        torch.ones(1).item()
    assert control.count == 1

    reads = Reads()

    class Steps(InOrder):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters())  # on a CPU, Adam reads its step count

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with reads:
                loss = (self.net(batch["x"]) - batch["y"]).square().mean()
                self.backward(loss, torch.tensor(2.0) if weighted else None)
                return {"loss": loss, "norm": self.step()}

    trainer = tiny(tmp_path, Steps, gradient_accumulation_steps=2, gradient_clip_val=0.5)
    trainer.fit()
    assert trainer.global_step > 1
    assert reads.count == 0
