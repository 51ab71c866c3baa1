"""The run that launched ones are compared with."""

from __future__ import annotations

from typing import Any

import pytest
from launched import ends, run_forks, train_here
from support import free_port


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How a run of two ranks ends that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    run_forks(train_here, folder, folder=folder, ranks=torchrun_variables(2))
    one, other = ends(folder)
    assert one["digest"] == other["digest"]
    return one


def torchrun_variables(size: int) -> list[dict[str, str]]:
    port = str(free_port())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": port}
    sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0"}
    return [common | sizes | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(size)]
