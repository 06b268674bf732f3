"""Sending a shard that is here to other nodes, because somebody asked for it.

One node after the other, and straight to each: a push is rare, and slots of the last hop are there
for it alone, so it never takes the place of somebody's store.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from ckptd.core import limits
from ckptd.errors import (
    CkptdError,
    NotAuthorized,
    NotFound,
    PeerBusy,
    PeerError,
    PeerRefused,
    PeerStalled,
    PeerUnreachable,
    ShardCorrupt,
)
from ckptd.net.bulk import BulkChannel, BulkConnector, ShardSender, ShardSource
from ckptd.node.forwarder import failed_report
from ckptd.node.reception import check_chain
from ckptd.node.traffic import Traffic
from ckptd.store.shard_io import ShardReader
from ckptd.store.shards import ShardStore
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport, Hop

PUSH_HOP: Final = limits.CHAIN_HOPS_MAX
_PIECE_S: Final = 0.25  # of a paced source
_BLOCK_BYTES: Final = 4096
_DEPTH: Final = 1  # only the one who asked waits for this node


class PacedSource:
    """A shard of `size` bytes that is read for the node `target`, at most at `rate_bytes_per_s`. In
    small pieces, so that whoever waits for them sees progress at any rate.

    It has its time: a target that takes the bytes slower than any card that works gets no more of
    them, so that nobody can keep this node from sending to others. `stopping` ends it at once."""

    def __init__(
        self,
        source: ShardSource,
        size: int,
        target: str,
        rate_bytes_per_s: float,
        stopping: threading.Event,
    ) -> None:
        self._source = source
        self._target = target
        self._rate_bytes_per_s = rate_bytes_per_s
        self._stopping = stopping
        piece_bytes = max(1, int(rate_bytes_per_s * _PIECE_S))
        # Whole blocks, as far as that is possible: only these are read past the page cache.
        self._piece_bytes = piece_bytes - piece_bytes % _BLOCK_BYTES or piece_bytes
        self._started_s = time.monotonic()
        slowest_s = size / rate_bytes_per_s + size / limits.COPY_MIN_BYTES_PER_S
        self._deadline_s = self._started_s + slowest_s + limits.STALL_TIMEOUT_S

    def piece(self, offset: int, size: int) -> memoryview:
        """As ShardSource has it; waits until what was read before has had its time. Raises
        PeerStalled when the target took too long, PeerUnreachable when this node stops."""
        now_s = time.monotonic()
        if now_s > self._deadline_s:
            raise PeerStalled(self._target, f"took {now_s - self._started_s:.0f} s for a copy")
        wait_s = self._started_s + offset / self._rate_bytes_per_s - now_s
        if self._stopping.wait(max(0.0, wait_s)):
            raise PeerUnreachable(self._target, "this side is stopping")
        return self._source.piece(offset, min(size, self._piece_bytes))


def send_copy(
    source: ShardSource,
    request: messages.PutShard,
    target: Hop,
    *,
    connector: BulkConnector,
    traffic: Traffic,
    on_news: Callable[[dict[str, CopyReport]], None] = lambda reports: None,
) -> CopyReport:
    """Sends a copy to `target` alone, by the slots of the last hop; what it says of its copy.

    Blocks. `on_news` gets what is known so far, whenever there is news. Raises PeerError, what
    `source` raises, and what `on_news` does."""
    out = connector.acquire(target.node, target.host, target.port, hop=PUSH_HOP)
    complete = False
    try:
        sender = ShardSender(
            out, request, hop=PUSH_HOP, depth=_DEPTH, on_news=lambda: on_news(sender.reports)
        )
        started_s = time.monotonic()
        sender.negotiate()
        sender.send(source)
        complete = True
    except (PeerBusy, PeerRefused):
        complete = True
        raise
    finally:
        out.broken = out.broken or not complete
        connector.release(target.node, target.host, target.port, out, hop=PUSH_HOP)
    traffic.sent(target.node, sender.sent_bytes, time.monotonic() - started_s)
    return sender.reports.get(target.node, CopyReport(target.node, "failed"))


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
        """Answers the request. Raises NotFound, Refused for a chain that cannot be, and what
        reading the copy raises; PeerError only when it is the asking side that fails."""
        request = self._request
        check_chain(request.chain, 0, self._node_id, sender=self._channel.peer)
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
            return send_copy(
                source,
                messages.PutShard(self._request.shard, self._request.size),
                target,
                connector=self._connector,
                traffic=self._traffic,
                on_news=self._note,
            )
        except (PeerError, NotAuthorized) as error:
            if self._channel.broken:
                raise  # nobody waits for the result any more
            return self._failed(target, error)

    def _failed(self, target: Hop, error: CkptdError) -> CopyReport:
        if not isinstance(error, PeerBusy):
            self._traffic.error(error.kind)
        return failed_report(target.node, error)

    def _note(self, reports: dict[str, CopyReport]) -> None:
        self._reports.update(reports)
        self._tell()

    def _tell(self) -> None:
        self._channel.send(messages.Progress(tuple(self._reports.values())))
