"""find_graph_breaks: each break and recompilation with its line and its cause."""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TinyTrainer, run_ranks, tiny_config
from torch import Tensor, nn

from dream_trainer import CompileReport, find_graph_breaks
from dream_trainer.errors import ConfigError
from dream_trainer.inspection.compile_log import CompileLog, GraphBreak


class Clean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class Breaking(Clean):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.layer(x) * self.calls
        if x.mean() > 0:
            x = x + 1
        return x


class Trainer(TinyTrainer):
    kind: type[nn.Module] = Clean

    def configure_models(self) -> None:
        self.net = self.kind()  # type: ignore[assignment]


class BreakingTrainer(Trainer):
    kind = Breaking


class Blocks(nn.Module):
    """The default policy compiles each block, not the loop around them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Clean(), nn.Linear(1, 3), Clean()])

    def forward(self, x: Tensor) -> Tensor:
        print(end="")  # would break the graph of the whole
        for block in self.blocks:
            x = block(x)
        return x


class BlockTrainer(Trainer):
    kind = Blocks


class BreakingBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Breaking(), nn.Linear(1, 3), Breaking()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class BreakingBlockTrainer(Trainer):
    kind = BreakingBlocks


def line_of(code: str) -> int:
    lines, start = inspect.getsourcelines(Breaking)
    return start + next(index for index, line in enumerate(lines) if code in line)


def find(root: Path, kind: type[TinyTrainer], **options: Any) -> CompileReport:
    return find_graph_breaks(kind, tiny_config(root), **options)


def test_a_break_has_its_line_and_its_reason(tmp_path: Path) -> None:
    report = find(tmp_path, BreakingTrainer)
    (one,) = report.breaks
    assert (one.file, one.line) == (__file__, line_of("if x.mean() > 0:"))
    assert "data-dependent" in one.reason.lower()
    assert one.times >= 1
    told = str(report)
    assert f"{__file__}:{one.line}" in told
    assert "if x.mean() > 0:" in told
    assert not report.is_clean
    assert list(tmp_path.iterdir()) == []


def test_a_recompilation_has_its_guard_and_the_line_that_it_comes_from(tmp_path: Path) -> None:
    report = find(tmp_path, BreakingTrainer, batches=3, vary_shapes=False)
    causes = {one.guard: one for one in report.recompilations if one.function == "forward"}
    (one,) = [one for guard, one in causes.items() if "calls == 0" in guard]
    assert one.source == f"{__file__}:{line_of('self.calls += 1')}: self.calls += 1"
    assert one.file == __file__
    assert not any("size mismatch" in guard for guard in causes)


def test_other_shapes_are_tried(tmp_path: Path) -> None:
    report = find(tmp_path, Trainer)
    assert report.breaks == ()
    (one,) = report.recompilations
    assert one.guard == "tensor 'x' size mismatch at index 0. expected 4, actual 2"
    clean = find(tmp_path, Trainer, batches=3, vary_shapes=False)
    assert clean.is_clean
    assert (clean.graphs, str(clean)) == (
        1,
        "3 batches, 1 graph, no graph break, no recompilation",
    )


def test_what_is_compiled_is_what_the_trainers_policy_compiles(tmp_path: Path) -> None:
    report = find(tmp_path, BlockTrainer, batches=2, vary_shapes=False)
    assert report.breaks == ()
    assert report.graphs >= 1


def test_a_break_of_several_blocks_is_one_place_and_counted(tmp_path: Path) -> None:
    (one,) = find(tmp_path, BreakingBlockTrainer, batches=1, vary_shapes=False).breaks
    assert (one.line, one.times) == (line_of("if x.mean() > 0:"), 2)


def test_a_duplicate_that_torch_shortens_is_the_same_break() -> None:
    log = CompileLog()
    try:
        texts = (
            "Graph break in user code at a.py:3\nGraph Break Reason: why\n  Hint: other\n\n"
            "User code traceback:\n  File ...",
            "Graph break (user stack suppressed due to duplicate graph break) in user code at "
            "a.py:3\nGraph Break Reason: why\n  Hint: other\n",
        )
        for text in texts:
            log.emit(logging.LogRecord("torch", logging.DEBUG, "", 0, text, None, None))
    finally:
        log.close()
    assert log.breaks == (GraphBreak("why", "other", "a.py", 3, 2),)


def test_a_model_without_code_of_its_own_is_told(tmp_path: Path) -> None:
    report = find(tmp_path, TinyTrainer)  # an nn.Sequential
    assert report.graphs == 0
    assert "nothing was compiled" in str(report)
    assert not report.is_clean


def test_logs_and_what_is_compiled_later_are_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_LOGS", "")
    find(tmp_path, BreakingTrainer)
    for name, one in logging.root.manager.loggerDict.items():
        if isinstance(one, logging.Logger) and name.endswith(("__graph_breaks", "__recompiles")):
            assert one.propagate
            assert not any(type(handler).__name__ == "CompileLog" for handler in one.handlers)
    assert os.environ["TORCH_LOGS"] == ""
    backends = []

    def backend(module: Any, inputs: Any) -> Any:
        backends.append(module)
        return module.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert len(backends) == 1  # no backend is forced any more


def test_too_few_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batches is 2, and must be at least 3"):
        find(tmp_path, Trainer, batches=2)


def on_ranks(root: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        find_graph_breaks(Trainer, tiny_config(root, devices=2, dp_replicate=2))
    return str(caught.value)


@pytest.mark.distributed
def test_several_processes_are_refused(tmp_path: Path) -> None:
    for told in run_ranks(2, on_ranks, tmp_path):
        assert told.startswith("device_parameters: 2 processes; find_graph_breaks works with one")
