"""Memory cards of different speed in one cluster: the slow ones get less and hold nobody up."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.root.clusters import (
    MIB,
    DaemonCluster,
    assert_protected,
    make_checkpoint,
    send_chain,
    shards_in,
)
from tests.root.devices import Disk, slow_disk

from ckptd.client.cluster import Cluster
from ckptd.wire.messages import CopyReport

pytestmark = [pytest.mark.root]

MakeCluster = Callable[..., DaemonCluster]
Keep = Callable[[Disk], Disk]

SLOW_BYTES_PER_S = 7_000_000
FAST_BYTES_PER_S = 35_000_000
WORKER_MAX_BYTES = 96 * MIB


def test_a_slow_card_delays_only_its_own_copy(
    place: Path, keep: Keep, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(2)
    for node, rate in (("node1", FAST_BYTES_PER_S), ("node2", SLOW_BYTES_PER_S)):
        keep(slow_disk(place / f"disk-{node}", 192, rate)).mount(cluster.store_of(node))
    cluster.up()
    durable_s: dict[str, float] = {}
    content = os.urandom(48 * MIB)

    def note(report: CopyReport) -> None:
        if report.state == "durable":
            durable_s.setdefault(report.node, time.monotonic())

    async def work(connected: Cluster) -> float:
        started_s = time.monotonic()
        await asyncio.to_thread(send_chain, connected, ["node1", "node2"], content, note)
        return started_s

    started_s = cluster.ask(work)

    fast_s, slow_s = (durable_s[node] - started_s for node in ("node1", "node2"))
    assert slow_s > len(content) / SLOW_BYTES_PER_S * 0.8, "the card is not slow: no test"
    assert fast_s < slow_s * 0.6, f"the head's copy took {fast_s:.1f} s, the tail's {slow_s:.1f} s"


def test_the_share_of_a_card_follows_its_speed_and_nobody_stalls(
    place: Path, keep: Keep, make_cluster: MakeCluster
) -> None:
    """Two cards of 35 MB/s and two of 7 MB/s. A second checkpoint, when all were measured, lies
    mostly on the fast ones; a fifth of their share is what speed alone would give the others."""
    cluster = make_cluster(4, "replication.shard_size=4MiB")
    nodes = ["node1", "node2", "node3", "node4"]
    rates = dict(zip(nodes, [FAST_BYTES_PER_S, SLOW_BYTES_PER_S] * 2, strict=True))
    for node in nodes:
        disk = slow_disk(place / f"disk-{node}", 512, rates[node])
        keep(disk).mount(cluster.store_of(node))
    cluster.up()
    first = cluster.ckptd("store", make_checkpoint(place / "first", 96 * MIB))
    print({node["id"]: node["write_bytes_per_s"] for node in cluster.ckptd("nodes")["nodes"]})
    before = {node: len(shards_in(cluster.store_of(node))) for node in nodes}

    second = cluster.ckptd("store", make_checkpoint(place / "second", 192 * MIB))

    stores = [cluster.store_of(node) for node in nodes]
    for stored in (first, second):
        assert stored["state"] == "protected"
        assert_protected(stored["version"], stores)
    taken = {node: len(shards_in(cluster.store_of(node))) - before[node] for node in nodes}
    fast = taken["node1"] + taken["node3"]
    slow = taken["node2"] + taken["node4"]
    print(f"shards by node: {taken}, {second['seconds']:.1f} s")
    assert fast >= 2 * slow, f"shards by node: {taken}"
    for node in nodes:
        assert "no progress within the deadline" not in cluster.log(node)
        assert cluster.peak_bytes(node) <= WORKER_MAX_BYTES, node
