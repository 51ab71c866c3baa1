"""The leak checks find leaks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

LEAKY = """
import os, random, socket, subprocess, threading
import pytest

kept, states = {}, []

@pytest.fixture(scope="module", autouse=True)
def stop():
    yield
    kept["process"].kill()
    kept["process"].wait()
    kept["thread"].set()
    kept["port"].close()

def test_clean():
    pass

def test_process():
    kept["process"] = subprocess.Popen(["sleep", "60"])

def test_thread():
    kept["thread"] = threading.Event()
    threading.Thread(target=kept["thread"].wait, daemon=True).start()

def test_port():
    kept["port"] = socket.create_server(("127.0.0.1", 0))

def test_environment():
    os.environ["LEFT_BEHIND"] = "1"

def test_the_environment_was_put_back():
    assert "LEFT_BEHIND" not in os.environ

@pytest.mark.may_leave("environment")
def test_excused():
    os.environ["LEFT_BEHIND"] = "1"

def test_file(tmp_path):
    (tmp_path / "a").open("w").write("x")

def test_rng():
    states.append(random.getstate())
    random.random()

def test_the_draw_was_taken_back():
    assert random.getstate() == states[0]

def test_required_untouched(untouched_rng):
    random.random()

def test_torch():
    import torch
    torch.autograd.set_detect_anomaly(True)

def test_process_group():
    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""


def test_every_kind_of_leak_fails_the_test_that_made_it(pytester: pytest.Pytester) -> None:
    source = Path(__file__).with_name("conftest.py")
    for needed in (source, source.with_name("streams.py")):
        shutil.copy(needed, pytester.path)
    patient = source.read_text(encoding="utf-8")
    hasty = patient.replace("_GRACE_SECONDS = 5.0", "_GRACE_SECONDS = 0.05")
    assert hasty != patient
    (pytester.path / "conftest.py").write_text(hasty, encoding="utf-8")
    pytester.makepyfile(LEAKY)

    result = pytester.runpytest_subprocess(
        *("-p", "no:cacheprovider", "-rA"),
        *("-W", "error::pytest.PytestUnraisableExceptionWarning"),
    )

    result.assert_outcomes(passed=12, failed=1, errors=8)
    text = result.stdout.str()
    kinds = ("process", "thread", "port", "environment", "rng", "torch", "process_group")
    assert [kind for kind in kinds if f"  - {kind}: " not in text] == []
    culprits = (*(f"ERROR *::test_{kind}" for kind in kinds), "FAILED *::test_file*")
    for culprit in (*culprits, "ERROR *::test_required_untouched*"):
        result.stdout.fnmatch_lines([culprit + "*"])
