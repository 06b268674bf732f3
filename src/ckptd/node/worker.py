"""The worker's part of a node: shards on its disk, and the bulk connections that bring them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from ckptd.config import StoreConfig
from ckptd.core import limits
from ckptd.core.identity import Identity
from ckptd.errors import CkptdError
from ckptd.net.acceptor import Handshake, server_handshake
from ckptd.net.bulk import BulkConnector
from ckptd.net.tls import check_peer
from ckptd.node.bulk_service import BulkService
from ckptd.node.traffic import Traffic
from ckptd.observe.metrics import Metrics
from ckptd.store.marker import StoreDirectory
from ckptd.store.room import Room
from ckptd.store.shards import ShardStore
from ckptd.wire import messages

_log = structlog.get_logger(__name__)

_NO_ROOM: Final = Room(0, 0, 0)


class Worker:
    """Shards of one node. Made before its loop runs; `start` comes from the loop."""

    def __init__(self, config: StoreConfig, directory: StoreDirectory, metrics: Metrics) -> None:
        self._directory = directory
        self._metrics = metrics
        self.traffic = Traffic(metrics)
        reserve = config.reserve
        self.shards = ShardStore(directory, reserve=reserve.size_bytes or reserve.percent / 100)

    def room(self) -> tuple[Room, int, int]:
        """The store's room, how many shards it has, and how many bad copies of shards are in
        quarantine; all 0 while the medium has failed."""
        if self._directory.medium.failed is None:
            with contextlib.suppress(CkptdError):  # it just failed: the next call says so
                bad = sum(not file.suffix for file in self.shards.quarantined())
                return self.shards.room(), len(self.shards), bad
        return _NO_ROOM, 0, 0

    def start(
        self,
        *,
        cluster: str,
        node_id: str,
        connector: BulkConnector,
        hello: Callable[[], messages.Hello],
        suspect: Callable[[bytes], Awaitable[object]],
        forgotten: Callable[[str], bool],
        draining: Callable[[], bool],
    ) -> None:
        """Makes the bulk service. `suspect` re-reads a copy that somebody found bad; the rest is
        described at `BulkService`."""
        loop = asyncio.get_running_loop()
        self._connector = connector
        self.bulk = BulkService(
            cluster=cluster,
            node_id=node_id,
            store=self.shards,
            connector=connector,
            hello=hello,
            traffic=self.traffic,
            on_suspicion=lambda shard: _soon(loop, suspect(shard)),
            forgotten=forgotten,
            draining=draining,
        )

    bulk: BulkService
    _connector: BulkConnector

    def handshake(
        self, context: ssl.SSLContext, cluster: str, forgotten: Callable[[str], bool]
    ) -> Handshake:
        """For the Acceptor of the bulk port."""

        async def secure(sock: socket.socket) -> Callable[[], None]:
            secured = await server_handshake(sock, context)
            try:
                identity: Identity = check_peer(secured.tls, cluster=cluster, forgotten=forgotten)
            except CkptdError as error:
                secured.close()
                raise ConnectionRefusedError(error.message) from error
            return lambda: self.bulk.start(secured, identity)

        return secure

    def sample(self) -> None:
        """Brings the gauges of the store up to date."""
        room, _, _ = self.room()
        self._metrics.sample_store(
            used_bytes=room.bytes_used,
            capacity_bytes=room.bytes_total,
            free_bytes=room.bytes_free,
            read_only=self._directory.medium.failed is not None,
        )

    async def stop(self) -> None:
        """Lets transfers under way end, for a while, and drops the others."""
        await asyncio.to_thread(self.bulk.stop, limits.SHUTDOWN_TIMEOUT_S)
        self._connector.close()


def _soon(loop: asyncio.AbstractEventLoop, work: Awaitable[object]) -> None:
    """Runs `work` on the loop, from any thread."""

    async def quietly() -> None:
        try:
            await work
        except CkptdError as error:
            _log.warning("verify_failed", reason=error.message)

    asyncio.run_coroutine_threadsafe(quietly(), loop)
