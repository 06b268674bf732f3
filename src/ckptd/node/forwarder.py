"""Passing a shard on to the rest of its chain while it comes in, and what is said of that.

A thread of its own sends. It follows the writer from memory, or reads behind it from the shard's
file. The receiver never waits for it, so that a slow next node delays only its own copy.
"""

from __future__ import annotations

import threading
import time

import structlog

from ckptd.errors import (
    CkptdError,
    NotAuthorized,
    PeerBusy,
    PeerError,
    PeerRefused,
    PeerStalled,
)
from ckptd.net.bulk import BulkChannel, BulkConnector, ShardSender
from ckptd.node.recent_pieces import RecentPieces
from ckptd.node.traffic import Traffic
from ckptd.store.shard_io import IncomingShard, ShardReader
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport, Hop

_log = structlog.get_logger(__name__)


def failed_report(node: str, error: CkptdError, received: int = 0) -> CopyReport:
    """What a node of the chain says when it did not store its copy."""
    state = "busy" if error.kind == "peer_busy" else "failed"
    return CopyReport(node, state, received, error.kind, error.message[:8000])


class _Incomplete(CkptdError):
    """The shard ended before its last byte: whoever was to get it is not to blame."""


class BehindWriter:
    """A shard that is still coming in, as far as it is written: from memory, or from its file."""

    def __init__(self, incoming: IncomingShard, recent: RecentPieces, timeout_s: float) -> None:
        self._incoming = incoming
        self._recent = recent
        self._reader = incoming.reader()
        self._timeout_s = timeout_s

    def piece(self, offset: int, size: int) -> memoryview:
        """As ShardSource. Raises CkptdError when the shard will never be complete."""
        written = self._incoming.wait_written(offset, self._timeout_s)
        if written <= offset:
            raise _Incomplete("the shard did not come in completely")
        size = min(size, written - offset)
        return self._recent.hold(offset, offset + size) or self._reader.piece(offset, size)

    def close(self) -> None:
        self._reader.close()


class Forwarder:
    """Sends the shard on to the rest of the chain, in a thread of its own."""

    def __init__(
        self,
        connector: BulkConnector,
        request: messages.PutShard,
        hop: int,
        traffic: Traffic,
    ) -> None:
        self._connector = connector
        self._target: Hop = request.chain[0]
        self._request = messages.PutShard(request.shard, request.size, request.chain[1:])
        self._hop = hop
        self._traffic = traffic
        self._channel: BulkChannel | None = None
        self._sender: ShardSender | None = None
        self._error: CkptdError | None = None
        self._complete = False  # the exchange has come to its end: the channel serves another
        self._giving_back = threading.Lock()
        self._thread: threading.Thread | None = None

    def negotiate(self) -> None:
        """Asks the next node; a refusal or no answer leaves it out of the chain."""
        target = self._target
        try:
            self._channel = self._connector.acquire(
                target.node, target.host, target.port, hop=self._hop
            )
            self._sender = ShardSender(self._channel, self._request, hop=self._hop)
            self._sender.negotiate()
        except CkptdError as error:
            self._complete = isinstance(error, PeerBusy | PeerRefused)
            self._fail(error)

    def start(self, source: ShardReader | BehindWriter) -> None:
        """Begins to send, or to wait for the end of what the rest of the chain does without.
        Closes `source` at the end."""
        if self._error is not None:
            source.close()
            return
        self._thread = threading.Thread(
            target=self._run, args=(source,), name="shard forwarder", daemon=True
        )
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Waits for the rest of the chain; whether it has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def close(self) -> None:
        """Gives the connection back, or drops it when the transfer has not ended: the next node
        then discards what it has. To be called once, whatever has happened."""
        if self._thread is not None and self._thread.is_alive():
            if self._channel is not None:
                self._channel.interrupt()  # its thread gives it back
        else:
            self._give_back()

    def _give_back(self) -> None:
        with self._giving_back:
            channel, self._channel = self._channel, None
        if channel is not None:
            target = self._target
            channel.broken = channel.broken or not self._complete
            self._connector.release(target.node, target.host, target.port, channel, hop=self._hop)

    def reports(self) -> tuple[CopyReport, ...]:
        """What is known of the rest of the chain."""
        known = dict(self._sender.reports) if self._sender is not None else {}
        if (error := self._error) is not None:
            culprit = self._culprit(error)
            for hop in (self._target, *self._request.chain):
                report = known.get(hop.node, CopyReport(hop.node, "receiving"))
                unfinished = report.state == "receiving"
                if hop.node == culprit or (unfinished and isinstance(error, PeerBusy)):
                    known[hop.node] = failed_report(hop.node, error, report.received_bytes)
                elif unfinished:  # cut off by another's failure: not to blame
                    known[hop.node] = CopyReport(hop.node, "unknown", report.received_bytes)
        return tuple(known.values())

    @property
    def own_error(self) -> CkptdError | None:
        """What keeps this node from sending on what it has."""
        error = self._error
        return None if isinstance(error, PeerError | NotAuthorized | _Incomplete) else error

    def _culprit(self, error: CkptdError) -> str:
        """The node of the rest of the chain that is to blame for `error`; "" when none is."""
        if isinstance(error, PeerStalled):
            return error.node  # our own deadlines say so, which watch all of them
        # Whatever node a peer names in an error, it is the one that has not done its work.
        is_target = isinstance(error, PeerError | NotAuthorized) and not isinstance(error, PeerBusy)
        return self._target.node if is_target else ""

    def _run(self, source: ShardReader | BehindWriter) -> None:
        assert self._sender is not None
        started_s = time.monotonic()
        target = self._target
        try:
            self._sender.send(source)
            self._complete = True
            seconds = time.monotonic() - started_s
            self._traffic.sent(target.node, self._sender.sent_bytes, seconds)
        except CkptdError as error:
            self._fail(error)
        except Exception as error:  # the edge of this thread: the copy failed, the node goes on
            _log.exception("forwarding_failed", node=target.node)
            self._fail(CkptdError(f"{target.node}: forwarding failed: {error}"))
        finally:
            source.close()
            self._give_back()

    def _fail(self, error: CkptdError) -> None:
        self._error = error
        if isinstance(error, PeerBusy):  # a hint, not a failure
            return
        self._traffic.error(error.kind)
        _log.warning("chain_broken", node=self._target.node, reason=error.message)
