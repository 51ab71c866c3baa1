"""Starts runs in every way there is, as real processes, and reads how their ranks ended.

What users type is started as they type it. Where only the variables of a launcher matter, or where
torchrun's agents are to meet, processes are forks of this one, which has imported torch already.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import train
from support import free_port

SCRIPT = Path(train.__file__)
SOURCES = SCRIPT.parents[2] / "src"
BIN = Path(sys.executable).parent
#: Options of `train.py` on the command line, the same run as `train.config`.
OPTIONS = [
    "fit",
    *("--batch_size", 2),
    *("--training_parameters.n_epochs", 2, "--training_parameters.global_batch_size", 8),
    *("--checkpoint_parameters.every_n_steps", 1, "--checkpoint_parameters.async_save", "false"),
]
#: After so many seconds a launch counts as hanging.
SECONDS = 400
_LAUNCHERS = (
    "LT_ SLURM_ LSB_ JSM_ OMPI_ PMI_ TORCHELASTIC_ RANK LOCAL_RANK WORLD_SIZE MASTER_ "
    "LOCAL_WORLD_SIZE GROUP_RANK NODE_RANK KUBERNETES_"
).split()


def environment(**variables: str) -> dict[str, str]:
    """Of a shell that no launcher has been near, with a package that can be imported."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(tuple(_LAUNCHERS))}
    path = os.pathsep.join(map(str, (SOURCES, SCRIPT.parents[1], SCRIPT.parent)))
    common = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return own | common | variables


class Process:
    """A process and everything it starts; at the end of the block nothing of it is left.

    Args:
        pid: of a child of this process.
        log: where its output goes.
    """

    def __init__(self, pid: int, log: Path) -> None:
        self._process = psutil.Process(pid)
        self._log = log
        self._code: int | None = None

    @classmethod
    def command(
        cls, words: Sequence[object], folder: Path, typed: str = "", **variables: str
    ) -> Process:
        """Start what a user types, in a folder; then type more."""
        log = folder / f"log-{time.monotonic_ns()}"
        with log.open("w") as out, tempfile.TemporaryFile("w+") as lines:
            lines.write(typed)
            lines.seek(0)
            # Without its own session, a signal to the group would be one to pytest.
            started = subprocess.Popen(
                [str(word) for word in words],
                cwd=folder,
                env=environment(**variables),
                stdin=lines,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.returncode = 0  # psutil waits for it, Popen must not warn that nobody did
        return cls(started.pid, log)

    @classmethod
    def fork(
        cls, function: Callable[..., Any], *arguments: Any, folder: Path, **variables: str
    ) -> Process:
        """Call a function in a process of its own; it exits with 0, or with 1 if that raises."""
        log = folder / f"log-{time.monotonic_ns()}"
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _child(function, arguments, log, folder, environment(**variables))
        return cls(pid, log)

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit code, negative for a signal.

        Raises:
            AssertionError: it hangs.
        """
        if self._code is None:
            try:
                self._code = int(self._process.wait(seconds))
            except psutil.TimeoutExpired:
                self.kill()
                raise AssertionError(f"not done after {seconds} s\n{self.output}") from None
        return self._code

    def kill(self) -> None:
        """SIGKILL to it and all that it has started."""
        tree = []
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = [self._process, *self._process.children(recursive=True)]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, 10)

    def interrupt(self) -> None:
        """Ctrl-C as a notebook's kernel gets it: alone."""
        self._process.send_signal(signal.SIGINT)

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")


@contextlib.contextmanager
def together(processes: Sequence[Process]) -> Iterator[Sequence[Process]]:
    """However the block ends, none of them is left."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def run(
    words: Sequence[object],
    folder: Path,
    *,
    typed: str = "",
    seconds: float = SECONDS,
    status: int = 0,
    **variables: str,
) -> str:
    """What a command prints; it must end with this status, and leave nobody behind."""
    before = set(psutil.pids())
    with together([Process.command(words, folder, typed, **variables)]) as (process,):
        ended = process.wait(seconds)
        assert ended == status, f"exit status {ended}\n{process.output}"
        assert not _left_behind(before, folder), f"left behind: {_left_behind(before, folder)}"
        return process.output


def _left_behind(before: set[int], folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        if process.pid not in before:
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()  # none, if it is a zombie
                # Python's own tracker of shared memory goes a moment later.
                is_ours = words and "resource_tracker" not in " ".join(words)
                if is_ours and process.cwd() == str(folder):
                    found.append(f"{process.pid} {words}")
    return found


def run_forks(
    function: Callable[..., Any], *arguments: Any, folder: Path, ranks: Sequence[dict[str, str]]
) -> str:
    """Call a function in one process per entry of ``ranks``, which are their variables.

    Returns:
        What they print. All must end with 0.
    """
    forks = [Process.fork(function, *arguments, folder=folder, **own) for own in ranks]
    with together(forks):
        codes = [process.wait() for process in forks]
        output = "\n".join(process.output for process in forks)
        assert not any(codes), f"exit codes {codes}\n{output}"
        return output


def torchrun_variables(size: int) -> list[dict[str, str]]:
    """What torchrun gives each of so many processes on one machine."""
    port = str(free_port())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": port}
    sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0"}
    return [common | sizes | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(size)]


def agent(words: str, *arguments: Any, folder: Path, **variables: str) -> Process:
    """A torchrun agent, whose workers are forks that run `train_here`."""
    return Process.fork(_agent, words.split(), arguments, folder=folder, **variables)


def _agent(words: list[str], arguments: tuple[Any, ...]) -> None:
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    config, _, _ = config_from_args(parse_args([*words, "--local-addr", "127.0.0.1", str(SCRIPT)]))
    config.start_method = "fork"
    elastic_launch(config, train_here)(*arguments)


def train_here(folder: Path, kind: type[train.Trainer] = train.Trainer, **options: Any) -> None:
    """The run of `train.py`, in this process."""
    torch.set_num_threads(1)
    kind(train.config(folder, **options)).fit()


def wait_until(condition: Callable[[], bool]) -> bool:
    """Whether something that other processes do has happened in time."""
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def ends(folder: Path) -> list[dict[str, Any]]:
    """How the ranks ended, by rank."""
    paths = sorted(folder.glob("end-*.json"))
    return [json.loads(path.read_text()) for path in paths]


def only(values: Sequence[Any]) -> Any:
    """The one value that all of them are."""
    (value,) = set(values)
    return value


def _child(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    log: Path,
    folder: Path,
    variables: dict[str, str],
) -> None:
    """The life of a forked process; does not return."""
    status = 1
    try:
        os.setpgid(0, 0)
        signal.alarm(2 * SECONDS)  # whatever happens to the parent
        os.chdir(folder)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(out, stream)
        # pytest's own streams would keep it to themselves.
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(variables)
        function(*arguments)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - it must not return into the parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        # At once: interpreter shutdown would run finalizers that belong to the parent.
        os._exit(status)
