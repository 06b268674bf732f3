"""What a client takes for known when nodes fall silent while they are asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec import structs
from tests.unit.core.test_catalogue import CLIENT, manifest, pin, tombstone
from tests.unit.core.test_signing import CA, SIGNER

from ckptd.client import marks
from ckptd.client.cluster import Cluster, Node
from ckptd.client.documents import next_order, write
from ckptd.client.store import store_source
from ckptd.coordinator.link import Link
from ckptd.core.catalogue import Catalogue
from ckptd.core.documents import document_id, encode
from ckptd.errors import NotEnoughNodes, PeerUnreachable
from ckptd.wire import messages


class Control:
    """The connection to a node that knows the versions `names`."""

    def __init__(self, node: str, *names: str, silent: bool = False) -> None:
        self.node = node
        self.names = names
        self.silent = silent
        self.address = f"{node}:7701"
        self.identity = SimpleNamespace(serial=node)
        self.listed = 0
        self.hello = messages.Hello(
            cluster="home", node=node, roles=("worker",), software="1", clock_ms=0, highest_order=0
        )

    @property
    def status(self) -> Any:
        digest = repr(self.names).encode()
        return SimpleNamespace(state="up", documents_digest=digest, peers=())

    async def request(self, question: Any, *_: object, **__: object) -> tuple[Any, bytes]:
        if isinstance(question, messages.GetStatus):
            return self.status, b""
        if self.silent:
            name = type(question).__name__
            raise PeerUnreachable(self.node, f"gave no answer to {name} for 30 s")
        if isinstance(question, messages.GetDocuments):
            return messages.Documents(0, question.ids), messages.encode_documents(())
        assert isinstance(question, messages.ListDocuments)
        self.listed += 1
        return messages.DocumentHeaders(tuple(map(header, self.names)), more=False), b""


def header(name: str) -> messages.DocumentHeader:
    return messages.DocumentHeader(
        id=name.encode().ljust(32, b"."),
        kind="manifest",
        order=1,
        created="2026-01-01T00:00:00Z",
        name=name,
        content_id=bytes(32),
    )


def cluster_of(*controls: Control) -> Cluster:
    nodes = {c.node: Node(c.node, cast(Any, c), "127.0.0.1", 1, c.status) for c in controls}
    membership = SimpleNamespace(suspect_s=35.0)
    return Cluster(
        config=cast(Any, SimpleNamespace(cluster="home", membership=membership)),
        identity=cast(Any, SimpleNamespace(node_id="mac1")),
        signer=cast(Any, None),
        bulk=cast(Any, None),
        nodes=nodes,
        absent={},
        ca=cast(Any, None),
    )


async def names(cluster: Cluster) -> list[str]:
    return sorted(version.name for version in (await cluster.catalogue()).live_versions())


def test_one_node_of_each_catalogue_is_asked() -> None:
    controls = [Control("pi1", "a"), Control("pi2", "a"), Control("pi3", "a", "b")]
    assert asyncio.run(names(cluster_of(*controls))) == ["a", "b"]
    assert [control.listed for control in controls] == [1, 0, 1]


def test_what_one_node_no_longer_tells_those_tell_that_know_the_same() -> None:
    controls = [Control("pi1", "a", silent=True), Control("pi2", "a"), Control("pi3", "b")]
    cluster = cluster_of(*controls)
    assert asyncio.run(names(cluster)) == ["a", "b"]
    assert sorted(cluster.nodes) == ["pi2", "pi3"]


def test_when_all_fall_silent_that_is_no_empty_catalogue() -> None:
    cluster = cluster_of(Control("pi1", "a", silent=True), Control("pi2", "a", silent=True))
    with pytest.raises(NotEnoughNodes, match="gave no answer"):
        asyncio.run(names(cluster))


def test_an_order_that_nobody_is_left_to_prove_is_no_lie() -> None:
    """Else what is stored next would not come after it, on a machine whose clock is behind."""
    controls = [Control("pi1", "a"), Control("pi2", "a")]
    cluster = cluster_of(*controls)

    async def order_after_silence(silent: int) -> int:
        catalogue = await cluster.catalogue()
        for control in controls[:silent]:
            control.silent = True
        return await next_order(cluster, catalogue, now_ms=0)

    assert asyncio.run(order_after_silence(0)) == 1, "they cannot show what they told of"
    with pytest.raises(NotEnoughNodes, match="gave no answer to GetDocuments"):
        asyncio.run(order_after_silence(2))


def test_a_coordinator_asks_a_node_that_is_back_what_it_did_not_tell() -> None:
    back = Control("pi1", "a", silent=True)
    cluster = cluster_of(back, Control("pi2", "b"))

    @asynccontextmanager
    async def connect() -> AsyncIterator[Cluster]:
        yield cluster

    async def work() -> list[list[str]]:
        link = Link(connect)
        found = [await link.catalogue()]
        back.silent = False
        cluster.nodes["pi1"] = Node("pi1", cast(Any, back), "127.0.0.1", 1, back.status)
        found.append(await link.catalogue())
        return [sorted(v.name for v in catalogue.live_versions()) for catalogue in found]

    assert asyncio.run(work()) == [["b"], ["a", "b"]]


class Ahead(Control):
    """It tells of an order that is ahead of every clock, and then falls silent."""

    async def request(self, question: Any, *_: object, **__: object) -> tuple[Any, bytes]:
        if isinstance(question, messages.GetDocuments):
            raise PeerUnreachable(self.node, "gave no answer to GetDocuments for 30 s")
        reply, payload = await super().request(question)
        if isinstance(question, messages.ListDocuments):
            reply = messages.DocumentHeaders(
                tuple(structs.replace(told, order=2**60) for told in reply.headers), more=False
            )
        return reply, payload


def test_a_store_checks_orders_before_anything_else() -> None:
    """At its end, hours later, those who told of them may not be there any more."""
    cluster = cluster_of(Ahead("pi1", "a"), Ahead("pi2", "a"))
    cast(Any, cluster.config).replication = SimpleNamespace(copies=2)
    untouched = cast(Any, object())
    with pytest.raises(NotEnoughNodes, match="gave no answer to GetDocuments"):
        asyncio.run(store_source(cluster, untouched, name="run/a"))


class Taker(Control):
    """It takes documents."""

    taken = 0

    async def request(self, question: Any, *_: object, **more: Any) -> tuple[Any, bytes]:
        if not isinstance(question, messages.PutDocuments):
            return await super().request(question)
        self.taken += 1
        (signed,) = messages.decode_documents(memoryview(more["payload"]), peer="laptop")
        result = messages.PutDocumentResult(bytes.fromhex(document_id(signed.document)))
        return messages.PutDocumentsReply((result,)), b""


def test_a_mark_goes_once_to_every_node_whether_it_keeps_shards_or_not() -> None:
    controls = [Taker("pi1"), Taker("pi2"), Taker("mac1")]
    controls[2].hello = structs.replace(controls[2].hello, roles=("coordinator",))
    cluster = cluster_of(*controls)
    cluster.signer, cluster.ca, cluster.identity = SIGNER, CA, CLIENT
    asyncio.run(write(cluster, Catalogue("home"), pin("ab" * 32)))
    assert [control.taken for control in controls] == [1, 1, 1]


def test_a_coordinator_alone_keeps_no_mark() -> None:
    controls = [Taker("pi1", silent=True), Taker("mac1")]
    controls[1].hello = structs.replace(controls[1].hello, roles=("coordinator",))

    async def gone(question: Any, *_: object, **__: object) -> Any:
        raise PeerUnreachable("pi1", "is gone")

    controls[0].request = gone  # type: ignore[method-assign]
    cluster = cluster_of(*controls)
    cluster.signer, cluster.ca = SIGNER, CA
    with pytest.raises(NotEnoughNodes):
        asyncio.run(write(cluster, Catalogue("home"), pin("ab" * 32)))
    assert controls[1].taken == 0


def test_what_came_back_is_told_to_nodes_that_keep_no_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controls = [Taker("pi1"), Taker("mac1")]
    controls[1].hello = structs.replace(controls[1].hello, roles=("coordinator",))
    cluster = cluster_of(*controls)
    cluster.signer, cluster.ca = SIGNER, CA
    cast(Any, cluster.config).replication = SimpleNamespace(copies=2)
    removed = structs.replace(manifest(), shards=())
    known = Catalogue("home")
    author = cluster.admit(messages.SignedDocument(encode(removed), SIGNER.sign(encode(removed))))[
        2
    ]
    version_id = document_id(encode(removed))
    known.add(version_id, removed, author=author)
    known.add("cd" * 32, tombstone(version_id), author=author)

    async def catalogue(*, with_dead: bool) -> Catalogue:
        return known

    async def its_manifest(_: str) -> Any:
        return removed

    monkeypatch.setattr(cluster, "catalogue", catalogue)
    monkeypatch.setattr(cluster, "manifest", its_manifest)
    monkeypatch.setattr(marks, "machines_of", lambda _: {})
    asyncio.run(marks.undelete(cluster, "run/a"))
    assert [control.taken for control in controls] == [1, 1]
