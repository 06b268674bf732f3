"""Sending a shard that is here to other nodes, because somebody asked for it.

One node after the other, and straight to each: a push is rare, and slots of the last hop are there
for it alone, so it never takes the place of somebody's store.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from ckptd.core import limits
from ckptd.errors import CkptdError, NotFound, PeerBusy, PeerRefused, ShardCorrupt
from ckptd.net.bulk import BulkChannel, BulkConnector, ShardSender
from ckptd.node.reception import check_chain, failed_report
from ckptd.node.traffic import Traffic
from ckptd.store.filesystem import aligned_buffer
from ckptd.store.shard_io import ShardReader
from ckptd.store.shards import ShardStore
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport, Hop

PUSH_HOP: Final = limits.CHAIN_HOPS_MAX
_DEPTH: Final = 1  # only the one who asked waits for this node


class Push:
    """One PushShard from its request to its result."""

    def __init__(
        self,
        channel: BulkChannel,
        request: messages.PushShard,
        *,
        node_id: str,
        store: ShardStore,
        connector: BulkConnector,
        traffic: Traffic,
        on_suspicion: Callable[[bytes], None],
    ) -> None:
        self._channel = channel
        self._request = request
        self._node_id = node_id
        self._store = store
        self._connector = connector
        self._traffic = traffic
        self._on_suspicion = on_suspicion
        self._reports: dict[str, CopyReport] = {}

    def run(self) -> None:
        """Answers the request. Raises NotFound, or Refused for a chain that cannot be; PeerError
        only when it is the asking side that fails."""
        request = self._request
        check_chain(request.chain, 0, self._node_id)
        with self._store.open_read(request.shard) as source:
            source.bypass_cache()
            if source.size != request.size:
                raise NotFound(f"shard {request.shard.hex()} has {source.size} bytes here")
            for target in request.chain:
                self._reports[target.node] = self._send(source, target)
                self._tell()
        if any(report.code == ShardCorrupt.kind for report in self._reports.values()):
            self._on_suspicion(request.shard)
        own = CopyReport(self._node_id, "present", request.size)
        self._channel.send(messages.PutResult((own, *self._reports.values())))

    def _send(self, source: ShardReader, target: Hop) -> CopyReport:
        """One node's copy: what became of it."""
        try:
            out = self._connector.acquire(target.node, target.host, target.port, hop=PUSH_HOP)
        except CkptdError as error:
            return self._failed(target, error)
        complete = False
        try:
            sender = ShardSender(
                out,
                messages.PutShard(self._request.shard, self._request.size),
                hop=PUSH_HOP,
                depth=_DEPTH,
                on_news=lambda: self._note(sender),
            )
            started_s = time.monotonic()
            sender.negotiate()
            sender.send(source, aligned_buffer(limits.BULK_BUFFER_BYTES))
            complete = True
        except CkptdError as error:
            if self._channel.broken:
                raise  # nobody waits for the result any more
            complete = isinstance(error, PeerBusy | PeerRefused)
            return self._failed(target, error)
        finally:
            out.broken = out.broken or not complete
            self._connector.release(target.node, target.host, target.port, out, hop=PUSH_HOP)
        self._traffic.sent(target.node, sender.sent_bytes, time.monotonic() - started_s)
        return sender.reports.get(target.node, CopyReport(target.node, "failed"))

    def _failed(self, target: Hop, error: CkptdError) -> CopyReport:
        if not isinstance(error, PeerBusy):
            self._traffic.error(error.kind)
        return failed_report(target.node, error)

    def _note(self, sender: ShardSender) -> None:
        self._reports.update(sender.reports)
        self._tell()

    def _tell(self) -> None:
        self._channel.send(messages.Progress(tuple(self._reports.values())))
