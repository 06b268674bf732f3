"""A holder decides by itself what it sends to whom."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from tests.unit.node.loop_cluster import LoopCluster, RunInCluster

from ckptd.config import RepairConfig
from ckptd.core import limits
from ckptd.errors import (
    CkptdError,
    MediumFailed,
    PeerBusy,
    PeerRefused,
    PeerStalled,
    ShardCorrupt,
    StoreOperationFailed,
)
from ckptd.wire import messages


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


async def copy(
    cluster: LoopCluster,
    version: str,
    datas: list[bytes],
    target: str = "c",
    *,
    source: str = "a",
    asker: str = "d",
    rate: float = 0.0,
) -> list[messages.CopyReport]:
    request = messages.CopyShards(
        bytes.fromhex(version), tuple(digest(data) for data in datas), target, rate
    )
    reply, _ = await cluster.nodes[asker].network.request(
        source, request, messages.CopyShardsReply, timeout_s=30
    )
    return list(reply.reports)


def states(reports: list[messages.CopyReport]) -> list[str]:
    return [report.state for report in reports]


def test_copies_go_to_the_target(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["ab", "abc"])
        assert states(await copy(cluster, version, datas)) == ["durable", "present"]
        assert cluster.holders(datas[0]) == "abc"

    in_cluster(body)


def test_only_shards_that_the_version_names(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, _ = cluster.store(["ab"])
        cluster.nodes["a"].put(b"of nobody")
        _, others = cluster.store(["ab"], name="run/y")
        reports = await copy(cluster, version, [b"of nobody", *others])
        assert [(r.state, r.node, r.code) for r in reports] == [("failed", "a", "refused")] * 2
        assert cluster.moved == []

    in_cluster(body)


def test_only_of_a_live_version_whose_manifest_is_here(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["ab"])
        with pytest.raises(PeerRefused, match="no manifest of a live version"):
            await copy(cluster, "0" * 64, datas)
        cluster.remove(version)
        with pytest.raises(PeerRefused, match="no manifest of a live version"):
            await copy(cluster, version, datas)
        assert cluster.moved == []

    in_cluster(body)


@pytest.mark.parametrize("target", ["a", "x", "", "../x", "b", "c"])
def test_only_to_a_remembered_worker_that_takes_copies(
    in_cluster: RunInCluster, target: str
) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["ad"])
        cluster.nodes["b"].draining = True
        cluster.kill("c")
        with pytest.raises(PeerRefused, match=r"takes no copies|is no node"):
            await copy(cluster, version, datas, target)
        assert cluster.moved == []

    in_cluster(body)


def test_what_is_not_here_is_told(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["b", "ab"])
        reports = await copy(cluster, version, datas)
        assert [(r.state, r.node, r.code) for r in reports] == [
            ("failed", "a", "not_found"),
            ("durable", "c", ""),
        ]

    in_cluster(body)


@pytest.mark.parametrize(
    ("error", "node"),
    [
        (MediumFailed("the disk of a"), "a"),
        (StoreOperationFailed("a read on a"), "a"),
        (ShardCorrupt("00" * 32), "a"),
        (PeerStalled("c", "no progress"), "c"),
    ],
)
def test_who_failed_is_named(
    in_cluster: RunInCluster, monkeypatch: pytest.MonkeyPatch, error: CkptdError, node: str
) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["ab"])

        async def push(*_: object, **__: object) -> messages.CopyReport:
            raise error

        monkeypatch.setattr(cluster.nodes["a"].network, "push", push)
        reports = await copy(cluster, version, datas)
        assert [(r.state, r.node, r.code) for r in reports] == [("failed", node, error.kind)]

    in_cluster(body)


def test_a_copy_that_was_not_hashed_since_the_start_is_hashed_first(
    in_cluster: RunInCluster, no_pause: None
) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["ab", "ab"])
        node = cluster.nodes["a"]
        node.rot(datas[0])
        node.restart()
        reports = await copy(cluster, version, datas)
        assert [(r.state, r.node, r.code) for r in reports] == [
            ("failed", "a", "shard_corrupt"),
            ("durable", "c", ""),
        ]
        assert cluster.holders(datas[0]) == "b"
        assert len(node.shards.quarantined()) == 1

    in_cluster(body)


def test_a_copy_that_arrives_bad_is_looked_at(in_cluster: RunInCluster, no_pause: None) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["ab"])
        node = cluster.nodes["a"]
        node.rot(datas[0])
        (report,) = await copy(cluster, version, datas)
        assert (report.state, report.node, report.code) == ("failed", "c", "shard_corrupt")
        assert cluster.holders(datas[0]) == "b"
        assert len(node.shards.quarantined()) == 1

    in_cluster(body)


def test_a_copy_that_ends_too_early_is_looked_at(
    in_cluster: RunInCluster, monkeypatch: pytest.MonkeyPatch, no_pause: None
) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["ab"])
        node = cluster.nodes["a"]
        node.rot(datas[0])

        async def push(shard: bytes, *_: object, **__: object) -> messages.CopyReport:
            raise ShardCorrupt(shard.hex())

        monkeypatch.setattr(node.network, "push", push)
        (report,) = await copy(cluster, version, datas)
        assert (report.state, report.node, report.code) == ("failed", "a", "shard_corrupt")
        assert cluster.holders(datas[0]) == "b"

    in_cluster(body)


def test_a_target_that_does_not_answer_is_named(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["ab"])
        cluster.nodes["c"].up = False  # and nobody has noticed yet
        (report,) = await copy(cluster, version, datas)
        assert (report.state, report.node, report.code) == ("failed", "c", "peer_unreachable")

    in_cluster(body)


def test_one_request_for_each_target_and_within_the_rates(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["ab"] * 4)
        began_s = cluster.now_s
        sending = asyncio.create_task(copy(cluster, version, datas[:2], rate=32.0))
        await asyncio.sleep(1)
        with pytest.raises(PeerRefused) as refused:
            await copy(cluster, version, datas[2:])
        assert isinstance(refused.value.__cause__, PeerBusy)
        await sending
        assert cluster.now_s - began_s >= 4.0  # as slow as was asked for
        began_s = cluster.now_s
        await copy(cluster, version, datas[2:], rate=1e9)
        assert 2.0 <= cluster.now_s - began_s < 3.0  # and never faster than its own limit

    in_cluster(body, config=RepairConfig(after_s=60.0, rate_bytes_per_s=64, promise_s=30.0))


def test_a_slow_target_keeps_nobody_else_from_getting_copies(in_cluster: RunInCluster) -> None:
    """All together stay within the holder's own rate."""

    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["ab"] * 3)
        slow = asyncio.create_task(copy(cluster, version, datas[:1], "c", rate=8.0))
        await asyncio.sleep(0.1)
        began_s = cluster.now_s
        assert states(await copy(cluster, version, datas[1:], "d")) == ["durable", "durable"]
        assert 4.0 <= cluster.now_s - began_s < 4.2 and not slow.done()
        assert states(await slow) == ["durable"]

    in_cluster(body, config=RepairConfig(after_s=60.0, rate_bytes_per_s=64, promise_s=30.0))


