"""The network as a running node has it: its connections to the others, and threads that push."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ckptd.core import limits
from ckptd.errors import NotFound, PeerBusy, PeerError, PeerUnreachable
from ckptd.net.bulk import BulkConnector, ShardSource
from ckptd.net.control import ControlClient
from ckptd.node.members import Members
from ckptd.node.push import PacedSource, send_copy
from ckptd.node.traffic import Traffic
from ckptd.store.shards import ShardStore
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport, Hop, Message

_A = TypeVar("_A", bound=Message)


class NodeNetwork:
    """The port `Network`. `client` gives the connection that is held to a node, if there is one."""

    def __init__(
        self,
        *,
        client: Callable[[str], ControlClient | None],
        members: Members,
        connector: BulkConnector,
        store: ShardStore | None,
        traffic: Traffic | None,
    ) -> None:
        """`store` and `traffic` are None on a node that keeps no shards: it pushes nothing."""
        self._client = client
        self._members = members
        self._connector = connector
        self._store = store
        self._traffic = traffic
        self._pushing = ThreadPoolExecutor(limits.BULK_PUSH_SLOTS, thread_name_prefix="push")
        self._stopping = threading.Event()

    def close(self) -> None:
        """Ends the pushes under way; the connector is closed before."""
        self._stopping.set()
        self._pushing.shutdown(wait=True, cancel_futures=True)

    async def request(
        self,
        node: str,
        message: Message,
        answer: type[_A],
        *,
        payload: bytes = b"",
        timeout_s: float,
    ) -> tuple[_A, bytes]:
        """See `Network`."""
        client = self._client(node)
        if client is None:
            raise PeerUnreachable(node, "there is no connection to it")
        reply, received = await client.request(
            message, answer, payload=payload, timeout_s=timeout_s
        )
        return reply, bytes(received)

    async def push(
        self, shard: bytes, size: int, target: str, *, rate_bytes_per_s: float | None = None
    ) -> CopyReport:
        """See `Network`."""
        peer = self._members.peer(target)
        client = self._client(target)
        if peer is None or client is None or not peer.bulk_port:
            raise PeerUnreachable(target, "it is not known where its bulk port is")
        hop = Hop(target, client.remote.host, peer.bulk_port)
        return await asyncio.get_running_loop().run_in_executor(
            self._pushing, lambda: self._push(shard, size, hop, rate_bytes_per_s)
        )

    def _push(
        self, shard: bytes, size: int, target: Hop, rate_bytes_per_s: float | None
    ) -> CopyReport:
        if self._store is None or self._traffic is None:
            raise NotFound(f"shard {shard.hex()}: this node keeps no shards")
        with self._store.open_read(shard) as reader:
            if reader.size != size:
                raise NotFound(f"shard {shard.hex()} has {reader.size} bytes here, not {size}")
            reader.bypass_cache()
            source: ShardSource = reader
            if rate_bytes_per_s:
                source = PacedSource(reader, size, target.node, rate_bytes_per_s, self._stopping)
            try:
                return send_copy(
                    source,
                    messages.PutShard(shard, size),
                    target,
                    connector=self._connector,
                    traffic=self._traffic,
                )
            except PeerError as error:
                if not isinstance(error, PeerBusy):  # which is no failure
                    self._traffic.error(error.kind)
                raise
