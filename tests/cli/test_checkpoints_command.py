"""``dream-trainer checkpoints``: what it says of real checkpoints, and what it leaves alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny

from dream_trainer.checkpointing import Checkpointer, CheckpointStore
from dream_trainer.cli import main
from dream_trainer.storage import flatten, read_parts, save_directory
from dream_trainer.storage.run_lock import RunLock

pytestmark = pytest.mark.may_leave("rng")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with checkpoints at 3, 6, 9 and 12."""
    trainer = tiny(
        tmp_path_factory.mktemp("runs"),
        every_n_steps=3,
        monitor="val/loss",
        keep_last=9,
        keep_every_n_steps=6,
        async_save=False,
        callbacks={},
    )
    trainer.fit()
    return Path(trainer.run_directory)


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy to damage and prune."""
    return Path(shutil.copytree(original, tmp_path / "runs" / "tiny", symlinks=True))


def call(*words: object) -> int:
    """Exit status of ``dream-trainer checkpoints``."""
    try:
        main(["checkpoints", *map(str, words)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def told(capsys: Capture, *words: object) -> Any:
    """What ``--json`` prints."""
    capsys.readouterr()
    call(*words, "--json")
    return json.loads(capsys.readouterr().out)


def steps(run: Path) -> list[int]:
    return [one.manifest.step for one in CheckpointStore(run / "checkpoints").list()]


def at(run: Path, step: int) -> Path:
    """The checkpoint of a step; that of an epoch's end has a number behind it."""
    (path,) = (
        one.path for one in CheckpointStore(run / "checkpoints").list() if one.manifest.step == step
    )
    return path


