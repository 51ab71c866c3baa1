from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from dream_trainer.randomness import (
    decode_state,
    derive,
    encode_state,
    preserved,
    raw_state,
    rng_state,
    seed_cpu,
    seed_everything,
    set_raw_state,
    set_rng_state,
)

# These tests draw, and seed, on their own.
pytestmark = pytest.mark.may_leave("rng")


def draws() -> tuple[float, float, bytes, float, float]:
    """Of every stream, also those that keep half of a pair back."""
    return (
        random.random(),
        float(np.random.rand()),
        torch.rand(3).numpy().tobytes(),
        random.gauss(0, 1),
        float(np.random.randn()),
    )


def test_derived_seeds_never_change() -> None:
    # A release that changed one would continue every older run with other samples.
    assert derive() == 0
    assert derive(0) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 from state 0
    assert derive(42, 0) == 6332618229526065668
    assert derive(42, 1) == 17532488217563185893
    assert derive(42, "workers") == 8654411684094993742


def test_derived_seeds_of_neighbours_differ_and_fill_64_bits() -> None:
    seeds = {
        derive(seed, epoch, index) for seed in range(8) for epoch in range(8) for index in range(64)
    }
    assert len(seeds) == 8 * 8 * 64
    assert all(0 <= seed < 2**64 for seed in seeds)
    ones = sum(seed.bit_count() for seed in seeds) / len(seeds)
    assert 31 < ones < 33


def test_the_order_of_the_parts_matters() -> None:
    assert derive(1, 2) != derive(2, 1)
    assert derive("a", 1) != derive(1, "a")
    assert derive(1) != derive(1, 0)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_any_64_bit_seed_fixes_every_stream(seed: int) -> None:
    seed_cpu(seed)
    first = draws()
    seed_cpu(seed)
    assert draws() == first
    seed_everything(seed)
    assert draws() == first


def test_different_seeds_give_different_streams() -> None:
    seed_cpu(0)
    first = draws()
    seed_cpu(1)
    assert all(a != b for a, b in zip(first, draws(), strict=True))


def test_a_raw_state_continues_every_stream() -> None:
    draws()
    state = raw_state()
    first = draws()
    set_raw_state(state)
    assert draws() == first


def test_a_state_is_plain_data_and_continues_every_stream_through_a_file(tmp_path) -> None:
    draws()
    random.gauss(0, 1)  # leaves the second of a pair behind
    torch.save(rng_state(), tmp_path / "state.pt")
    first = draws()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    set_rng_state(state)
    assert draws() == first


def test_loading_a_state_does_not_change_or_keep_it() -> None:
    state = rng_state()
    kept = copy.deepcopy(state)
    set_rng_state(state)
    draws()
    assert torch.equal(state["torch"], kept["torch"])
    assert torch.equal(state["numpy"][1], kept["numpy"][1])
    assert torch.equal(state["python"][1], kept["python"][1])


def test_a_state_of_a_machine_with_accelerators_loads_without_them() -> None:
    kept = rng_state()
    torch.rand(1)
    set_rng_state(kept | {"cuda": [torch.zeros(16, dtype=torch.uint8)]})
    assert torch.equal(rng_state()["torch"], kept["torch"])


def test_encoding_and_decoding_are_inverse() -> None:
    state = raw_state()
    again = decode_state(encode_state(state))
    assert again[0] == state[0]
    assert again[1][1].tobytes() == state[1][1].tobytes()
    assert again[1][0] == state[1][0]
    assert again[1][2:] == state[1][2:]
    assert torch.equal(again[2], state[2])


@pytest.mark.usefixtures("untouched_rng")
def test_nothing_of_a_preserved_block_is_seen_outside_even_if_it_fails() -> None:
    with preserved():
        seed_cpu(7)
        draws()

    @preserved()
    def fail() -> None:
        draws()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
