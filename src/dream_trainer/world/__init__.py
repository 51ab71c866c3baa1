"""The adapter around Lightning Fabric; no other package here imports ``lightning.fabric``."""

from dream_trainer.world.dream_fabric import DreamFabric
from dream_trainer.world.dream_world import DreamWorld
from dream_trainer.world.mesh_strategy import MeshStrategy

__all__ = ["DreamFabric", "DreamWorld", "MeshStrategy"]
