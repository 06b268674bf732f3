"""Accepting connections while almost nothing is owed to somebody without a certificate.

A connection goes through two stages before it is authenticated: *silent* (nothing received yet)
and *handshake*. Both together are capped, in all and per address, and must end within
HANDSHAKE_TIMEOUT_S. When a cap is reached, the oldest silent connection makes room, so that idle
connections never keep out a peer that speaks; if none is silent, the oldest handshake does that has
taken far longer than one takes; else the new one is closed.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from ckptd.core import limits
from ckptd.net.bulk_channel import tune
from ckptd.net.tls_stream import TlsStream

_log = structlog.get_logger(__name__)

# Whatever else accept(2) reports is about one connection, or passes.
_LISTENER_GONE: Final = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK)


@dataclass(eq=False)
class _Pending:
    address: str
    sock: socket.socket
    since_s: float
    silent: bool = True
    evicted: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Unauthenticated:
    """The connections of one node, on all its ports, that have not proved who they are."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []
        self.refused_total = 0

    def __len__(self) -> int:
        return len(self._pending)

    def admit(self, sock: socket.socket, address: str) -> _Pending | None:
        """A place for a new connection, or None when it must be closed."""
        now_s = time.monotonic()
        same = [pending for pending in self._pending if pending.address == address]
        if len(same) >= limits.UNAUTHENTICATED_CONNECTIONS_PER_ADDRESS_MAX:
            crowd = same
        elif len(self._pending) >= limits.UNAUTHENTICATED_CONNECTIONS_MAX:
            crowd = self._pending
        else:
            crowd = []
        if crowd:
            self.refused_total += 1
            slow_s = now_s - limits.EVICT_HANDSHAKE_AFTER_S
            oldest = next((each for each in crowd if _is_silent(each)), None) or next(
                (each for each in crowd if each.since_s <= slow_s), None
            )
            if oldest is None:
                return None
            self._pending.remove(oldest)
            oldest.evicted.set()
            if not oldest.silent and oldest.task is not None:
                oldest.task.cancel()
        pending = _Pending(address, sock, now_s)
        self._pending.append(pending)
        return pending

    def leave(self, pending: _Pending) -> None:
        """The connection is authenticated, or gone."""
        if pending in self._pending:
            self._pending.remove(pending)


def _is_silent(pending: _Pending) -> bool:
    """Whether nothing has arrived yet, also nothing that its task has not seen so far."""
    if not pending.silent:
        return False
    try:
        pending.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:  # nothing there, or nobody
        return True
    return False


Handshake = Callable[[socket.socket], Awaitable[Callable[[], None]]]
"""Authenticates a socket and returns what starts its work; it owns the socket from the call on."""


class Acceptor:
    """Accepts on `listener` and hands each socket to `handshake`, within the caps."""

    def __init__(
        self, listener: socket.socket, waiting: Unauthenticated, handshake: Handshake
    ) -> None:
        self._listener = listener
        self._waiting = waiting
        self._handshake = handshake
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Accepts until cancelled; then closes what is not authenticated yet."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    sock, address = await loop.sock_accept(self._listener)
                except OSError as error:
                    if error.errno in _LISTENER_GONE:
                        raise
                    _log.warning("accept_failed", reason=error.strerror)
                    await asyncio.sleep(0.1)  # descriptors come back when connections end
                    continue
                self._begin(sock, str(address[0]))
        finally:
            for task in self._tasks:
                task.cancel()
            self._listener.close()

    def _begin(self, sock: socket.socket, address: str) -> None:
        pending = self._waiting.admit(sock, address)
        if pending is None:
            sock.close()
            return
        task = asyncio.create_task(self._authenticate(pending), name=f"authenticate {address}")
        pending.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _authenticate(self, pending: _Pending) -> None:
        sock = pending.sock
        owned = True
        try:
            sock.setblocking(False)
            tune(sock)
            async with asyncio.timeout(limits.HANDSHAKE_TIMEOUT_S):
                if not await _first_byte(pending):
                    return
                pending.silent = False
                owned = False
                start = await self._handshake(sock)
            start()
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            _log.info("connection_refused", address=pending.address, reason=_reason(error))
        finally:
            self._waiting.leave(pending)
            if owned:
                sock.close()


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "TLS failed"
    return str(error) or type(error).__name__


async def _first_byte(pending: _Pending) -> bool:
    """Waits until the peer has sent something; False when its place was given away."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    descriptor = pending.sock.fileno()
    loop.add_reader(descriptor, readable.set)
    waits = [asyncio.ensure_future(readable.wait()), asyncio.ensure_future(pending.evicted.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        return not pending.evicted.is_set()
    finally:
        loop.remove_reader(descriptor)
        for wait in waits:
            wait.cancel()


async def server_handshake(sock: socket.socket, context: ssl.SSLContext) -> TlsStream:
    """The server's side of a TLS handshake without blocking the loop, for the bulk path.

    The socket stays non-blocking. Closes it and raises OSError when the handshake fails.
    """
    try:
        stream = TlsStream(sock, context, server_side=True)
        await stream.shake_hands_on_loop()
    except BaseException:
        sock.close()
        raise
    return stream


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket, ready for an Acceptor. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind((host, port))
        listener.listen(512)
    except BaseException:
        listener.close()
        raise
    return listener
