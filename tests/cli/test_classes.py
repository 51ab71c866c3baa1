"""Classes in a configuration: by short or dotted name, with arguments, one in place of another."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import fit, printed, refused, write

pytestmark = pytest.mark.usefixtures("program")

SGD = "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5, momentum: 0.9}}"


@pytest.mark.parametrize("name", ["Flat", "__main__.Flat"])
def test_models_and_data_go_by_short_and_by_dotted_name(name: str) -> None:
    config = printed("--model", name, "--model.bias", "false", "--data", "Data", "--data.size=8")
    assert config["model"] == {"class_path": "__main__.Flat", "init_args": {"bias": False}}
    assert config["data"]["init_args"] == {"size": 8, "width": 2}


def test_optimizers_schedulers_callbacks_and_loggers_do_too() -> None:
    words = ["--optimizer", "AdamW", "--optimizer.lr", "1e-3", "--scheduler", "StepLR"]
    words += ["--scheduler.step_size", "3", "--callbacks.ema", "Average"]
    logger = "lightning.fabric.loggers.CSVLogger"
    config = printed(*words, "--loggers.csv", logger, "--loggers.csv.root_dir", "logs")
    assert config["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert config["optimizer"]["init_args"]["lr"] == 1e-3
    assert config["scheduler"]["class_path"] == "torch.optim.lr_scheduler.StepLR"
    assert config["scheduler"]["init_args"]["step_size"] == 3
    assert config["callbacks"]["ema"] == {
        "class_path": "__main__.Average",
        "init_args": {"decay": 0.9},
    }
    assert config["loggers"]["csv"]["class_path"] == logger
    done = fit(*words, "--experiment", "a")
    assert done.status == 0, done.err


def test_loggers_go_by_short_name_and_can_be_switched_too() -> None:
    text = "loggers: {log: {class_path: CSVLogger, init_args: {root_dir: a, prefix: p}}}"
    words = ["--config", write("a.yaml", text)]
    log = printed(*words, "--loggers.log.flush_logs_every_n_steps", "7")["loggers"]["log"]
    assert log["class_path"] == "lightning.fabric.loggers.CSVLogger"
    given = {"root_dir": "a", "prefix": "p", "flush_logs_every_n_steps": 7}
    assert log["init_args"].items() >= given.items()
    words += ["--loggers.log", "lightning.pytorch.loggers.MLFlowLogger"]
    done = fit(*words, "--print_config")
    assert done.err == "--loggers.log: MLFlowLogger instead of CSVLogger keeps prefix='p' " + (
        "and drops root_dir\n"
    )
    assert printed("--config", "a.yaml", "--loggers.log", "null")["loggers"] == {"log": None}
    assert "--loggers.x: there is no class NoLogger" in refused("--loggers.x", "NoLogger")


def test_help_of_a_class_lists_its_arguments() -> None:
    for words in (["--model.help", "Net"], ["--model.help=__main__.Net"]):
        done = fit(*words)
        assert done.status == 0, done.err
        assert "--model.hidden HIDDEN" in done.out
        assert "of the layer. (type: int, default: 4)" in done.out


def test_another_class_keeps_the_arguments_that_it_has_and_names_the_others() -> None:
    done = fit("--config", write("a.yaml", SGD), "--optimizer", "AdamW", "--print_config")
    assert done.status == 0, done.err
    assert done.err == "--optimizer: AdamW instead of SGD keeps lr=0.5 and drops momentum\n"
    arguments = printed("--config", "a.yaml", "--optimizer", "AdamW")["optimizer"]["init_args"]
    # Its own default, not the one of SGD, which is 0.
    assert (arguments["lr"], arguments["weight_decay"]) == (0.5, 0.01)


def test_options_before_another_class_are_kept_or_named_too() -> None:
    words = ["--optimizer", "SGD", "--optimizer.lr", "0.3", "--optimizer.nesterov", "true"]
    done = fit(*words, "--optimizer=Adam", "--optimizer.eps", "1e-6", "--print_config")
    assert done.err == "--optimizer: Adam instead of SGD keeps lr=0.3 and drops nesterov\n"
    arguments = printed(*words, "--optimizer=Adam", "--optimizer.eps", "1e-6")["optimizer"]
    assert arguments["class_path"] == "torch.optim.Adam"
    assert (arguments["init_args"]["lr"], arguments["init_args"]["eps"]) == (0.3, 1e-6)


def test_the_default_of_the_author_leaves_nothing_behind() -> None:
    done = fit("--model", "Flat", "--optimizer", "AdamW", "--print_config")
    assert done.err == ""
    assert printed("--optimizer", "AdamW")["optimizer"]["init_args"]["weight_decay"] == 0.01
    assert printed("--config", write("b.yaml", "model: Flat"))["model"]["init_args"] == {
        "bias": True
    }


def test_another_class_for_a_callback_in_a_mapping() -> None:
    text = "callbacks: {e: {class_path: Early, init_args: {patience: 9, mode: max}}}"
    done = fit("--config", write("a.yaml", text), "--callbacks.e", "Average", "--print_config")
    assert done.status == 0, done.err
    assert "--callbacks.e: Average instead of Early drops patience, mode\n" in done.err
    assert printed("--config", "a.yaml", "--callbacks.e", "Average")["callbacks"]["e"] == {
        "class_path": "__main__.Average",
        "init_args": {"decay": 0.9},
    }


def test_one_flag_reaches_any_callback() -> None:
    text = "callbacks: {early: {class_path: Early}, ema: {class_path: Average}}"
    words = ["--callbacks.early.patience", "9", "--callbacks.ema", "null"]
    callbacks = printed("--config", write("a.yaml", text), *words)["callbacks"]
    assert callbacks["early"]["init_args"] == {"patience": 9, "mode": "min"}
    assert callbacks["ema"] is None
    assert callbacks["progress"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "Nett"], "--model: there is no class Nett here; did you mean Net?"),
        (["--model", "Flat", "--model.hidden", "3"], "--model.hidden: __main__.Flat has no arg"),
        (["--optimizer.lrr", "3"], "--optimizer.lrr: it has no argument lrr; did you mean lr?"),
        (
            ["--callbacks.x", "gone.X"],
            "--callbacks.x: gone.X cannot be imported: ModuleNotFoundError: No",
        ),
        (
            ["--callbacks.x", "needs.X"],
            "needs.X cannot be imported: ModuleNotFoundError: No module named 'not_th",
        ),
        (["--callbacks.x", "broken.X"], "broken.X cannot be imported: SyntaxError: invalid syn"),
        (["--callbacks.x", "raising.X"], "raising.X cannot be imported: ZeroDivisionError: div"),
        (["--callbacks.x", "torch.nn.Linear"], "--callbacks.x: "),
    ],
)
def test_a_class_that_cannot_be_used_is_one_message(words: list[str], message: str) -> None:
    write("needs.py", "import not_there")
    write("broken.py", "class X(:")
    write("raising.py", "1 / 0")
    said = refused(*words)
    assert message in said
    assert len(said.splitlines()) <= 2


def test_debug_shows_where_an_import_failed() -> None:
    write("raising.py", "def fail():\n    return 1 / 0\n\n\nfail()")
    done = fit("--callbacks.x", "raising.X", "--debug")
    assert done.status == 2
    assert "Traceback" in done.err
    assert 'raising.py", line 2, in fail' in done.err
    assert not Path("runs").exists()


def test_modules_may_hold_modules_and_lists_of_them() -> None:
    program = Path("train.py").read_text(encoding="utf-8")
    holder = """
