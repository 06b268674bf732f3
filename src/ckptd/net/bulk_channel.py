"""Frames and payloads over one blocking TLS connection.

No peer can hold a thread for ever: a frame must be complete, and each piece of a payload must move,
within the deadline, and over a whole payload bytes must move at a least speed.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import TypeVar

from ckptd.core import limits
from ckptd.errors import (
    PeerBusy,
    PeerError,
    PeerRefused,
    PeerStalled,
    PeerUnreachable,
    ProtocolError,
)
from ckptd.net.tls_stream import TlsStream
from ckptd.wire import exchanges, frames, messages
from ckptd.wire.exchanges import Channel
from ckptd.wire.frames import FrameHeader
from ckptd.wire.messages import Message

_CONNECTION_ERRORS = (OSError, ssl.SSLError, ValueError)
_T = TypeVar("_T")


def tune(sock: socket.socket) -> None:
    """Options of every connection: no Nagle delay, and dead peers are noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class BulkChannel:
    """Frames and payloads over one established TLS connection. Used by one thread at a time.

    `peer` is the node id for messages. Errors: PeerStalled when too little moved within the
    deadline, PeerUnreachable when the connection broke, ProtocolError for nonsense. `broken` says
    that the channel is of no further use.
    """

    def __init__(self, sock: TlsStream, peer: str, *, timeout_s: float) -> None:
        self._sock = sock
        self.peer = peer
        self.idle_since_s = time.monotonic()
        self.broken = False
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self._header = bytearray(frames.HEADER_BYTES)
        self._timeout_s = timeout_s
        self._waited_s = 0.0  # inside the socket's calls, since the payload began
        self._moved_bytes = 0
        sock.settimeout(timeout_s)

    def set_timeout(self, timeout_s: float) -> None:
        """The longest wait without progress from now on."""
        self._timeout_s = timeout_s
        self._sock.settimeout(timeout_s)

    def send(
        self, message: Message, *, request_id: int = 0, payload_bytes: int = 0, hop: int = 0
    ) -> None:
        """Sends one frame; its payload follows by `send_payload`."""
        body = messages.encode(message)
        number = messages.NUMBERS[type(message)]
        header = frames.encode_header(number, request_id, len(body), payload_bytes, hop=hop)
        self._begin_payload()
        self.send_payload(memoryview(header + body))

    def send_payload(self, view: memoryview) -> None:
        """Sends all of `view`; at most one buffer, so that the deadline means progress."""
        self._timed(lambda: self._sock.sendall(view), "took")
        self._moved(len(view), "took")

    def receive_payload(self, view: memoryview) -> int:
        """Receives some of a payload into `view`; returns how many bytes, at least one."""
        count = self._receive_some(view)
        self._moved(count, "sent")
        return count

    def receive(self) -> tuple[FrameHeader, Message]:
        """The next frame without its payload. An Error or Busy is returned like any message."""
        deadline_s = time.monotonic() + self._timeout_s
        try:
            self._receive_exactly(memoryview(self._header), deadline_s)
            header = frames.parse_header(self._header, peer=self.peer)
            exchanges.check_header(header, Channel.BULK, peer=self.peer)
            body = bytearray(header.body_bytes)
            self._receive_exactly(memoryview(body), deadline_s)
            message = messages.decode(header.type, body, peer=self.peer)
        except ProtocolError:
            self.broken = True
            raise
        self._sock.settimeout(self._timeout_s)
        self._begin_payload()
        return header, message

    def _receive_exactly(self, view: memoryview, deadline_s: float) -> None:
        while view:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                self.broken = True
                raise PeerStalled(self.peer, "did not finish a frame within the deadline")
            self._sock.settimeout(left_s)
            view = view[self._receive_some(view) :]

    def _receive_some(self, view: memoryview) -> int:
        count = self._timed(lambda: self._sock.recv_into(view), "sent")
        if not count:
            self.broken = True
            raise PeerUnreachable(self.peer, "closed the connection")
        return count

    def _timed(self, call: Callable[[], _T], verb: str) -> _T:
        started_s = time.monotonic()
        try:
            result = call()
        except TimeoutError as error:
            self.broken = True
            raise PeerStalled(self.peer, f"{verb} no bytes within the deadline") from error
        except _CONNECTION_ERRORS as error:
            self.broken = True
            raise PeerUnreachable(self.peer, f"the connection broke: {error}") from error
        self._waited_s += time.monotonic() - started_s
        return result

    def _begin_payload(self) -> None:
        self._waited_s = 0.0
        self._moved_bytes = 0

    def _moved(self, count: int, verb: str) -> None:
        """One byte now and then is progress, but holds a thread and a slot for too long."""
        self._moved_bytes += count
        allowed_s = self._timeout_s + self._moved_bytes / limits.TRANSFER_MIN_BYTES_PER_S
        if self._waited_s > allowed_s:
            self.broken = True
            raise PeerStalled(self.peer, f"{verb} only {self._moved_bytes} bytes in the time")

    def frame_waiting(self) -> bool:
        """Whether something has arrived (a frame, or the end of the connection)."""
        return self._sock.pending() or bool(self._poll.poll(0))

    def wait_for_frame(self, timeout_s: float) -> bool:
        """Whether something arrives within `timeout_s` seconds."""
        return self._sock.pending() or bool(self._poll.poll(max(0.0, timeout_s) * 1000))

    def rest(self) -> None:
        """Gives back memory while nothing is expected."""
        self._sock.rest()

    def drain(self, timeout_s: float) -> None:
        """Takes and forgets what the peer still sends, until it closes or `timeout_s` seconds have
        passed: closing with bytes unread would reset the connection, and the peer could lose what
        was said last. Of no further use afterwards."""
        self.broken = True
        rubbish = memoryview(bytearray(limits.BULK_BUFFER_BYTES))
        deadline_s = time.monotonic() + timeout_s
        try:
            while (left_s := deadline_s - time.monotonic()) > 0:
                self._sock.settimeout(left_s)
                self._receive_some(rubbish)
        except PeerError:
            pass  # the end that was waited for

    def interrupt(self) -> None:
        """From another thread: the one that waits gets PeerUnreachable, and has to close.

        The descriptor stays open until then, so that its number is not somebody else's meanwhile.
        """
        self.broken = True
        try:
            self._sock.shutdown()
        except OSError:
            pass  # already gone

    def close(self) -> None:
        """Closes at once. Only for the thread that uses the channel; others `interrupt` it."""
        self.interrupt()
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


def stall_timeout_s(hop: int) -> float:
    """The longest wait without progress for a sender at `hop`: shorter further down the chain,
    so that the error names the node that stalled and not everybody before it."""
    return limits.STALL_TIMEOUT_S - hop * limits.STALL_TIMEOUT_STEP_PER_HOP_S


def patience_s(hop: int) -> float:
    """The longest wait for a sender, at the node that receives at `hop`: longer further down, so
    that whoever is nearest to the one that stalled is the first to give up."""
    return limits.STALL_TIMEOUT_S + hop * limits.STALL_TIMEOUT_STEP_PER_HOP_S


def connect_timeout_s(hop: int) -> float:
    """How long connecting, TLS and hellos may take together. In a chain the nodes before wait
    meanwhile, each one step longer than the next: it must fit into a step."""
    if hop == 0:
        return limits.CONNECT_TIMEOUT_S + limits.HANDSHAKE_TIMEOUT_S
    return limits.STALL_TIMEOUT_STEP_PER_HOP_S * 3 / 4
