"""A blocking TLS connection for gigabytes: few system calls, whatever the size of TLS records.

OpenSSL on a socket reads the head and the body of each record of 16 KiB apart. Here the socket is
read and written in large pieces, and OpenSSL works in memory (`ssl.MemoryBIO`).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Final, cast

WIRE_BYTES: Final = 256 * 1024
"""Read from the socket at a time."""
RECORDS_BYTES: Final = 64 * 1024
"""Given to OpenSSL at a time, or taken from it: its buffers stay as large as they once were."""
_HANDSHAKE_BYTES: Final = 32 * 1024

# RFC 8446, section 5: type, version 3.x, length; then at most 2^14 bytes and 256 for the cipher.
_RECORD_HEAD: Final = struct.Struct("!BHH")
_RECORD_HEAD_BYTES: Final = _RECORD_HEAD.size
_RECORD_BODY_MAX_BYTES: Final = 2**14 + 256


class TlsStream:
    """TLS over a connected TCP socket, which it owns. Used by one thread at a time.

    One of the `shake_hands` comes first. Errors are those of sockets and of `ssl`.
    """

    def __init__(self, raw: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._raw = raw
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        # With a buffer it returns a count, which the stubs do not know.
        self._read = cast(Callable[[int, memoryview], int], self._tls.read)
        self._wire = memoryview(bytearray(_HANDSHAKE_BYTES))
        self._waiting = self._wire[:0]  # read from the socket, not yet given to OpenSSL

    @property
    def tls(self) -> ssl.SSLObject:
        """The connection as `ssl` sees it, to look at."""
        return self._tls

    def fileno(self) -> int:
        return self._raw.fileno()

    def settimeout(self, timeout_s: float) -> None:
        """The longest that the peer may take nothing, or send nothing. It holds for each wait on
        the socket: of a `sendall`, for each piece of RECORDS_BYTES and not for the whole call.
        Makes the socket a blocking one."""
        self._raw.settimeout(timeout_s)

    # -- the handshake

    def shake_hands(self) -> None:
        """The handshake, blocking."""
        while not self._handshake_step():
            self._flush()
            self._received(self._raw.recv_into(self._room()))
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
            self._received(await loop.sock_recv_into(self._raw, self._room()))

    def _handshake_step(self) -> bool:
        """Whether it is done; else something has to come from the peer."""
        while True:
            try:
                self._tls.do_handshake()
                return True
            except ssl.SSLWantReadError:
                if not self._feed():
                    return False
            except ssl.SSLError:
                self._tell_why()
                raise

    def _tell_why(self) -> None:
        """The alert that says why this side refuses, if the peer still listens."""
        try:
            self._raw.send(self._outgoing.read())
        except OSError:
            pass  # it does not

    # -- bytes

    def recv_into(self, view: memoryview) -> int:
        """Receives at least one byte into `view`, and what else is there already; 0 at the end."""
        filled, size = 0, len(view)
        incoming, read = self._incoming, self._read  # for each record of 16 KiB: it adds up
        while filled < size:
            # Asking OpenSSL when it has nothing would cost an exception for each piece.
            if not (incoming.pending or self._tls.pending() or self._feed()):
                if filled or not self._receive():
                    break
                continue
            try:
                count = read(size - filled, view[filled:])
            except ssl.SSLWantReadError:  # a record of TLS itself
                if incoming.pending and not (self._feed() or self._receive()):
                    break
                continue
            if not count:
                break
            filled += count
        return filled

    def _receive(self) -> int:
        """Waits for bytes of the peer; their count, 0 at the end."""
        if self._outgoing.pending:  # an answer of TLS itself
            self._flush()
        if len(self._wire) < WIRE_BYTES:
            wire = memoryview(bytearray(WIRE_BYTES))
            wire[: len(self._waiting)] = self._waiting
            self._wire, self._waiting = wire, wire[: len(self._waiting)]
        count = self._raw.recv_into(self._room())
        if count:
            self._received(count)
        return count

    def _room(self) -> memoryview:
        """Where bytes from the socket go: behind the part of a record that waits."""
        kept = len(self._waiting)
        self._wire[:kept] = self._waiting
        self._waiting = self._wire[:kept]
        return self._wire[kept:]

    def _received(self, count: int) -> None:
        """`count` bytes have come into `_room`; 0: no more will."""
        if count:
            self._waiting = self._wire[: len(self._waiting) + count]
            return
        self._incoming.write(self._waiting)
        self._incoming.write_eof()
        self._waiting = self._wire[:0]

    def _feed(self) -> bool:
        """Gives OpenSSL whole records of what waits; whether there were any."""
        size = self._whole_bytes()
        self._incoming.write(self._waiting[:size])
        self._waiting = self._waiting[size:]
        return size > 0

    def _whole_bytes(self) -> int:
        """How much of what waits are whole records, not much more than RECORDS_BYTES; everything
        when it is not TLS, for OpenSSL to say so."""
        waiting = self._waiting
        size, end = 0, len(waiting)
        while size < RECORDS_BYTES and end - size >= _RECORD_HEAD_BYTES:
            _, version, body = _RECORD_HEAD.unpack_from(waiting, size)
            if version >> 8 != 3 or body > _RECORD_BODY_MAX_BYTES:
                return end
            if end - size < _RECORD_HEAD_BYTES + body:
                break
            size += _RECORD_HEAD_BYTES + body
        return size

    def sendall(self, view: memoryview) -> None:
        """Sends all of `view`. The timeout holds for each piece of RECORDS_BYTES: a peer that takes
        one just in time, again and again, is not too slow for this call as a whole."""
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
            self._wire = self._waiting = memoryview(b"")

    def shutdown(self) -> None:
        """From any thread: whoever waits gets the end of the connection."""
        self._raw.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._raw.close()
