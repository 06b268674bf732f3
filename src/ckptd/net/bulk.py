"""The bulk path: blocking TLS sockets, one thread at a time on each.

Shards travel here, everything small travels on control connections. A thread that sits in OpenSSL,
in a hash or in a system call has released the interpreter lock, so a few such threads use all
cores of a small machine; `docs/decisions/bulk-path.md` has the measurements.

A wait on this path always means "no progress": each read and each write of at most one buffer has
its own deadline.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Protocol

from ckptd.core import limits
from ckptd.errors import (
    NotAuthorized,
    PeerBusy,
    PeerError,
    PeerRefused,
    PeerStalled,
    PeerUnreachable,
    ProtocolError,
)
from ckptd.net.tls import check_peer
from ckptd.wire import frames, messages
from ckptd.wire.frames import FrameHeader
from ckptd.wire.messages import CopyReport, Message

_CONNECTION_ERRORS = (OSError, ssl.SSLError, ValueError)


class ShardSource(Protocol):
    """Bytes of one shard, read from the start to the end by one thread."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fills `buffer` from `offset` on with at least one byte; blocks until there is one.

        Returns the count of bytes. Raises what stands in the way when they will never come.
        """


def tune(sock: socket.socket) -> None:
    """Options of every connection: no Nagle delay, and dead peers are noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class BulkChannel:
    """Frames and payloads over one established TLS socket. Used by one thread at a time.

    `peer` is the node id for messages. Errors: PeerStalled when nothing moved within the
    deadline, PeerUnreachable when the connection broke, ProtocolError for nonsense.
    """

    def __init__(self, sock: ssl.SSLSocket, peer: str, *, timeout_s: float) -> None:
        self._sock = sock
        self.peer = peer
        self.idle_since_s = time.monotonic()
        self.broken = False
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self._header = bytearray(frames.HEADER_BYTES)
        sock.settimeout(timeout_s)

    def set_timeout(self, timeout_s: float) -> None:
        """The longest wait without progress from now on."""
        self._sock.settimeout(timeout_s)

    def send(
        self, message: Message, *, request_id: int = 0, payload_bytes: int = 0, hop: int = 0
    ) -> None:
        """Sends one frame; its payload follows by `send_payload`."""
        body = messages.encode(message)
        number = messages.NUMBERS[type(message)]
        header = frames.encode_header(number, request_id, len(body), payload_bytes, hop=hop)
        self.send_payload(memoryview(header + body))

    def send_payload(self, view: memoryview) -> None:
        """Sends all of `view`; at most one buffer, so that the deadline means progress."""
        try:
            self._sock.sendall(view)
        except TimeoutError as error:
            self.broken = True
            raise PeerStalled(self.peer, "took no bytes within the deadline") from error
        except _CONNECTION_ERRORS as error:
            self.broken = True
            raise PeerUnreachable(self.peer, f"the connection broke: {error}") from error

    def receive_payload(self, view: memoryview) -> int:
        """Receives some of a payload into `view`; returns how many bytes, at least one."""
        try:
            count = self._sock.recv_into(view)
        except TimeoutError as error:
            self.broken = True
            raise PeerStalled(self.peer, "sent no bytes within the deadline") from error
        except _CONNECTION_ERRORS as error:
            self.broken = True
            raise PeerUnreachable(self.peer, f"the connection broke: {error}") from error
        if not count:
            self.broken = True
            raise PeerUnreachable(self.peer, "closed the connection")
        return count

    def receive(self) -> tuple[FrameHeader, Message]:
        """The next frame without its payload. An Error or Busy is returned like any message."""
        self._receive_exactly(memoryview(self._header))
        try:
            header = frames.parse_header(self._header, peer=self.peer)
            body = bytearray(header.body_bytes)
            self._receive_exactly(memoryview(body))
            return header, messages.decode(header.type, body, peer=self.peer)
        except ProtocolError:
            self.broken = True
            raise

    def _receive_exactly(self, view: memoryview) -> None:
        while view:
            view = view[self.receive_payload(view) :]

    def frame_waiting(self) -> bool:
        """Whether something has arrived (a frame, or the end of the connection)."""
        return bool(self._sock.pending()) or bool(self._poll.poll(0))

    def wait_for_frame(self, timeout_s: float) -> bool:
        """Whether something arrives within `timeout_s` seconds."""
        return bool(self._sock.pending()) or bool(self._poll.poll(max(0.0, timeout_s) * 1000))

    def interrupt(self) -> None:
        """From another thread: the one that waits gets PeerUnreachable, and has to close.

        The descriptor stays open until then, so that its number is not somebody else's meanwhile.
        """
        self.broken = True
        try:
            # Past ssl's own shutdown, after which reads would return what is still encrypted.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        except OSError:
            pass  # already gone

    def close(self) -> None:
        """Closes at once. Safe from another thread: the one that waits gets PeerUnreachable."""
        self.broken = True
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # already gone
        self._sock.close()


