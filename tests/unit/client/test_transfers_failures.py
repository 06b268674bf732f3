"""Who is blamed for a failed transfer, who is asked again, and what is said when nobody is left."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ckptd.client.cluster import Cluster, Node
from ckptd.client.hashing import BytesReader
from ckptd.client.progress import Progress
from ckptd.client.store import _cause
from ckptd.client.transfers import Shard, Transfers
from ckptd.errors import (
    CkptdError,
    NoRoom,
    NotEnoughNodes,
    PeerRefused,
    PeerStalled,
    PeerUnreachable,
    SourceChanged,
    SourceRefused,
)
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport

SIZE = 1000


class _Notes(Progress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def _node(node_id: str, *, free: int = 10**9, machine: str = "") -> Node:
    """A node as a client remembers it after its first answer."""
    hello = messages.Hello(
        cluster="home",
        node=node_id,
        roles=("worker",),
        software="1",
        clock_ms=0,
        highest_order=0,
        boot_id=machine or f"machine of {node_id}",
    )
    status = cast(
        Any,
        SimpleNamespace(state="up", bytes_free=free, write_bytes_per_s=0.0, queued_bytes=0),
    )
    return Node(
        node_id, cast(Any, SimpleNamespace(hello=hello, address="")), "127.0.0.1", 1, status
    )


def _transfers(*nodes: Node, copies: int = 2) -> tuple[Transfers, Cluster, _Notes]:
    cluster = Cluster(
        config=cast(Any, None),
        identity=cast(Any, None),
        signer=cast(Any, None),
        bulk=cast(Any, None),
        nodes={node.id: node for node in nodes},
        absent={},
        ca=cast(Any, None),
    )
    notes = _Notes()
    return Transfers(cluster, copies, notes), cluster, notes


def _shard() -> Shard:
    return Shard(bytes(32), SIZE, lambda: BytesReader(b"x" * SIZE))


def _settle(transfers: Transfers, *reports: CopyReport, started_s: float | None = None) -> Shard:
    shard = _shard()
    chain = tuple(report.node for report in reports)
    assert set(chain) <= set(transfers._placement.choose(SIZE) + chain)
    transfers._settle(shard, chain, reports, time.monotonic() if started_s is None else started_s)
    return shard


def test_only_what_a_node_confirmed_counts() -> None:
    transfers, _, _ = _transfers(_node("a"), _node("b"), _node("c"), _node("d"))
    shard = _settle(
        transfers,
        CopyReport("a", "durable", SIZE),
        CopyReport("b", "present", SIZE),
        CopyReport("c", "receiving", SIZE),
        CopyReport("d", "unknown"),
    )
    assert shard.holders == {"a", "b"}
    assert transfers.bytes_written == SIZE, "what was there already is not written"


def test_a_node_that_does_not_answer_any_more_is_no_copy() -> None:
    transfers, cluster, _ = _transfers(_node("a"), _node("b"))
    assert transfers.distinct({"a", "b"}) == 2
    cluster.lose(cluster.nodes["b"], PeerUnreachable("b", "gone"))
    assert transfers.distinct({"a", "b"}) == 1


def test_two_nodes_on_one_machine_are_one_copy() -> None:
    transfers, _, _ = _transfers(_node("a", machine="pi"), _node("b", machine="pi"), _node("c"))
    assert transfers.distinct({"a", "b"}) == 1
    assert transfers.distinct({"a", "c"}) == 2


def test_one_incident_that_breaks_all_transfers_counts_once() -> None:
    transfers, _, notes = _transfers(_node("a"), _node("b"), _node("c"))
    began_s = time.monotonic()
    for _ in range(10):
        _settle(transfers, CopyReport("a", "failed", 0, "peer_unreachable"), started_s=began_s)
    assert not transfers._left_out and not notes.texts


def test_a_node_that_fails_three_times_in_a_row_is_left_out() -> None:
    transfers, _, notes = _transfers(_node("a"), _node("b"), _node("c"))
    failed = CopyReport("a", "failed", 0, "peer_stalled", "no progress")
    _settle(transfers, failed)
    _settle(transfers, failed)
    _settle(transfers, CopyReport("a", "durable", SIZE))
    _settle(transfers, failed)
    _settle(transfers, failed)
    assert not transfers._left_out, "a success in between begins the count anew"
    _settle(transfers, failed)
    assert transfers._left_out == {"a"}
    assert len(notes.texts) == 1 and "a is left out" in notes.texts[0]


@pytest.mark.parametrize(
    ("error", "culprit"),
    [
        (PeerUnreachable("a", "gone"), "a"),
        (PeerRefused("b", "refused", "says a, of b"), "a"),
        (PeerStalled("b", "no progress"), "b"),
        (PeerStalled("x", "no progress"), "a"),
    ],
)
def test_no_node_says_that_another_one_is_to_blame(
    monkeypatch: pytest.MonkeyPatch, error: CkptdError, culprit: str
) -> None:
    """Our own deadlines do, which watch all nodes of a chain."""
    transfers, _, _ = _transfers(_node("a"), _node("b"))
    blamed: list[str] = []

    def send_chain(shard: Shard, chain: tuple[str, ...]) -> tuple[CopyReport, ...]:
        raise error

    async def after_break(
        shard: Shard, chain: tuple[str, ...], culprit: str, error: CkptdError
    ) -> tuple[CopyReport, ...]:
        blamed.append(culprit)
        return ()

    monkeypatch.setattr(transfers, "_send_chain", send_chain)
    monkeypatch.setattr(transfers, "_after_break", after_break)
    asyncio.run(transfers._try(_shard(), ("a", "b")))
    transfers.close()
    assert blamed == [culprit]


def test_a_node_that_others_cut_off_is_not_left_out() -> None:
    transfers, _, notes = _transfers(_node("a"), _node("b"))
    for _ in range(4):
        _settle(
            transfers, CopyReport("a", "failed", 0, "peer_unreachable"), CopyReport("b", "unknown")
        )
    assert transfers._left_out == {"a"} and len(notes.texts) == 1


@pytest.mark.parametrize("code", ["no_room", "medium_failed", "store_operation_failed"])
def test_a_node_that_cannot_store_is_left_out_at_once(code: str) -> None:
    transfers, _, notes = _transfers(_node("a"), _node("b"))
    _settle(transfers, CopyReport("a", "failed", 0, code, "because"))
    assert transfers._left_out == {"a"} and len(notes.texts) == 1


def test_a_full_node_still_gives_what_it_has() -> None:
    transfers, cluster, _ = _transfers(_node("a"), _node("b"), _node("c"))
    _settle(transfers, CopyReport("a", "failed", 0, "no_room"))
    _settle(transfers, CopyReport("b", "failed", 0, "medium_failed"))
    shard = _shard()
    shard.holders = {"b"}
    assert transfers._source_node(shard) is None
    shard.holders = {"a", "b"}
    assert transfers._source_node(shard) is cluster.nodes["a"]


def test_busy_is_no_failure() -> None:
    transfers, _, notes = _transfers(_node("a"), _node("b"))
    for _ in range(10):
        _settle(transfers, CopyReport("a", "busy"))
    assert not transfers._left_out and not notes.texts


def test_no_room_is_said_only_when_that_is_why() -> None:
    transfers, cluster, _ = _transfers(_node("a", free=SIZE - 1), _node("b", free=0), _node("c"))
    assert isinstance(transfers.why_nowhere(_shard()), NotEnoughNodes)
    _settle(transfers, CopyReport("c", "failed", 0, "no_room", "full"))
    error = transfers.why_nowhere(_shard())
    assert isinstance(error, NoRoom) and "3 nodes" in error.message and "full" in error.message
    for node in list(cluster.nodes.values()):
        cluster.lose(node, PeerUnreachable(node.id, "gone"))
    assert isinstance(transfers.why_nowhere(_shard()), NotEnoughNodes)


def test_the_error_that_explains_the_others_is_shown() -> None:
    gone = PeerUnreachable("a", "gone")
    changed = SourceChanged("changed")
    refused = SourceRefused("a fifo")
    assert _cause(BaseExceptionGroup("", [gone, changed])) is changed
    assert _cause(BaseExceptionGroup("", [gone, BaseExceptionGroup("", [refused])])) is refused
    assert _cause(BaseExceptionGroup("", [gone])) is gone
    surprise = ZeroDivisionError()
    assert _cause(BaseExceptionGroup("", [changed, surprise])) is surprise
