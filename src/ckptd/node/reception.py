"""Taking in one shard, and passing it on while it comes in.

The connection's own thread receives, hashes and writes; what passes the shard on follows it
(`ckptd.node.forwarder`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from ckptd.core import limits
from ckptd.core.names import check_node_id
from ckptd.errors import (
    CkptdError,
    Draining,
    NameRefused,
    PeerError,
    ProtocolError,
    Refused,
    ShardCorrupt,
)
from ckptd.net.bulk import BulkChannel, BulkConnector
from ckptd.net.bulk_channel import patience_s
from ckptd.node.forwarder import BehindWriter, Forwarder, failed_report
from ckptd.node.recent_pieces import RecentPieces
from ckptd.node.traffic import Traffic
from ckptd.store.copy_reader import VerifyResult
from ckptd.store.shard_io import IncomingShard
from ckptd.store.shards import ShardStore
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport, Hop

_log = structlog.get_logger(__name__)


def check_chain(chain: tuple[Hop, ...], hop: int, node_id: str, *, sender: str) -> None:
    """Raises Refused for a chain behind the node `node_id`, which receives from `sender` at `hop`,
    that is too long, comes back to a node, or names what can be no node or address."""
    if hop + len(chain) > limits.CHAIN_HOPS_MAX:
        raise Refused(f"a chain of {hop + len(chain)} hops; the limit is {limits.CHAIN_HOPS_MAX}")
    # One that passes a shard on has it: if it also was to get it, it would read what is here.
    # Whoever sends at hop 0 may read anyway, and may be a worker, too.
    seen = {node_id} if hop == 0 else {node_id, sender}
    for place in chain:
        try:
            check_node_id(place.node)
        except NameRefused as error:
            raise Refused(f"a chain names {place.node!a}: {error.message}") from error
        if place.node in seen:
            raise Refused(f"a chain comes to {place.node} twice")
        seen.add(place.node)
        printable = place.host.isascii() and place.host.isprintable() and " " not in place.host
        if not (printable and 0 < len(place.host) <= limits.HOST_MAX_CHARACTERS and place.port):
            raise Refused(f"a chain gives {place.node} no usable address")


def _is_suspicious(forwarder: Forwarder) -> bool:
    """Whether another node got other bytes than the shard's from the copy here, or too few."""
    bad_there = any(report.code == ShardCorrupt.kind for report in forwarder.reports())
    return bad_there or isinstance(forwarder.own_error, ShardCorrupt)


class _Commit:
    """Makes a complete shard durable in a thread of its own, so that the connection's thread can
    report progress while the disk flushes."""

    def __init__(self, incoming: IncomingShard) -> None:
        self._incoming = incoming
        self.error: CkptdError | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="shard commit", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Waits for the end of the commit; whether it has come."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        started_s = time.monotonic()
        try:
            self._incoming.commit()
        except CkptdError as error:
            self.error = error
        except Exception as error:  # the edge of this thread: the copy failed, the node goes on
            _log.exception("shard_not_stored", shard=self._incoming.digest.hex())
            self.error = CkptdError(f"storing a shard failed: {error}")
        self.seconds = time.monotonic() - started_s


