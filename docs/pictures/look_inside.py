"""The digits example looked at from inside: a step's time, its trace, its gradients."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from pictures import example

from dream_trainer import (
    CheckpointParameters,
    Histograms,
    StepTimes,
    TrainingParameters,
    profile_run,
)

digits = example("digits")
#: Row -> (how names in the trace begin, color).
SPANS = {
    "loader": ("enumerate(DataLoader)", "tab:blue"),
    "operations": ("aten::", "0.45"),
    "backward": ("autograd::engine::evaluate_function", "tab:green"),
    "optimizer step": ("Optimizer.step", "tab:red"),
}


def config(root: str, **options: Any) -> Any:
    """The example without what it draws itself."""
    options.setdefault("checkpoint_parameters", CheckpointParameters())
    callbacks = {"progress": None, "curves": None, **options.pop("callbacks", {})}
    return digits.DigitsConfig(root_dir=root, callbacks=callbacks, **options)


def main(folder: Path) -> None:
    """Write ``step_times.png``, ``step_trace.png`` and ``gradient_histograms.png``."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        draw_times(root, folder / "step_times.png")
        draw_trace(root, folder / "step_trace.png")
        draw_gradients(root, folder / "gradient_histograms.png")


def draw_times(root: str, path: Path) -> None:
    """Bars of a step's phases, saving every 10 steps and once an epoch."""
    figure, axes = plt.subplots(figsize=(8, 1.9), layout="constrained")
    for row, every in ((0, None), (1, 10)):
        times = StepTimes()
        saves = CheckpointParameters(every_n_steps=every)
        digits.DigitsTrainer(
            config(
                root,
                experiment=f"every-{every}",
                checkpoint_parameters=saves,
                training_parameters=TrainingParameters(n_epochs=3),
                callbacks={"times": times},
            )
        ).fit()
        left = 0.0
        for number, one in enumerate(times.summary[:-1]):
            label = one.phase if row else None
            axes.barh(row, one.mean * 1e3, left=left, color=f"C{number}", label=label)
            left += one.mean * 1e3
    axes.set_yticks([0, 1], ["saved once an epoch", "saved every 10 steps"])
    axes.set_xlabel("milliseconds a step")
    axes.legend(ncols=7, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_trace(root: str, path: Path) -> None:
    """Two steps of a trace, as a viewer shows them."""
    found = profile_run(digits.DigitsTrainer, config(root), Path(root, "trace"), steps=2)
    with gzip.open(found.trace) as file:
        events = [one for one in json.load(file)["traceEvents"] if one.get("ph") == "X"]
    begin = min(one["ts"] for one in events if one["name"].startswith("ProfilerStep"))
    figure, axes = plt.subplots(figsize=(8, 2.2), layout="constrained")
    steps = [one for one in events if one["name"].startswith("ProfilerStep")]
    for one in steps:
        left, width = (one["ts"] - begin) / 1e3, one["dur"] / 1e3
        axes.barh(1, width, left=left, color="0.85", edgecolor="white")
        axes.text(left + width / 2, 1, one["name"], ha="center", va="center", fontsize=8)
    for one in events:
        for row, (start, color) in enumerate(SPANS.values()):
            if one["name"].startswith(start):
                left, width = (one["ts"] - begin) / 1e3, one["dur"] / 1e3
                axes.barh(-row, width, left=left, color=color)
    axes.set_yticks([1, *range(0, -len(SPANS), -1)], ["step", *SPANS])
    axes.set_xlabel("milliseconds")
    axes.set_xlim(0, max(one["ts"] + one["dur"] - begin for one in steps) / 1e3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


class Kept:
    """A logger that keeps histograms, in the manner of TensorBoard's."""

    def __init__(self) -> None:
        self.experiment = self
        self.found: dict[str, list[dict[str, Any]]] = {}

    def add_histogram_raw(self, name: str, **told: Any) -> None:
        self.found.setdefault(name, []).append(told)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        pass

    def finalize(self, status: str) -> None:
        pass


def draw_gradients(root: str, path: Path) -> None:
    """Gradients of two layers over a run."""
    kept = Kept()
    digits.DigitsTrainer(
        config(
            root,
            experiment="gradients",
            training_parameters=TrainingParameters(n_epochs=8),
            callbacks={"histograms": Histograms(20, batch=False)},
            loggers={"kept": kept},
        )
    ).fit()
    names = ("gradients/model.features.0.weight", "gradients/model.classifier.weight")
    figure, both = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axes, name in zip(both, names, strict=True):
        width = max(max(abs(one["min"]), abs(one["max"])) for one in kept.found[name]) / 4
        for number, one in enumerate(kept.found[name]):
            counts = torch.tensor(one["bucket_counts"], dtype=torch.float)
            line = counts / counts.max() * 1.6 - number
            color = plt.cm.viridis(number / len(kept.found[name]))
            axes.fill_between(one["bucket_limits"], line, -number, color=color, zorder=number)
            axes.plot(one["bucket_limits"], line, color="white", linewidth=0.7, zorder=number)
        steps = [one["global_step"] for one in kept.found[name]]
        axes.set_yticks([-n for n in range(len(steps))], steps)
        axes.set(xlim=(-width, width), title=name, ylabel="step")
        axes.title.set_fontsize(9)
        axes.locator_params(axis="x", nbins=5)
    figure.savefig(path, dpi=110)
    plt.close(figure)