def hand_shake(channel: BulkChannel, hello: messages.Hello, *, hop: int) -> messages.Hello:
    """The connecting side's first exchange on a bulk connection. Raises PeerError."""
    channel.send(hello, hop=hop)
    _, answer = channel.receive()
    if isinstance(answer, messages.Hello):
        if answer.cluster != hello.cluster:
            raise ProtocolError(channel.peer, f"belongs to cluster {answer.cluster!r}")
        return answer
    raise refusal(channel.peer, answer)


def refusal(peer: str, message: Message) -> PeerError:
    """The error that an unexpected answer stands for."""
    if isinstance(message, messages.Busy):
        return PeerBusy(peer, message.reason or "has no free slot")
    if isinstance(message, messages.Error):
        return PeerRefused(message.node or peer, message.code, message.message, next=message.next)
    return ProtocolError(peer, f"answered with an unexpected {type(message).__name__}")


class BulkConnector:
    """Makes bulk connections and keeps idle ones for the next shard. Thread-safe."""

    def __init__(
        self, context: ssl.SSLContext, cluster: str, hello: Callable[[], messages.Hello]
    ) -> None:
        self._context = context
        self._cluster = cluster
        self._hello = hello
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str, int, int], list[BulkChannel]] = {}
        self._in_use: set[BulkChannel] = set()
        self._closed = False

    def acquire(self, node: str, host: str, port: int, *, hop: int = 0) -> BulkChannel:
        """A channel to `node` at `host`:`port`, for payload at `hop`.

        Raises PeerUnreachable, PeerBusy, or NotAuthorized when somebody else answers there.
        """
        key = (node, host, port, hop)
        timeout_s = stall_timeout_s(hop)
        while (channel := self._take_idle(key)) is not None:
            fresh = time.monotonic() - channel.idle_since_s < limits.BULK_IDLE_TIMEOUT_S / 2
            if fresh and not channel.frame_waiting():
                channel.set_timeout(timeout_s)
                return self._use(channel)
            channel.close()
        channel = self._connect(node, host, port, timeout_s)
        try:
            channel.set_timeout(limits.HANDSHAKE_TIMEOUT_S)
            hand_shake(channel, self._hello(), hop=hop)
        except BaseException:
            channel.close()
            raise
        channel.set_timeout(timeout_s)
        return self._use(channel)

    def _use(self, channel: BulkChannel) -> BulkChannel:
        with self._lock:
            if not self._closed:
                self._in_use.add(channel)
                return channel
        channel.close()
        raise PeerUnreachable(channel.peer, "this side is stopping")

    def release(
        self, node: str, host: str, port: int, channel: BulkChannel, *, hop: int = 0
    ) -> None:
        """Gives a channel back after a complete exchange; a broken one is closed."""
        with self._lock:
            self._in_use.discard(channel)
            if not (channel.broken or self._closed):
                channel.idle_since_s = time.monotonic()
                self._idle.setdefault((node, host, port, hop), []).append(channel)
                return
        channel.close()

    def close(self) -> None:
        """Closes all channels; whoever waits on one gets PeerUnreachable."""
        with self._lock:
            self._closed = True
            channels = [*self._in_use, *(c for idle in self._idle.values() for c in idle)]
            self._idle.clear()
            self._in_use.clear()
        for channel in channels:
            channel.close()

    def _take_idle(self, key: tuple[str, str, int, int]) -> BulkChannel | None:
        with self._lock:
            channels = self._idle.get(key)
            return channels.pop() if channels else None

    def _connect(self, node: str, host: str, port: int, timeout_s: float) -> BulkChannel:
        try:
            raw = socket.create_connection((host, port), timeout=limits.CONNECT_TIMEOUT_S)
        except OSError as error:
            raise PeerUnreachable(node, f"cannot connect to {host}:{port}: {error}") from error
        try:
            tune(raw)
            raw.settimeout(limits.HANDSHAKE_TIMEOUT_S)
            sock = self._context.wrap_socket(raw)
        except OSError as error:  # ssl.SSLError is one
            raw.close()
            raise PeerUnreachable(node, f"no TLS with {host}:{port}: {error}") from error
        try:
            check_peer(sock, cluster=self._cluster, expected_node_id=node)
        except NotAuthorized:
            sock.close()
            raise
        return BulkChannel(sock, node, timeout_s=timeout_s)


