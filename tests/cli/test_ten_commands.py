"""The page of ten commands, run from top to bottom."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from programs import Ended, run_command, run_script, write

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ten_commands.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def run(command: str) -> Ended:
    command, _, file = command.partition(" > ")
    program, *words = shlex.split(command)
    if program == "python":
        done = run_script(words[0], *words[1:])
    else:
        assert program == "dream-trainer"
        done = run_command(*words)
    if file:
        write(file, done.out)
    return done


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_every_command_of_the_page_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (program,), (run_yaml,) = blocks("python"), blocks("yaml")
    write("train.py", program)
    write("run.yaml", run_yaml)
    said = {}
    for command in [line for block in blocks("bash") for line in block.splitlines()]:
        done = said[command] = run(command)
        assert done.status == 0, (command, done.err)
    assert len(re.findall(r"^\*\*\d+\.", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == 10

    def of(part: str) -> Ended:
        (found,) = (done for command, done in said.items() if part in command)
        return found

    assert "--model.hidden HIDDEN" in of("--model.help").out
    assert "lr: 0.05" in Path("all.yaml").read_text(encoding="utf-8")
    assert "straight run again: exact" in of("verify-resume").out
    assert "test/loss" in of("--then test").out
    told = "--optimizer: AdamW instead of SGD keeps lr=0.1 and drops momentum\n"
    assert told in of("--optimizer AdamW").err
    assert told.strip() in PAGE.read_text(encoding="utf-8")
    assert "training_parameters.n_epochs: 3 -> 5" in of("n_epochs 5").out
    runs = Path("runs/default/default")
    logs = [(runs / name / "metrics.jsonl").read_bytes() for name in ("second", "second-again")]
    assert logs[0] == logs[1] != b""
    assert Path("model.safetensors").stat().st_size > 0
