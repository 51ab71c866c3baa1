"""A trainer as one stateful object in a Fabric script's own checkpoint, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.fabric import Fabric
from support import TinyTrainer, differences, exact_state, run_ranks, tiny_config

from dream_trainer.world import DreamFabric, MeshStrategy

pytestmark = pytest.mark.distributed

STRATEGIES: dict[str, Any] = {"ddp": lambda: "ddp", "mesh": lambda: MeshStrategy(dp_shard=2)}


@pytest.mark.parametrize("kind", [Fabric, DreamFabric])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_saved_and_loaded_through_the_fabric_it_trains_on_alike(
    tmp_path: Path, kind: type[Fabric], strategy: str
) -> None:
    def rank() -> tuple[list[str], list[str], int]:
        fabric = kind(accelerator="cpu", devices=2, strategy=STRATEGIES[strategy]())
        fabric.launch()

        def trainer() -> Any:
            config = tiny_config(tmp_path, max_steps=2, n_epochs=3, batch_size=2, enable=False)
            return TinyTrainer(config, fabric=fabric)

        first, second = trainer(), trainer()
        first.fit()
        fabric.save(tmp_path / "checkpoint", {"trainer": first, "mine": [1, 2]})
        state = {"trainer": second, "mine": None}
        fabric.load(tmp_path / "checkpoint", state)
        assert state["trainer"] is second
        assert state["mine"] == [1, 2]
        loaded = differences(exact_state(first), exact_state(second))
        for one in (first, second):
            one.training_parameters.max_steps = 8
            one.fit()
        trained = differences(exact_state(first), exact_state(second))
        return loaded, trained, second.global_step

    for loaded, trained, steps in run_ranks(2, rank):
        # Fabric writes one rank's random streams; every other rank has streams of its own.
        assert [path for path in loaded + trained if not path.startswith("/rng")] == []
        assert steps == 8
