"""GradNormMonitor: the norm of the gradients, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer

from dream_trainer.callbacks.callback import Callback
from dream_trainer.errors import ConfigError
from dream_trainer.progress import reaches_multiple
from dream_trainer.world.gradient_norm import total_norm
from dream_trainer.world.wrappers import unwrap

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


class GradNormMonitor(Callback):
    """Logs ``grad_norm/<model>.<layer>``, the norm of a layer's gradients before clipping.

    Exact, and part of the step's row. Costs a few kernels a layer, and where gradients are
    sharded a small all-reduce a layer; nothing waits for them. The norm of all gradients together
    is what ``track_grad_norm`` logs.

    Args:
        depth: parts of a parameter's path that make a layer: with 1, those of the model's own
            children; with 2, of their children. 0 makes each model one layer.
        every_n_steps: log every n-th step.

    Raises:
        ConfigError: a number is out of range; or the precision scales gradients, ``"16-mixed"``.
    """

    def __init__(self, depth: int = 1, every_n_steps: int = 1) -> None:
        problems = [] if depth >= 0 else [f"depth={depth} is below 0"]
        if every_n_steps < 1:
            problems.append(f"every_n_steps={every_n_steps} is not a number above 0")
        if problems:
            raise ConfigError("GradNormMonitor", problems)
        self.depth, self.every_n_steps = depth, every_n_steps
        self._layers: dict[Optimizer, dict[str, list[nn.Parameter]]] = {}

    def post_setup(self, trainer: BaseTrainer) -> None:
        """Refuse what would be logged with the loss scale in it."""
        if trainer.world.scales_loss:
            raise ConfigError(
                "GradNormMonitor",
                [f"precision={trainer.world.precision!r} scales gradients until they are clipped"],
                'Take "bf16-mixed", or track_grad_norm, which knows the scale.',
            )

    def pre_optimizer_step(self, trainer: BaseTrainer, optimizer: Optimizer) -> None:
        """Take the norms, on every rank alike."""
        step = trainer.global_step + 1  # the one under way
        if not reaches_multiple(step, self.every_n_steps, after=step - 1):
            return
        if optimizer not in self._layers:
            self._layers[optimizer] = self._layers_of(trainer, optimizer)
        norms: dict[str, Tensor | float] = {}
        for name, parameters in self._layers[optimizer].items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                norms[f"grad_norm/{name}"] = total_norm(gradients)
        trainer.log_dict(norms)

    def _layers_of(
        self, trainer: BaseTrainer, optimizer: Optimizer
    ) -> dict[str, list[nn.Parameter]]:
        """In the order of the models, which is that of every rank: there are collectives."""
        own = {id(p) for group in unwrap(optimizer).param_groups for p in group["params"]}
        layers: dict[str, list[nn.Parameter]] = {}
        for model, module in trainer.named_models().items():
            for path, parameter in module.named_parameters():
                if id(parameter) in own:
                    parts = path.split(".")[:-1][: self.depth]
                    layers.setdefault(".".join([model, *parts]), []).append(parameter)
        return layers
