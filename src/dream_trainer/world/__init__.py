"""The adapter around Lightning Fabric; no other package here imports ``lightning.fabric``."""

from typing import TYPE_CHECKING

from dream_trainer.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning.fabric import Fabric as Fabric

    from dream_trainer.world.dream_fabric import DreamFabric
    from dream_trainer.world.dream_world import DreamWorld
    from dream_trainer.world.mesh_strategy import MeshStrategy

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "dream_fabric": "DreamFabric Fabric",
        "dream_world": "DreamWorld",
        "mesh_strategy": "MeshStrategy",
    },
    globals(),
)

__all__ = ["DreamFabric", "DreamWorld", "MeshStrategy"]
