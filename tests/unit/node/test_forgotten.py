"""A certificate that was forgotten opens nothing any more; a node that drains takes nothing."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Any

import pytest
import yaml
from msgspec import structs
from tests.cluster.hostile import is_refused
from tests.cluster.kill_fixtures import wait_until
from tests.unit.node.running_nodes import RunningNode, identity
from tests.unit.node.test_bulk_service import SIZE, greeted, put, shard

from ckptd.client.connect import connect
from ckptd.config import check
from ckptd.core import documents
from ckptd.core.catalogue import Catalogue
from ckptd.core.documents import Document, Drain, Forget, Undrain
from ckptd.core.identity import identity_of
from ckptd.core.signing import Signer
from ckptd.errors import NotAuthorized
from ckptd.net.bulk import BulkConnector
from ckptd.net.control import connect_control
from ckptd.net.loop import run
from ckptd.net.tls import client_context
from ckptd.node.presence import member_document
from ckptd.wire import messages


def signer(node: RunningNode, name: str) -> Signer:
    files = identity(node.pki, name)
    return Signer.from_pem(files.cert.read_bytes(), files.key.read_bytes())


def serial_of(node: RunningNode, name: str) -> str:
    return identity_of(signer(node, name).certificate_der, cluster="home").serial


def common() -> dict[str, Any]:
    return {
        "format": 1,
        "cluster": "home",
        "order": 1,
        "created": "2026-01-02T03:04:05Z",
        "nonce": secrets.token_hex(16),
    }


def told(node: RunningNode, document: Document) -> str:
    """Tells the node a document, as an admin."""
    raw = documents.encode(document)
    return node.node.records.put(raw, signer(node, "admin").sign(raw))


def forget(node: RunningNode, name: str) -> None:
    told(node, Forget(**common(), node=name, serials=(serial_of(node, name),)))


def test_a_forgotten_certificate_gets_no_connection(node: RunningNode) -> None:
    assert not is_refused(node.place.host, node.place.control, identity(node.pki, "mallory"))
    forget(node, "mallory")
    with node.connect("mallory") as peer:
        answer = peer.greet()
    assert isinstance(answer, messages.Error) and answer.code == "not_authorized"
    assert "forgotten" in answer.message and "ckptd pki issue worker mallory" in answer.next
    assert is_refused(node.place.host, node.place.bulk, identity(node.pki, "mallory"))
    assert not is_refused(node.place.host, node.place.control, identity(node.pki, "client"))


def test_connections_that_were_open_before_are_of_no_use(node: RunningNode) -> None:
    digest, _ = shard()
    with node.connect("mallory") as control, greeted(node, "mallory", hop=1) as bulk:
        control.greet()
        assert isinstance(control.ask(messages.GetStatus()), messages.NodeStatus)
        forget(node, "mallory")
        answer = control.ask(messages.GetStatus(), request_id=2)
        assert isinstance(answer, messages.Error) and "forgotten" in answer.message
        answer = bulk.ask(messages.PutShard(digest, SIZE), hop=1)
        assert isinstance(answer, messages.Error) and "forgotten" in answer.message
    assert not node.worker.shards.has(digest)


def test_who_connects_to_a_forgotten_node_notices(node: RunningNode) -> None:
    files = identity(node.pki, "client")
    context = client_context(files.ca, files.cert, files.key)
    hello = messages.Hello("home", "client", ("client",), "0", 0, 0)
    forgotten = {serial_of(node, node.node_id)}.__contains__
    where = node.place

    async def connect() -> None:
        await connect_control(
            where.host,
            where.control,
            context=context,
            cluster="home",
            hello=hello,
            forgotten=forgotten,
        )

    with pytest.raises(NotAuthorized, match="was forgotten"):
        run(connect())
    connector = BulkConnector(context, "home", lambda: hello, forgotten)
    with pytest.raises(NotAuthorized, match="was forgotten"):
        connector.acquire(where.node, where.host, where.bulk)
    connector.close()


def test_a_node_passes_nothing_on_to_a_forgotten_one(two_nodes: list[RunningNode]) -> None:
    head, tail = two_nodes
    forget(head, "pi2")
    digest, data = shard()
    reports = put(head, digest, data, (tail.place.hop,))
    assert reports["pi1"].state == "durable"
    assert (reports["pi2"].state, reports["pi2"].code) == ("failed", "not_authorized")
    assert not tail.worker.shards.has(digest)


def test_a_draining_node_takes_no_new_copies_and_passes_on_what_it_has(
    two_nodes: list[RunningNode],
) -> None:
    head, tail = two_nodes
    digest, data = shard()
    put(tail, digest, data)
    drain = told(tail, Drain(**common(), node="pi2"))
    assert tail.node.status().state == "draining"
    assert put(tail, digest, data)["pi2"].state == "present"
    other, more = shard(1)
    reports = put(head, other, more, (tail.place.hop,))
    assert reports["pi1"].state == "durable"
    assert (reports["pi2"].state, reports["pi2"].code) == ("failed", "draining")
    assert put(tail, digest, data, (head.place.hop,))["pi1"].state == "durable"
    told(tail, Undrain(**common(), drains=(drain,)))
    assert put(tail, other, more)["pi2"].state == "durable"


def test_a_node_says_anew_who_it_is_when_its_certificate_was_renewed(node: RunningNode) -> None:
    catalogue = node.node.records.catalogue
    wait_until(lambda: node.node_id in catalogue.members(), "its member document")
    serial = serial_of(node, node.node_id)
    said = catalogue.members()[node.node_id]
    settings = node.config.node
    assert settings is not None
    place = {"cluster": "home", "address": said.address, "bulk_port": said.bulk_port}

    def to_say(known: Catalogue, own: str, **changed: Any) -> documents.Member | None:
        return member_document(known, settings, serial=own, **{**place, **changed})

    assert to_say(catalogue, serial) is None
    moved = to_say(catalogue, serial, address="10.0.0.9:1")
    assert moved is not None and moved.order > said.order
    renewed = to_say(catalogue, "ab" * 20)
    assert renewed is not None and structs.replace(renewed, order=0, created="") == (
        structs.replace(said, order=0, created="")
    )
    forget(node, node.node_id)
    assert to_say(catalogue, serial, address="10.0.0.9:1") is None
    assert to_say(catalogue, "ab" * 20) is not None


def introduce(node: RunningNode, other: RunningNode, *, besides: Collection[str] = ()) -> None:
    """Brings `node` what `other` says of itself, which knows nothing but that and `besides`."""
    roster = other.node.records.catalogue.roster
    wait_until(lambda: roster.last_said(other.node_id) is not None, "its member document")
    [said] = set(other.node.records.catalogue.ids()).difference(besides)
    signed = other.node.records.get(said)
    assert signed is not None
    node.node.records.put(*signed)


def is_linked(node: RunningNode, other: RunningNode) -> bool:
    assert node.node.peers is not None
    return other.node_id in node.node.peers._links


def test_a_node_leaves_a_connection_that_it_made_to_a_node_that_is_forgotten_meanwhile(
    two_nodes: list[RunningNode],
) -> None:
    one, other = two_nodes
    introduce(one, other)
    wait_until(lambda: is_linked(one, other), "a connection")
    assert one.node.members.knows("pi2")
    forget(one, "pi2")
    wait_until(lambda: not is_linked(one, other), "it to be left")
    wait_until(lambda: not one.node.members.knows("pi2"), "the node to be dropped")
    assert {view.node: view.state for view in one.node.members.views()} == {"pi2": "forgotten"}
    assert "pi2" not in one.node.members.standings()


def test_a_client_leaves_a_node_out_as_soon_as_it_has_the_signed_word(
    two_nodes: list[RunningNode],
) -> None:
    one, other = two_nodes
    files = identity(one.pki, "client")
    config, errors = check(
        yaml.safe_dump(
            {
                "cluster": "home",
                "tls": {"ca": str(files.ca), "cert": str(files.cert), "key": str(files.key)},
                "discovery": {
                    "mdns": False,
                    "peers": [f"{n.place.host}:{n.place.control}" for n in two_nodes],
                },
            }
        )
    )
    assert config is not None, errors

    async def work() -> None:
        async with connect(config) as cluster:
            assert set(cluster.nodes) == {"pi1", "pi2"}
            forget(one, "pi2")
            await cluster.refresh()
            await cluster.catalogue()
            assert set(cluster.nodes) == {"pi1"} and not cluster.absent
            with pytest.raises(NotAuthorized, match="was forgotten"):
                cluster.bulk.acquire("pi2", other.place.host, other.place.bulk)
            await cluster.rejoin()
            assert set(cluster.nodes) == {"pi1"} and not cluster.absent

    run(work())
