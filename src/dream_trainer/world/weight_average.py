"""An average of models' weights, kept in the layout of the weights themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dream_trainer.world.component_state import clean_name, every_parameter, laid_out_like
from dream_trainer.world.sharded import is_dtensor, is_fsdp_module

#: As ``torch.optim.swa_utils`` has them: ``(averages, weights, number averaged so far)``.
MultiAverage = Callable[[list[Tensor], list[Tensor], int], None]

#: Weights of another type than their average are converted in pieces of about this size.
_PIECE_BYTES = 1 << 26


class WeightAverage:
    """Averages of parameters and buffers of models, by name; of none at first.

    The average of a sharded parameter is this rank's shard of it: averaging, and putting averages
    in place, is no collective and does not wait for the device.

    Args:
        models: by name, placed and sharded.
        dtype: of the averages. None is that of each weight, float32 where that has fewer digits:
            what a step adds to an average is less than a digit of bfloat16.
    """

    def __init__(self, models: Mapping[str, nn.Module], dtype: torch.dtype | None = None) -> None:
        self._models, self._dtype = dict(models), dtype
        self._live: dict[str, Callable[[], Tensor]] = {}
        self._names: dict[str, list[tuple[str, str]]] = {}
        self._averages: dict[str, Tensor] = {}
        self._pieces: dict[tuple[str, ...], list[_Piece]] = {}
        self._is_in_place = False
        first: dict[int, str] = {}
        for full, parameter in every_parameter(models):
            if parameter.is_floating_point() or parameter.is_complex():
                name = first.setdefault(id(parameter), full)
                # By object: after a forward FSDP has others at the names of its parameters.
                self._live.setdefault(name, partial(_itself, parameter))
                model, _, key = full.partition(".")
                self._names.setdefault(name, []).append((model, key))
        self.buffers: dict[str, list[str]] = {name: [] for name in models}
        for model, key, live in _floating_buffers(models):
            name = f"{model}.{key}"
            self._live[name], self._names[name] = live, [(model, key)]
            self.buffers[model].append(name)

    def __len__(self) -> int:
        return len(self._averages)

    def __contains__(self, name: object) -> bool:
        return name in self._averages

    @property
    def is_in_place(self) -> bool:
        """Whether the averages are where the weights belong."""
        return self._is_in_place

    def has_weight(self, name: str) -> bool:
        """Whether something that can be averaged has that name."""
        return name in self._live

    def weight(self, name: str) -> Tensor:
        """The weight of a name, as it is now."""
        return self._live[name]()

    def dtype_of(self, weight: Tensor) -> torch.dtype:
        """The type of the average of a weight."""
        if not weight.is_floating_point():
            return weight.dtype
        own = torch.float32 if weight.dtype.itemsize < 4 else weight.dtype
        return own if self._dtype is None else self._dtype

    @torch.no_grad()
    def begin(self, names: Iterable[str]) -> None:
        """Let averages be what the weights are now. Memory for them is taken here."""
        for name in names:
            weight = self._live[name]().detach()
            self._averages[name] = weight.to(self.dtype_of(weight), copy=True)
        self._pieces.clear()

    @torch.no_grad()
    def update(self, names: tuple[str, ...], average: MultiAverage, num_averaged: int) -> None:
        """Take the weights of now into their averages.

        Args:
            names: all begun.
            average: changes the averages that it is given.
            num_averaged: given to it.

        Raises:
            RuntimeError: the averages are in place, so the weights of now are not the model's own.
        """
        self.require_out_of_place()
        if names not in self._pieces:
            self._pieces[names] = self._cut(names)
        for piece in self._pieces[names]:
            weights = [_local(live()) for live in piece.live]
            if piece.converts:
                weights = [one.to(piece.averages[0].dtype) for one in weights]
            average(piece.averages, weights, num_averaged)

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Let averages be given values."""
        self._averages |= {name: value.detach().clone() for name, value in values.items()}
        self._pieces.clear()

    def discard(self, names: Iterable[str]) -> None:
        """Forget averages."""
        for name in names:
            self._averages.pop(name, None)
        self._pieces.clear()

    def averages(self) -> dict[str, Tensor]:
        """The averages by ``"model.name"``; the live ones, sharded as the weights are."""
        return dict(self._averages)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages where the weights belong, for a block; afterwards all is as it was.

        Takes the memory of the weights once more: as much as gradients, which are not there then.

        Raises:
            RuntimeError: they are in place already.
        """
        self.require_out_of_place()
        names = list(self._averages)
        averages = [_local(self._averages[name]) for name in names]
        with torch.no_grad():
            own = [_local(self._live[name]()).clone() for name in names]
        self._is_in_place = True
        try:
            self._copy(averages, names)
            yield
        finally:
            self._copy(own, names)
            self._is_in_place = False

    def require_out_of_place(self) -> None:
        """Raise if the averages are where the weights belong.

        Raises:
            RuntimeError: they are.
        """
        if self._is_in_place:
            raise RuntimeError(
                "averaged weights are in the place of the model's own. Take the state, and train, "
                "after the validation, or after `with callback.swapped(trainer)`."
            )

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Averages by model, then by each name of a weight: the live ones, sharded or not."""
        state: dict[str, dict[str, Tensor]] = {}
        for name, average in self._averages.items():
            for model, key in self._names[name]:
                state.setdefault(model, {})[key] = average
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `state_dict`, under any strategy. A collective where weights are sharded.

        What has no weight here is passed over.
        """
        self._averages.clear()
        self._pieces.clear()
        # In the order of our own names, the same on every rank: spreading a tensor is a collective.
        for name, places in self._names.items():
            found = [state[m][key] for m, key in places if key in state.get(m, {})]
            weight = self._live[name]().detach()
            if found and found[0].shape == weight.shape:
                value = laid_out_like(found[0], weight)
                self._averages[name] = value.to(weight.device, self.dtype_of(weight))

    def _cut(self, names: Iterable[str]) -> list[_Piece]:
        """Averages and weights side by side, of one device and type each."""
        pieces: dict[Any, _Piece] = {}
        done: list[_Piece] = []
        for name in names:
            average, weight = _local(self._averages[name]), _local(self._live[name]())
            kind = average.device, average.dtype, weight.dtype
            piece = pieces.setdefault(kind, _Piece(converts=average.dtype != weight.dtype))
            piece.averages.append(average)
            piece.live.append(self._live[name])
            if piece.converts and sum(one.nbytes for one in piece.averages) > _PIECE_BYTES:
                done.append(pieces.pop(kind))
        return [*done, *pieces.values()]

    @torch.no_grad()
    def _copy(self, values: list[Tensor], names: list[str]) -> None:
        reshard(self._models)
        for value, name in zip(values, names, strict=True):
            _local(self._live[name]()).copy_(value)


@dataclass
class _Piece:
    converts: bool
    averages: list[Tensor] = field(default_factory=list)
    live: list[Callable[[], Tensor]] = field(default_factory=list)


def reshard(models: Mapping[str, nn.Module]) -> None:
    """Free what FSDP has gathered: it would go on computing with that, whatever the shards are."""
    for model in models.values():
        for part in model.modules():
            if is_fsdp_module(part):
                part.reshard()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if is_dtensor(tensor) else tensor).detach()


def _floating_buffers(
    models: Mapping[str, nn.Module],
) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    """Model, name and a function for the value of every buffer that is saved and no count."""
    for model_name, model in models.items():
        saved = model.state_dict().keys()
        for raw, buffer in model.named_buffers():
            if raw in saved and buffer.is_floating_point():
                path, _, attribute = raw.rpartition(".")
                # By name: a module may assign a new tensor to it.
                live = partial(getattr, model.get_submodule(path), attribute)
                yield model_name, clean_name(raw), live
