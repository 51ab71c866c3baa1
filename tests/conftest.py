"""Every test leaves the process as it found it, or fails and says what it left behind."""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from streams import differing_streams, restore_rng_streams, rng_streams, same_streams

# Set by importing a library, or by pytest itself.
_FOREIGN_VARIABLES = {
    "PYTEST_CURRENT_TEST",
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # lightning.fabric
    "TORCHINDUCTOR_CACHE_DIR",  # torch._dynamo
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
}
# Python starts it once per process, to outlive whoever shares memory.
_FOREIGN_PROCESS = "resource_tracker"
# Somebody who was told to stop may need a moment; nobody who was not told does.
_GRACE_SECONDS = 5.0

Snapshot = Callable[[], dict[Any, str]]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "may_leave(*kinds): the test may leave these behind: "
        "process, thread, port, environment, rng, torch, process_group",
    )
    # A file that is closed by luck is a file whose content may be missing after a crash.
    config.addinivalue_line("filterwarnings", "error:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaks; put back what can be put back, so that the next one is clean."""
    excused = {kind for mark in request.node.iter_markers("may_leave") for kind in mark.args}
    environment = _environment()
    looks: dict[str, Snapshot] = {
        "process": _processes,
        "thread": _threads,
        "port": _listening_ports,
        "torch": _torch_switches,
        "process_group": _process_group,
    }
    before = {kind: look() for kind, look in looks.items()}
    streams = rng_streams()
    yield
    now = rng_streams()
    restore_rng_streams(streams)
    found: dict[str, list[str]] = {"rng": differing_streams(streams, now)}
    for kind, look in looks.items():
        found[kind] = _added(look(), before[kind])
        if found[kind]:
            gc.collect()  # what only waits to be collected is not leaked
            _wait_for(kind, before[kind])
            found[kind] = _added(look(), before[kind])
    changes = {
        name: f"{name}: {environment.get(name)!r} -> {value!r}"
        for name, value in (dict.fromkeys(environment) | _environment()).items()
        if value != environment.get(name)
    }
    found["environment"] = list(changes.values())
    _put_back(environment, changes, before["torch"])
    leaks = [
        f"{kind}: {what}"
        for kind, all_of in found.items()
        if kind not in excused
        for what in all_of
    ]
    if leaks:
        pytest.fail("the test left behind\n  - " + "\n  - ".join(leaks), pytrace=False)


@pytest.fixture
def untouched_rng() -> Iterator[None]:
    """Assert that the test leaves ``random``, ``numpy`` and ``torch`` exactly as they were."""
    import numpy as np
    import torch

    outer = rng_streams()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = rng_streams()
    yield
    is_same = same_streams(before, rng_streams())
    restore_rng_streams(outer)
    assert is_same, "a global random stream was drawn from"


def _added(after: dict[Any, str], before: dict[Any, str]) -> list[str]:
    return [text for key, text in after.items() if key not in before]


def _processes() -> dict[Any, str]:
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            if process.status() != psutil.STATUS_ZOMBIE and _FOREIGN_PROCESS not in command:
                found[process.pid] = f"pid {process.pid}: {command[:120]}"
        except psutil.NoSuchProcess:
            continue
    return found


def _threads() -> dict[Any, str]:
    return {id(thread): repr(thread) for thread in threading.enumerate()}


def _listening_ports() -> dict[Any, str]:
    return {
        connection.laddr: f"{connection.laddr.ip}:{connection.laddr.port}"
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def _environment() -> dict[str, str | None]:
    return {k: v for k, v in os.environ.items() if k not in _FOREIGN_VARIABLES}


def _torch_switches() -> dict[Any, str]:
    torch = sys.modules.get("torch")
    if torch is None:  # what it will be set to once it is imported
        switches: tuple[Any, ...] = (False, False, False, True, "torch.float32")
    else:
        switches = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.is_anomaly_enabled(),
            torch.is_grad_enabled(),
            str(torch.get_default_dtype()),
        )
    names = ("deterministic", "warn_only", "anomaly", "grad", "dtype")
    return {switches: ", ".join(f"{n}={v}" for n, v in zip(names, switches, strict=True))}


def _process_group() -> dict[Any, str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return {}
    if not torch.distributed.is_initialized():
        return {}
    return {"group": "torch.distributed is initialised; call destroy_process_group()"}


def _wait_for(kind: str, before: dict[Any, str]) -> None:
    if kind == "process":
        new = [psutil.Process(pid) for pid in _processes() if pid not in before]
        psutil.wait_procs(new, timeout=_GRACE_SECONDS)
    elif kind == "thread":
        for thread in threading.enumerate():
            if id(thread) not in before:
                thread.join(_GRACE_SECONDS)


def _put_back(
    environment: dict[str, str | None], changes: dict[str, str], switches: dict[Any, str]
) -> None:
    for name in changes:
        if (value := environment.get(name)) is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    torch = sys.modules.get("torch")
    if torch is None:
        return
    ((deterministic, warn_only, anomaly, grad, dtype),) = switches
    ((*now, _, _, _),) = _torch_switches()
    if now != [deterministic, warn_only]:  # setting it imports half of torch's compiler
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.autograd.set_detect_anomaly(anomaly)
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(getattr(torch, dtype.removeprefix("torch.")))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
