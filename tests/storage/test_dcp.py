from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dream_trainer.errors import CheckpointError
from dream_trainer.storage import flatten, read_outline, read_parts, read_tree
from dream_trainer.storage.dcp import write_tree


def assert_same(one: object, other: object, path: str = "state") -> None:
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        as_bytes = [
            tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            for tensor in (one, other)
        ]
        assert as_bytes[0] == as_bytes[1], path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}.{index}")
    else:
        assert one == other, path


def dcp_save(tmp_path: Path, state: dict) -> None:
    """As another program would."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)


def round_trip(tmp_path: Path, shared: object, local: object = None) -> tuple[object, object]:
    write_tree(tmp_path / "c", flatten(shared, {} if local is None else local))
    return read_tree(tmp_path / "c")


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ],
    ids=str,
)
def test_every_type_and_shape_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.empty(0, dtype=dtype),
        "empty matrix": torch.empty(3, 0, 2, dtype=dtype),
        "matrix": torch.arange(6).reshape(2, 3).to(dtype),
        "transposed": torch.arange(6).reshape(2, 3).to(dtype).t(),
        "strided": torch.arange(20).to(dtype)[3::4],
        "expanded": torch.ones(1, dtype=dtype).expand(4),
    }
    shared, local = round_trip(tmp_path, state, {"local": state})
    assert_same(shared, state)
    assert_same(local, {"local": state})


def test_values_that_are_not_finite_come_back_to_the_bit(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800000, -0x800000, -0x80000000, 1]).to(torch.int32)
    state = {"x": bits.view(torch.float32), "plain": float("inf")}
    shared, _ = round_trip(tmp_path, state)
    assert torch.equal(shared["x"].view(torch.int32), bits)
    assert shared["plain"] == float("inf")


def test_nested_containers_and_plain_values_come_back_as_they_were(tmp_path: Path) -> None:
    state = {
        "optimizer": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999)}, 1: {}},
        "list": [1, [torch.ones(2), None, "x", b"y\0", True, 1.5, 2j], ()],
        "big": 2**80,
        "negative": -(2**63),
        "text": "Füße\n",
        "set": {1, 2},
        "a.b": torch.zeros(1),
        "a": {"c": torch.ones(1)},
    }
    shared, local = round_trip(tmp_path, state, {"rng": (3, torch.arange(4), None)})
    assert_same(shared, state)
    assert_same(local, {"rng": (3, torch.arange(4), None)})


@pytest.mark.parametrize("state", [{}, {"a": 1}, {"a": []}], ids=str)
def test_a_state_without_tensors_comes_back(tmp_path: Path, state: dict) -> None:
    assert round_trip(tmp_path, state) == (state, {})


def test_writing_leaves_the_state_as_it_is(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    state = {"w": weight, "n": {"x": 1}}
    shared, _ = round_trip(tmp_path, state)
    assert state["w"] is weight
    assert weight.requires_grad
    assert not shared["w"].requires_grad


@pytest.mark.parametrize(
    "state",
    [
        {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)},
        {1: torch.ones(1), "1": torch.zeros(1)},
        {"__plain__": torch.ones(1)},
    ],
    ids=["dotted", "number and text", "our own name"],
)
def test_tensors_that_would_share_a_name_are_refused(tmp_path: Path, state: dict) -> None:
    with pytest.raises(ValueError, match="name"):
        write_tree(tmp_path / "c", flatten(state, {}))


def test_templates_choose_the_device_and_their_path_and_size_are_asked_for(tmp_path: Path) -> None:
    state = {"models": {"net": {"w": torch.ones(2, 3)}}, "x": torch.ones(1)}
    asked = []

    def like(path, size):
        asked.append((path, tuple(size)))

    write_tree(tmp_path / "c", flatten(state, {}))
    shared, _ = read_tree(tmp_path / "c", like)
    assert_same(shared, state)
    assert sorted(asked, key=str) == [(("models", "net", "w"), (2, 3)), (("x",), (1,))]


def test_a_rank_that_was_not_there_gets_rank_0s_local_part(tmp_path: Path) -> None:
    write_tree(tmp_path / "c", flatten({}, {"rng": torch.arange(3)}))
    _, local = read_tree(tmp_path / "c", rank=5)
    assert_same(local, {"rng": torch.arange(3)})


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_payload_runs_where_pickle_is_trusted(tmp_path: Path) -> None:
    # Otherwise the tests below would pass for the wrong reason.
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_payload_in_the_metadata_does_not_run(tmp_path: Path) -> None:
    write_tree(tmp_path / "c", flatten({"w": torch.ones(1)}, {}))
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(
        CheckpointError, match=r"\.metadata asks for pathlib\.Path\.touch|not allowed"
    ):
        read_tree(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_a_payload_inside_the_plain_part_does_not_run(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"skeleton": Payload(tmp_path / "ran"), "tensors": {}}, buffer)
    plain = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    dcp_save(tmp_path, {"__plain__": plain})
    with pytest.raises(CheckpointError, match="Weights only load failed"):
        read_tree(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_byte_entries_are_refused_by_name_and_do_not_run(tmp_path: Path) -> None:
    dcp_save(tmp_path, {"w": torch.ones(1), "extra": Payload(tmp_path / "ran")})
    with pytest.raises(CheckpointError, match="extra is a pickle, which can run code"):
        read_tree(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_program_is_refused_with_the_next_move(tmp_path: Path) -> None:
    dcp_save(tmp_path, {"w": torch.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        read_tree(tmp_path / "c")
    assert str(caught.value).endswith("that a run or DreamWorld.save wrote.")


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", b"\x80\x04N."])
def test_broken_metadata_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    write_tree(tmp_path / "c", flatten({"w": torch.ones(1)}, {}))
    (tmp_path / "c" / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="c"):
        read_tree(tmp_path / "c")


def test_a_directory_that_is_no_checkpoint_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        read_tree(tmp_path / "nothing")


def test_an_outline_has_everything_but_the_content_of_tensors(tmp_path: Path) -> None:
    tree = {"w": torch.ones(3, 2), "n": [1, torch.ones(2).bfloat16()], "b": "text"}
    write_tree(tmp_path / "c", flatten(tree, {"own": torch.ones(1)}))
    outline = read_outline(tmp_path / "c")
    assert list(outline) == list(tree)
    assert (outline["n"][0], outline["b"]) == (1, "text")
    for found, saved in ((outline["w"], tree["w"]), (outline["n"][1], tree["n"][1])):
        assert (found.device.type, found.shape, found.dtype) == ("meta", saved.shape, saved.dtype)


def test_parts_are_read_and_nothing_else(tmp_path: Path) -> None:
    tree = {"a": {"w": torch.ones(3, 2), "n": [1, torch.ones(2)]}, "b": torch.zeros(4)}
    write_tree(tmp_path / "c", flatten(tree, {}))
    asked = []

    def like(path: object, size: torch.Size) -> None:
        asked.append(path)

    parts = read_parts(tmp_path / "c", [("a", "w"), ("a", "n")], like)
    assert_same(parts, {("a", "w"): tree["a"]["w"], ("a", "n"): tree["a"]["n"]})
    assert sorted(asked, key=len) == [("a", "w"), ("a", "n", 1)]


@pytest.mark.parametrize("read", [read_outline, lambda path: read_parts(path, [("a",)])])
def test_an_outline_and_parts_are_read_as_safely_as_the_whole(tmp_path: Path, read: Any) -> None:
    dcp_save(tmp_path, {"a": Path("x")})
    with pytest.raises(CheckpointError, match="a is a pickle"):
        read(tmp_path / "c")
    with pytest.raises(CheckpointError):
        read(tmp_path / "gone")
