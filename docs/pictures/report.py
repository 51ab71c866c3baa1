"""The page of a digits run that was killed twice, and of three runs, as a browser shows it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "examples" / "digits" / "train.py"
sys.path.insert(0, str(ROOT / "tests" / "browser"))


def train(root: Path, *options: str, kill_at: int | None = None) -> None:
    """Run the example, and kill it once it has logged a step."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TRAIN), "fit", "--root_dir", str(root), *options]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        log = root / "digits" / "default" / "cnn" / "metrics.jsonl"
        while kill_at is not None and process.poll() is None:
            if last_step(log) >= kill_at:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)


def last_step(log: Path) -> int:
    """The last step of a log that is being written."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def main(folder: Path) -> None:
    """Write ``report.png``, ``report_time.png``, ``report_runs.png``, ``report_phone.png``."""
    from browsers import chromium

    from dream_trainer.reporting.figures import save_figures
    from dream_trainer.reporting.page import MOST_POINTS, write_page
    from dream_trainer.reporting.run_view import view_directories

    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        root = Path(name)
        train(root, kill_at=140)
        train(root, kill_at=270)
        train(root)
        train(root, "--experiment", "slow", "--lr", "4e-4")
        train(root, "--experiment", "dropout", "--dropout", "0.5", "--batch_size", "32")
        run = root / "digits" / "default" / "cnn"
        os.chdir(root)
        one = view_directories([run.relative_to(root)], MOST_POINTS)
        write_page(one, root / "one.html")
        write_page(view_directories([run.parent.relative_to(root)], MOST_POINTS), root / "all.html")

        browser.open(root / "one.html", width=1200, height=930)
        browser.shoot(folder / "report.png")
        browser.run("document.querySelector('[data-axis=t]').click()")
        browser.run("document.getElementById('time').scrollIntoView()")
        browser.shoot(folder / "report_time.png", "#time")
        browser.open(root / "all.html", width=1200, height=760, dark=True)
        browser.run("document.querySelector('.chart .own').click()")
        browser.run(
            "const it = document.getElementById('smooth'); it.value = 0.9;"
            "it.dispatchEvent(new Event('input'));"
        )
        browser.shoot(folder / "report_runs.png")
        browser.open(root / "one.html", width=390, height=800)
        browser.shoot(folder / "report_phone.png")
        save_figures(one, folder, names=["train/loss", "val/loss"], log=True)
        (folder / "loss.png").replace(folder / "report_figure.png")