class Holder(nn.Module):
    def __init__(self, inner: nn.Module, more: list[nn.Module], width: int = 2):
        super().__init__()
        self.layers = nn.Sequential(inner, *more)

    def forward(self, x):
        return self.layers(x)


class Early"""
    write("train.py", program.replace("\nclass Early", holder, 1))
    text = """
    model:
      class_path: Holder
      init_args:
        inner: {class_path: Net, init_args: {hidden: 5}}
        more:
        - {class_path: torch.nn.LeakyReLU, init_args: {negative_slope: 0.2}}
        - {class_path: torch.nn.Identity}
    """
    done = fit("--config", write("a.yaml", text), "--preset", "debug")
    assert done.status == 0, done.err
    more = printed("--config", "a.yaml")["model"]["init_args"]["more"]
    assert more[0]["init_args"]["negative_slope"] == 0.2


def test_what_a_mapping_cannot_make_is_told_once_with_the_package_that_it_needs() -> None:
    refuses = "raise ModuleNotFoundError('needed is not installed')"
    write("needy.py", f"class Needy:\n    def __init__(self):\n        {refuses}\n")
    stopping = ["--callbacks.stop=EarlyStopping", "--callbacks.stop.patience=0"]
    done = fit(*stopping, "--loggers.needy", "needy.Needy")
    assert done.status == 2
    assert done.err == (
        "train.py: error: 2 mistakes:\n"
        "  - EarlyStopping: patience=0 is not a whole number above 0\n"
        "  - Needy: needed is not installed\n"
    )


def test_an_optimizer_that_refuses_its_arguments_is_a_mistake_of_the_configuration() -> None:
    done = fit("--optimizer.lr", "-1", "--preset", "debug")
    assert done.status == 2
    assert done.err.endswith("train.py: error: SGD: Invalid learning rate: -1.0\n")


def test_text_that_looks_like_a_class_is_not_imported() -> None:
    write("loud.py", "raise SystemExit('imported')")
    assert refused("--seed", "loud.X") == (
        "train.py: error: --seed: expected int or null, got 'loud.X'\n"
    )
