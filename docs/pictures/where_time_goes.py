"""A short run of the char_gpt example: where its time goes, and its tokens per second."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from pictures import example

from dream_trainer import CheckpointParameters, Throughput, Timeline, TrainingParameters

char_gpt = example("char_gpt")
KINDS = ("train", "loader", "validation", "save", "other")


def main(folder: Path) -> None:
    """Write ``where_time_goes.png``."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        trainer = char_gpt.CharGPTTrainer(
            char_gpt.CharGPTConfig(
                root_dir=root,
                training_parameters=TrainingParameters(
                    max_steps=200,
                    gradient_accumulation_steps=1,
                    gradient_clip_val=1.0,
                    val_every_n_epochs=None,
                    val_every_n_steps=40,
                    val_steps_per_epoch=20,
                ),
                checkpoint_parameters=CheckpointParameters(every_n_steps=40),
                callbacks={
                    "progress": None,
                    "timeline": Timeline(every_n_seconds=3.0),
                    "throughput": Throughput(),
                },
            )
        )
        trainer.fit()
        text = (trainer.run_directory / "timeline.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    began = lines[0]["time"]
    progress = [line for line in lines if line["event"] == "progress"]
    times = [line["time"] - began for line in progress]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    seconds = [[line["seconds"][kind] for kind in KINDS] for line in progress]
    spent = [
        [after - before for after, before in zip(one, last, strict=True)]
        for one, last in zip(seconds, [[0.0] * len(KINDS), *seconds], strict=False)
    ]
    starts = [0.0, *times[:-1]]
    widths = [end - start for start, end in zip(starts, times, strict=True)]
    below = [0.0] * len(spent)
    for number, kind in enumerate(KINDS):
        shares = [100 * one[number] / sum(one) for one in spent]
        left.bar(starts, shares, widths, below, align="edge", label=kind)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    left.set(xlabel="seconds since the start", title="share of each interval (%)", ylim=(0, 100))
    left.legend(loc="lower left", fontsize="small")
    known = [
        (line["time"] - began, line["measured"]["tokens_per_second"])
        for line, one in zip(progress, spent, strict=True)
        if "tokens_per_second" in line["measured"] and one[0] > 1
    ]
    right.plot(*zip(*known, strict=True), marker=".", label="tokens_per_second")
    for kind, style in (("validation", ":"), ("checkpoint", "--")):
        for number, line in enumerate(one for one in lines if one["event"] == kind):
            where = line["time"] - began
            label = kind if number == 0 else None
            right.axvline(where, color="gray", linestyle=style, linewidth=0.8, label=label)
    highest = max(rate for _, rate in known)
    right.set(xlabel="seconds since the start", title="tokens per second", ylim=(0, 1.5 * highest))
    right.legend(loc="upper left", fontsize="small")
    figure.savefig(folder / "where_time_goes.png", dpi=110)
    plt.close(figure)
