"""The network of running nodes: whom they can ask, and copies that they push."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.cluster.kill_fixtures import wait_until
from tests.unit.node.running_nodes import RunningNode
from tests.unit.store.workload import put_shard

from ckptd.core import limits
from ckptd.core.quantities import Address
from ckptd.errors import NotFound, PeerBusy, PeerRefused, PeerStalled, PeerUnreachable
from ckptd.node.network import NodeNetwork
from ckptd.node.push import PacedSource
from ckptd.store.shards import ShardStore
from ckptd.wire import messages

_T = TypeVar("_T")

DATA = random.Random(5).randbytes(700_000)
SHARD = hashlib.sha256(DATA).digest()


def on_loop(node: RunningNode, work: Coroutine[Any, Any, _T]) -> _T:
    return asyncio.run_coroutine_threadsafe(work, node.loop).result(30)


def network_of(node: RunningNode) -> NodeNetwork:
    assert node.node.background is not None
    network = node.node.background._ground.network
    assert isinstance(network, NodeNetwork)
    return network


def shards_of(node: RunningNode) -> ShardStore:
    assert node.node.worker is not None
    return node.node.worker.shards


@pytest.fixture
def acquainted(two_nodes: list[RunningNode]) -> list[RunningNode]:
    """Two nodes that keep a connection to each other."""
    for one, other in (two_nodes, two_nodes[::-1]):
        peers = one.node.peers
        assert peers is not None
        peers._configured.append(str(Address(other.place.host, other.place.control)))
    first, second = (each.node.peers for each in two_nodes)
    assert first is not None and second is not None
    wait_until(
        lambda: first.client("pi2") is not None and second.client("pi1") is not None, "connections"
    )
    return two_nodes


def test_a_node_asks_another_one_by_its_id(acquainted: list[RunningNode]) -> None:
    reply, payload = on_loop(
        acquainted[0],
        network_of(acquainted[0]).request(
            "pi2", messages.GetStatus(), messages.NodeStatus, timeout_s=5
        ),
    )
    assert (reply.node, payload) == ("pi2", b"")


def test_whoever_is_not_there_cannot_be_asked(acquainted: list[RunningNode]) -> None:
    network = network_of(acquainted[0])
    for node in ("pi1", "pi9"):  # not itself either
        with pytest.raises(PeerUnreachable):
            on_loop(
                acquainted[0],
                network.request(node, messages.Ping(), messages.NodeStatus, timeout_s=5),
            )
        with pytest.raises(PeerUnreachable):
            on_loop(acquainted[0], network.push(SHARD, 1, node))
    acquainted[1].stop()
    with pytest.raises(PeerUnreachable):
        on_loop(
            acquainted[0],
            network.request("pi2", messages.Ping(), messages.NodeStatus, timeout_s=5),
        )


def test_what_is_not_allowed_is_refused_by_the_other_side(acquainted: list[RunningNode]) -> None:
    question = network_of(acquainted[0]).request(
        "pi2", messages.SetJob("scrub", True), messages.NodeStatus, timeout_s=5
    )
    with pytest.raises(PeerRefused, match="set job"):
        on_loop(acquainted[0], question)


def test_a_copy_is_pushed_once_and_then_present(acquainted: list[RunningNode]) -> None:
    first, second = acquainted
    put_shard(shards_of(first), DATA)
    report = on_loop(first, network_of(first).push(SHARD, len(DATA), "pi2"))
    assert (report.node, report.state, report.received_bytes) == ("pi2", "durable", len(DATA))
    assert shards_of(second).has(SHARD, len(DATA))
    report = on_loop(first, network_of(first).push(SHARD, len(DATA), "pi2"))
    assert report.state == "present"
    text = first.node.metrics.text().decode()
    sent = 'ckptd_shard_transfer_bytes_total{direction="sent",peer="pi2"} 700000.0'
    assert sent in text


def test_only_what_is_here_can_be_pushed(acquainted: list[RunningNode]) -> None:
    first = acquainted[0]
    with pytest.raises(NotFound):
        on_loop(first, network_of(first).push(SHARD, len(DATA), "pi2"))
    put_shard(shards_of(first), DATA)
    with pytest.raises(NotFound, match="700000 bytes here"):
        on_loop(first, network_of(first).push(SHARD, len(DATA) - 1, "pi2"))
    assert len(shards_of(acquainted[1])) == 0


def test_a_push_keeps_to_its_rate(acquainted: list[RunningNode]) -> None:
    first = acquainted[0]
    put_shard(shards_of(first), DATA)
    started_s = time.monotonic()
    push = network_of(first).push(SHARD, len(DATA), "pi2", rate_bytes_per_s=1_000_000)
    assert on_loop(first, push).state == "durable"
    assert time.monotonic() - started_s >= 0.4


def test_what_the_target_says_is_told(
    acquainted: list[RunningNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = acquainted
    put_shard(shards_of(first), DATA)
    assert second.node.worker is not None
    monkeypatch.setattr(second.node.worker.bulk, "_draining", lambda: True)
    report = on_loop(first, network_of(first).push(SHARD, len(DATA), "pi2"))
    assert (report.node, report.state) == ("pi2", "failed")
    assert not shards_of(second).has(SHARD)


def test_a_target_without_a_free_slot_is_busy_which_is_no_failure(
    acquainted: list[RunningNode],
) -> None:
    first, second = acquainted
    put_shard(shards_of(first), DATA)
    assert second.node.worker is not None
    slots = second.node.worker.bulk.receive_slots[-1]
    while slots.free:
        assert slots.take(f"peer {slots.free}")
    with pytest.raises(PeerBusy):
        on_loop(first, network_of(first).push(SHARD, len(DATA), "pi2"))
    failures = 'transfer_errors_total{kind="%s"} 0.0'
    assert failures % "peer_busy" in first.node.metrics.text().decode()


def test_a_push_that_cannot_connect_is_counted(acquainted: list[RunningNode]) -> None:
    first = acquainted[0]
    put_shard(shards_of(first), DATA)
    peer = first.node.members.peer("pi2")
    assert peer is not None
    peer.bulk_port = 1  # nobody listens there
    with pytest.raises(PeerUnreachable):
        on_loop(first, network_of(first).push(SHARD, len(DATA), "pi2"))
    assert 'transfer_errors_total{kind="peer_unreachable"} 1.0' in (
        first.node.metrics.text().decode()
    )


class Source:
    def piece(self, offset: int, size: int) -> memoryview:
        return memoryview(bytes(size))


def test_a_paced_source_comes_in_pieces_of_a_quarter_of_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 50.0
    waits_s: list[float] = []

    class Stopping(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            nonlocal now_s
            if timeout:
                waits_s.append(timeout)
                now_s += timeout
            return self.is_set()

    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    stopping = Stopping()
    paced = PacedSource(Source(), 100_000, "pi2", 1000, stopping)
    size = limits.BULK_BUFFER_BYTES
    offset = 0
    while offset < 1000:
        offset += len(paced.piece(offset, size))
    assert (offset, waits_s) == (1000, [0.25] * 3)
    now_s += 10  # somebody else was slow: nothing more to wait for
    assert len(paced.piece(offset, size)) == 250 and len(waits_s) == 3
    assert len(paced.piece(offset, 10)) == 10
    now_s += 89 + limits.STALL_TIMEOUT_S  # as much as the slowest may take, and not more
    assert len(paced.piece(offset, size)) == 250
    now_s += 1.0
    with pytest.raises(PeerStalled, match="took 121 s for a copy"):
        paced.piece(offset, size)
    assert len(PacedSource(Source(), 1, "pi2", 0.001, stopping).piece(0, size)) == 1
    stopping.set()
    with pytest.raises(PeerUnreachable, match="this side is stopping"):
        PacedSource(Source(), 1, "pi2", 0.001, stopping).piece(0, size)


def test_a_node_that_stops_does_not_wait_for_slow_copies(acquainted: list[RunningNode]) -> None:
    first = acquainted[0]
    put_shard(shards_of(first), DATA)
    push = network_of(first).push(SHARD, len(DATA), "pi2", rate_bytes_per_s=100)  # two hours
    pushing = asyncio.run_coroutine_threadsafe(push, first.loop)
    wait_until(
        lambda: (
            'transfer_bytes_total{direction="received",peer="pi1"}'
            in acquainted[1].node.metrics.text().decode()
            or any(Path(shards_of(acquainted[1])._path, "incoming").iterdir())
        ),
        "the first bytes",
    )
    first.stop()
    with pytest.raises((PeerUnreachable, CancelledError)):
        pushing.result(0)
