"""Who started the processes of a run, how many there are, and what names their job."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from typing_extensions import override

from dream_trainer.errors import ConfigError
from dream_trainer.storage import Ranks, write_text

#: Whether people type into this process: a notebook, or ``python -i``.
IS_INTERACTIVE: bool = _IS_INTERACTIVE
_INTERACTIVE_JOBS = ("bash", "interactive")


@dataclass(frozen=True)
class Launched:
    """Processes that exist already, so that Fabric starts none."""

    by: str
    """Who started them, as people call it."""
    size: int
    """All processes."""
    local: int
    """Processes on this machine."""
    how: str
    """What to give the launcher for ``{}`` processes on each machine."""
    environment: ClusterEnvironment | None = None
    """What reads their variables; None if Fabric finds it by itself."""

    @property
    def nodes(self) -> int:
        """Machines. Rounded up, where they do not have the same number of processes."""
        return -(-self.size // self.local)


def find_launcher() -> Launched | None:
    """Who started this process; None if Fabric is to start the others.

    Costs a collective under MPI, where not every implementation says how many processes a machine
    has.

    Raises:
        ConfigError: there are processes, but not the same number on each machine.
    """
    launched = next((found for find in _LAUNCHERS if (found := find()) is not None), None)
    # Ray's workers are laid out by Ray; the others number their processes machine by machine.
    if launched is not None and launched.by != "Ray" and launched.size % launched.local:
        raise ConfigError(
            "launch",
            [
                f"{launched.by} started {launched.size} processes, {launched.local} of them on "
                "this machine, so that machines differ"
            ],
            f"Start the same number on each: {launched.how.format(launched.local)}.",
        )
    return launched


def _ray() -> Launched | None:
    # Ray sets these in its workers; without ray.train somebody else did.
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK")
    if "ray.train" not in sys.modules or not _are_set(*names) or _are_set("TORCHELASTIC_RUN_ID"):
        return None
    size, local = _number("WORLD_SIZE"), _number("LOCAL_WORLD_SIZE")
    return Launched("Ray", size, local, "ScalingConfig(num_workers={})", RayEnvironment())


def _torchrun() -> Launched | None:
    if not TorchElasticEnvironment.detect() or not _are_set("WORLD_SIZE"):
        return None
    size = _number("WORLD_SIZE")
    return Launched("torchrun", size, _number("LOCAL_WORLD_SIZE", size), "--nproc-per-node {}")


def _slurm() -> Launched | None:
    if not SLURMEnvironment.detect():
        return None
    size = _number("SLURM_NTASKS")
    if size > 1 and not (_are_set("SLURM_STEP_ID") or _are_set("SLURM_STEPID")):
        sys.stderr.write(
            f"SLURM_NTASKS={size}, but srun did not start this process, which now waits for the "
            f"{size - 1} others.\nPut srun in front of the command. In an allocation that you "
            "type into, set SLURM_JOB_NAME=interactive.\n"
        )
    # "2(x3),1": two tasks on each of three machines, one on the next.
    given = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE")
    layout = re.match(r"\d+", given or "")
    local = _number("SLURM_NTASKS_PER_NODE", int(layout[0]) if layout else size)
    return Launched("SLURM", size, min(local, size), "--ntasks-per-node={}")


def _lsf() -> Launched | None:
    if not LSFEnvironment.detect():
        return None
    # The first line is where the job was launched from.
    hosts = Path(os.environ["LSB_DJOB_RANKFILE"]).read_text(encoding="utf-8").split()[1:]
    size = _number("JSM_NAMESPACE_SIZE")
    return Launched("LSF", size, -(-size // max(len(set(hosts)), 1)), "jsrun --tasks_per_rs {}")


def _mpi() -> Launched | None:
    if not MPIEnvironment.detect():
        return None
    from mpi4py import MPI

    names = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")
    local = next((_number(name) for name in names if _are_set(name)), None)
    if local is None:
        local = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).Get_size()
    return Launched("MPI", MPI.COMM_WORLD.Get_size(), local, "mpirun -npernode {}")


def _kubeflow() -> Launched | None:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    # Fabric's own children have a LOCAL_RANK.
    if not _are_set("KUBERNETES_PORT", *names) or _are_set("LOCAL_RANK"):
        return None
    size = _number("WORLD_SIZE")
    if size == 1:
        return None  # one pod: Fabric may start processes in it
    how = "one process a pod; use torchrun in the pod for {}"
    return Launched("Kubeflow", size, 1, how, KubeflowEnvironment())


#: In Fabric's order. Ray comes first: its workers inherit the variables of a scheduler around it.
_LAUNCHERS: tuple[Callable[[], Launched | None], ...] = (
    _ray,
    _torchrun,
    _slurm,
    _lsf,
    _mpi,
    _kubeflow,
)


class RayEnvironment(ClusterEnvironment):
    """Ranks as Ray Train numbers its workers; the process group is Ray's."""

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    @override
    def main_port(self) -> int:
        return _number("MASTER_PORT")

    @staticmethod
    @override
    def detect() -> bool:
        return _ray() is not None

    @override
    def world_size(self) -> int:
        return _number("WORLD_SIZE")

    @override
    def set_world_size(self, size: int) -> None:
        """Ray has decided."""

    @override
    def global_rank(self) -> int:
        return _number("RANK")

    @override
    def set_global_rank(self, rank: int) -> None:
        """Ray has decided."""

    @override
    def local_rank(self) -> int:
        return _number("LOCAL_RANK")

    @override
    def node_rank(self) -> int:
        return _number("NODE_RANK")


