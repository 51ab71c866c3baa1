"""The documentation: its code runs, and it leaves nothing out."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

import dream_trainer
from dream_trainer.callbacks import HOOKS
from dream_trainer.configs import CheckpointParameters, DeviceParameters, TrainingParameters
from dream_trainer.trainer import AbstractTrainerConfig, BaseTrainerConfig, DreamTrainerConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("README.md")])
CONFIGS = (
    CheckpointParameters,
    DeviceParameters,
    TrainingParameters,
    AbstractTrainerConfig,
    BaseTrainerConfig,
    DreamTrainerConfig,
)

# What a page leaves open: before the block of that number, this is run.
_READERS_OWN = """
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from lightning.fabric import Fabric
from dream_trainer import *
def Net():
    return torch.nn.Linear(4, 3)
x = torch.randn(64, 4)
data = TensorDataset(x, x[:, :3].argmax(1))
"""
_RUN = """
from lightning.fabric import Fabric
from dream_trainer import ResumableRun
run, stream = ResumableRun(Fabric(accelerator="cpu", devices=1), "{}"), [1, 2]
"""
LEFT_OPEN = {
    "docs/migrating/accelerate.md": {0: _READERS_OWN},
    "docs/migrating/fabric.md": {0: _READERS_OWN},
    "docs/migrating/lightning.md": {0: _READERS_OWN},
    "docs/own_loop.md": {0: _RUN.format("a"), 1: _RUN.format("b")},
    "docs/trainers/abstract_trainer.md": {
        0: "import torch",
        1: "from dream_trainer.trainer import AbstractTrainerConfig\n"
        "trainer = MyTrainer(AbstractTrainerConfig())\n"
        "trainer.configure()\n"
        "trainer.setup()",
    },
}

# One process loads torch and lightning; each page runs in a fork of it. The blocks of a page share
# a namespace, and a traceback shows the lines of the page.
SERVER = """
import atexit, gc, json, os, sys
import torch._dynamo, torchmetrics.classification, dream_trainer  # dynamo: for every optimizer
for name in dream_trainer.__all__:
    getattr(dream_trainer, name)
gc.freeze()
print("ready", flush=True)
for request in sys.stdin:
    page = json.loads(request)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(os.open(page["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.chdir(page["folder"])
        namespace = {"__name__": "__main__"}
        for block in page["blocks"]:
            source = "\\n" * (block["line"] - 1) + block["source"]
            exec(compile(source, page["name"], "exec"), namespace)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # taking all modules down would take longer than the page
    print(os.waitpid(pid, 0)[1], flush=True)
"""
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")


@dataclass(frozen=True)
class Block:
    line: int
    source: str
    not_run: bool


def blocks(page: Path) -> list[Block]:
    """The python blocks of a page. One that is not run has an HTML comment before it."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    start, marked = None, False
    for number, line in enumerate(lines, start=1):
        if start is not None:
            if line.strip() == "```":
                source = "\n".join(lines[start : number - 1]) + "\n"
                found.append(Block(start + 1, source, marked))
                start, marked = None, False
        elif line.startswith("```python"):
            start = number
        elif line.strip():
            marked = bool(NOT_RUN.fullmatch(line.strip()))
    assert start is None, f"{page}:{start}: the block does not end"
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of_docs() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def documented_objects() -> set[str]:
    return set(re.findall(r"^::: (\S+)", text_of_docs(), flags=re.MULTILINE))


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.terminate()


@pytest.mark.parametrize("page", [pytest.param(p, id=name(p)) for p in PAGES if blocks(p)])
def test_the_code_of_a_page_runs(page: Path, server: subprocess.Popen[str], tmp_path: Path) -> None:
    output, folder = tmp_path / "output.txt", tmp_path / "folder"
    folder.mkdir()
    run = []
    for number, block in enumerate(blocks(page)):
        if open_part := LEFT_OPEN.get(name(page), {}).get(number):
            run.append({"line": 1, "source": open_part})
        if not block.not_run:
            run.append({"line": block.line, "source": block.source})
    request = {"name": name(page), "blocks": run, "output": str(output), "folder": str(folder)}
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    status = int(server.stdout.readline())
    assert status == 0, output.read_text(encoding="utf-8")[-4000:]


@pytest.mark.parametrize("page", [pytest.param(p, id=name(p)) for p in PAGES if blocks(p)])
def test_code_that_is_not_run_is_python_all_the_same(page: Path) -> None:
    for block in blocks(page):
        ast.parse(block.source, filename=name(page))


def test_few_blocks_are_not_run() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    assert sum(block.not_run for block in found) * 5 <= len(found)


def test_every_page_is_in_the_menu() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

    def leaves(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        parts = node.values() if isinstance(node, dict) else node
        return [leaf for part in parts for leaf in leaves(part)]

    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    decisions = {page for page in pages if page.startswith("decisions/") and "index" not in page}
    assert sorted(leaves(menu)) == sorted(pages - decisions)
    index = (DOCS / "decisions" / "index.md").read_text(encoding="utf-8")
    assert {f"decisions/{link}" for link in re.findall(r"\]\((\S+\.md)\)", index)} == decisions


def test_every_hook_is_in_the_table_in_order() -> None:
    page = (DOCS / "callbacks.md").read_text(encoding="utf-8")
    assert (
        tuple(
            n
            for n in re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
            if "_" in n or n == "close"
        )
        == HOOKS
    )


def test_every_public_name_is_in_the_reference() -> None:
    documented = {path.rpartition(".")[2] for path in documented_objects()}
    assert set(dream_trainer.__all__) - documented == set()


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_of_a_configuration_is_explained(config: type) -> None:
    """A field has its explanation under itself; the reference page shows the class."""
    assert any(path.endswith(f".{config.__name__}") for path in documented_objects())
    source = Path(sys.modules[config.__module__].__file__ or "").read_text(encoding="utf-8")
    (definition,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == config.__name__
    )
    explained = {
        field.target.id
        for field, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
    inherited = {
        field.name for base in config.__bases__ if base is not object for field in fields(base)
    }
    assert {field.name for field in fields(config)} - inherited - explained == set()


def test_a_page_knows_its_blocks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\n\n<!-- not run: needs two ranks -->\n```python\nb\n```\n"
        "```text\nc\n```\n<!-- a remark -->\n```python\nd = 2\n```\n",
        encoding="utf-8",
    )
    assert blocks(page) == [
        Block(2, "a = 1\n", False),
        Block(7, "b\n", True),
        Block(14, "d = 2\n", False),
    ]
