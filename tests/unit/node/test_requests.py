"""Answers of a node: within the limits of a frame, by the role of who asks, with ids always."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tests.cluster.hostile import RawPeer
from tests.unit.node.running_nodes import RunningNode, running_nodes
from tests.unit.node.test_records import member, signer

from ckptd.core import limits
from ckptd.node.background import Background
from ckptd.wire import messages
from ckptd.wire.messages import Message


def greeted(node: RunningNode, name: str = "client") -> RawPeer:
    peer = node.connect(name)
    assert isinstance(peer.greet(), messages.Hello)
    return peer


@pytest.mark.parametrize("name", ["mallory", "monitor"])
@pytest.mark.parametrize(
    "request_", [messages.Verify((b"\0" * 32,)), messages.ReportCorrupt(b"\0" * 32)]
)
def test_workers_and_monitors_may_not_verify(
    node: RunningNode, name: str, request_: Message
) -> None:
    with node.connect(name) as peer:
        answer = peer.greet()
        if isinstance(answer, messages.Hello):
            answer = peer.ask(request_)
        assert isinstance(answer, messages.Error)
        assert answer.code == "not_authorized"


def put(peer: RawPeer, *signed: messages.SignedDocument, count: int | None = None) -> Message:
    number = len(signed) if count is None else count
    return peer.ask(messages.PutDocuments(number), payload=messages.encode_documents(signed))


def test_each_document_is_answered_with_its_id_also_when_refused(node: RunningNode) -> None:
    good = member(1)
    signed = [
        messages.SignedDocument(b"rubbish", b"none"),
        messages.SignedDocument(good, signer(node, "mallory").sign(good)),
        messages.SignedDocument(good, signer(node, "mallory").sign(good)),
    ]
    with greeted(node, "mallory") as peer:
        answer = put(peer, *signed)
    assert isinstance(answer, messages.PutDocumentsReply)
    expected = [hashlib.sha256(each.document).digest() for each in signed]
    assert [result.id for result in answer.results] == expected
    assert [bool(result.refused) for result in answer.results] == [True, False, False]


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_documents_than_announced_is_an_error(
    node: RunningNode, count: int
) -> None:
    good = member(1)
    signed = messages.SignedDocument(good, signer(node, "mallory").sign(good))
    with greeted(node) as peer:
        assert isinstance(put(peer, signed, count=count), messages.Error)
    assert len(node.node.records.catalogue) == 1


def test_reasons_for_refusals_are_short(node: RunningNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REFUSED_TEXT_MAX", 10)
    with greeted(node) as peer:
        answer = put(peer, messages.SignedDocument(b"rubbish", b"none"))
    assert isinstance(answer, messages.PutDocumentsReply)
    assert len(answer.results[0].refused) == 10


def test_lists_come_in_pages_that_fit(node: RunningNode, monkeypatch: pytest.MonkeyPatch) -> None:
    for order in range(1, 8):
        node.node.records.write(member(order), signer(node, "mallory"))
    monkeypatch.setattr(limits, "HEADERS_PER_REPLY_BYTES", 1)
    found: list[bytes] = []
    with greeted(node) as peer:
        more, request_id = True, 0
        while more:
            request_id += 1
            after = found[-1] if found else b""
            page = peer.ask(messages.ListDocuments(after), request_id=request_id)
            assert isinstance(page, messages.DocumentHeaders)
            assert len(page.headers) == 1
            found += [header.id for header in page.headers]
            more = page.more
    assert [each.hex() for each in found] == list(node.node.records.catalogue.ids())


def test_an_inventory_answers_the_first_few_when_more_do_not_fit(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = tuple(bytes([n]) * 32 for n in range(6))
    monkeypatch.setattr(limits, "INVENTORY_PER_REPLY_BYTES", 250)
    answers = iter([(bytes(100), 0.0)] * 6)
    monkeypatch.setattr(node.node.records, "inventory", lambda *_: next(answers))
    with greeted(node) as peer:
        reply = peer.ask(messages.Inventory(versions))
    assert isinstance(reply, messages.InventoryReply)
    assert (len(reply.bitmaps), len(reply.verified_age_s)) == (2, 2)


def test_an_inventory_always_answers_one(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "INVENTORY_PER_REPLY_BYTES", 1)
    monkeypatch.setattr(node.node.records, "inventory", lambda *_: (bytes(100), 0.0))
    with greeted(node) as peer:
        reply = peer.ask(messages.Inventory((b"\1" * 32, b"\2" * 32)))
    assert isinstance(reply, messages.InventoryReply)
    assert len(reply.bitmaps) == 1


def test_jobs_are_told_paused_and_stay_so_over_a_restart(loop_name: str, tmp_path: Path) -> None:
    with running_nodes(tmp_path, "pi1") as (node,):
        with greeted(node) as peer:
            status = peer.ask(messages.GetStatus())
            assert isinstance(status, messages.NodeStatus)
            names = {"gc", "rebalance", "repair", "scrub", "trim"}
            assert {job.name for job in status.jobs} == names
            answer = peer.ask(messages.SetJob("scrub", paused=True), request_id=2)
            assert isinstance(answer, messages.NodeStatus)
            wrong = peer.ask(messages.SetJob("scrap", paused=True), request_id=3)
            assert isinstance(wrong, messages.Error) and wrong.code == "not_found"
        node.stop()
        again = RunningNode(tmp_path, node.pki, "pi1")
        try:
            with greeted(again, "admin") as peer:
                status = peer.ask(messages.GetStatus())
                assert isinstance(status, messages.NodeStatus)
                assert [job.name for job in status.jobs if job.state == "paused"] == ["scrub"]
                status = peer.ask(messages.SetJob("scrub", paused=False), request_id=2)
                assert isinstance(status, messages.NodeStatus)
                assert all(job.state != "paused" for job in status.jobs)
        finally:
            again.stop()


def test_a_node_that_reads_wrong_calls_itself_suspect_and_says_why(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Background, "suspicion", "3 copies read wrong")
    with greeted(node) as peer:
        status = peer.ask(messages.GetStatus())
    assert isinstance(status, messages.NodeStatus)
    assert (status.state, status.failed_reason) == ("suspect", "3 copies read wrong")
