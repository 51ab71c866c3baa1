"""Make the pictures of the pages from real runs: all of them, or those named.

python docs/pictures/pictures.py [NAME...]

Each module beside this one has ``main(folder)``, which runs an example and writes its pictures.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import matplotlib

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "images"


def example(name: str) -> ModuleType:
    """The program of an example as a module."""
    path = HERE.parents[1] / "examples" / name / "train.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make(names: list[str]) -> None:
    """Run the modules one after another."""
    matplotlib.use("Agg")
    sys.path.insert(0, str(HERE))
    sys.modules["pictures"] = sys.modules[__name__]
    there_are = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "pictures")
    if unknown := set(names) - set(there_are):
        sys.exit(f"no pictures of {', '.join(sorted(unknown))}; there are: {', '.join(there_are)}")
    IMAGES.mkdir(exist_ok=True)
    for name in names or there_are:
        began = time.monotonic()
        importlib.import_module(name).main(IMAGES)
        print(f"pictures of {name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    make(sys.argv[1:])
