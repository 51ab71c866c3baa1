"""The command line: what is parsed, what is refused and how, and the program as a process."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dream_trainer.callbacks import Callback, ProgressBar
from dream_trainer.cli import DreamCLI, main
from dream_trainer.configs import CheckpointParameters, DeviceParameters, TrainingParameters
from dream_trainer.errors import CheckpointError, ConfigError, StateError
from dream_trainer.trainer import DreamTrainer, DreamTrainerConfig

# A run seeds the global streams.
pytestmark = pytest.mark.may_leave("rng")

ROOT = Path(__file__).resolve().parents[2]


class Ema(Callback):
    def __init__(self, decay: float = 0.9) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay} is not between 0 and 1")
        self.decay = decay


@dataclass(kw_only=True)
class Net:
    """Shape of the network."""

    hidden: int | None = 4
    """Width of the hidden layer."""
    act: str = "relu"
    """Activation."""


@dataclass(kw_only=True)
class Config(DreamTrainerConfig):
    """A tiny run."""

    lr: float = 1e-3
    """Learning rate."""
    note: str = "1e3"
    """Any words."""
    notes: list[str] = field(default_factory=list)
    """More words."""
    ratio: int | float = 1
    """A number."""
    weights: dict[str, float] = field(default_factory=lambda: {"a": 1.0, "b": 2.0})
    """Weight of each loss."""
    net: Net = field(default_factory=lambda: Net(hidden=8, act="gelu"))
    """The network."""
    failure: str = ""
    """What goes wrong in the first step."""
    training_parameters: TrainingParameters = field(
        default_factory=lambda: TrainingParameters(n_epochs=12, val_every_n_epochs=2)
    )
    device_parameters: DeviceParameters = field(
        default_factory=lambda: DeviceParameters(accelerator="cpu")
    )


class Trainer(DreamTrainer):
    config: Config

    def configure_models(self) -> None:
        self.model = nn.Linear(2, 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=self.config.lr)

    def configure_dataloaders(self) -> Any:
        data = TensorDataset(torch.arange(16.0).view(8, 2) / 16, torch.ones(8, 1))
        return DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=4)

    def compute_loss(self, batch: Any, batch_idx: int) -> Tensor:
        failures: dict[str, BaseException] = {
            "bug": RuntimeError("user code is broken"),
            "config": ConfigError("loss", ["cannot be computed"]),
            "checkpoint": CheckpointError("step-7", ["is damaged"]),
            "state": StateError("model", ["does not fit"]),
            "ctrl-c": KeyboardInterrupt(),
        }
        if self.config.failure:
            raise failures[self.config.failure]
        x, y = batch
        return (self.model(x) - y).square().mean()


class Required(DreamTrainer):
    """Its configuration has a field without a default."""

    config: RequiredConfig


@dataclass(kw_only=True)
class RequiredConfig(DreamTrainerConfig):
    width: int
    """No default."""


def parsed(*args: str) -> Any:
    return DreamCLI(Trainer, ["fit", *args], run=False).config


def refused(capsys: pytest.CaptureFixture[str], *args: str, status: int = 2) -> str:
    """What the program says when it refuses a command line; never a traceback."""
    with pytest.raises(SystemExit) as end:
        DreamCLI(Trainer, list(args), prog="train.py {}")
    said = capsys.readouterr()
    assert end.value.code == status
    assert "Traceback" not in said.err
    return said.err


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        DreamCLI(Trainer, ["fit", *args, "--print_config"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


# ---------------------------------------------------------------------- what is parsed


def test_every_field_is_an_option() -> None:
    config = parsed(
        *("--experiment", "a", "--lr", "1e-5", "--seed", "null", "--ratio=1.0"),
        *("--device_parameters.devices", "2", "--device_parameters.precision", "bf16-mixed"),
        *("--net.hidden", "null", "--checkpoint_parameters.keep_last", "5"),
    )
    assert type(config) is Config
    assert (config.experiment, config.lr, config.seed) == ("a", 1e-5, None)
    assert config.device_parameters == DeviceParameters(
        accelerator="cpu", devices=2, precision="bf16-mixed"
    )
    assert config.net == Net(hidden=None, act="gelu")
    assert config.checkpoint_parameters == CheckpointParameters(keep_last=5)
    assert isinstance(config.ratio, float)
    assert isinstance(parsed("--ratio", "1").ratio, int)


def test_an_option_keeps_the_rest_of_the_default_that_the_subclass_gave() -> None:
    config = parsed("--training_parameters.n_epochs", "3")
    assert config.training_parameters == TrainingParameters(n_epochs=3, val_every_n_epochs=2)


def test_a_file_with_one_nested_key_keeps_the_rest_of_the_default() -> None:
    config = parsed("--config", write("one.yaml", "training_parameters: {n_epochs: 3}"))
    assert config.training_parameters == TrainingParameters(n_epochs=3, val_every_n_epochs=2)


def test_later_files_win_and_options_win_over_files_wherever_they_stand() -> None:
    one = write("one.yaml", "lr: 1e-1\nnote: one\nnet: {hidden: 1, act: tanh}")
    two = write("two.yaml", "note: two\nnet: {hidden: 2}\ngroup: two")
    config = parsed("--group", "flag", "--config", one, f"--config={two}", "--net.hidden", "3")
    assert (config.lr, config.note, config.group) == (0.1, "two", "flag")
    assert config.net == Net(hidden=3, act="tanh")


def test_callbacks_merge_by_name_and_null_takes_one_out() -> None:
    path = f"{Ema.__module__}.Ema"
    one = write("one.yaml", f"callbacks: {{e: {{class_path: {path}, init_args: {{decay: 0.5}}}}}}")
    two = write("two.yaml", "callbacks: {lr: null, bar: {class_path: ProgressBar}}")
    args = ("--config", one, "--config", two, "--callbacks.progress", "null")
    trainer = DreamCLI(Trainer, ["fit", *args], run=False).trainer
    callbacks = trainer.config.callbacks
    assert sorted(callbacks) == ["bar", "e", "lr", "progress"]
    assert isinstance(callbacks["bar"], ProgressBar)
    assert callbacks["e"].decay == 0.5
    assert sorted(trainer.callbacks) == [
        "bar",
        "checkpoint",
        "e",
        "metrics",
        "summary",
        "timeline",
    ]


def test_another_class_in_a_later_file_leaves_the_arguments_of_the_first_behind() -> None:
    spec = "callbacks: {{x: {{class_path: {}, init_args: {{{}}}}}}}"
    one = write("one.yaml", spec.format(f"{Ema.__module__}.Ema", "decay: 0.5"))
    two = write("two.yaml", spec.format("ProgressBar", ""))
    three = write("three.yaml", spec.format(f"{Ema.__module__}.Ema", ""))
    assert isinstance(parsed("--config", one, "--config", two).callbacks["x"], ProgressBar)
    assert parsed("--config", one, "--config", three).callbacks["x"].decay == 0.5


def test_a_file_merges_a_mapping_into_its_default_by_name() -> None:
    config = parsed("--config", write("one.yaml", "weights: {b: 3, c: 4}"), "--weights.d", "5")
    assert config.weights == {"a": 1.0, "b": 3.0, "c": 4.0, "d": 5.0}


def test_a_rename_mapping_can_be_written_in_every_way() -> None:
    text = """
    checkpoint_parameters:
      init_from: other.pt
      init_strict: false
      init_rename: {backbone.layers: encoder, head: null, 0: 1, "": net}
    """
    parameters = parsed("--config", write("one.yaml", text)).checkpoint_parameters
    assert parameters.init_rename == {"backbone.layers": "encoder", "head": None, 0: 1, "": "net"}
    assert parameters.init_strict is False
    flag = "--checkpoint_parameters.init_rename"
    json_words = flag + '={"backbone.layers": "encoder", "head": null}'
    init_from = "--checkpoint_parameters.init_from=a.pt"
    for args in ([json_words], [f"{flag}.a=b", f"{flag}.head=null"]):
        renamed = parsed(init_from, *args).checkpoint_parameters.init_rename
        assert list(renamed.values()) == ["encoder" if len(args) == 1 else "b", None]


def test_loggers_and_strategies_are_named_by_class_path() -> None:
    from lightning.fabric.loggers import CSVLogger
    from lightning.fabric.strategies import DDPStrategy

    text = """
    loggers: {csv: {class_path: lightning.fabric.loggers.CSVLogger, init_args: {root_dir: logs}}}
    device_parameters: {strategy: {class_path: lightning.fabric.strategies.DDPStrategy}}
    """
    config = parsed("--config", write("one.yaml", text))
    assert type(config.loggers["csv"]) is CSVLogger
    assert type(config.device_parameters.strategy) is DDPStrategy


def test_nothing_is_run_with_run_false(tmp_path: Path) -> None:
    cli = DreamCLI(Trainer, ["validate", "--experiment", "a"], run=False)
    assert (cli.subcommand, cli.config.experiment, cli.result) == ("validate", "a", None)
    assert type(cli.trainer) is Trainer
    assert cli.trainer.config is cli.config
    assert list(tmp_path.iterdir()) == []


def test_a_value_in_a_file_can_stand_in_for_a_field_without_default() -> None:
    path = write("one.yaml", "width: 3")
    # Abstract, so the trainer itself cannot be made.
    with pytest.raises(TypeError, match="abstract"):
        DreamCLI(Required, ["fit", "--config", path], run=False)


# ---------------------------------------------------------------------- --print_config, --help


def test_what_is_printed_is_complete_and_reads_back_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["1e3", "1e-3", "null", "true", "2024-01-01", "0x10", "ü: [", "no", ""]
    args = ["--note", "1e-3", "--notes", json.dumps(words), "--callbacks.progress", "null"]
    args += ["--lr", "1e-05", "--net.hidden", "null", "--ratio", "1.0"]
    text = printed(capsys, *args)
    assert printed(capsys, "--config", write("all.yaml", text)) == text
    config = parsed("--config", "all.yaml")
    assert config == parsed(*args)
    assert (config.note, config.notes) == ("1e-3", words)
    assert isinstance(config.ratio, float)
    plain = yaml.safe_load(text)
    assert list(plain) == [f.name for f in Config.__dataclass_fields__.values()]
    assert plain["lr"] == 1e-5
    assert plain["net"] == {"hidden": None, "act": "gelu"}
    assert plain["device_parameters"]["precision"] == "32-true"


def test_a_configuration_with_something_missing_can_be_printed_and_not_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        DreamCLI(Required, ["fit", "--print_config"])
    assert end.value.code == 0
    assert "width: null" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        DreamCLI(Required, ["fit"])
    assert end.value.code == 2
    assert "--width: has no value and no default" in capsys.readouterr().err


def test_help_shows_the_words_under_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        DreamCLI(Trainer, ["fit", "--help"], prog="train.py {}")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: train.py fit [--config FILE ...]" in text
    assert "--lr LR Learning rate. (type: float, default: 0.001)" in text
    assert "--net.hidden HIDDEN Width of the hidden layer. (type: int | null, default: 8)" in text
    assert "--training_parameters.n_epochs N_EPOCHS Epochs to train." in text
    assert "defaults < files, in the order given < presets < environment" in text
    assert "Config(*" not in text  # a dataclass's signature is no help


# ---------------------------------------------------------------------- what is refused


def test_no_command_and_an_unknown_one_print_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["train"]):
        with pytest.raises(SystemExit) as end:
            DreamCLI(Trainer, args, prog="train.py {}")
        assert end.value.code == 2
        assert "usage: train.py [--help] COMMAND [options]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--nope 3", "options: there is no --nope"),
        ("--exp a", "options: there is no --exp"),
        ("--net.hiden 3", "options: there is no --net.hiden; did you mean --net.hidden?"),
        ("extra", "options: there is no extra"),
        ("--lr fast", "--lr: expected float, got 'fast'"),
        ("--net.hidden 1.5", "--net.hidden: expected int or null, got '1.5'"),
        ("--training_parameters.n_epochs 1.0", "expected int or null, got '1.0'"),
        ("--checkpoint_parameters.mode mix", "mode: expected 'min' or 'max', got 'mix'"),
        ("--device_parameters.dp_shard true", "dp_shard: expected int or 'auto', got 'true'"),
        (
            "--training_parameters.preemption_signals SIGUSR2",
            "preemption_signals: expected list, got 'SIGUSR2'; write [SIGUSR2]",
        ),
        ("--lr", "--lr: expected one argument"),
        ("--config", "--config: the name of a file is missing"),
        ("--config gone.yaml", "gone.yaml: there is no such file"),
        ("--config .", ".: cannot be read (Is a directory)"),
        ("--callbacks.x Nothing", "--callbacks.x: "),
        ("--callbacks.lr.decay 3", "--callbacks.lr.decay: "),
        ("--training_parameters.n_epochs 0", "training_parameters: n_epochs=0 is not a whole"),
        ("--experiment a/b", "Config: experiment='a/b' is not a folder name"),
    ],
)
def test_a_wrong_option_is_one_short_message(
    args: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = refused(capsys, "fit", *args.split())
    assert said.startswith("train.py: error: ")
    assert message in said
    assert len(said.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nnope: 3", "bad.yaml:2: there is no nope"),
        ("net: {hiden: 3}", "bad.yaml:1: there is no net.hiden; did you mean net.hidden?"),
        ("net: {hidden: many}", "bad.yaml:1: net.hidden: expected int or null, got 'many'"),
        ("net: {\nhidden: ]", "bad.yaml:2: broken YAML, column 9"),
        ("- 1\n- 2", "bad.yaml: is not a mapping"),
        ("callbacks: {x: {class_path: gone.Callback}}", "bad.yaml:1: callbacks.x: "),
        (
            "callbacks: {x: {class_path: ProgressBar, init_args: {a: 1}}}",
            "bad.yaml:1: callbacks.x.a: ",
        ),
    ],
)
def test_a_wrong_file_is_named(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--config", write("good.yaml", "lr: 0.1"), "--config", write("bad.yaml", text))
    said = refused(capsys, "fit", *args, "--group", "g")
    assert message in said
    assert len(said.splitlines()) <= 2


def test_a_file_that_is_no_text_is_refused_and_an_empty_one_says_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bytes.yaml: is not a text file" in refused(capsys, "fit", "--config", "bytes.yaml")
    assert parsed("--config", write("empty.yaml", "# nothing\n")) == parsed()


def test_all_unknown_options_and_all_bad_parts_are_named_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refused(capsys, "fit", "--one", "1", "--two=2")
    assert "there is no --one" in said
    assert "there is no --two" in said
    args = ("--training_parameters.n_epochs", "0", "--checkpoint_parameters.keep_last", "0")
    said = refused(capsys, "fit", *args)
    assert "training_parameters: n_epochs=0" in said
    assert "checkpoint_parameters: keep_last=0" in said


def test_a_value_error_of_a_named_class_is_a_config_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = f"{{class_path: {Ema.__module__}.Ema, init_args: {{decay: 2}}}}"
    assert "Ema: decay=2.0 is not between" in refused(capsys, "fit", "--callbacks.x", spec)


def test_other_ranks_say_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    for args in (["fit", "--nope", "3"], ["fit", "--training_parameters.n_epochs", "0"], []):
        assert refused(capsys, *args) == ""
    assert printed(capsys) == ""


def test_other_ranks_of_torchrun_leave_the_first_one_time_to_speak(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun kills all with the first that ends."""
    waited: list[float] = []
    monkeypatch.setattr("dream_trainer.cli.messages.time.sleep", waited.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "0")
    assert "there is no --nope" in refused(capsys, "fit", "--nope", "3")
    assert waited == []
    monkeypatch.setenv("RANK", "1")
    assert refused(capsys, "fit", "--nope", "3") == ""
    assert waited == [10.0]