def test_whoever_asks_leaves_room_for_what_others_ask(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["a"] * 3)
        held = [
            asyncio.create_task(copy(cluster, version, datas[:1], target, asker="d", rate=8.0))
            for target in "bc"
        ]
        await asyncio.sleep(0.1)
        with pytest.raises(PeerRefused):  # a third one of the same asker
            await copy(cluster, version, datas[:1], "d", asker="d")
        assert states(await copy(cluster, version, datas[1:2], "c", asker="b")) == ["durable"]
        assert not any(task.done() for task in held)
        await asyncio.gather(*held)

    in_cluster(body, config=RepairConfig(after_s=60.0, rate_bytes_per_s=64, promise_s=30.0))


def test_all_requests_together_are_bounded(
    in_cluster: RunInCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["a"])
        held = asyncio.create_task(copy(cluster, version, datas, "b", asker="d", rate=8.0))
        await asyncio.sleep(0.1)
        with pytest.raises(PeerRefused):
            await copy(cluster, version, datas, "c", asker="b")
        await held

    monkeypatch.setattr(limits, "BULK_PUSH_SLOTS", 1)
    in_cluster(body, config=RepairConfig(after_s=60.0, rate_bytes_per_s=64, promise_s=30.0))


def test_a_request_for_next_to_no_rate_gets_a_share_that_ends(in_cluster: RunInCluster) -> None:
    """A stolen worker could ask for a byte in a year, and hold a sending for as long."""

    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["ab"])
        began_s = cluster.now_s
        await copy(cluster, version, datas, rate=1e-9)
        assert cluster.now_s - began_s == pytest.approx(limits.COPY_RATE_SHARES_MAX, rel=0.1)

    in_cluster(body, config=RepairConfig(after_s=60.0, rate_bytes_per_s=64, promise_s=30.0))


def test_a_request_ends_after_a_while_with_what_is_done(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["ab"] * 40)
        reports = await copy(cluster, version, datas)
        assert 5 <= len(reports) <= 7

    in_cluster(body, config=RepairConfig(after_s=60.0, rate_bytes_per_s=64, promise_s=30.0))
