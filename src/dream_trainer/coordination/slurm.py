"""Put a preempted job back into SLURM's queue."""

from __future__ import annotations

import os
import subprocess

from dream_trainer.coordination.messages import tell


def requeue_slurm_job() -> None:
    """Ask SLURM to run this job again, under the same id; nothing happens outside a batch job.

    A failure is told and does not hide how the run ended.
    """
    from dream_trainer.world.launchers import is_interactive_job

    job = os.environ.get("SLURM_JOB_ID")
    if job is None or is_interactive_job():
        return
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        tell(f"{' '.join(command)} failed: {str(reason).strip()}")
    else:
        tell(f"SLURM job {job} is back in the queue")
