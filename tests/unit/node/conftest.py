from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.node.loop_cluster import LoopCluster, Pki, RunInCluster
from tests.unit.node.running_nodes import LOOPS, RunningNode, running_nodes
from tests.virtual_time import run_virtual


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


@pytest.fixture(scope="session")
def loop_pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Certificates for clusters on virtual time."""
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def in_cluster(loop_pki: Pki) -> Iterator[RunInCluster]:
    """Runs a test's body with a cluster on virtual time, in memory where there is a file system
    for that: its stores flush much."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="ckptd-loop-", dir=memory if memory.is_dir() else None
    ) as directory:

        def run(body: Callable[[LoopCluster], Awaitable[None]], **settings: Any) -> None:
            async def main() -> None:
                await body(LoopCluster(loop_pki, Path(directory), **settings))

            run_virtual(main())

        yield run


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second read of a bad copy comes at once."""
    monkeypatch.setattr("ckptd.store.shards.time.sleep", lambda _: None)
