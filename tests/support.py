"""Tiny trainers, a callback that writes everything down, and a runner for ranks."""

from __future__ import annotations

import copy
import hashlib
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dream_trainer.callbacks import Callback
from dream_trainer.callbacks.callback import HOOKS
from dream_trainer.configs import CheckpointParameters, DeviceParameters, TrainingParameters
from dream_trainer.trainer import DreamTrainer, DreamTrainerConfig

# Once, in the process that the runners fork: every rank would load Fabric for itself, for seconds.
importlib.import_module("dream_trainer.world.dream_world")

# ---------------------------------------------------------------------- a tiny trainer


@dataclass(kw_only=True)
class TinyConfig(DreamTrainerConfig):
    experiment: str | None = "tiny"
    device_parameters: DeviceParameters = field(
        default_factory=lambda: DeviceParameters(accelerator="cpu")
    )
    num_samples: int = 24
    num_val_samples: int = 10
    batch_size: int = 4
    dropout: float = 0.0
    augment: bool = False
    num_workers: int = 0
    lr: float = 0.05
    has_validation: bool = True


class Points(Dataset[dict[str, Tensor]]):
    """Fixed points of a noisy line; ``augment`` adds noise from all three global generators."""

    def __init__(self, num_samples: int, augment: bool = False, seed: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(num_samples, 3, generator=generator, dtype=torch.float64)
        self.y = self.x.sum(1, keepdim=True).sin()
        self.augment = augment

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        import random

        x = self.x[index]
        if self.augment:
            x = x + random.random() * torch.rand(3) * float(np.random.rand())
        dtype = torch.get_default_dtype()
        return {"x": x.to(dtype), "y": self.y[index].to(dtype), "index": torch.tensor(index)}


def mlp(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))


class TinyTrainer(DreamTrainer):
    """One MLP, AdamW, a scheduler. Remembers which samples it has seen, step by step."""

    config: TinyConfig

    def __init__(self, config: TinyConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.seen: list[list[int]] = []

    def configure_models(self) -> None:
        self.net = mlp(self.config.dropout)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=self.config.lr)

    def configure_schedulers(self) -> Any:
        (optimizer,) = self.named_optimizers().values()
        return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)

    def configure_dataloaders(self) -> Any:
        config = self.config
        train = DataLoader(
            Points(config.num_samples, config.augment),
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            shuffle=True,
        )
        if not config.has_validation:
            return train, None
        return train, DataLoader(Points(config.num_val_samples, seed=6), config.batch_size)

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        if self.is_fitting and torch.is_grad_enabled():
            self.seen.append(batch["index"].tolist())
        return (self.net(batch["x"]) - batch["y"]).square().mean()


def tiny_config(root: Path | str, **options: Any) -> TinyConfig:
    """A config from the fields of itself and of its three parts, side by side."""
    parts: dict[str, type] = {
        "training_parameters": TrainingParameters,
        "checkpoint_parameters": CheckpointParameters,
        "device_parameters": DeviceParameters,
    }
    defaults: dict[str, dict[str, Any]] = {
        "training_parameters": {"n_epochs": 2},
        "device_parameters": {"accelerator": "cpu"},
    }
    made: dict[str, Any] = {"root_dir": str(root)}
    for name, kind in parts.items():
        known = {f.name for f in fields(kind)}
        own = {key: options.pop(key) for key in list(options) if key in known}
        if name not in options:
            made[name] = kind(**defaults.get(name, {}) | own)
    callbacks = {"progress": None} | dict(options.pop("callbacks", {}))
    return TinyConfig(**made | options, callbacks=callbacks)


def tiny(root: Path | str, kind: type[TinyTrainer] = TinyTrainer, **options: Any) -> Any:
    """A trainer of a kind with :func:`tiny_config`."""
    return kind(tiny_config(root, **options))


# ---------------------------------------------------------------------- writing things down