def stall_timeout_s(hop: int) -> float:
    """The longest wait without progress for a sender at `hop`: shorter further down the chain,
    so that the error names the node that stalled and not everybody before it."""
    return limits.STALL_TIMEOUT_S - hop * limits.STALL_TIMEOUT_STEP_PER_HOP_S


class ShardSender:
    """Sends one shard down a chain, over a channel to the chain's first node.

    `reports` is up to date at any time: per node of the chain what it last said. `sent_bytes` is
    the payload that left here.
    """

    def __init__(
        self,
        channel: BulkChannel,
        request: messages.PutShard,
        *,
        hop: int,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._channel = channel
        self._request = request
        self._hop = hop
        self._on_change = on_change
        self.reports: dict[str, CopyReport] = {}
        self.sent_bytes = 0
        self.wanted = False
        self._result: messages.PutResult | None = None
        self._last_change_s = time.monotonic()

    def negotiate(self) -> bool:
        """Asks the chain to take the shard; whether it wants the payload. Raises PeerError."""
        self._channel.send(self._request, hop=self._hop)
        _, answer = self._channel.receive()
        if not isinstance(answer, messages.Ready):
            raise refusal(self._channel.peer, answer)
        self._note(answer.reports)
        self.wanted = answer.wanted
        return answer.wanted

    def send(self, source: ShardSource, buffer: memoryview) -> tuple[CopyReport, ...]:
        """Sends the payload if the chain wants it, and waits for the result. Raises PeerError, or
        what `source` raises; then the channel is broken, and `reports` says how far the chain
        came."""
        try:
            if self.wanted:
                self._send_payload(source, buffer)
            while self._result is None:
                self._wait()
        except BaseException:
            self._channel.broken = True
            raise
        return self._result.reports

    def _send_payload(self, source: ShardSource, buffer: memoryview) -> None:
        size = self._request.size
        data = messages.ShardData(self._request.shard)
        self._channel.send(data, payload_bytes=size, hop=self._hop)
        while self.sent_bytes < size:
            piece = buffer[: min(len(buffer), size - self.sent_bytes)]
            count = source.read_into(piece, self.sent_bytes)
            self._channel.send_payload(piece[:count])
            self.sent_bytes += count
            self._last_change_s = time.monotonic()
            while self._result is None and self._channel.frame_waiting():
                self._take_frame()
            if self._result is not None:  # the head gave up: what is left has nowhere to go
                self._channel.broken = self.sent_bytes < size
                return

    def _wait(self) -> None:
        left_s = self._last_change_s + stall_timeout_s(self._hop) - time.monotonic()
        if left_s <= 0 or not self._channel.wait_for_frame(left_s):
            raise PeerStalled(self._stalled_node(), "no progress within the deadline")
        self._take_frame()

    def _take_frame(self) -> None:
        _, message = self._channel.receive()
        if isinstance(message, messages.PutResult):
            self._note(message.reports)
            self._result = message
        elif isinstance(message, messages.Progress):
            self._note(message.reports)
        else:
            raise refusal(self._channel.peer, message)

    def _note(self, reports: tuple[CopyReport, ...]) -> None:
        changed = False
        for report in reports:
            if self.reports.get(report.node) != report:
                self.reports[report.node] = report
                changed = True
        if changed:
            self._last_change_s = time.monotonic()
            self._on_change()

    def _stalled_node(self) -> str:
        """The first node that has not finished although the one before it has all bytes."""
        for node in (self._channel.peer, *(hop.node for hop in self._request.chain)):
            report = self.reports.get(node)
            if report is None or report.state == "receiving":
                return node
        return self._channel.peer


def push_shard(channel: BulkChannel, request: messages.PushShard) -> tuple[CopyReport, ...]:
    """Asks the node at the other end to send a shard that it has to other nodes; their reports.

    Raises PeerError when it cannot or stalls."""
    channel.send(request)
    last: tuple[CopyReport, ...] = ()
    changed_s = time.monotonic()
    try:
        while True:
            left_s = changed_s + limits.STALL_TIMEOUT_S - time.monotonic()
            if left_s <= 0 or not channel.wait_for_frame(left_s):
                raise PeerStalled(channel.peer, "no progress of a push within the deadline")
            _, message = channel.receive()
            if isinstance(message, messages.PutResult):
                return message.reports
            if not isinstance(message, messages.Progress):
                raise refusal(channel.peer, message)
            if message.reports != last:
                last, changed_s = message.reports, time.monotonic()
    except PeerRefused:
        raise  # a complete answer: the channel is as good as before
    except BaseException:
        channel.broken = True
        raise
