"""What a client takes for known when nodes fall silent while they are asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ckptd.client.cluster import Cluster, Node
from ckptd.client.documents import next_order
from ckptd.coordinator.link import Link
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