class RecordingCallback(Callback):
    """Writes down the name of every hook, and where the run was."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.places: list[tuple[Any, ...]] = []


def _record(hook: str) -> Callable[..., None]:
    def method(self: RecordingCallback, trainer: Any, *arguments: Any) -> None:
        self.calls.append(hook)
        index = next((a for a in arguments if type(a) is int), None)
        self.places.append((hook, trainer.global_step, trainer.current_epoch, index))

    return method


for _hook in HOOKS:
    setattr(RecordingCallback, _hook, _record(_hook))


def flat(state: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a state by its path; tensors as bytes, so that ``==`` is to the bit."""
    if isinstance(state, Mapping):
        return {
            k: v for key, value in state.items() for k, v in flat(value, f"{path}/{key}").items()
        }
    if isinstance(state, (list, tuple)):
        items = enumerate(state)
        return {k: v for index, value in items for k, v in flat(value, f"{path}/{index}").items()}
    if isinstance(state, Tensor):
        state = state.full_tensor() if hasattr(state, "full_tensor") else state
        state = state.detach().cpu().contiguous()
        return {path: (str(state.dtype), tuple(state.shape), state.view(-1).numpy().tobytes())}
    return {path: state}


def exact_state(trainer: Any) -> dict[str, Any]:
    """The state of a trainer by path, without what a clock says."""
    state = flat(trainer.state_dict())
    return {key: value for key, value in state.items() if not key.endswith("progress/seconds")}


def weights(trainer: Any) -> dict[str, Any]:
    return flat(trainer.state_dict()["models"])


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Paths at which two flat states differ; a readable ``assert``."""
    return sorted(k for k in one.keys() | other.keys() if one.get(k, "?") != other.get(k, "?"))


def digest(trainer: Any) -> str:
    """A hash of weights and optimizer state."""
    state = trainer.state_dict()
    leaves = flat({"models": state["models"], "optimizers": state["optimizers"]})
    return hashlib.sha256(repr(sorted(leaves.items())).encode()).hexdigest()


def deep_copy(state: Any) -> Any:
    return copy.deepcopy(state)


# ---------------------------------------------------------------------- ranks

_TIME_LIMIT = 60.0
_fork = multiprocessing.get_context("fork")


class RankError(AssertionError):
    """Some rank failed, or took too long."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun gives each process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"test-{port}",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def run_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, time_limit: float = _TIME_LIMIT
) -> list[Any]:
    """Fork ``size`` processes as torchrun would, call ``function(*arguments)`` in each.

    Returns what the ranks returned, by rank. A rank that raises, dies or is not done in time
    ends all of them and raises :class:`RankError` with every traceback.
    """
    port = free_port()
    processes, pipes = [], {}
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(size):
        receiver, sender = _fork.Pipe()
        environment = rank_environment(rank, size, port)
        process = _fork.Process(target=_rank, args=(sender, environment, function, arguments))
        process.start()
        sender.close()
        processes.append(process)
        pipes[receiver] = rank
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + time_limit
    try:
        open_pipes = dict(pipes)
        while open_pipes:
            # Once one has failed, the others wait for it in vain.
            left = 5.0 if failures else deadline - time.monotonic()
            ready = wait(list(open_pipes), timeout=max(left, 0))
            if not ready:
                failures |= dict.fromkeys(open_pipes.values(), f"not done after {time_limit:.0f} s")
                break
            for pipe in ready:
                rank = open_pipes.pop(pipe)
                try:
                    succeeded, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    processes[rank].join(5)
                    succeeded, value = False, f"died with exit code {processes[rank].exitcode}"
                (results if succeeded else failures)[rank] = value
        if not failures:
            next(iter(pipes)).send_bytes(b"leave")
    finally:
        for process in processes:
            if failures or sys.exc_info()[0] is not None:
                process.kill()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for pipe in pipes:
            pipe.close()
    if failures:
        raise RankError(
            "\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items()))
        )
    return [results[rank] for rank in range(size)]


def _rank(
    sender: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(environment)
    signal.alarm(int(_TIME_LIMIT) + 30)  # whatever happens to the parent
    torch.set_num_threads(1)
    try:
        answer = pickle.dumps((True, function(*arguments)))
    except BaseException:  # noqa: BLE001 - the parent raises it
        answer = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(answer)
    if environment["RANK"] == "0":
        sender.recv_bytes()  # it carries the store, so it leaves last
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: interpreter shutdown would run finalizers that belong to the parent.
    os._exit(0)
