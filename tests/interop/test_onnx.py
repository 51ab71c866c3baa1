"""What ONNX Runtime makes of an exported model is what the model makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import Points, TinyTrainer, tiny
from torch import Tensor, nn

from dream_trainer.errors import ConfigError

pytestmark = [
    pytest.mark.may_leave("rng", "environment", "thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def need(name: str) -> Any:
    return pytest.importorskip(name, reason="pip install 'dream-trainer[onnx]' onnxruntime")


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.one, self.other = nn.Linear(8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return self.one(x), self.other(x).softmax(1)


class Exports(TinyTrainer):
    def configure_models(self) -> None:
        self.net = Heads()

    def export_example(self, batch: Any) -> Any:
        return batch["x"]

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        one, other = self.net(batch["x"])
        return (one - batch["y"]).square().mean() + other[:, 0].mean()


def test_a_trained_model_runs_in_another_runtime_on_batches_of_any_size(tmp_path: Path) -> None:
    runtime = need("onnxruntime")
    need("onnxscript")
    trainer = tiny(tmp_path, Exports, monitor="val/loss")
    trainer.fit()
    path = trainer.export(tmp_path / "net.onnx", checkpoint="best")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model = trainer.named_models()["net"].eval()  # the last checkpoint is the best
    store = trainer.checkpointer.store
    assert store.best("min", "val/loss").path == store.newest().path
    (name,) = (one.name for one in session.get_inputs())
    for number in (1, 2, 9):
        x = Points(number, seed=8).x.float()
        made = session.run(None, {name: x.numpy()})
        with torch.no_grad():
            wanted = model(x)
        for one, other in zip(made, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-4, atol=1e-5)
    assert sorted(one.name for one in tmp_path.iterdir() if one.is_file()) == ["net.onnx"]


def test_without_the_packages_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name.startswith("onnx") else find(name, *rest),
    )
    with pytest.raises(ConfigError, match=r"onnxscript, which is not(.|\n)*dream-trainer\[onnx\]"):
        tiny(tmp_path, Exports, enable=False).export(tmp_path / "net.onnx")
