"""The run that launched ones are compared with."""

from __future__ import annotations

from typing import Any

import pytest
from launched import ends, run_forks, torchrun_variables, train_here


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How a run of two ranks ends that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    run_forks(train_here, folder, folder=folder, ranks=torchrun_variables(2))
    one, other = ends(folder)
    assert one["digest"] == other["digest"]
    return one
