"""A node's bulk side: who may ask what, slots that always come back, chains, nothing stored twice
or by strangers."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from tests.cluster.hostile import RawPeer
from tests.cluster.kill_fixtures import wait_until
from tests.unit.node.running_nodes import RunningNode, identity

from ckptd.core import limits
from ckptd.errors import (
    CkptdError,
    NotAuthorized,
    PeerBusy,
    PeerRefused,
    PeerStalled,
    PeerUnreachable,
    ProtocolError,
    Refused,
    StoreOperationFailed,
)
from ckptd.net.bulk import (
    BulkChannel,
    BulkConnector,
    ShardSender,
    push_shard,
    stall_timeout_s,
)
from ckptd.net.tls import client_context
from ckptd.node.bulk_connections import BulkConnections, Slots
from ckptd.node.forwarder import Forwarder
from ckptd.node.recent_pieces import RecentPieces
from ckptd.node.reception import check_chain
from ckptd.store.filesystem import OperatingSystem
from ckptd.store.shard_io import ShardReader
from ckptd.wire import frames, messages
from ckptd.wire.messages import CopyReport, Hop, Message

SIZE = 4 * limits.BULK_BUFFER_BYTES


@pytest.fixture(autouse=True)
def short_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile peers here do not close: nobody waits long for them to listen."""
    monkeypatch.setattr(limits, "LAST_WORDS_TIMEOUT_S", 0.2)


def shard(seed: int = 0, size: int = SIZE) -> tuple[bytes, bytes]:
    """Random bytes and their digest."""
    data = random.Random(seed).randbytes(size)
    return hashlib.sha256(data).digest(), data


def path_of(node: RunningNode, digest: bytes) -> Path:
    """Where a shard lies on a node's disk."""
    return Path(node.store, "shards", digest.hex()[:2], digest.hex())


