"""Chains that break, stall or cross each other."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.cluster.kill_fixtures import BreakableCluster, breakable_cluster, make_checkpoint

from ckptd.client.progress import Progress

MIB = 1024 * 1024


class _WhenSending(Progress):
    """Calls `act` once the first shard has gone to a node; keeps the notes."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._acts = [act]
        self._lock = threading.Lock()
        self.notes: list[str] = []

    def node(self, node: str, size: int) -> None:
        with self._lock:
            if self._acts:
                self._acts.pop()()

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[BreakableCluster]:
    with breakable_cluster(tmp_path / "two", count=2) as running:
        yield running


def test_half_of_a_pair_dies_and_the_other_half_is_kept(
    two_nodes: BreakableCluster, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "ck", "half", size=16 * MIB)
    progress = _WhenSending(lambda: two_nodes.kill("node1"))
    stored = two_nodes.store(path, "half", progress=progress)
    assert (stored.state, stored.copies) == ("degraded", 1)
    assert not [note for note in progress.notes if "node2" in note]
    assert two_nodes.comes_back("half", path)
    two_nodes.up()
    again = two_nodes.store(path, "half")
    assert (again.version, again.state) == (stored.version, "protected")
    assert again.bytes_sent == 0, "its copies are passed on by the node that has them"
    two_nodes.kill("node2")
    assert two_nodes.comes_back("half", path)


def test_crossing_chains_under_full_load_all_finish(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    """Six stores at once of four copies each: every node is head, middle and tail of chains."""
    paths = [make_checkpoint(tmp_path / f"ck{n}", f"cross {n}", size=6 * MIB) for n in range(6)]
    with ThreadPoolExecutor(len(paths)) as clients:
        stores = [
            clients.submit(fresh_cluster.command, "store", path, "--copies", 4, "--name", path.name)
            for path in paths
        ]
        finished = [store.result() for store in stores]
    assert [done.code for done in finished] == [0] * len(paths)
    assert {done.document["copies"] for done in finished} == {4}
    for path in paths:
        assert fresh_cluster.comes_back(path.name, path)


def test_the_same_content_stored_by_two_clients_at_once(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "ck", "twice", size=8 * MIB)
    with ThreadPoolExecutor(2) as clients:
        first, second = clients.map(
            lambda name: fresh_cluster.command("store", path, "--name", name), ["one", "two"]
        )
    assert (first.code, second.code) == (0, 0)
    assert fresh_cluster.comes_back("one", path) and fresh_cluster.comes_back("two", path)


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_node_that_hangs_is_left_out_and_named(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "ck", "hangs", size=16 * MIB)
    pid = fresh_cluster.pid("node1")
    progress = _WhenSending(lambda: os.kill(pid, signal.SIGSTOP))
    started_s = time.monotonic()
    try:
        stored = fresh_cluster.store(path, "hangs", progress=progress)
        seconds = time.monotonic() - started_s
        assert (stored.state, stored.copies) == ("protected", 2)
        assert seconds < 120, f"waited {seconds:.0f} s"
        assert not [note for note in progress.notes if "node1" not in note]
        holders = fresh_cluster.all_shards()
        manifest = fresh_cluster.manifest("node2", stored.version)
        assert all(len(holders[shard] - {"node1"}) >= 2 for shard, _ in manifest["shards"])
    finally:
        os.kill(pid, signal.SIGCONT)