class Reception:
    """One PutShard from its request to its result."""

    def __init__(
        self,
        channel: BulkChannel,
        request: messages.PutShard,
        *,
        hop: int,
        node_id: str,
        store: ShardStore,
        connector: BulkConnector,
        traffic: Traffic,
        draining: Callable[[], bool],
    ) -> None:
        self._draining = draining
        self._channel = channel
        self._request = request
        self._hop = hop
        self._node_id = node_id
        self._store = store
        self._traffic = traffic
        self._connector = connector
        self._received = 0
        self._disk_s = 0.0
        self._error: CkptdError | None = None
        self._told_s = time.monotonic()

    def run(self) -> None:
        """Answers the request. Raises PeerError when the sender fails, after cleaning up, and
        Refused for a chain that cannot be."""
        request = self._request
        check_chain(request.chain, self._hop, self._node_id, sender=self._channel.peer)
        if self._is_present():
            self._pass_on_present()
            return
        try:
            if self._draining():
                raise Draining(f"{self._node_id} is draining: it takes no new copies")
            incoming = self._store.begin(request.shard, request.size)
        except CkptdError as error:
            self._fail(error)
            report = failed_report(self._node_id, error)
            self._channel.send(messages.Ready(False, (report,)))
            self._channel.send(messages.PutResult((report,)))
            return
        self._traffic.expect(request.size)
        try:
            self._take_in(incoming)
        finally:
            self._traffic.expect(-request.size)

    def _is_present(self) -> bool:
        """Whether a good copy is here. One that was not hashed since the start is hashed now: a
        copy that rotted while the node was off must not stand for a new one."""
        shard = self._request.shard
        if not self._store.has(shard, self._request.size):
            return False
        if self._store.verified_at(shard) is not None:
            return True
        return self._store.verify(shard) is VerifyResult.OK

    def _pass_on_present(self) -> None:
        """The shard is here: at most the rest of the chain needs it, from this copy."""
        own = CopyReport(self._node_id, "present", self._request.size)
        forwarder = self._forwarder()
        if forwarder is None:
            self._channel.send(messages.Ready(False, (own,)))
            self._channel.send(messages.PutResult((own,)))
            return
        try:
            forwarder.negotiate()
            source = self._store.open_read(self._request.shard)
            forwarder.start(source)
            self._channel.send(messages.Ready(False, (own, *forwarder.reports())))
            while not forwarder.join(limits.PROGRESS_INTERVAL_S):
                self._channel.send(messages.Progress((own, *forwarder.reports())))
        finally:
            forwarder.close()
        if _is_suspicious(forwarder):
            own = self._own_copy_checked(own)
        elif forwarder.own_error is not None:
            own = failed_report(self._node_id, forwarder.own_error)
        self._channel.send(messages.PutResult((own, *forwarder.reports())))

    def _own_copy_checked(self, own: CopyReport) -> CopyReport:
        """What is to be said of the copy here, once it was read again: `own` if it is good."""
        if self._store.verify(self._request.shard) is VerifyResult.OK:
            return own
        return failed_report(self._node_id, ShardCorrupt(self._request.shard.hex()))

    def _forwarder(self) -> Forwarder | None:
        """What passes the shard on to the next node; None at the chain's end."""
        if not self._request.chain:
            return None
        return Forwarder(self._connector, self._request, self._hop + 1, self._traffic)

    def _take_in(self, incoming: IncomingShard) -> None:
        started_s = time.monotonic()
        forwarder = self._forwarder()
        recent = RecentPieces(1 if forwarder is None else limits.BULK_PIECES_FOR_FORWARDER)
        try:
            if forwarder is not None:
                forwarder.negotiate()
            self._channel.send(messages.Ready(True, forwarder.reports() if forwarder else ()))
            self._expect_payload()
            if forwarder is not None:
                forwarder.start(BehindWriter(incoming, recent, patience_s(self._hop)))
            self._receive_payload(incoming, recent, forwarder)
            if self._error is None:
                self._commit(incoming, forwarder)
            while forwarder is not None and not forwarder.join(limits.PROGRESS_INTERVAL_S):
                self._tell(incoming, forwarder)
        finally:
            incoming.abort()  # unless it was committed
            if forwarder is not None:
                forwarder.close()
        own, *rest = self._reports(incoming, forwarder)
        if incoming.committed and forwarder is not None and _is_suspicious(forwarder):
            own = self._own_copy_checked(own)
        self._channel.send(messages.PutResult((own, *rest)))
        if self._received < self._request.size:
            self._channel.drain(limits.LAST_WORDS_TIMEOUT_S)
        else:
            self._traffic.received(self._channel.peer, self._received, time.monotonic() - started_s)

    def _expect_payload(self) -> None:
        header, data = self._channel.receive()
        if not isinstance(data, messages.ShardData) or data.shard != self._request.shard:
            raise ProtocolError(self._channel.peer, "sent something else than the shard")
        if header.payload_bytes != self._request.size:
            raise ProtocolError(
                self._channel.peer,
                f"announced {self._request.size} bytes and sends {header.payload_bytes}",
            )

    def _receive_payload(
        self, incoming: IncomingShard, recent: RecentPieces, forwarder: Forwarder | None
    ) -> None:
        """Receives, hashes and writes until all bytes are here or the disk refuses; then the
        connection is given up, because what is still under way has nowhere to go."""
        size = self._request.size
        while self._received < size:
            buffer = recent.next_piece()
            buffer = buffer[: min(len(buffer), size - self._received)]
            written = 0
            while written < len(buffer):
                filled = self._fill(buffer, written)
                started_s = time.monotonic()
                try:
                    incoming.write(buffer[written:filled])
                except CkptdError as error:
                    self._fail(error)
                    return
                self._disk_s += time.monotonic() - started_s
                self._received += filled - written
                written = filled
                self._tell(incoming, forwarder)

    def _fill(self, buffer: memoryview, filled: int) -> int:
        """Receives into `buffer`, of which `filled` bytes are there already, until it is full, or
        for as long as others may be left without news; how much is there then."""
        until_s = time.monotonic() + limits.PIECE_LATE_S
        while filled < len(buffer):
            filled += self._channel.receive_payload(buffer[filled:])
            if time.monotonic() > until_s:
                break
        return filled

    def _commit(self, incoming: IncomingShard, forwarder: Forwarder | None) -> None:
        commit = _Commit(incoming)
        try:
            while not commit.join(limits.PROGRESS_INTERVAL_S):
                self._tell(incoming, forwarder)
        except PeerError:
            commit.join(limits.FLUSH_TIMEOUT_S)  # complete as it is, it may as well stay
            raise
        if commit.error is not None:
            self._fail(commit.error)
        else:
            self._traffic.written(self._request.size, self._disk_s + commit.seconds)

    def _fail(self, error: CkptdError) -> None:
        self._error = error
        self._traffic.store_error(error.kind)
        _log.warning(
            "shard_not_stored",
            shard=self._request.shard.hex(),
            peer=self._channel.peer,
            reason=error.message,
        )

    def _tell(self, incoming: IncomingShard, forwarder: Forwarder | None) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= limits.PROGRESS_INTERVAL_S:
            self._told_s = now_s
            self._channel.send(messages.Progress(self._reports(incoming, forwarder)))

    def _reports(
        self, incoming: IncomingShard, forwarder: Forwarder | None
    ) -> tuple[CopyReport, ...]:
        if self._error is not None:
            own = failed_report(self._node_id, self._error, self._received)
        else:
            state = "durable" if incoming.committed else "receiving"
            own = CopyReport(self._node_id, state, self._received)
        return (own, *(forwarder.reports() if forwarder else ()))
