"""What ``setup`` returns for a module: Fabric's wrapper without its surprises.

Every method of the user's module runs as ``forward`` does, in the precision of the run and through
the strategy, and parameters may be frozen and unfrozen while the run goes on.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from dream_trainer.errors import ConfigError
from dream_trainer.world.direct import (
    is_autocast_alone,
    leaves_backward_alone,
    leaves_forward_alone,
)
from dream_trainer.world.gradient_sync import fix_bucket_order, keep_reducing_gradients

_USED_UNGATHERED = (
    "A parameter was used that is not gathered. Either its module was sharded, and used without "
    "being called: override apply_fully_shard (MeshStrategy: parallelize) and leave it to the "
    "module that is called. Or tensor parallel split it, and a plain tensor met it: give the plan "
    "an input layout there."
)


_requires_grad = operator.attrgetter("requires_grad")

#: torch 2.6 sends parameters from rank 0 whenever DDP is made.
_CAN_SKIP_SYNC = "init_sync" in inspect.signature(DistributedDataParallel.__init__).parameters


class WrappedModule(_FabricModule):
    """A module in the precision of the run: one device, or a strategy with a wrapper of its own."""

    _inner: nn.Module | None
    """What a call comes down to, if the precision does no more than autocast; else None."""
    _autocast: MixedPrecision | None
    """The precision, if it does that."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's ``forward``, in precision and through the strategy."""
        inner, autocast = self._inner, self._autocast
        if inner is None:
            return super().forward(*args, **kwargs)
        if autocast is None:
            return inner(*args, **kwargs)
        args = tuple([_converted(one, autocast.convert_input) for one in args])
        if kwargs:
            kwargs = {name: _converted(one, autocast.convert_input) for name, one in kwargs.items()}
        with autocast.forward_context():
            output = inner(*args, **kwargs)
        return _converted(output, autocast.convert_output)

    def __getattr__(self, item: str) -> Any:
        try:
            return nn.Module.__getattr__(self, item)
        except AttributeError:
            original = nn.Module.__getattr__(self, "_original_module")
            value = getattr(original, item)
        if inspect.ismethod(value) and value.__self__ is original:
            return functools.partial(self._run_method, value)
        return value

    def _run_method(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Another method than ``forward``, in the same precision, through the same strategy."""
        precision = self._strategy.precision
        args, kwargs = precision.convert_input((args, kwargs))
        with precision.forward_context():
            output = self.run_method(method, *args, **kwargs)
        return self.after_forward(precision.convert_output(output))

    # ------------------------------------------------------------------ what strategies differ in

    def after_forward(self, output: Any) -> Any:
        """After each outermost call."""
        return output

    def run_method(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the original module so that the strategy takes part."""
        if _uncompiled(self._forward_module) is self._original_module:
            return method(*args, **kwargs)
        return call_through(self._forward_module, self._original_module, method, *args, **kwargs)


class ShardedModule(WrappedModule):
    """FSDP2: the module's own hooks gather its parameters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's ``forward``, in precision and between FSDP2's hooks."""
        try:
            return self.after_forward(super().forward(*args, **kwargs))
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" in str(error):
                raise RuntimeError(f"{error}\n{_USED_UNGATHERED}") from error
            raise

    def after_forward(self, output: Any) -> Any:
        """Give gathered parameters back where no backward pass will.

        Otherwise the root keeps them, ``requires_grad_`` on them would be lost with the next
        sharding, and a frozen model would stay whole in memory.
        """
        root = self._original_module
        if isinstance(root, FSDPModule) and not needs_backward(output):
            root.reshard()
        return output

    def run_method(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a method between the hooks that gather and shard the module's parameters."""
        root = self._original_module
        if not isinstance(root, FSDPModule):
            return method(*args, **kwargs)
        changed: dict[int, bool] = {}

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = [p.requires_grad for p in root.parameters()]
            output = method(*args, **kwargs)
            after = [p.requires_grad for p in root.parameters()]
            changed.update((i, now) for i, now in enumerate(after) if now != before[i])
            return output

        output = call_through(root, root, watched, *args, **kwargs)
        if changed:  # on the gathered parameters; the sharded ones are what stays
            root.reshard()
            for index, parameter in enumerate(root.parameters()):
                parameter.requires_grad_(changed.get(index, parameter.requires_grad))
        return output


class ReplicatedModule(WrappedModule):
    """DDP, which reduces what needed a gradient when it was made; this follows later changes."""

    _ddp: DistributedDataParallel | None
    """None if nothing of the module is trained, so that there is nothing to reduce."""

    def follow_from_now_on(self) -> None:
        """Remember what is reduced now."""
        parameters = list(self._original_module.parameters())
        ddp = _uncompiled(self._forward_module)
        # Past Fabric's __setattr__, which would put them on the user's module.
        self.__dict__["_ddp"] = ddp if isinstance(ddp, DistributedDataParallel) else None
        self.__dict__["_parameters_in_order"] = parameters
        self.__dict__["_reduced"] = [p.requires_grad for p in parameters]
        self.__dict__["_num_changes"] = 0
        self.__dict__["_takes_turns"] = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's ``forward``, in precision and through DDP."""
        ddp = self._ddp
        if ddp is None or not torch.is_grad_enabled() or self._trains():
            return super().forward(*args, **kwargs)
        # Told to expect gradients that never come, DDP would reduce those of a later pass that is
        # not to be synchronised.
        flags = ddp.require_backward_grad_sync, ddp.require_forward_param_sync
        ddp.require_backward_grad_sync = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            ddp.require_backward_grad_sync, ddp.require_forward_param_sync = flags

    def run_method(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a method; DDP learns of it only if a backward pass will follow.

        So helpers, and sampling without gradients, may run on one rank alone.
        """
        output = method(*args, **kwargs)
        ddp = self._ddp
        if ddp is None or not needs_backward(output) or not self._trains():
            return output
        # Between forward and backward buffers must stay as they are.
        synchronises, ddp.require_forward_param_sync = ddp.require_forward_param_sync, False
        try:
            ddp._pre_forward()
            return ddp._post_forward(output)
        finally:
            ddp.require_forward_param_sync = synchronises

    def _trains(self) -> bool:
        """Whether any parameter needs a gradient. DDP is made anew if it reduces others."""
        # In every forward: of 300 parameters in C it costs 10 us.
        trained = list(map(_requires_grad, self._parameters_in_order))
        if trained == self._reduced or not any(trained):
            return any(trained)
        known = all(r or not t for t, r in zip(trained, self._reduced, strict=True))
        if not (known and self._ddp is not None and self._ddp.find_unused_parameters):
            self._reduce(trained)
        return True

    def _reduce(self, trained: list[bool]) -> None:
        """Reduce the parameters that are trained; all that ever were, once parts take turns.

        Such a model would otherwise be wrapped anew in every step. One whose parts only come in is
        told to reduce more, and need not look for unused ones. A collective.
        """
        strategy, ddp = self._strategy, self._forward_module
        assert isinstance(strategy, DDPStrategy)
        options = strategy._ddp_kwargs
        if options.get("static_graph") or not isinstance(ddp, DistributedDataParallel):
            way = "static_graph=True" if options.get("static_graph") else "torch.compile(model)"
            raise ConfigError(
                type(self._original_module).__name__,
                [f"requires_grad of its parameters changed after set-up, which {way} rules out"],
                "Leave static_graph off, and compile with model.compile() or compile_model=True.",
            )
        gradients = [p.grad for p in self._parameters_in_order]
        # What waits for the end of its accumulation window is still to be reduced.
        waits = [
            r and not t and g is not None
            for t, r, g in zip(trained, self._reduced, gradients, strict=True)
        ]
        stops = any(r and not t for t, r in zip(trained, self._reduced, strict=True))
        is_second = self._num_changes > 0 and stops
        takes_turns = self._takes_turns or is_second or any(waits)
        reduced = [t or (r and takes_turns) for t, r in zip(trained, self._reduced, strict=True)]
        own = {"find_unused_parameters": True} if takes_turns else {}
        if _CAN_SKIP_SYNC:  # their parameters are the same already
            own["init_sync"] = False
        hooks, is_synchronising = ddp._comm_hooks, ddp.require_backward_grad_sync
        del ddp.reducer, ddp.logger  # and with them the hooks that they put on the parameters
        strategy._ddp_kwargs = options | own
        try:
            with requiring_gradients(self._parameters_in_order, reduced):
                made = strategy.setup_module(self._original_module)
                keep_reducing_gradients([made])
        finally:
            strategy._ddp_kwargs = options
        # The same object, because an accumulation may be under way that switched its sync off.
        vars(ddp).update(vars(made))
        for hook, state in hooks:
            ddp.register_comm_hook(state, hook)
        fix_bucket_order(ddp)
        ddp.require_backward_grad_sync = is_synchronising
        for parameter, gradient in zip(self._parameters_in_order, gradients, strict=True):
            parameter.grad = gradient
        self.__dict__["_reduced"] = reduced
        self.__dict__["_num_changes"] += 1
        self.__dict__["_takes_turns"] = takes_turns


def improved(wrapped: _FabricModule) -> WrappedModule:
    """Fabric's wrapper, in place, as one of ours: callbacks have been given it already."""
    if isinstance(wrapped, WrappedModule):
        return wrapped
    is_sharded = any(isinstance(part, FSDPModule) for part in wrapped._original_module.modules())
    kind = ShardedModule if is_sharded else WrappedModule
    if isinstance(wrapped._strategy, DDPStrategy):
        kind = ReplicatedModule
    # Not by Fabric's __setattr__, which would change the user's module as well.
    object.__setattr__(wrapped, "__class__", kind)
    assert isinstance(wrapped, WrappedModule)
    # Past torch's __setattr__, too: it would be a second submodule.
    strategy = wrapped._strategy
    autocast = strategy.precision if is_autocast_alone(strategy.precision) else None
    is_direct = leaves_backward_alone(strategy) and (autocast or leaves_forward_alone(strategy))
    wrapped.__dict__["_inner"] = wrapped._forward_module if is_direct else None
    wrapped.__dict__["_autocast"] = autocast
    if isinstance(wrapped, ReplicatedModule):
        wrapped.follow_from_now_on()
    return wrapped


def call_through(
    outer: nn.Module, original: nn.Module, method: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Call ``outer``, whose ``forward`` ends in ``original``'s, with a method in place of that.

    The hooks of both run around it. Afterwards, and inside the method, everything is as before.
    """
    attributes = vars(original)
    names = ("forward", "_compiled_call_impl")
    found = {name: attributes[name] for name in names if name in attributes}

    def restore() -> None:
        for name in names:
            if name in found:
                attributes[name] = found[name]
            else:
                attributes.pop(name, None)

    def forward(*args: Any, **kwargs: Any) -> Any:
        restore()
        return method(*args, **kwargs)

    attributes["forward"] = forward
    attributes["_compiled_call_impl"] = None
    try:
        return outer(*args, **kwargs)
    finally:
        restore()


def needs_backward(output: Any) -> bool:
    """Whether a backward pass can start from any tensor in an output."""
    if isinstance(output, Tensor):
        return output.requires_grad
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output))


@contextmanager
def requiring_gradients(parameters: list[nn.Parameter], flags: list[bool]) -> Iterator[None]:
    """Set ``requires_grad`` of each parameter inside, and back."""
    before = [p.requires_grad for p in parameters]
    try:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)


def _converted(value: Any, convert: Callable[[Any], Any]) -> Any:
    """As Fabric converts it, which walks over everything as if it were a collection."""
    if isinstance(value, Tensor) and not value.is_floating_point():
        return value
    return value if value is None or isinstance(value, (str, int, float)) else convert(value)


def _uncompiled(module: nn.Module) -> nn.Module:
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner
