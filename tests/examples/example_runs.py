"""Examples as their users run them, in forks of this process, which has imported torch already."""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import dream_trainer
from dream_trainer import export_checkpoint

# Once, in the process that is forked: each run would load them for itself, for seconds.
for name in dream_trainer.__all__:
    getattr(dream_trainer, name)
for name in ("torchmetrics.classification", "torch._dynamo", "sklearn.datasets"):
    importlib.import_module(name)

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(folder: Path, example: str, *arguments: object, kill_at: int = 0, status: int = 0) -> str:
    """What ``python examples/EXAMPLE ARGUMENTS`` prints, started in a folder.

    Args:
        folder: where it runs.
        example: its path in ``examples``.
        *arguments: of the command line.
        kill_at: the step of any optimizer after which it gets SIGKILL; 0 lets it live.
        status: with which it has to end, if it lives.
    """
    log = folder / "output.txt"
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        os._exit(_run(folder, example, [str(one) for one in arguments], log, kill_at))
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    output = log.read_text(encoding="utf-8")
    assert ended == (-signal.SIGKILL if kill_at else status), output
    return output


def _run(folder: Path, example: str, arguments: list[str], log: Path, kill_at: int) -> int:
    num_steps = 0

    def count(*_: object) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.chdir(folder)
    script = EXAMPLES / example
    with log.open("w", buffering=1, encoding="utf-8") as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
        sys.stdout = sys.stderr = opened
        sys.argv = [str(script), *arguments]
        sys.path.insert(0, str(script.parent))
        torch.set_num_threads(1)
        if kill_at:
            register_optimizer_step_post_hook(count)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code
            if isinstance(code, str):
                print(code)
            return code if isinstance(code, int) else int(code is not None)
        except BaseException:  # noqa: BLE001 - the parent shows it
            traceback.print_exc()
            return 1
        return 0


def assert_resumes_exactly(
    folder: Path, example: str, *arguments: object, kill_at: int
) -> tuple[str, Path]:
    """A run that is killed and started again ends like one that never was.

    Returns:
        What the run without a kill printed, and its directory.
    """
    # A save behind the training might not be committed yet when the process is killed.
    at_once = ("--checkpoint_parameters.async_save", "false")
    common = ("fit", "--root_dir", "runs", *at_once, *arguments)
    output = run(folder, example, *common, "--experiment", "whole")
    run(folder, example, *common, "--experiment", "killed", kill_at=kill_at)
    again = run(folder, example, *common, "--experiment", "killed")
    assert "resuming" in again, again
    whole, killed = (one_run(folder, name) for name in ("whole", "killed"))
    logs = [(run / "metrics.jsonl").read_bytes() for run in (whole, killed)]
    assert logs[0] == logs[1]
    weights = []
    for run_directory in (whole, killed):
        file = export_checkpoint(run_directory, folder / f"{run_directory.name}.pt")
        weights.append(_bits(torch.load(file, weights_only=True)))
    assert weights[0] == weights[1]
    return output, whole


def one_run(folder: Path, name: str) -> Path:
    """The directory of a run."""
    (found,) = (folder / "runs").glob(f"*/*/{name}")
    return found


def _bits(tree: object) -> object:
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.contiguous().view(-1).numpy().tobytes()
    if isinstance(tree, dict):
        return {name: _bits(value) for name, value in tree.items()}
    return tree