def job_id(ranks: Ranks) -> str | None:
    """What names the job of this process: the same in every restart of it. A collective.

    A scheduler's id with the command beside it, because a job may run several; Ray's name of the
    run; the id of a torchrun rendezvous; else one that is kept as long as one of torchrun's agents
    lives. None if nothing restarts this process.
    """
    if IS_INTERACTIVE:
        return None
    if _ray() is not None:
        from ray import train

        return f"ray {train.get_context().get_experiment_name()}"
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID"):
        # What people start by hand in one allocation are different runs.
        if _are_set(name) and not is_interactive_job():
            task = os.environ.get("SLURM_ARRAY_TASK_ID") or os.environ.get("LSB_JOBINDEX")
            return " ".join([name, os.environ[name], task or "", *sys.argv])
    rendezvous = os.environ.get("TORCHELASTIC_RUN_ID")
    if rendezvous == "none":  # torchrun's default, the same for every job
        return _id_of_agents(ranks)
    if rendezvous is None and _kubeflow() is not None:
        return os.environ.get("HOSTNAME")  # the first pod's name, which its successors get as well
    return rendezvous


def _id_of_agents(ranks: Ranks) -> str | None:
    """What the agents' folders of error files keep for us: each agent has one, for all restarts."""
    given = os.environ.get("TORCHELASTIC_ERROR_FILE")
    note = Path(given).parents[2] / "dream_trainer-job" if given else None
    kept = note.read_text(encoding="utf-8") if note and note.exists() else None
    # The agent of rank 0 may be new, or have replaced one that is lost: any of them knows.
    known = [one for one in ranks.gather(kept) if one]
    job = known[0] if known else ranks.gather(secrets.token_hex(8))[0]
    if note and job != kept and os.environ.get("LOCAL_RANK") == "0":
        write_text(note, job)
    return job


def is_interactive_job() -> bool:
    """Whether people type into the job that this process is in."""
    return (
        os.environ.get("SLURM_JOB_NAME") in _INTERACTIVE_JOBS
        or os.environ.get("LSB_INTERACTIVE") == "Y"
        or os.environ.get("PBS_ENVIRONMENT") == "PBS_INTERACTIVE"
    )


def _are_set(*names: str) -> bool:
    return all(os.environ.get(name) for name in names)


def _number(name: str, default: int | None = None) -> int:
    value = os.environ.get(name) or default
    if value is None:
        raise ConfigError("launch", [f"{name} is not set"], "The launcher sets it; start by it.")
    return int(value)


__all__ = [
    "IS_INTERACTIVE",
    "Launched",
    "RayEnvironment",
    "find_launcher",
    "is_interactive_job",
    "job_id",
]
