"""What a step returned for a batch, sample by sample, and samples put together again.

Mappings and tuples are structure; a tensor has a row a sample, and a list an entry a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: What can be read back without running code.
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MOVE = (
    "predict_step returns tensors with a row a sample and lists with an entry a sample, alone or "
    "in mappings and tuples. Leave out what belongs to the batch as a whole."
)


def batch_of(result: Any, num_samples: int | None) -> tuple[Any, int]:
    """A result as it is written: tensors in host memory, nothing but plain data beside them.

    Args:
        result: of a batch.
        num_samples: in the batch; None takes that of the result.

    Returns:
        A copy, and the number of samples.

    Raises:
        ValueError: a part has another number of samples, listing every one.
        TypeError: a part is of a kind that cannot be split, or not be read back.
    """
    lengths = dict(_lengths(result, ""))
    if num_samples is None:
        num_samples = next(iter(lengths.values()), None) or 0
    wrong = [
        f"{place or 'the result'} has {'no' if length is None else length} rows"
        for place, length in lengths.items()
        if length != num_samples
    ]
    if wrong:
        text = "\n  - ".join(wrong)
        raise ValueError(f"for a batch of {num_samples} samples:\n  - {text}\n{_MOVE}")
    return _on_host(result), num_samples


def whole_of(result: Any) -> Any:
    """A result that is of one sample as a whole, as it is written."""
    return _on_host(result)


def sample_of(batch: Any, row: int) -> Any:
    """The part of one sample."""
    if isinstance(batch, Mapping):
        return {key: sample_of(value, row) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(sample_of(value, row) for value in batch)
    return batch[row]


def together(samples: Sequence[Any]) -> Any:
    """Samples as one batch: the inverse of `sample_of`.

    Tensors of one shape and type become one tensor, all else a list.
    """
    if not samples:
        return []
    first = samples[0]
    if isinstance(first, Mapping) and _all_have(samples, dict, lambda one: one.keys()):
        return {key: together([one[key] for one in samples]) for key in first}
    if isinstance(first, tuple) and _all_have(samples, tuple, len):
        return tuple(together(list(part)) for part in zip(*samples, strict=True))
    if isinstance(first, Tensor) and _all_have(samples, Tensor, lambda t: (t.shape, t.dtype)):
        return torch.stack(list(samples))
    return list(samples)


def _all_have(samples: Sequence[Any], kind: type, look: Any) -> bool:
    return all(isinstance(one, kind) and look(one) == look(samples[0]) for one in samples)


def _lengths(result: Any, place: str) -> Iterator[tuple[str, int | None]]:
    """Number of samples of every part by its path; None if it has no such number."""
    if isinstance(result, Mapping):
        for key, value in result.items():
            yield from _lengths(value, f"{place}[{key!r}]")
    elif isinstance(result, tuple):
        for index, value in enumerate(result):
            yield from _lengths(value, f"{place}[{index}]")
    elif isinstance(result, Tensor):
        yield place, len(result) if result.ndim else None
    else:
        yield place, len(result) if isinstance(result, list) else None


def _on_host(value: Any, place: str = "the result") -> Any:
    if isinstance(value, Tensor):
        # A copy: a row of a large tensor would be written with all of it.
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {key: _on_host(one, f"{place}[{key!r}]") for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_on_host(one, f"{place}[{index}]") for index, one in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    if type(value) in _PLAIN:
        return value
    raise TypeError(
        f"{place} is a {type(value).__name__}, which cannot be read back without running code. "
        "Return tensors (torch.from_numpy), numbers and words."
    )
