"""Where values come from, and which wins: files, variables, presets, options, links."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import TRAIN, fit, printed, refused, run_command, write

from dream_trainer.configs.yaml_text import load_yaml

pytestmark = pytest.mark.usefixtures("program")

# ---------------------------------------------------------------------- files


def test_a_file_lies_over_its_base_files_seen_from_its_folder() -> None:
    write("base/all.yaml", "note: all\nbatch_size: 2\ntraining_parameters: {n_epochs: 5}")
    write("base/more.yaml", "_base_: all.yaml\nnote: more\ngroup: more")
    write("run.yaml", "_base_: [base/more.yaml]\ntraining_parameters: {max_steps: 3}")
    config = printed("--config", "run.yaml")
    assert (config["note"], config["group"], config["batch_size"]) == ("more", "more", 2)
    training = config["training_parameters"]
    assert (training["n_epochs"], training["max_steps"]) == (5, 3)
    assert "_base_" not in config


def test_base_files_that_lead_back_or_are_missing_are_named_with_their_line() -> None:
    write("a.yaml", "note: a\n_base_: b.yaml")
    write("b.yaml", "_base_: a.yaml")
    assert "a.yaml:2: b.yaml:1: a.yaml: is one of its own base files" in refused("--config=a.yaml")
    write("c.yaml", "note: c\n\n_base_: gone.yaml")
    assert "c.yaml:3: gone.yaml: there is no such file" in refused("--config=c.yaml")
    write("d.yaml", "_base_: 3")
    assert "d.yaml:1: _base_ is neither the path of a file nor" in refused("--config=d.yaml")


def test_a_section_may_have_a_file_of_its_own() -> None:
    write("sections/fast.yaml", "n_epochs: 1\nmax_steps: 2")
    write("run.yaml", "training_parameters: sections/fast.yaml\nnote: run")
    for words in (["--config", "run.yaml"], ["--training_parameters", "sections/fast.yaml"]):
        training = printed(*words)["training_parameters"]
        assert (training["n_epochs"], training["max_steps"]) == (1, 2)
    # It is a file: options win, wherever they stand.
    option = ["--training_parameters.max_steps", "9"]
    both = printed(*option, "--training_parameters", "sections/fast.yaml")["training_parameters"]
    assert (both["n_epochs"], both["max_steps"]) == (1, 9)
    write("callbacks.yaml", "early: {class_path: Early, init_args: {patience: 7}}")
    entry = printed("--callbacks", "callbacks.yaml", "--callbacks.early.mode=max")["callbacks"]
    assert entry["early"]["init_args"] == {"patience": 7, "mode": "max"}
    write("sections/fast.yaml", "n_epochs: 1\nmax_stepz: 2")
    said = refused("--training_parameters", "sections/fast.yaml")
    assert "sections/fast.yaml:2: there is no training_parameters.max_stepz" in said
    said = refused("--config", "run.yaml", "--training_parameters", "gone.yaml")
    assert "sections/fast.yaml:2: there is no" in said
    assert "gone.yaml: there is no such file" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("note: a\nbatch_size: 1\nnote: b", "bad.yaml: note stands twice, in lines 1 and 3"),
        ("note: &a\n  b: *a", "bad.yaml:1: note.b contains itself"),
        ("3: x\nnote: a", "bad.yaml: 3 is no option name"),
        ("note: a\n  b: c", "bad.yaml:2: broken YAML, column 4"),
        ("note: !!python/object:os.system x", "bad.yaml:1: broken YAML"),
        ("? [a, b]\n: c", "bad.yaml:1: broken YAML"),
        ("a: " + "[" * 2000 + "]" * 2000, "bad.yaml: is nested too deeply"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + "".join(
                f"{k}: &{k} [{f'*{p},' * 10}]\n" for p, k in zip("abcdef", "bcdefg", strict=True)
            ),
            "bad.yaml: has more than 100000 values",
        ),
    ],
)
def test_a_file_that_is_no_configuration_is_one_message(text: str, message: str) -> None:
    said = refused("--config", write("bad.yaml", text))
    assert f"train.py: error: {message}" in said
    assert len(said.splitlines()) <= 2


# ---------------------------------------------------------------------- environment


def test_variables_set_options() -> None:
    config = printed(
        DREAM_TRAINER_NOTE="from outside",
        DREAM_TRAINER_TRAINING_PARAMETERS__MAX_STEPS="10",
        DREAM_TRAINER_TRAINING_PARAMETERS__N_EPOCHS="null",
        DREAM_TRAINER_CALLBACKS__EARLY="Early",
        DREAM_TRAINER_CALLBACKS__EARLY__PATIENCE="9",
        DREAM_TRAINER_MODEL="Flat",
    )
    assert config["note"] == "from outside"
    training = config["training_parameters"]
    assert (training["max_steps"], training["n_epochs"]) == (10, None)
    assert config["callbacks"]["early"]["init_args"]["patience"] == 9
    assert config["model"]["class_path"] == "__main__.Flat"


def test_a_variable_that_is_no_option_or_has_a_wrong_value_is_named() -> None:
    said = refused(
        DREAM_TRAINER_NOTES="a",
        DREAM_TRAINER_BATCH_SIZE="many",
        DREAM_TRAINER_TRAINING_PARAMETERS__MAX_STEP="3",
    )
    assert "DREAM_TRAINER_NOTES: there is no notes; did you mean note?" in said
    assert "DREAM_TRAINER_BATCH_SIZE: expected int, got 'many'" in said
    assert "DREAM_TRAINER_TRAINING_PARAMETERS__MAX_STEP: there is no" in said
    assert "did you mean training_parameters.max_steps" in said


def test_precedence_is_as_help_says() -> None:
    help_text = " ".join(fit("--help").out.split())
    order = "defaults < files, in the order given < presets < environment"
    assert order in help_text
    write("a.yaml", "note: a\nbatch_size: 2\ngroup: a\nroot_dir: a\nproject: a")
    write("b.yaml", "note: b\nbatch_size: 3\ngroup: b\nroot_dir: b")
    words = ["--config", "a.yaml", "--preset", "long", "--config", "b.yaml", "--root_dir", "option"]
    variables = {"DREAM_TRAINER_GROUP": "variable", "DREAM_TRAINER_ROOT_DIR": "variable"}
    config = printed(*words, **variables)
    found = [config[key] for key in ("experiment", "project", "note", "group", "root_dir")]
    assert found == [None, "a", "long", "variable", "option"]
    assert config["batch_size"] == 8


# ---------------------------------------------------------------------- presets


def test_presets_of_the_author_and_of_the_package_leave_what_options_say() -> None:
    config = printed("--preset", "long", "--training_parameters.max_steps", "5")
    training = config["training_parameters"]
    assert (training["n_epochs"], training["max_steps"], config["note"]) == (7, 5, "long")
    config = printed("--preset=long", "--preset=debug", "--note", "mine")
    assert config["training_parameters"]["train_steps_per_epoch"] == 1
    assert config["training_parameters"]["n_epochs"] == 1
    assert config["checkpoint_parameters"]["enable"] is False
    assert (config["note"], config["batch_size"]) == ("mine", 8)


def test_what_a_preset_made_is_recorded_and_repeats_the_run() -> None:
    done = fit("--preset", "long", "--experiment", "a")
    assert done.status == 0, done.err
    config = Path("runs/default/default/a/config.yaml")
    assert load_yaml(config.read_text())["training_parameters"]["n_epochs"] == 7
    assert fit("--config", str(config), "--experiment", "b").status == 0
    logs = [Path(f"runs/default/default/{name}/metrics.jsonl").read_bytes() for name in "ab"]
    assert logs[0] == logs[1] != b""


def test_without_a_seed_nothing_may_be_drawn_before_the_run() -> None:
    said = refused("--seed", "null")
    assert "seed: is null, and making an object of the configuration drew random numbers" in said
    assert fit("--seed", "null", "--preset", "debug").status == 2


def test_one_batch_of_everything_writes_nothing() -> None:
    done = fit("--preset", "debug")
    assert done.status == 0, done.err
    assert "done at step 1, after 1 epoch" in done.out
    assert not Path("runs").exists()


def test_a_preset_that_does_not_exist_or_fails_is_named() -> None:
    said = refused("--preset", "lnog")
    assert "--preset: there is no preset lnog; did you mean long?" in said
    assert "Its presets: debug, overfit, long." in said
    assert "--preset: expected one argument" in refused("--preset")


# ---------------------------------------------------------------------- links


def test_a_link_on_instantiate_takes_the_value_of_the_object() -> None:
    done = fit("--data.width", "5", "--experiment", "a")
    assert done.status == 0, done.err
    config = load_yaml(Path("runs/default/default/a/config.yaml").read_text())
    assert config["data"]["init_args"]["width"] == 5
    assert "width" not in config["model"]["init_args"]
    shown = run_command("checkpoints", "show", "runs/default/default/a").out
    assert "3 x 5" in shown or "(3, 5)" in shown or "[3, 5]" in shown, shown


def test_a_link_on_parse_computes_and_its_target_cannot_be_given() -> None:
    write(
        "train.py",
        TRAIN.replace("self.model = ", 'print("twice", self.config.twice)\n        self.model = '),
    )
    assert "twice 12" in fit("--batch_size", "6", "--preset", "debug").out
    said = refused("--twice", "3")
    assert (
        said == "train.py: error: --twice: follows from batch_size by a link: give that instead\n"
    )


def test_a_link_to_nowhere_is_the_authors_mistake() -> None:
    write("train.py", TRAIN.replace('"twice", lambda', '"twise", lambda'))
    assert "the link from batch_size to twise: " in refused("--note", "a")
