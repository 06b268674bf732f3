"""Running clusters and checkpoints for tests against real daemons.

`cluster` is shared by all tests of a run: they store under names of their own, and leave daemons
and disks alone. Whoever kills or damages something takes `fresh_cluster`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.cluster.kill_fixtures import BreakableCluster, breakable_cluster

_numbers = itertools.count()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BreakableCluster]:
    """Four nodes with shards of 256 KiB, for the whole run."""
    with breakable_cluster(tmp_path_factory.mktemp("cluster") / "local") as running:
        yield running


@pytest.fixture
def fresh_cluster(tmp_path: Path) -> Iterator[BreakableCluster]:
    """Four nodes with shards of 256 KiB, for this test alone."""
    with breakable_cluster(tmp_path / "local") as running:
        yield running


@pytest.fixture
def new_name() -> Callable[[], str]:
    """Makes names of checkpoints that no other test uses."""
    return lambda: f"run{next(_numbers)}/checkpoint-1"
