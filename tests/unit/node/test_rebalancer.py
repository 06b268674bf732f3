"""A new node gets its part, and then all is quiet again."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.unit.node.loop_cluster import SIZE, LoopCluster, RunInCluster

from ckptd.core import limits


def counts(cluster: LoopCluster, datas: list[bytes]) -> Counter[str]:
    return Counter("".join(cluster.holders(data) for data in datas))


def small_disks(cluster: LoopCluster, shards: int) -> None:
    for node in cluster.nodes.values():
        node.capacity_bytes = shards * SIZE


def test_a_new_node_gets_its_part_and_then_nothing_moves(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        small_disks(cluster, 64)
        # Several versions of one run: what is left for the next one is small.
        datas = [
            data for n in range(12) for data in cluster.store(["ab", "bc", "ac"], name=f"r/{n}")[1]
        ]
        await cluster.run(1500)
        found = counts(cluster, datas)
        assert found["d"] >= 15
        assert max(found.values()) - min(found.values()) <= 5
        assert sum(found.values()) == 72
        moved = len(cluster.moved)
        await cluster.run(1500)
        assert len(cluster.moved) == moved < 25

    in_cluster(body)


def test_nothing_moves_while_a_node_is_away(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        small_disks(cluster, 64)
        for n in range(12):
            cluster.store(["ab"] * 3, name=f"r/{n}")
        cluster.maintenance_s["d"] = 1e6
        cluster.kill("d")
        await cluster.run(600)
        assert cluster.moved == []

    in_cluster(body)


def test_almost_even_is_even_enough(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        small_disks(cluster, 64)
        cluster.store(["ab"] * 8)
        await cluster.run(600)
        assert cluster.moved == []

    in_cluster(body)


def test_a_large_move_goes_in_rounds_and_slices(
    in_cluster: RunInCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(cluster: LoopCluster) -> None:
        small_disks(cluster, 64)
        _, datas = cluster.store(["ab"] * 30)
        cluster.store(["cd"], name="run/y")
        await cluster.run(3000)
        found = counts(cluster, datas)
        assert max(found.values()) - min(found.values()) <= 8
        assert sum(found.values()) == 60

    monkeypatch.setattr(limits, "REBALANCE_ROUND_BYTES", 4 * SIZE)
    monkeypatch.setattr(limits, "SHARDS_PER_COPY_MAX", 3)
    in_cluster(body)
