"""Whose documents a node knows, and until when: garbage collection waits for that."""

from __future__ import annotations

import asyncio

import pytest
from tests.cluster.kill_fixtures import wait_until
from tests.unit.node.running_nodes import CLUSTER, RunningNode
from tests.unit.node.test_forgotten import introduce
from tests.unit.node.test_records import member, signer_of

from ckptd.core import documents
from ckptd.core.identity import Identity, Role
from ckptd.errors import DocumentRefused
from ckptd.node.records import TooManyByWorker
from ckptd.wire import messages


def test_a_node_whose_disk_has_failed_is_heard_of_no_more(two_nodes: list[RunningNode]) -> None:
    node, other = two_nodes
    introduce(node, other)
    peers = node.node.peers
    assert peers is not None

    def heard_s() -> float:
        return peers.known_until_s(other.node_id) or 0.0

    def answered_s() -> float:
        link = peers._links.get(other.node_id)
        return link.answered_s if link is not None else 0.0

    wait_until(lambda: heard_s() > 0.0, "an exchange")
    other.node._directory.medium.fail("for this test")
    failed_s = answered_s()
    wait_until(lambda: answered_s() > failed_s + 1.0, "one more that began since then")
    heard_last_s = heard_s()
    again_s = answered_s()
    wait_until(lambda: answered_s() > again_s + 1.0, "another")
    assert heard_s() == heard_last_s


def test_a_node_that_knows_what_is_refused_here_is_not_heard_of(
    two_nodes: list[RunningNode],
) -> None:
    """Whatever it is that it has admitted, it could name any shard."""
    node, other = two_nodes
    raw = member(7, name="pi9")  # not by pi9, and so of no worth to anybody
    signature = signer_of(node.pki, "mallory").sign(raw)
    refused = documents.document_id(raw)
    with pytest.raises(DocumentRefused):
        node.node.records.put(raw, signature)
    there = other.node.records
    there._files.put(refused, raw, signature)
    author = Identity(CLUSTER, frozenset({Role.WORKER}), "pi9", "00" * 20)
    there.catalogue.add(refused, documents.decode(raw, cluster=CLUSTER), author=author)
    introduce(node, other, besides=(refused,))
    peers = node.node.peers
    assert peers is not None

    def answered_s() -> float:
        link = peers._links.get(other.node_id)
        return link.answered_s if link is not None else 0.0

    wait_until(lambda: answered_s() > 0.0, "the first answer")
    first_s = answered_s()
    wait_until(lambda: answered_s() > first_s + 1.0, "one after an exchange")
    assert peers.known_until_s(other.node_id) is None


def test_an_address_that_is_none_is_passed_over(two_nodes: list[RunningNode]) -> None:
    node, other = two_nodes
    peers = node.node.peers
    assert peers is not None
    peers._configured.insert(0, "no address")
    introduce(node, other)
    wait_until(lambda: (peers.known_until_s(other.node_id) or 0.0) > 0.0, "an exchange")
    keeper = peers._keepers["no address"]
    assert keeper.done() and keeper.exception() is None


def test_what_one_worker_wrote_too_much_of_keeps_nobody_from_having_heard(
    two_nodes: list[RunningNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a stolen one could, for ever: others get other documents of it than this node."""
    node = two_nodes[0]
    peers = node.node.peers
    assert peers is not None
    told = messages.DocumentView(memoryview(b"{}"), b"s")

    def admitted(error: DocumentRefused) -> bool:
        def put(*_: object) -> str:
            raise error

        monkeypatch.setattr(node.node.records, "put", put)
        return asyncio.run_coroutine_threadsafe(peers._admit("pi2", told), node.loop).result(9)

    assert admitted(TooManyByWorker("over 1024"))
    assert not admitted(DocumentRefused("forged"))