def when_read(monkeypatch: pytest.MonkeyPatch, path: Path, happens: Callable[[], None]) -> None:
    """Something happens to the disk whenever the file at `path` is about to be read."""
    original = OperatingSystem.pread_into

    def read(self: OperatingSystem, descriptor: int, buffer: memoryview, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(path):
            happens()
        return original(self, descriptor, buffer, offset)

    monkeypatch.setattr(OperatingSystem, "pread_into", read)


class Source:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def piece(self, offset: int, size: int) -> memoryview:
        return memoryview(self._data)[offset : offset + size]


@contextlib.contextmanager
def connector(node: RunningNode, name: str = "client") -> Iterator[BulkConnector]:
    files = identity(node.pki, name)
    context = client_context(files.ca, files.cert, files.key)
    bulk = BulkConnector(context, "home", lambda: messages.Hello("home", name, (), "0", 0, 0))
    try:
        yield bulk
    finally:
        bulk.close()


def put(
    node: RunningNode,
    digest: bytes,
    data: bytes,
    chain: tuple[Hop, ...] = (),
    *,
    name: str = "client",
    hop: int = 0,
) -> dict[str, CopyReport]:
    """Stores a shard as a client does; the reports by node."""
    with connector(node, name) as bulk:
        where = node.place
        channel = bulk.acquire(where.node, where.host, where.bulk, hop=hop)
        sender = ShardSender(channel, messages.PutShard(digest, len(data), chain), hop=hop)
        sender.negotiate()
        reports = sender.send(Source(data))
        bulk.release(where.node, where.host, where.bulk, channel, hop=hop)
        return {report.node: report for report in reports}


def greeted(node: RunningNode, name: str = "client", hop: int = 0) -> RawPeer:
    peer = node.connect(name, "bulk")
    assert isinstance(peer.greet(hop=hop), messages.Hello)
    return peer


def is_at_rest(node: RunningNode) -> bool:
    """Whether nothing is held: no connection, slot, room or temporary file."""
    bulk = node.worker.bulk
    slots = [*bulk.receive_slots, bulk.read_slots]
    return (
        len(bulk.connections) == 0
        and all(pool.free == limits.BULK_SLOTS_PER_HOP for pool in slots)
        and bulk.push_slots.free == limits.BULK_PUSH_SLOTS
        and not bulk.connector._in_use
        and bulk.traffic.queued_bytes == 0
        and not os.listdir(node.store / "incoming")
    )


def wait_at_rest(node: RunningNode) -> None:
    wait_until(lambda: is_at_rest(node), "everything to be given back", timeout_s=20)


def test_a_shard_goes_down_a_chain_and_comes_back(two_nodes: list[RunningNode]) -> None:
    head, tail = two_nodes
    digest, data = shard()
    reports = put(head, digest, data, (tail.place.hop,))
    assert [reports[n].state for n in ("pi1", "pi2")] == ["durable", "durable"]
    for node in two_nodes:
        with greeted(node) as peer:
            peer.send(messages.GetShard(digest))
            assert peer.receive()[2] == data
    again = put(head, digest, data, (tail.place.hop,))
    assert [again[n].state for n in ("pi1", "pi2")] == ["present", "present"]
    for node in two_nodes:
        node.worker.bulk.connector.close()  # idle ones are kept for the next shard
        wait_at_rest(node)


@pytest.mark.parametrize(
    ("name", "hop", "request_"),
    [
        ("mallory", 1, messages.GetShard(b"\0" * 32)),
        ("mallory", 1, messages.PushShard(b"\0" * 32, 1, (Hop("pi2", "127.0.0.1", 1),))),
    ],
)
def test_a_worker_reads_nothing_and_orders_nothing(
    node: RunningNode, name: str, hop: int, request_: Message
) -> None:
    with greeted(node, name, hop) as peer:
        answer = peer.ask(request_, hop=hop)
        assert isinstance(answer, messages.Error)
        assert answer.code == "not_authorized"
    assert b'kind="not_authorized"} 1.0' in node.node.metrics.text()
    wait_at_rest(node)


@pytest.mark.parametrize(
    ("name", "hop"), [("mallory", 0), ("client", 1), ("admin", 0), ("admin", 1), ("monitor", 0)]
)
def test_hops_that_are_not_for_everybody(node: RunningNode, name: str, hop: int) -> None:
    with node.connect(name, "bulk") as peer:
        answer = peer.greet(hop=hop)
        assert isinstance(answer, messages.Error)
        assert answer.code == "not_authorized"
        assert peer.is_closed()
    wait_at_rest(node)


@pytest.mark.parametrize(
    "first",
    [
        frames.encode_frame(messages.Hello("elsewhere", "x", (), "0", 0, 0), 0),
        frames.encode_frame(messages.GetShard(b"\0" * 32), 0),
        frames.encode_header(36, 0, 2**63, 2**63),
        b"\x80\x04\x95" * 20,
    ],
)
def test_whoever_does_not_begin_with_hello_is_refused(node: RunningNode, first: bytes) -> None:
    with node.connect("client", "bulk") as peer:
        peer.sock.sendall(first)
        answer = peer.receive()[1]
        assert isinstance(answer, messages.Error)
        assert answer.code in ("protocol", "limit_exceeded")
        assert peer.is_closed()
    wait_at_rest(node)


@pytest.mark.parametrize(
    ("request_", "payload", "hop"),
    [
        (messages.PutShard(b"\0" * 32, 10), 5, 0),
        (messages.ShardData(b"\0" * 32), 0, 0),
        (messages.Ready(True), 0, 0),
        (messages.GetShard(b"\0" * 32), 0, 3),
    ],
)
def test_frames_that_break_the_rules_end_the_connection(
    node: RunningNode, request_: Message, payload: int, hop: int
) -> None:
    with greeted(node) as peer:
        peer.promise(request_, payload, hop=hop)
        assert isinstance(peer.receive()[1], messages.Error)
        assert peer.is_closed()
    wait_at_rest(node)


@pytest.mark.parametrize("what", ["another shard", "another size", "a request"])
def test_other_than_the_promised_payload_is_refused(node: RunningNode, what: str) -> None:
    digest, data = shard()
    with greeted(node) as peer:
        peer.send(messages.PutShard(digest, len(data)))
        assert isinstance(peer.receive()[1], messages.Ready)
        if what == "another shard":
            peer.send(messages.ShardData(b"\0" * 32), payload=data)
        elif what == "another size":
            peer.send(messages.ShardData(digest), payload=data[:-1])
        else:
            peer.send(messages.GetShard(digest))
        assert isinstance(peer.receive()[1], messages.Error)
        assert peer.is_closed()
    wait_at_rest(node)
    assert not node.worker.shards.has(digest)


def test_bytes_with_another_hash_are_not_stored(node: RunningNode) -> None:
    digest, data = shard()
    reports = put(node, digest, b"\x80\x04." + data[3:])
    assert (reports["pi1"].state, reports["pi1"].code) == ("failed", "shard_corrupt")
    assert not node.worker.shards.has(digest)
    wait_at_rest(node)


def test_a_pickle_is_just_bytes(node: RunningNode) -> None:
    data = b"cos\nsystem\n(S'touch /tmp/never'\ntR."
    digest = hashlib.sha256(data).digest()
    assert put(node, digest, data)["pi1"].state == "durable"
    with greeted(node) as peer:
        peer.send(messages.GetShard(digest))
        assert peer.receive()[2] == data


@pytest.mark.parametrize("when", ["hello", "put", "ready", "payload"])
def test_a_sender_that_disappears_leaves_nothing(two_nodes: list[RunningNode], when: str) -> None:
    head, tail = two_nodes
    digest, data = shard()
    peer = greeted(head)
    if when != "hello":
        peer.send(messages.PutShard(digest, len(data), (tail.place.hop,)))
    if when in ("ready", "payload"):
        assert isinstance(peer.receive()[1], messages.Ready)
    if when == "payload":
        peer.promise(messages.ShardData(digest), len(data))
        peer.sock.sendall(data[: len(data) // 2])
    peer.close()
    wait_at_rest(head)
    assert not head.worker.shards.has(digest)
    head.worker.bulk.connector.close()
    wait_at_rest(tail)


def test_a_sender_that_trickles_loses_its_slot(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STALL_TIMEOUT_S", 0.6)
    digest, data = shard()
    with greeted(node) as peer:
        peer.send(messages.PutShard(digest, len(data)))
        assert isinstance(peer.receive()[1], messages.Ready)
        peer.promise(messages.ShardData(digest), len(data))
        started_s = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - started_s < 15:
                peer.sock.sendall(b"x")
                time.sleep(0.05)  # this is what a slow sender does
        assert time.monotonic() - started_s < 10
    wait_at_rest(node)


def test_a_reader_that_takes_nothing_loses_its_slot(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, data = shard(size=32 * limits.MIB)
    assert put(node, digest, data)["pi1"].state == "durable"  # however long the disk takes for it
    monkeypatch.setattr(limits, "STALL_TIMEOUT_S", 0.6)
    with greeted(node) as peer:
        peer.send(messages.GetShard(digest))
        wait_until(lambda: node.worker.bulk.read_slots.free < limits.BULK_READ_SLOTS, "the reader")
        wait_until(lambda: node.worker.bulk.read_slots.free == limits.BULK_READ_SLOTS, "its end")
    wait_at_rest(node)


def test_one_peer_leaves_slots_to_others_and_busy_is_told(node: RunningNode) -> None:
    peers = []
    for number in range(limits.BULK_SLOTS_PER_PEER_MAX):
        peers.append(greeted(node, "mallory", 1))
        digest, data = shard(number)
        peers[-1].send(messages.PutShard(digest, len(data)), hop=1)
        assert isinstance(peers[-1].receive()[1], messages.Ready)
    with greeted(node, "mallory", 1) as one_more:
        digest, data = shard(99)
        answer = one_more.ask(messages.PutShard(digest, len(data)), hop=1)
        assert isinstance(answer, messages.Busy)
    assert node.worker.bulk.receive_slots[1].free == 2
    digest, data = shard(100)
    assert put(node, digest, data)["pi1"].state == "durable"
    for peer in peers:
        peer.close()
    wait_at_rest(node)


def test_idle_connections_make_room(node: RunningNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BULK_CONNECTIONS_PER_HOP_MAX", 2)
    oldest, newer = greeted(node), greeted(node)
    wait_until(
        lambda: all(c.idle_since_s is not None for c in node.worker.bulk.connections._open),
        "both to be idle",
    )
    with greeted(node) as newest:
        assert oldest.is_closed()
        assert isinstance(newest.ask(messages.GetShard(b"\0" * 32)), messages.Error)
        assert isinstance(newer.ask(messages.GetShard(b"\0" * 32)), messages.Error)
    for peer in (oldest, newer):
        peer.close()
    wait_at_rest(node)


def test_working_connections_do_not_make_room(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BULK_CONNECTIONS_PER_HOP_MAX", 1)
    digest, data = shard()
    with greeted(node) as working:
        working.send(messages.PutShard(digest, len(data)))
        assert isinstance(working.receive()[1], messages.Ready)
        with node.connect("client", "bulk") as other:
            assert isinstance(other.greet(), messages.Busy)
        working.send(messages.ShardData(digest), payload=data)
        while isinstance(answer := working.receive()[1], messages.Progress):
            pass
        assert isinstance(answer, messages.PutResult)
    wait_at_rest(node)


def test_all_connections_together_are_capped(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BULK_CONNECTIONS_MAX", 1)
    digest, data = shard()
    with greeted(node) as working:
        working.send(messages.PutShard(digest, len(data)))
        assert isinstance(working.receive()[1], messages.Ready)
        with node.connect("mallory", "bulk") as other:
            assert other.is_closed()
    wait_at_rest(node)


# Chains


@pytest.mark.parametrize(
    "chain",
    [
        (Hop("pi1", "127.0.0.1", 1),),
        (Hop("pi2", "127.0.0.1", 1), Hop("pi2", "127.0.0.2", 1)),
        (Hop("pi2", "127.0.0.1", 1), Hop("pi1", "127.0.0.1", 1)),
        (Hop("../../etc", "127.0.0.1", 1),),
        (Hop("pi2\n\x1b[2J", "127.0.0.1", 1),),
        (Hop("pi2", "", 1),),
        (Hop("pi2", "host\nname", 1),),
        (Hop("pi2", "host name", 1),),
        (Hop("pi2", "h" * 300, 1),),
        (Hop("pi2", "127.0.0.1", 0),),
        tuple(Hop(f"n{number}", "127.0.0.1", 1) for number in range(5)),
    ],
)
def test_chains_that_cannot_be(chain: tuple[Hop, ...]) -> None:
    with pytest.raises(Refused):
        check_chain(chain, 0, "pi1", sender="mac")


def test_a_chain_never_comes_back_to_a_node_that_passes_on() -> None:
    """A stolen worker could name itself behind a node that has the shard, and read it."""
    chain = (Hop("pi3", "127.0.0.1", 1), Hop("pi2", "127.0.0.1", 1))
    with pytest.raises(Refused, match="pi2 twice"):
        check_chain(chain, 1, "pi1", sender="pi2")
    check_chain(chain, 0, "pi1", sender="pi2")  # which stores as a client, and is a worker, too


def test_a_chain_may_not_pass_the_last_hop() -> None:
    chain = tuple(Hop(f"n{number}", "127.0.0.1", 1) for number in range(limits.CHAIN_HOPS_MAX))
    check_chain(chain, 0, "pi1", sender="mac")
    with pytest.raises(Refused, match="hops"):
        check_chain(chain, 1, "pi1", sender="mac")


def test_a_chain_that_comes_back_is_refused_before_a_byte(node: RunningNode) -> None:
    digest, data = shard()
    for request_ in (
        messages.PutShard(digest, len(data), (node.place.hop,)),
        messages.PushShard(digest, len(data), (node.place.hop,)),
    ):
        with greeted(node) as peer:
            answer = peer.ask(request_)
            assert isinstance(answer, messages.Error)
            assert answer.code == "refused"
    wait_at_rest(node)


def test_a_tail_that_is_somebody_else_gets_nothing(two_nodes: list[RunningNode]) -> None:
    head, tail = two_nodes
    digest, data = shard()
    pretended = Hop("pi7", tail.place.host, tail.place.bulk)
    reports = put(head, digest, data, (pretended,))
    assert reports["pi1"].state == "durable"
    assert (reports["pi7"].state, reports["pi7"].code) == ("failed", "not_authorized")
    assert not tail.worker.shards.has(digest)
    wait_at_rest(head)


def test_a_tail_that_is_down_is_half_a_success(node: RunningNode) -> None:
    digest, data = shard()
    reports = put(node, digest, data, (Hop("pi2", "127.0.0.1", 1),))
    assert reports["pi1"].state == "durable"
    assert (reports["pi2"].state, reports["pi2"].code) == ("failed", "peer_unreachable")
    wait_at_rest(node)


def test_only_the_node_that_is_down_is_to_blame(two_nodes: list[RunningNode]) -> None:
    """Who stands behind it in a chain was never asked: three such failures leave a node out."""
    head, tail = two_nodes
    digest, data = shard()
    reports = put(head, digest, data, (Hop("pi3", "127.0.0.1", 1), tail.place.hop))
    assert reports["pi1"].state == "durable"
    assert (reports["pi3"].state, reports["pi3"].code) == ("failed", "peer_unreachable")
    assert (reports["pi2"].state, reports["pi2"].code) == ("unknown", "")
    wait_at_rest(head)


def test_a_slow_line_leaves_the_rest_of_the_chain_not_without_bytes(
    two_nodes: list[RunningNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer takes longer to fill at the least speed that counts than others wait for news."""
    head, tail = two_nodes
    digest, data = shard()
    monkeypatch.setattr(limits, "PIECE_LATE_S", 0.02)
    there: list[int] = []

    class Slow(Source):
        def piece(self, offset: int, size: int) -> memoryview:
            if any(there) or offset >= limits.BULK_BUFFER_BYTES - limits.KIB:
                return super().piece(offset, size)
            time.sleep(0.01)  # so slow is the line: five seconds for a buffer
            parts = Path(tail.store, "incoming").iterdir()
            there.append(sum(part.stat().st_size for part in parts))
            return super().piece(offset, limits.KIB)

    with connector(head) as bulk:
        where = head.place
        channel = bulk.acquire(where.node, where.host, where.bulk)
        request_ = messages.PutShard(digest, len(data), (tail.place.hop,))
        sender = ShardSender(channel, request_, hop=0)
        sender.negotiate()
        reports = sender.send(Slow(data))
        bulk.release(where.node, where.host, where.bulk, channel)
    assert [report.state for report in reports] == ["durable", "durable"]
    assert any(there)
    for node in two_nodes:
        path = path_of(node, digest)
        assert path.read_bytes() == data


def test_news_of_a_slow_line_come_before_anybody_gives_up() -> None:
    shortest_s = min(stall_timeout_s(hop) for hop in range(limits.CHAIN_HOPS_MAX))
    a_record_s = 16 * limits.KIB / limits.TRANSFER_MIN_BYTES_PER_S
    assert limits.PIECE_LATE_S + a_record_s + limits.PROGRESS_INTERVAL_S < shortest_s


def test_a_head_that_cannot_read_its_copy_blames_itself(
    two_nodes: list[RunningNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, tail = two_nodes
    digest, data = shard()
    put(head, digest, data)

    def fail() -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    when_read(monkeypatch, path_of(head, digest), fail)
    reports = put(head, digest, data, (tail.place.hop,))
    assert (reports["pi1"].state, reports["pi1"].code) == ("failed", "store_operation_failed")
    assert (reports["pi2"].state, reports["pi2"].code) == ("unknown", "")
    with connector(head) as bulk:
        where = head.place
        channel = bulk.acquire(where.node, where.host, where.bulk)
        with pytest.raises(PeerRefused) as refused:
            push_shard(channel, messages.PushShard(digest, len(data), (tail.place.hop,)))
        assert (refused.value.node, refused.value.code) == ("pi1", "store_operation_failed")
        bulk.release(where.node, where.host, where.bulk, channel)
    assert not tail.worker.shards.has(digest)
    monkeypatch.undo()
    assert put(head, digest, data, (tail.place.hop,))["pi2"].state == "durable"


def test_a_copy_that_ends_too_early_is_found_out_when_it_is_passed_on(
    two_nodes: list[RunningNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, tail = two_nodes
    digest, data = shard()
    put(head, digest, data)
    path = path_of(head, digest)
    when_read(monkeypatch, path, lambda: os.truncate(path, SIZE // 2))
    reports = put(head, digest, data, (tail.place.hop,))
    assert (reports["pi1"].state, reports["pi1"].code) == ("failed", "shard_corrupt")
    assert (reports["pi2"].state, reports["pi2"].code) == ("unknown", "")
    assert not head.worker.shards.has(digest)
    assert not tail.worker.shards.has(digest)


def test_a_copy_that_is_too_short_is_replaced_when_it_is_put_again(
    two_nodes: list[RunningNode],
) -> None:
    head, tail = two_nodes
    digest, data = shard()
    put(head, digest, data)
    path = path_of(head, digest)
    os.truncate(path, SIZE // 2)
    with pytest.raises(PeerRefused) as refused:
        put(head, digest, data, (tail.place.hop,))
    assert (refused.value.node, refused.value.code) == ("pi1", "shard_corrupt")
    wait_until(lambda: not head.worker.shards.has(digest), "the bad copy to go", timeout_s=20)
    reports = put(head, digest, data, (tail.place.hop,))
    assert [reports[n].state for n in ("pi1", "pi2")] == ["durable", "durable"]
    assert path.read_bytes() == data


def test_a_copy_that_is_cut_while_it_comes_in_is_found_out_by_whoever_passes_it_on(
    two_nodes: list[RunningNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, tail = two_nodes
    digest, data = shard()
    written, cut = threading.Event(), threading.Event()
    hold, fsync = RecentPieces.hold, OperatingSystem.fsync

    def late(self: RecentPieces, offset: int, end: int) -> memoryview:
        if offset:
            return hold(self, offset, end)
        assert written.wait(20)
        (path,) = Path(head.store, "incoming").iterdir()
        os.truncate(path, 0)
        cut.set()
        return memoryview(b"")  # too late: the file has to be read

    def last(self: OperatingSystem, descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{head.store}/incoming/"):
            written.set()
            assert cut.wait(20)
        fsync(self, descriptor)

    monkeypatch.setattr(RecentPieces, "hold", late)
    monkeypatch.setattr(OperatingSystem, "fsync", last)
    reports = put(head, digest, data, (tail.place.hop,))
    assert (reports["pi1"].state, reports["pi1"].code) == ("failed", "shard_corrupt")
    assert reports["pi2"].state == "unknown"
    assert not head.worker.shards.has(digest)
    assert not tail.worker.shards.has(digest)


def test_a_good_copy_that_arrived_bad_elsewhere_is_still_good(
    two_nodes: list[RunningNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, tail = two_nodes
    digest, data = shard()
    piece = ShardReader.piece
    monkeypatch.setattr(ShardReader, "piece", lambda *each: memoryview(bytes(len(piece(*each)))))
    put(head, digest, data)
    reports = put(head, digest, data, (tail.place.hop,))
    assert reports["pi1"].state == "present"
    assert (reports["pi2"].state, reports["pi2"].code) == ("failed", "shard_corrupt")
    assert head.worker.shards.has(digest)
    assert not tail.worker.shards.has(digest)


@pytest.mark.parametrize("left", [0, SIZE // 2])
@pytest.mark.parametrize("when", ["before it is opened", "while it is read"])
def test_a_copy_that_is_too_short_to_be_handed_out_is_looked_at(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch, when: str, left: int
) -> None:
    digest, data = shard()
    put(node, digest, data)
    path = path_of(node, digest)
    suspicions: list[bytes] = []
    monkeypatch.setattr(node.worker.bulk, "_on_suspicion", suspicions.append)
    if when == "before it is opened":
        os.truncate(path, left)
    else:
        when_read(monkeypatch, path, lambda: os.truncate(path, left))
    with greeted(node) as peer:
        peer.send(messages.GetShard(digest))
        if when == "before it is opened":
            answer = peer.receive()[1]
            assert isinstance(answer, messages.Error) and answer.code == "shard_corrupt"
        else:
            with pytest.raises(ConnectionError):  # more was promised than comes
                peer.receive()
    assert suspicions == [digest]


@pytest.mark.parametrize("when", ["before it is opened", "while it is read"])
def test_a_copy_that_ends_too_early_is_found_out_when_it_is_pushed(
    two_nodes: list[RunningNode], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    head, tail = two_nodes
    digest, data = shard()
    put(head, digest, data)
    path = path_of(head, digest)
    if when == "before it is opened":
        os.truncate(path, SIZE // 2)
    else:
        when_read(monkeypatch, path, lambda: os.truncate(path, SIZE // 2))
    suspicions: list[bytes] = []
    monkeypatch.setattr(head.worker.bulk, "_on_suspicion", suspicions.append)
    with connector(head) as bulk:
        where = head.place
        channel = bulk.acquire(where.node, where.host, where.bulk)
        with pytest.raises(PeerRefused) as refused:
            push_shard(channel, messages.PushShard(digest, len(data), (tail.place.hop,)))
        bulk.release(where.node, where.host, where.bulk, channel)
    assert (refused.value.node, refused.value.code) == ("pi1", "shard_corrupt")
    assert suspicions == [digest]
    assert not tail.worker.shards.has(digest)


DURABLE = CopyReport("b", "durable", SIZE)
RECEIVING = CopyReport("b", "receiving", 7)


@pytest.mark.parametrize(
    ("error", "said", "states"),
    [
        (PeerUnreachable("a", "gone"), [], ["failed", "unknown"]),
        (PeerUnreachable("a", "gone"), [DURABLE], ["failed", "durable"]),
        (PeerUnreachable("a", "gone"), [RECEIVING], ["failed", "unknown"]),
        (PeerRefused("b", "refused", "it was b"), [], ["failed", "unknown"]),
        (PeerRefused("x", "refused", "it was x"), [], ["failed", "unknown"]),
        (ProtocolError("a", "nonsense"), [], ["failed", "unknown"]),
        (NotAuthorized("somebody else"), [], ["failed", "unknown"]),
        (PeerStalled("b", "stalls"), [CopyReport("a", "durable", SIZE)], ["durable", "failed"]),
        (PeerStalled("b", "stalls"), [RECEIVING], ["unknown", "failed"]),
        (PeerBusy("a", "no slot"), [], ["busy", "busy"]),
        (PeerBusy("a", "no slot"), [DURABLE], ["busy", "durable"]),
        (StoreOperationFailed("own disk"), [RECEIVING], ["unknown", "unknown"]),
        (CkptdError("own fault"), [DURABLE], ["unknown", "durable"]),
    ],
)
def test_of_a_chain_that_broke_only_one_is_to_blame(
    node: RunningNode, error: CkptdError, said: list[CopyReport], states: list[str]
) -> None:
    """Nodes "a" and "b" were to get the shard."""
    request_ = messages.PutShard(b"\0" * 32, SIZE, (Hop("a", "h", 1), Hop("b", "h", 1)))
    forwarder = Forwarder(node.worker.bulk.connector, request_, 1, node.worker.traffic)
    forwarder._sender = cast(ShardSender, SimpleNamespace(reports={r.node: r for r in said}))
    forwarder._fail(error)
    reports = {report.node: report for report in forwarder.reports()}
    assert [reports[each].state for each in "ab"] == states
    ours = isinstance(error, StoreOperationFailed) or type(error) is CkptdError
    assert forwarder.own_error is (error if ours else None)
    if RECEIVING in said:
        assert reports["b"].received_bytes == 7


def test_a_tail_without_slots_is_busy_and_not_to_blame(two_nodes: list[RunningNode]) -> None:
    head, tail = two_nodes
    digest, data = shard()
    taken = [tail.worker.bulk.receive_slots[1].take(f"peer{n}") for n in range(8)]
    assert all(taken)
    reports = put(head, digest, data, (tail.place.hop,))
    assert (reports["pi1"].state, reports["pi2"].state) == ("durable", "busy")
    for number in range(8):
        tail.worker.bulk.receive_slots[1].give_back(f"peer{number}")
    assert put(head, digest, data, (tail.place.hop,))["pi2"].state == "durable"


def test_a_head_whose_disk_fails_does_not_blame_its_tail(
    two_nodes: list[RunningNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, tail = two_nodes
    digest, data = shard()
    filesystem = OperatingSystem
    original = filesystem.pwrite
    incoming = str(head.store)
    counted: list[int] = []

    def failing(self: OperatingSystem, descriptor: int, data: memoryview, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(incoming):
            counted.append(descriptor)
            if len(counted) > 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, descriptor, data, offset)

    monkeypatch.setattr(filesystem, "pwrite", failing)
    reports = put(head, digest, data, (tail.place.hop,))
    monkeypatch.undo()
    assert (reports["pi1"].state, reports["pi1"].code) == ("failed", "no_room")
    assert reports["pi2"].state == "unknown"
    assert not tail.worker.shards.has(digest)
    wait_at_rest(head)
    wait_at_rest(tail)


def test_a_push_goes_to_each_node_and_blames_only_who_failed(
    two_nodes: list[RunningNode],
) -> None:
    head, tail = two_nodes
    digest, data = shard()
    put(head, digest, data)
    down = Hop("pi3", "127.0.0.1", 1)
    with connector(head) as bulk:
        where = head.place
        channel = bulk.acquire(where.node, where.host, where.bulk)
        request_ = messages.PushShard(digest, len(data), (down, tail.place.hop))
        reports = {report.node: report for report in push_shard(channel, request_)}
        assert [reports[n].state for n in ("pi1", "pi3", "pi2")] == ["present", "failed", "durable"]
        missing = messages.PushShard(b"\0" * 32, 1, (tail.place.hop,))
        with pytest.raises(PeerRefused, match="not in"):
            push_shard(channel, missing)
        bulk.release(where.node, where.host, where.bulk, channel)
    assert tail.worker.shards.has(digest)


def test_a_bad_copy_that_was_passed_on_is_found_out(two_nodes: list[RunningNode]) -> None:
    head, tail = two_nodes
    digest, data = shard()
    put(head, digest, data)
    path = path_of(head, digest)
    path.write_bytes(b"\0" + data[1:])
    reports = put(head, digest, data, (tail.place.hop,))
    assert (reports["pi1"].state, reports["pi1"].code) == ("failed", "shard_corrupt")
    assert not head.worker.shards.has(digest)
    assert not tail.worker.shards.has(digest)


# Stopping


def test_a_transfer_under_way_may_finish_when_the_node_stops(node: RunningNode) -> None:
    digest, data = shard()
    with greeted(node) as peer, greeted(node) as idle:
        peer.send(messages.PutShard(digest, len(data)))
        assert isinstance(peer.receive()[1], messages.Ready)
        peer.promise(messages.ShardData(digest), len(data))
        peer.sock.sendall(data[:1000])
        node.request_stop()
        assert idle.is_closed()
        peer.sock.sendall(data[1000:])
        while isinstance(answer := peer.receive()[1], messages.Progress):
            pass
        assert isinstance(answer, messages.PutResult)
        assert answer.reports[0].state == "durable"
    node.join()


def test_a_transfer_that_does_not_finish_is_cut_off_when_the_node_stops(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SHUTDOWN_TIMEOUT_S", 0.5)
    digest, data = shard()
    with greeted(node) as peer:
        peer.send(messages.PutShard(digest, len(data)))
        assert isinstance(peer.receive()[1], messages.Ready)
        started_s = time.monotonic()
        node.stop()
        assert time.monotonic() - started_s < 15
        assert peer.is_closed()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bulk ")]


# The parts


def test_slots_are_counted_for_each_peer() -> None:
    slots = Slots(3, per_peer=2)
    assert [slots.take(peer) for peer in "aaab"] == [True, True, False, True]
    assert not slots.take("b")
    slots.give_back("a")
    assert slots.take("b")
    assert slots.free == 0


def test_a_closed_registry_admits_nobody() -> None:
    connections = BulkConnections()
    connections.close()
    assert connections.admit(object.__new__(BulkChannel)) is None
