from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dream_trainer.data.permutation import Permutation

LENGTHS = [0, 1, 2, 3, 15, 16, 17, 4_095, 4_096, 4_097, 10_000, 99_991]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_every_number_comes_once(length: int, seed: int) -> None:
    assert sorted(Permutation(length, seed)[:]) == list(range(length))


@given(st.integers(1, 5_000), st.integers(0, 2**64 - 1), st.data())
def test_any_part_is_that_of_the_whole(length: int, seed: int, data: st.DataObject) -> None:
    whole = Permutation(length, seed)[:]
    start, stop = sorted(data.draw(st.tuples(st.integers(0, length), st.integers(0, length))))
    assert Permutation(length, seed)[start:stop] == whole[start:stop]
    step = data.draw(st.sampled_from([-3, -1, 2]))
    assert Permutation(length, seed)[::step] == whole[::step]
    index = data.draw(st.integers(-length, length - 1))
    assert Permutation(length, seed)[index] == whole[index]


def test_an_index_outside_is_an_error() -> None:
    with pytest.raises(IndexError):
        Permutation(3, 0)[3]


def test_it_begins_anywhere_in_a_length_that_fits_in_no_memory() -> None:
    order = Permutation(10**15, seed=1)
    found = order[10**14 : 10**14 + 10_000]
    assert len(set(found)) == 10_000
    assert all(0 <= one < 10**15 for one in found)


def test_places_and_neighbours_tell_nothing_of_each_other() -> None:
    """Correlations, and counts in 64 bins, stay within five standard deviations of chance."""
    length, count = 2**24 + 1, 200_000
    for seed in range(5):
        order = np.array(Permutation(length, seed)[:count])
        for other in (
            np.arange(count),
            np.roll(order, 1),
            np.array(Permutation(length, 9)[:count]),
        ):
            assert abs(np.corrcoef(order, other)[0, 1]) < 5 / np.sqrt(count)
        for part in (order * 64 // length, order % 64, np.diff(order) % 64):
            expected = len(part) / 64
            chi_squared = (np.square(np.bincount(part, minlength=64) - expected) / expected).sum()
            assert chi_squared < 63 + 5 * np.sqrt(2 * 63)


def test_the_order_of_a_seed_stays_what_it_is() -> None:
    # A run that is resumed with a later release must not see another order.
    assert Permutation(1_000_003, 7)[:5] == [194193, 939385, 813903, 889345, 447865]
