"""`DreamFabric` in place of `Fabric`: method by method, and where it differs on purpose."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from lightning.fabric.strategies import ModelParallelStrategy
from support import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from dream_trainer import DreamFabric, MeshStrategy

pytestmark = [
    pytest.mark.may_leave("rng", "environment"),
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore"),
]

Walk = Callable[[Fabric, Path], Any]
LAYOUTS = ("single", "ddp", "sharded")


def strategy(layout: str) -> Any:
    def parallelize(module: nn.Module, mesh: Any) -> nn.Module:
        fully_shard(module, mesh=mesh["data_parallel"])
        return module

    if layout == "sharded":
        return ModelParallelStrategy(parallelize, data_parallel_size=2, tensor_parallel_size=1)
    return "ddp" if layout == "ddp" else "auto"


def whole(value: Any) -> Any:
    """Tensors as lists, sharded ones put together."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    return [whole(one) for one in value] if isinstance(value, (list, tuple)) else value


def trained(fabric: Fabric) -> tuple[Any, Any]:
    """A model and an optimizer, in the order that suits every strategy."""
    fabric.seed_everything(3, verbose=False)
    model = fabric.setup_module(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    fabric.backward(model(torch.ones(2, 3) * (1 + fabric.global_rank)).square().mean())
    return model, optimizer


class Counter:
    """Something that keeps a state."""

    value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


class Heard:
    """A callback of a Fabric."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))


# ---------------------------------------------------------------------- what each method does


def properties(fabric: Fabric, folder: Path) -> Any:
    names = "device global_rank local_rank node_rank world_size is_global_zero"
    kinds = type(fabric.accelerator).__name__, type(fabric.strategy).__name__
    return [str(getattr(fabric, name)) for name in names.split()], kinds


def sets_up(fabric: Fabric, folder: Path) -> Any:
    made = fabric.setup(nn.Linear(2, 2))
    names = [type(made.module).__name__, list(made.state_dict())]
    if isinstance(fabric.strategy, ModelParallelStrategy):
        return names  # an optimizer beside it would train nothing
    model = nn.Linear(2, 1)
    both = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return names, len(both), both[1].param_groups[0]["lr"], both[0].module is model


def sets_up_module(fabric: Fabric, folder: Path) -> Any:
    fabric.seed_everything(1, verbose=False)
    module = fabric.setup_module(nn.Linear(2, 2), move_to_device=False)
    return whole(module(torch.ones(1, 2))), [name for name, _ in module.named_parameters()]


def setup_optimizers(fabric: Fabric, folder: Path) -> Any:
    model, optimizer = trained(fabric)
    optimizer.step()
    return whole(model.state_dict()), whole(optimizer.state_dict()["state"])


def setup_dataloaders(fabric: Fabric, folder: Path) -> Any:
    data = TensorDataset(torch.arange(12))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=2))
    plain = fabric.setup_dataloaders(
        DataLoader(data, batch_size=2), use_distributed_sampler=False, move_to_device=False
    )
    lengths = len(loader), len(plain)
    return lengths, [whole(x) for (x,) in loader], [whole(x) for (x,) in plain]


def run(fabric: Fabric, folder: Path) -> Any:
    return fabric.run()


def backward(fabric: Fabric, folder: Path) -> Any:
    model, _ = trained(fabric)
    return [whole(parameter.grad) for parameter in model.parameters()]


def clip_gradients(fabric: Fabric, folder: Path) -> Any:
    model, optimizer = trained(fabric)
    norm = fabric.clip_gradients(model, optimizer, max_norm=0.1)
    clipped = [whole(parameter.grad) for parameter in model.parameters()]
    value = None
    if not isinstance(fabric.strategy, ModelParallelStrategy):
        value = fabric.clip_gradients(model, optimizer, clip_val=0.01)
    with pytest.raises(ValueError, match="clip_val") as caught:
        fabric.clip_gradients(model, optimizer)
    return whole(norm), clipped, value, str(caught.value)


def autocast(fabric: Fabric, folder: Path) -> Any:
    with fabric.autocast():
        return str((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)


def to_device(fabric: Fabric, folder: Path) -> Any:
    moved = fabric.to_device({"x": torch.ones(2), "y": [torch.zeros(1)]})
    return whole(moved), type(fabric.to_device(nn.Linear(1, 1))).__name__


def prints(fabric: Fabric, folder: Path) -> Any:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        fabric.print("one", 2, sep="-")
    return told.getvalue()


def barrier(fabric: Fabric, folder: Path) -> Any:
    return fabric.barrier(), fabric.barrier("name")


def broadcast(fabric: Fabric, folder: Path) -> Any:
    last = fabric.world_size - 1
    return fabric.broadcast({"rank": fabric.global_rank}), fabric.broadcast("x", src=last)


def all_gather(fabric: Fabric, folder: Path) -> Any:
    mine = torch.tensor([1.0 + fabric.global_rank])
    return whole(fabric.all_gather(mine)), whole(fabric.all_gather({"x": [mine, mine * 2]}))


def all_reduce(fabric: Fabric, folder: Path) -> Any:
    mine = torch.tensor(1.0 + fabric.global_rank)
    return [
        whole(fabric.all_reduce(data, reduce_op=how))
        for how in ("mean", "sum")
        for data in (mine.clone(), {"x": mine.clone()})
    ]


def rank_zero_first(fabric: Fabric, folder: Path) -> Any:
    path, seen = folder / "first", []
    for local in (False, True):
        with fabric.rank_zero_first(local=local):
            seen.append(path.exists())
            path.touch()
        fabric.barrier()
    return seen


def no_backward_sync(fabric: Fabric, folder: Path) -> Any:
    model, _ = trained(fabric)
    found = []
    for enabled in (False, True, False):
        with fabric.no_backward_sync(model, enabled=enabled):
            fabric.backward(model(torch.ones(2, 3) * (2 + fabric.global_rank)).sum())
        found.append([whole(parameter.grad) for parameter in model.parameters()])
    for parameter in model.parameters():
        parameter.grad = None
    fabric.backward(model(torch.ones(2, 3)).sum())
    return [*found, [whole(parameter.grad) for parameter in model.parameters()]]


def sharded_model(fabric: Fabric, folder: Path) -> Any:
    with fabric.sharded_model():
        return type(nn.Linear(1, 1)).__name__


def init_tensor(fabric: Fabric, folder: Path) -> Any:
    with fabric.init_tensor():
        return str(torch.ones(1).dtype), str(torch.ones(1).device)


def init_module(fabric: Fabric, folder: Path) -> Any:
    with fabric.init_module(empty_init=False):
        return str(nn.Linear(1, 1).weight.device)


def save_and_load(fabric: Fabric, folder: Path) -> Any:
    model, optimizer = trained(fabric)
    optimizer.step()
    path, counter = folder / "state.ckpt", Counter()
    counter.value = 5
    fabric.save(path, {"model": model, "optimizer": optimizer, "counter": counter, "n": 1})
    before = whole(model.state_dict())
    fabric.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    counter.value = 0
    state = {"model": model, "optimizer": optimizer, "counter": counter}
    rest = fabric.load(path, state)
    return whole(model.state_dict()) == before, counter.value, rest, type(state["counter"])


def load_raw(fabric: Fabric, folder: Path) -> Any:
    torch.manual_seed(4)
    source = nn.Linear(3, 3)
    path = folder / f"raw-{fabric.global_rank}.pt"
    torch.save(source.state_dict(), path)
    model = fabric.setup_module(nn.Linear(3, 3))
    fabric.load_raw(path, model)
    return whole(model.state_dict()) == whole(source.state_dict())


def launch(fabric: Fabric, folder: Path) -> Any:
    return fabric._launched, type(fabric.launch()).__name__


def calls(fabric: Fabric, folder: Path) -> Any:
    heard = Heard()
    fabric._callbacks.append(heard)
    fabric.call("on_epoch", 1, results={"x": 2})
    fabric.call("nobody_has_this")
    return heard.calls


def logs(fabric: Fabric, folder: Path) -> Any:
    fabric._loggers.append(CSVLogger(str(folder), name="csv", flush_logs_every_n_steps=1))
    fabric.log("loss", torch.tensor(0.5), step=1)
    fabric.log_dict({"loss": 0.25, "other": 1}, step=2)
    fabric.barrier()
    (found,) = folder.glob("csv/*/metrics.csv")
    return found.read_text(), type(fabric.logger).__name__, len(fabric.loggers)


def seed_everything(fabric: Fabric, folder: Path) -> Any:
    return fabric.seed_everything(9, workers=True, verbose=False), torch.rand(2).tolist()


#: Every public name -> the walk that uses it.
WALKS: dict[str, Walk] = {
    **dict.fromkeys(
        (
            *("device", "global_rank", "local_rank", "node_rank", "world_size"),
            *("is_global_zero", "accelerator", "strategy"),
        ),
        properties,
    ),
    **dict.fromkeys(("loggers", "logger", "log", "log_dict"), logs),
    **dict.fromkeys(("save", "load"), save_and_load),
    "run": run,
    "setup": sets_up,
    "setup_module": sets_up_module,
    "setup_optimizers": setup_optimizers,
    "setup_dataloaders": setup_dataloaders,
    "backward": backward,
    "clip_gradients": clip_gradients,
    "autocast": autocast,
    "to_device": to_device,
    "print": prints,
    "barrier": barrier,
    "broadcast": broadcast,
    "all_gather": all_gather,
    "all_reduce": all_reduce,
    "rank_zero_first": rank_zero_first,
    "no_backward_sync": no_backward_sync,
    "sharded_model": sharded_model,
    "init_tensor": init_tensor,
    "init_module": init_module,
    "load_raw": load_raw,
    "launch": launch,
    "call": calls,
    "seed_everything": seed_everything,
}
#: What Fabric gets wrong, and ours right: layout, walk -> whether an answer is right.
MENDED: dict[tuple[str, Walk], Callable[[Any], bool]] = {
    ("sharded", save_and_load): lambda found: found == (True, 5, {"n": 1}, Counter),
    # A plain backward after a block with `enabled=False` has gradients.
    ("sharded", no_backward_sync): lambda found: None not in found[-1],
}


def outcome(walk: Walk, kind: type[Fabric], layout: str, folder: Path) -> Any:
    """What a walk gives, or how it fails."""
    place = folder / f"{kind.__name__}-{walk.__name__}"
    place.mkdir(exist_ok=True)
    devices = 1 if layout == "single" else 2
    fabric = kind(accelerator="cpu", devices=devices, strategy=strategy(layout))
    fabric.launch()
    try:
        return walk(fabric, place)
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - part of what is compared
        return f"{type(error).__name__}: {error}".replace("DreamFabric", "Fabric")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_method_does_what_fabrics_does(layout: str, tmp_path: Path) -> None:
    def rank() -> dict[str, tuple[Any, Any]]:
        walks = dict.fromkeys(WALKS.values())
        return {
            walk.__name__: (
                outcome(walk, Fabric, layout, tmp_path),
                outcome(walk, DreamFabric, layout, tmp_path),
            )
            for walk in walks
        }

    for found in run_ranks(1 if layout == "single" else 2, rank):
        mended = {walk.__name__: right for (of, walk), right in MENDED.items() if of == layout}
        differing = {name: both for name, both in found.items() if both[0] != both[1]}
        assert differing.keys() == mended.keys(), differing
        for name, is_right in mended.items():
            theirs, ours = found[name]
            assert is_right(ours), ours
            assert isinstance(theirs, str) or not is_right(theirs), "Fabric has mended it"
        failed = [name for name, (_, ours) in found.items() if isinstance(ours, str)]
        # `sharded_model` is deprecated and gone from some strategies.
        assert {name for name in failed if "Error" in found[name][1]} <= {"sharded_model"}, found


def test_no_public_name_is_left_out() -> None:
    public = {name for name in dir(Fabric) if not name.startswith("_")}
    assert public == set(WALKS)
    assert {name for name in dir(DreamFabric) if not name.startswith("_")} == public


def test_signatures_are_those_of_fabric() -> None:
    assert inspect.signature(DreamFabric) == inspect.signature(Fabric)
    for name in WALKS:
        theirs, ours = getattr(Fabric, name), getattr(DreamFabric, name)
        if callable(theirs):
            assert inspect.signature(ours) == inspect.signature(theirs), name


# ---------------------------------------------------------------------- how people use it


def test_it_is_derived_from_again_named_in_types_and_made_twice() -> None:
    class Own(DreamFabric):
        def run(self, value: int) -> int:  # type: ignore[override]
            return value + self.world_size

    first, second = Own(accelerator="cpu", devices=1), Own(accelerator="cpu", devices=1)
    assert (first.run(1), second.run(2)) == (2, 3)
    assert isinstance(first, Fabric)
    fabric: Fabric = DreamFabric(accelerator="cpu")
    assert fabric.launch(lambda given: type(given) is DreamFabric) is True
    assert (fabric._strategy, fabric._precision) == (fabric.strategy, fabric.strategy.precision)
    assert fabric._loggers == []
    prepared = fabric._setup_dataloader(DataLoader(TensorDataset(torch.arange(4))))
    assert len(prepared) == 4


def test_it_is_copied_and_pickled_as_fabric_is() -> None:
    outcomes = []
    for kind in (Fabric, DreamFabric):
        fabric = kind(accelerator="cpu", devices=1)
        for way in (copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
            try:
                again = way(fabric)
                outcomes.append((type(again) is kind, again.world_size))
            except Exception as error:  # noqa: BLE001 - compared
                outcomes.append((type(error).__name__, 0))
    assert outcomes[:3] == outcomes[3:]


def test_what_fabric_saved_it_loads_and_the_other_way_round(tmp_path: Path) -> None:
    kinds = (Fabric, DreamFabric)
    for number, (writer, reader) in enumerate([kinds, kinds[::-1]]):
        one, other = (kind(accelerator="cpu", devices=1) for kind in (writer, reader))
        model, optimizer = trained(one)
        optimizer.step()
        one.save(tmp_path / f"{number}.ckpt", {"model": model, "optimizer": optimizer, "n": 2})
        copied, stepped = trained(other)
        rest = other.load(tmp_path / f"{number}.ckpt", {"model": copied, "optimizer": stepped})
        assert rest == {"n": 2}
        assert whole(copied.state_dict()) == whole(model.state_dict())
        assert whole(stepped.state_dict()) == whole(optimizer.state_dict())


def test_under_a_mesh_it_saves_what_a_stock_fabric_loads(tmp_path: Path) -> None:
    def rank() -> bool:
        found = []
        for kind in (DreamFabric, Fabric):
            fabric = kind(accelerator="cpu", devices=2, strategy=MeshStrategy(dp_shard=2))
            fabric.launch()
            model, _ = trained(fabric)
            if kind is DreamFabric:
                fabric.save(tmp_path / "state", {"model": model})
                expected = whole(model.state_dict())
            else:
                for parameter in model.parameters():
                    parameter.data.zero_()
                fabric.load(tmp_path / "state", {"model": model})
                found.append(whole(model.state_dict()) == expected)
        return found == [True]

    assert run_ranks(2, rank) == [True, True]
