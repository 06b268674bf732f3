"""A blocking TLS connection for gigabytes: few system calls, whatever the size of TLS records.

OpenSSL on a socket reads the head and the body of each record of 16 KiB apart. Here the socket is
read and written in large pieces, and OpenSSL works in memory (`ssl.MemoryBIO`).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Final, cast

WIRE_BYTES: Final = 256 * 1024
"""Read from the socket at a time."""
RECORDS_BYTES: Final = 64 * 1024
"""Given to OpenSSL at a time, or taken from it: its buffers stay as large as they once were."""


class TlsStream:
    """TLS over a connected TCP socket, which it owns. Used by one thread at a time.

    One of the `shake_hands` comes first. Errors are those of sockets and of `ssl`.
    """

    def __init__(self, raw: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._raw = raw
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._wire: memoryview | None = None
        self._waiting = memoryview(b"")  # read from the socket, not yet given to OpenSSL

    @property
    def tls(self) -> ssl.SSLObject:
        """The connection as `ssl` sees it, to look at."""
        return self._tls

    def fileno(self) -> int:
        return self._raw.fileno()

    def settimeout(self, timeout_s: float) -> None:
        """How long one call may take; a `sendall` as a whole. Makes the socket a blocking one."""
        self._raw.settimeout(timeout_s)

    # -- the handshake

    def shake_hands(self) -> None:
        """The handshake, blocking."""
        while not self._handshake_step():
            self._flush()
            self._take(self._raw.recv(RECORDS_BYTES))
        self._flush()

    async def shake_hands_on_loop(self) -> None:
        """The handshake on the event loop; the socket does not block."""
        loop = asyncio.get_running_loop()
        while True:
            done = self._handshake_step()
            if self._outgoing.pending:
                await loop.sock_sendall(self._raw, self._outgoing.read())
            if done:
                return
            self._take(await loop.sock_recv(self._raw, RECORDS_BYTES))

    def _handshake_step(self) -> bool:
        """Whether it is done; else something has to come from the peer."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError:
            self._tell_why()
            raise
        return True

    def _tell_why(self) -> None:
        """The alert that says why this side refuses, if the peer still listens."""
        try:
            self._raw.send(self._outgoing.read())
        except OSError:
            pass  # it does not

    def _take(self, data: bytes) -> None:
        if not data:
            self._incoming.write_eof()
        else:
            self._incoming.write(data)

    # -- bytes

    def recv_into(self, view: memoryview) -> int:
        """Receives at least one byte into `view`, and what else is there already; 0 at the end."""
        filled = 0
        while filled < len(view):
            try:
                count = self._read(view[filled:])
            except ssl.SSLWantReadError:
                # All that has come is in `view`.
                if filled or not self._receive():
                    break
                continue
            if not count:
                break
            filled += count
        return filled

    def _read(self, view: memoryview) -> int:
        """One record at most. Raises SSLWantReadError when nothing is left."""
        while True:
            try:
                # With a buffer it returns a count, which the stubs do not know.
                return cast(int, self._tls.read(len(view), view))
            except ssl.SSLWantReadError:
                if not self._waiting:
                    raise
                self._incoming.write(self._waiting[:RECORDS_BYTES])
                self._waiting = self._waiting[RECORDS_BYTES:]

    def _receive(self) -> int:
        """Waits for bytes of the peer; their count."""
        if self._outgoing.pending:  # an answer of TLS itself
            self._flush()
        if self._wire is None:
            self._wire = memoryview(bytearray(WIRE_BYTES))
        count = self._raw.recv_into(self._wire)
        self._waiting = self._wire[:count]
        return count

    def sendall(self, view: memoryview) -> None:
        """Sends all of `view`."""
        while view:
            count = self._tls.write(view[:RECORDS_BYTES])
            view = view[count:]
            self._flush()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._raw.sendall(self._outgoing.read())

    def pending(self) -> bool:
        """Whether something was received that nobody has read."""
        return bool(self._tls.pending() or self._incoming.pending or self._waiting)

    def rest(self) -> None:
        """Gives back memory while nothing is expected."""
        if not self._waiting:
            self._wire = None
            self._waiting = memoryview(b"")

    def shutdown(self) -> None:
        """From any thread: whoever waits gets the end of the connection."""
        self._raw.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._raw.close()
