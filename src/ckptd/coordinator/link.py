"""The coordinator's view of the cluster: made when it is needed, and anew as nodes come and go."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack

from ckptd.client.cluster import Cluster
from ckptd.core import limits
from ckptd.core.catalogue import Catalogue


class Link:
    """Connections to the nodes, for one task at a time. `connect` makes them."""

    def __init__(self, connect: Callable[[], AbstractAsyncContextManager[Cluster]]) -> None:
        self._connect = connect
        self._stack = AsyncExitStack()
        self._cluster: Cluster | None = None
        self._asked_at_s = 0.0
        self._catalogue: tuple[frozenset[bytes], Catalogue] | None = None

    async def cluster(self) -> Cluster:
        """All nodes that answer now. Raises NotEnoughNodes when no worker does."""
        now_s = time.monotonic()
        if self._cluster is None:
            self._cluster = await self._stack.enter_async_context(self._connect())
            self._asked_at_s = now_s
        elif now_s - self._asked_at_s >= limits.RECONNECT_NODES_S or self._is_lacking():
            await self._cluster.rejoin()
            self._asked_at_s = now_s
        self._cluster.require_nodes()
        return self._cluster

    def _is_lacking(self) -> bool:
        """Whether no worker answers, or this node sees one up (perhaps where it was not before)
        that there is no connection to: a store without it would make too few copies."""
        cluster = self._cluster
        assert cluster is not None
        own = cluster.nodes.get(cluster.identity.node_id)
        recent_s = cluster.config.membership.suspect_s
        views = own.status.peers if own else ()
        up = {view.node for view in views if 0 <= view.last_seen_s < recent_s}
        return not cluster.workers or not up <= cluster.nodes.keys()

    async def catalogue(self) -> Catalogue:
        """What the nodes know now; asked for again only when some node knows something new."""
        cluster = await self.cluster()
        await cluster.refresh()
        cluster.require_nodes()
        if self._catalogue is None or self._catalogue[0] != _digests(cluster):
            catalogue = await cluster.catalogue()
            # Without that of a node that fell silent while it was asked: it is asked once it is
            # back.
            self._catalogue = _digests(cluster), catalogue
        return self._catalogue[1]

    async def close(self) -> None:
        """Closes all connections; the next question makes them anew."""
        self._cluster = None
        self._catalogue = None
        await self._stack.aclose()
        self._stack = AsyncExitStack()


def _digests(cluster: Cluster) -> frozenset[bytes]:
    return frozenset(node.status.documents_digest for node in cluster.workers)