def flip_a_bit(checkpoint: Path) -> Path:
    file = next(checkpoint.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def fingerprint(directory: Path) -> dict[str, Any]:
    """Everything below a directory, to the byte and the nanosecond."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(directory.rglob("*"))
    }


# ---------------------------------------------------------------------- ls


def test_ls_tells_what_each_checkpoint_is(original: Path, capsys: Capture) -> None:
    rows = told(capsys, "ls", original)
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert [row["epoch"] for row in rows] == [0, 1, 1, 2]
    assert {row["world_size"] for row in rows} == {1}
    assert all(row["whole"] and row["saved_at"] for row in rows)
    monitored = [row["monitored"] for row in rows]
    assert [one is None for one in monitored] == [True, False, True, False]
    best = 6 if monitored[1] < monitored[3] else 12
    for row in rows:
        files = [f for f in Path(row["path"]).iterdir() if f.name != "manifest.json"]
        assert row["bytes"] == sum(file.stat().st_size for file in files)
        reasons = {
            "newest": row["step"] == 12,
            "best": row["step"] == best,
            "kept for good": row["step"] % 6 == 0,
        }
        assert row["kinds"] == [name for name, holds in reasons.items() if holds]
    assert call("ls", original) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(original)
    assert lines[1].split()[:3] == ["Checkpoint", "Epoch", "Size"]
    assert "val/loss" in lines[1]
    assert [line.split()[0] for line in lines[2:6]] == [Path(row["path"]).name for row in rows]


@pytest.mark.parametrize("place", [".", "checkpoints", "../..", "../../.."])
def test_ls_finds_runs_from_any_place_above_their_checkpoints(
    original: Path, place: str, capsys: Capture
) -> None:
    rows = told(capsys, "ls", (original / place).resolve())
    assert [(row["run"], row["step"]) for row in rows] == [
        (str(original), n) for n in (3, 6, 9, 12)
    ]


def test_ls_of_a_checkpoint_or_a_link_is_that_one(original: Path, capsys: Capture) -> None:
    for place in (at(original, 12), original / "checkpoints" / "newest"):
        (row,) = told(capsys, "ls", place)
        assert (row["step"], row["kinds"][0]) == (12, "newest")


def test_ls_names_damage_that_shows_in_sizes_and_what_was_set_aside(
    run: Path, capsys: Capture
) -> None:
    folder = run / "checkpoints"
    os.truncate(at(run, 12) / ".metadata", 10)
    (folder / "step-00000009" / "manifest.json").unlink()
    (folder / "step-00000003").rename(folder / "step-00000003.damaged-1")
    rows = told(capsys, "ls", run)
    assert [(row["step"], row["whole"]) for row in rows] == [(6, True), (9, False), (12, False)]
    assert "newest" in rows[0]["kinds"]
    assert ".metadata has 10 bytes" in rows[2]["problems"][0]
    assert call("ls", run) == 0
    text = capsys.readouterr().out
    assert "damaged: manifest.json" in text
    assert "set aside: step-00000003.damaged-1, " in text


def test_ls_without_a_configuration_knows_the_best_one_from_its_link(
    run: Path, capsys: Capture
) -> None:
    (run / "config.yaml").unlink()
    best = (run / "checkpoints" / "best").readlink().name
    rows = told(capsys, "ls", run / "checkpoints")
    assert [Path(r["path"]).name for r in rows if "best" in r["kinds"]] == [best]


@pytest.mark.parametrize("words", [("ls",), ("show",), ("diff", "{}")], ids=lambda words: words[0])
def test_a_narrow_terminal_cuts_no_name(
    original: Path, words: tuple[str, ...], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    command, *others = words
    call(command, original, *(at(original, 9) for _ in others))
    plain = capsys.readouterr().out.split()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    call(command, original, *(at(original, 9) for _ in others))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).split()
    assert shown == plain


def test_head_may_stop_reading(original: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    if not (child := os.fork()):
        status = 1
        try:
            sys.stdout = os.fdopen(writing, "w")
            status = call("ls", original)
        finally:
            os._exit(status)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 141


# ---------------------------------------------------------------------- wrong words


@pytest.mark.parametrize(
    "words",
    [
        ("ls", "{}"),
        ("show", "{}"),
        ("verify", "{}"),
        ("diff", "{}", "{}"),
        ("export", "{}", "x.pt"),
        ("prune", "{}", "--keep_last", "1"),
    ],
    ids=lambda words: words[0],
)
def test_a_wrong_path_is_two_lines_at_most_and_names_what_is_near(
    original: Path, words: tuple[str, ...], capsys: Capture
) -> None:
    wrong = original.with_name("tinny")
    assert call(*(word.format(wrong) for word in words)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dream-trainer: error: {wrong}: there is nothing of that name")
    assert f"did you mean {original}?" in error
    assert len(error.splitlines()) <= 2


def test_a_directory_without_runs_says_what_is_there(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "photos").mkdir()
    assert call("ls", tmp_path) == 2
    assert "here is: photos\nGive a run's directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls", "--jso"], "unrecognized arguments: --jso"),
        (["show", "x", "--depth", "0"], "'0' is neither a number above 0 nor 'all'"),
        (["prune", "x", "--keep_every_n_steps", "often"], "'often' is neither a number nor 'none'"),
        (["diff", "x"], "required: B"),
        ([], "required: COMMAND"),
    ],
)
def test_a_wrong_option_is_named(words: list[str], message: str, capsys: Capture) -> None:
    assert call(*words) == 2
    assert message in capsys.readouterr().err


def test_looking_changes_nothing(run: Path, capsys: Capture) -> None:
    before = fingerprint(run)
    newest = run / "checkpoints" / "newest"
    for words in (
        ("ls", run),
        ("show", run),
        ("verify", run),
        ("diff", run, newest),
        ("prune", run, "--keep_last", "1"),
        ("prune", run, "--keep_last", "1", "--yes", "--dry_run"),
    ):
        assert call(*words) == 0, words
    assert fingerprint(run) == before


def test_listing_help_and_report_load_no_torch(original: Path) -> None:
    program = (
        "import sys\n"
        "from dream_trainer.cli import main\n"
        "for words in sys.argv[1:]:\n"
        "    try:\n"
        "        main(words.split())\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, words\n"
        "heavy = {'torch', 'numpy', 'lightning', 'jsonargparse', 'rich'}\n"
        "assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))\n"
    )
    commands = [f"checkpoints ls {original}", f"checkpoints verify {original}"]
    commands += [f"checkpoints prune {original} --keep_last 1", f"report {original} --no-html"]
    commands += ["checkpoints --help", "checkpoints prune --help", "report --help"]
    result = subprocess.run(
        [sys.executable, "-c", program, *commands], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------- show


def test_show_tells_names_shapes_types_and_bytes(original: Path, capsys: Capture) -> None:
    found = told(capsys, "show", original)
    assert found["step"] == 12
    assert set(found["files"]) == {".metadata", "__0_0.distcp"}
    parts = {part["name"]: part for part in found["contents"]["parts"]}
    (net,) = parts["models"]["parts"]
    weights = {one["name"]: (one["dtype"], one["shape"], one["bytes"]) for one in net["parts"]}
    assert weights == {
        "0.weight": ("float32", [8, 3], 96),
        "0.bias": ("float32", [8], 32),
        "3.weight": ("float32", [1, 8], 32),
        "3.bias": ("float32", [1], 4),
    }
    assert (net["tensors"], net["elements"], net["bytes"]) == (4, 41, 164)
    # AdamW: two moments like each parameter, and a step of one float.
    assert parts["optimizers"]["bytes"] == 2 * 164 + 4 * 4
    assert found["contents"]["bytes"] == sum(part.get("bytes", 0) for part in parts.values())
    assert {"trainer", "schedulers", "callbacks", "rank 0"} <= parts.keys()


def test_show_goes_as_deep_as_it_is_told(original: Path, capsys: Capture) -> None:
    assert call("show", original, "--depth", "1") == 0
    shallow = capsys.readouterr().out
    assert "models" in shallow
    assert "net" not in shallow
    assert call("show", original) == 0
    assert "    0.weight" in capsys.readouterr().out
    assert call("show", original, "--depth", "all") == 0
    deep = capsys.readouterr().out
    assert "exp_avg_sq" in deep
    assert deep.splitlines()[-1].split()[:2] == ["in", "all"]


def test_show_reads_no_weights(run: Path, capsys: Capture) -> None:
    """Only the index and what is no tensor: a flipped bit in a weight goes unseen."""
    before = told(capsys, "show", run)
    place = ("models", "net", "0.weight")
    raw = read_parts(at(run, 12), [place])[place].numpy().tobytes()
    file = next(at(run, 12).glob("*.distcp"))
    assert file.read_bytes().count(raw) == 1
    file.write_bytes(file.read_bytes().replace(raw, bytes(len(raw))))
    assert told(capsys, "show", run) == before


def test_show_of_a_broken_manifest_ends_with_1(run: Path, capsys: Capture) -> None:
    path = at(run, 12)
    (path / "manifest.json").write_text("{")
    assert call("show", path) == 1
    assert "manifest.json" in capsys.readouterr().err
    assert told(capsys, "show", run)["step"] == 9  # of a run, the newest whole one


# ---------------------------------------------------------------------- verify


def test_verify_reads_every_file(run: Path, capsys: Capture) -> None:
    assert call("verify", run) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("4 whole (")
    damaged = flip_a_bit(at(run, 12))
    assert call("verify", run) == 1
    text = capsys.readouterr().out
    assert f"{damaged.parent}: damaged\n  {damaged.name} does not match its checksum\n" in text
    assert "step-00000009 is the newest whole one" in text
    assert call("verify", at(run, 9)) == 0
    assert call("verify", damaged.parent) == 1
    assert f"'checkpoints verify {run}' looks for a whole one" in capsys.readouterr().out


def test_verify_where_nothing_is_saved_does_not_say_whole(run: Path, capsys: Capture) -> None:
    shutil.rmtree(run / "checkpoints")
    assert call("verify", run) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


# ---------------------------------------------------------------------- diff


def saved(folder: Path, state: dict[str, Any], step: int = 1) -> Path:
    path = folder / f"step-{step:08d}"
    Checkpointer(folder).write(path, state, step=step)
    return path


def test_a_checkpoint_is_the_same_as_its_copy(original: Path, run: Path, capsys: Capture) -> None:
    assert call("diff", original, run) == 0
    text = capsys.readouterr().out
    assert "manifest: the same\nconfig: the same\n" in text
    assert "are bitwise equal" in text
    assert told(capsys, "diff", original, run)["same"] is True


def test_diff_names_what_is_in_one_only_shapes_types_and_values(
    tmp_path: Path, capsys: Capture
) -> None:
    one = {
        "models": {
            "net": {
                "a": torch.tensor([1.0, 2.0, float("nan")]),
                "same": torch.tensor([float("nan")]),
                "zero": torch.tensor(0.0),
                "shape": torch.zeros(2, 3),
                "dtype": torch.ones(2),
                "gone": torch.zeros(1),
            }
        },
        "lr": 0.1,
        "steps": 1,
    }
    other = {
        "models": {
            "net": {
                "a": torch.tensor([1.0, 2.5, float("nan")]),
                "same": torch.tensor([float("nan")]),
                "zero": torch.tensor(-0.0),
                "shape": torch.zeros(3, 2),
                "dtype": torch.ones(2, dtype=torch.float64),
                "new": torch.zeros(1),
            }
        },
        "lr": 0.2,
        "steps": 1.0,
    }
    places = saved(tmp_path / "a", one), saved(tmp_path / "b", other, step=2)
    found = told(capsys, "diff", *places)
    assert found["same"] is False
    assert found["manifest"] == {"step": [1, 2]}
    assert found["config"] is None
    assert found["state"] == {
        "only_in_one": ["models.net.gone"],
        "only_in_other": ["models.net.new"],
        "shapes": {"models.net.shape": [[2, 3], [3, 2]]},
        "dtypes": {"models.net.dtype": ["float32", "float64"]},
        "plain": {"lr": ["0.1", "0.2"], "steps": ["1", "1.0"]},
        "parts": [
            {
                "part": "models.net",
                "num_tensors": 4,
                "num_differing": 3,
                "largest": 0.5,
                "largest_in": "models.net.a",
            }
        ],
    }
    assert call("diff", *places) == 1
    text = capsys.readouterr().out
    for line in ("only in A: 1\n  models.net.gone", "only in B: 1\n  models.net.new"):
        assert line in text
    assert "tensors: 3 of 4 that are in both differ" in text


def test_a_nan_in_one_is_larger_than_any_difference(tmp_path: Path, capsys: Capture) -> None:
    one = saved(tmp_path / "a", {"m": {"x": torch.tensor([1.0]), "y": torch.tensor([1.0])}})
    other = saved(
        tmp_path / "b", {"m": {"x": torch.tensor([float("nan")]), "y": torch.tensor([9.0])}}
    )
    parts = told(capsys, "diff", one, other)["state"]["parts"]
    assert [(part["largest"], part["largest_in"]) for part in parts] == [
        ("nan", "m.x"),
        (8.0, "m.y"),
    ]


def test_the_parts_of_all_ranks_are_shown_and_compared(tmp_path: Path, capsys: Capture) -> None:
    def checkpoint(name: str, second: float) -> Path:
        shared = {"models": {"net": {"w": torch.ones(2)}}}
        ranks = [{"rng": {"torch": torch.tensor([n])}} for n in (1.0, second)]
        entries = flatten(shared, ranks[0]) | flatten(shared, ranks[1], rank=1)
        save_directory(tmp_path / name, entries, step=1, epoch=0)
        return tmp_path / name

    one, other = checkpoint("one", 2.0), checkpoint("other", 5.0)
    names = [part["name"] for part in told(capsys, "show", one)["contents"]["parts"]]
    assert names == ["models", "rank 0", "rank 1"]
    assert call("show", one) == 0
    last = capsys.readouterr().out.splitlines()[-2].split()
    assert last == ["rank", "1", "not", "listed", "1", "4", "B"]
    parts = told(capsys, "diff", one, other)["state"]["parts"]
    differing = {part["part"]: part["largest"] for part in parts if part["num_differing"]}
    assert differing == {"rank 1: rng": 3.0}


def test_only_the_asked_for_is_compared(original: Path, run: Path, capsys: Capture) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.05", "lr: 0.06"))
    assert call("diff", original, run) == 1
    assert "lr    0.05  0.06" in capsys.readouterr().out
    assert call("diff", original, run, "--only", "state", "--only", "manifest") == 0
    assert told(capsys, "diff", original, run)["config"] == {"lr": [0.05, 0.06]}


def test_trouble_is_no_difference(original: Path, run: Path, capsys: Capture) -> None:
    flip_a_bit(at(run, 12))
    assert call("diff", original, run) == 2
    assert "does not match its checksum" in capsys.readouterr().err


# ---------------------------------------------------------------------- export


def test_export_is_the_same_in_its_short_form(original: Path, tmp_path: Path) -> None:
    files = tmp_path / "long.pt", tmp_path / "short.pt"
    assert call("export", original, files[0]) == 0
    main(["export", str(original), str(files[1])])
    weights = [torch.load(file, weights_only=True) for file in files]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


# ---------------------------------------------------------------------- prune


def test_prune_lists_and_deletes_only_when_it_is_told_to(run: Path, capsys: Capture) -> None:
    foreign = run / "checkpoints" / "step-notes"
    foreign.mkdir()
    words = ("prune", run, "--keep_last", "1", "--keep_top_k", "0")
    assert call(*words) == 0
    text = capsys.readouterr().out
    assert "keep the newest 1, every multiple of 6 steps" in text
    assert "would delete 2 checkpoints" in text
    assert text.endswith("Nothing was deleted. Add --yes to delete.\n")
    assert steps(run) == [3, 6, 9, 12]
    assert call(*words, "--yes") == 0
    text = capsys.readouterr().out
    assert "deleted step-00000003, " in text
    assert "deleted step-00000009, " in text
    assert steps(run) == [6, 12]
    assert call(*words, "--keep_every_n_steps", "none", "--yes") == 0
    assert steps(run) == [12]
    assert foreign.is_dir()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "newest",
        "best",
        at(run, 12).name,
        "step-notes",
    }
    assert (run / "checkpoints" / "best").resolve() == at(run, 12)


def test_the_best_ones_stay(run: Path) -> None:
    def best(mode: str) -> int:
        found = CheckpointStore(run / "checkpoints").best(mode, "val/loss")
        assert found is not None
        return int(found.manifest.step)

    config = run / "config.yaml"
    worst = best("max")
    config.write_text(config.read_text().replace("mode: min", "mode: max"))
    words = ("--keep_last", "1", "--keep_top_k", "1", "--keep_every_n_steps", "none")
    assert call("prune", run, *words, "--yes") == 0
    assert steps(run) == sorted({worst, 12})


def test_the_newest_whole_one_is_never_deleted(run: Path, capsys: Capture) -> None:
    """Also if later ones look whole, and only their checksums tell that they are not."""
    folder = run / "checkpoints"
    *_, whole, truncated, flipped = CheckpointStore(folder).paths()
    flip_a_bit(flipped)
    os.truncate(truncated / ".metadata", 1)
    words = ("--keep_last", "1", "--keep_top_k", "0", "--keep_every_n_steps", "none", "--yes")
    assert call("prune", run, *words) == 0
    assert CheckpointStore(folder).paths() == [whole, truncated, flipped]
    assert f"left alone: {flipped.name} is damaged" in capsys.readouterr().out
    shutil.rmtree(whole)
    assert call("prune", run, *words) == 1
    assert "it has no whole checkpoint" in capsys.readouterr().err


def test_prune_refuses_while_a_process_trains_there(run: Path, capsys: Capture) -> None:
    held, let_go = os.pipe(), os.pipe()
    if not (child := os.fork()):
        RunLock(run).acquire()
        os.write(held[1], b"x")
        os.read(let_go[0], 1)
        os._exit(0)
    try:
        os.read(held[0], 1)
        before = steps(run)
        assert call("prune", run, "--keep_last", "1", "--yes") == 2
        assert f"error: {run}: another process (process {child} " in capsys.readouterr().err
        assert steps(run) == before
    finally:
        os.write(let_go[1], b"x")
        os.waitpid(child, 0)
        for end in (*held, *let_go):
            os.close(end)
    assert call("prune", run, "--keep_last", "1", "--yes") == 0


def test_all_wrong_rules_are_named_at_once(run: Path, capsys: Capture) -> None:
    words = ("--keep_last", "0", "--keep_top_k", "-1", "--mode", "max", "--yes")
    assert call("prune", run, *words) == 2
    error = capsys.readouterr().err
    for part in ("keep_last=0", "keep_top_k=-1", "--mode max, but config.yaml of the run says min"):
        assert part in error
    assert steps(run) == [3, 6, 9, 12]


def test_checkpoints_of_a_loop_of_ones_own_are_pruned_too(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "mine"
    for step in range(1, 5):
        saved(folder, {"w": torch.ones(2)}, step)
    assert call("prune", folder, "--keep_top_k", "1") == 2
    assert "add --mode min" in capsys.readouterr().err
    assert call("prune", folder, "--keep_last", "1", "--keep_every_n_steps", "2", "--yes") == 0
    assert [path.name for path in CheckpointStore(folder).paths()] == [
        "step-00000002",
        "step-00000004",
    ]


def test_prune_takes_one_run(run: Path, capsys: Capture) -> None:
    shutil.copytree(run, run.with_name("again"), symlinks=True)
    assert call("prune", run.parent, "--yes") == 2
    assert "2 runs are below it" in capsys.readouterr().err
    assert call("prune", run / "checkpoints" / "newest", "--yes") == 2
    assert f"Give the run, {run}" in capsys.readouterr().err
