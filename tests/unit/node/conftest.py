from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.node.running_nodes import LOOPS, RunningNode, running_nodes


@pytest.fixture
def loop_name(monkeypatch: pytest.MonkeyPatch) -> str:
    """The loop of a daemon. What differs between loops is tested with the network."""
    monkeypatch.delenv("CKPTD_LOOP", raising=False)
    return LOOPS[0]


@pytest.fixture
def node(loop_name: str, tmp_path: Path) -> Iterator[RunningNode]:
    """One real node."""
    with running_nodes(tmp_path, "pi1") as nodes:
        yield nodes[0]


@pytest.fixture
def two_nodes(loop_name: str, tmp_path: Path) -> Iterator[list[RunningNode]]:
    """Two real nodes that do not know each other."""
    with running_nodes(tmp_path, "pi1", "pi2") as nodes:
        yield nodes