# ---------------------------------------------------------------------- running


def test_a_run_records_what_print_config_prints_and_that_repeats_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["--experiment", "a", "--lr", "1e-2", "--training_parameters.n_epochs", "2"]
    DreamCLI(Trainer, ["fit", *args])
    run = Path("runs/default/default/a")
    text = (run / "config.yaml").read_text(encoding="utf-8")
    capsys.readouterr()
    assert text == printed(capsys, *args)
    DreamCLI(Trainer, ["fit", "--config", str(run / "config.yaml"), "--root_dir", "again"])
    again = Path("again/default/default/a")
    assert (again / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_the_recorded_seed_and_name_are_those_the_run_got() -> None:
    limit = ["--training_parameters.max_steps", "1"]
    cli = DreamCLI(Trainer, ["fit", "--seed", "null", *limit])
    (path,) = Path("runs/default/default").glob("*/config.yaml")
    recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert recorded["experiment"] == path.parent.name == cli.trainer.config.experiment
    assert recorded["seed"] == cli.trainer.config.seed
    assert cli.config.seed is None


def test_validate_prints_and_keeps_its_results(capsys: pytest.CaptureFixture[str]) -> None:
    cli = DreamCLI(Trainer, ["validate", "--checkpoint_parameters.enable", "false"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("val/")]
    name, value = line.split()
    assert cli.result == {name: float(value)} == {"val/loss": float(value)}


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        ("config", 2, "train.py: error: loss: cannot be computed\n"),
        ("checkpoint", 1, "train.py: error: step-7: is damaged\n"),
        ("state", 1, "train.py: error: model: does not fit\n"),
        ("ctrl-c", 130, ""),
    ],
)
def test_errors_that_a_traceback_would_not_explain_end_with_a_status(
    failure: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--failure", failure, "--checkpoint_parameters.enable", "false"]
    assert refused(capsys, *args, status=status) == message


# ---------------------------------------------------------------------- real processes


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def script() -> str:
    """A program as users write it, with the trainer of this file."""
    imports = """
    from __future__ import annotations
    from dataclasses import dataclass, field
    from typing import Any
    import torch
    from torch import Tensor, nn
    from torch.utils.data import DataLoader, TensorDataset
    from dream_trainer import *
    from dream_trainer.errors import CheckpointError, ConfigError, StateError
    """
    parts = [inspect.getsource(part) for part in (Net, Config, Trainer)]
    main_part = 'if __name__ == "__main__":\n    DreamCLI(Trainer)\n'
    return write("train.py", "\n\n".join([inspect.cleandoc(imports), *parts, main_part]))


def test_a_script_trains_and_the_command_continues_it() -> None:
    args = ["--experiment", "a", "--training_parameters.n_epochs", "1"]
    first = run(script(), "fit", *args)
    assert first.returncode == 0, first.stderr
    rows = Path("runs/default/default/a/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(row)["epoch"] for row in rows} <= {0, 1}
    command = ["-c", "from dream_trainer.cli import main; main()"]
    second = run(*command, "fit", "train:Trainer", *args[:-1], "2")
    assert second.returncode == 0, second.stderr
    assert "resuming runs/default/default/a at step 2" in second.stdout
    assert "done at step 4" in second.stdout


def test_a_bug_in_user_code_has_its_traceback() -> None:
    bug = run(script(), "fit", "--failure", "bug", "--checkpoint_parameters.enable", "false")
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr
    assert bug.stderr.rstrip().endswith("RuntimeError: user code is broken")


def test_the_command_line_loads_neither_torch_nor_lightning() -> None:
    program = (
        "import sys, dream_trainer.cli\n"
        "heavy = {'torch', 'lightning', 'jsonargparse'}\n"
        "assert not heavy & set(sys.modules)\n"
        "try: dream_trainer.cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not heavy & set(sys.modules)\n"
    )
    result = run("-c", program)
    assert result.returncode == 0, result.stderr
    assert "usage: dream-trainer [--help] COMMAND MODULE:CLASS [options]" in result.stdout


# ---------------------------------------------------------------------- dream-trainer


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Imports of a test are forgotten after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


LIGHT = "class Trainer:\n    def fit(self): ...\n    def named_optimizers(self): ...\n"


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("light_cli:Nope", "light_cli has no class Nope\nIts trainers: Trainer."),
        ("light_cli.py:Nope", "light_cli.py has no class Nope"),
        ("light_cli:LIGHT", "light_cli has no class LIGHT"),
        ("light_cli:Plain", "light_cli:Plain: it is no trainer"),
        ("gone_cli:X", "gone_cli: there is no module gone_cli"),
        ("gone.py:X", "gone.py: there is no such file"),
        ("light_cli", "light_cli: the trainer is named MODULE:CLASS"),
        ("json.py:X", "json is also the name of"),
        ("light_cli:Trainer", "Trainer: it does not annotate 'config'"),
    ],
)
def test_a_trainer_that_cannot_be_found_is_one_message(
    target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("light_cli.py", f"{LIGHT}\nLIGHT = 3\nclass Plain: ...\n")
    write("json.py", "")
    with pytest.raises(SystemExit) as end:
        main(["fit", target])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("target", ["broken_cli:Trainer", "broken_cli.py:Trainer"])
def test_a_module_that_cannot_be_imported_says_why_and_where(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(write("broken_cli.py", "import math\nimport gone_from_here\n")).resolve()
    problem = (
        "broken_cli cannot be imported: ModuleNotFoundError: No module named 'gone_from_here' "
        f"({path}:2)"
    )
    for words in ([], ["--debug"]):
        with pytest.raises(SystemExit) as end:
            main(["fit", target, *words])
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert f"dream-trainer: error: MODULE:CLASS: {problem}\n" in err
        assert ("Traceback" in err) == bool(words)


def test_the_command_without_a_trainer_says_what_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit"])
    assert end.value.code == 2
    assert "dream-trainer fit: error: the following arguments are required: MODULE:CLASS" in (
        capsys.readouterr().err
    )


def test_without_a_seed_what_draws_nothing_is_never_refused() -> None:
    from dream_trainer.cli.dream_cli import _drawing_from

    kept = []
    for _ in range(50):
        with _drawing_from(None):
            kept.append(torch.get_rng_state())  # another place in memory for the next one
