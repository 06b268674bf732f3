"""The last pieces of a shard that is coming in, in memory, for whoever passes it on.

What is written goes past the page cache, so reading behind the writer would mean reading from the
disk. A forwarder that keeps up copies from here instead; one that does not finds the piece
overwritten and reads the file. So a slow next node delays its own copy only: the receiver never
waits for the forwarder, but for one copy of a piece in memory.
"""

from __future__ import annotations

import threading

from ckptd.core.limits import BULK_BUFFER_BYTES as PIECE_BYTES
from ckptd.store.filesystem import aligned_buffer


class RecentPieces:
    """The last `count` pieces of a stream that is cut into pieces of PIECE_BYTES from its start.

    One thread receives (`next_piece`), any other one copies.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._buffer = aligned_buffer(count * PIECE_BYTES)
        self._begun = 0  # pieces that were handed out to be filled
        self._lock = threading.Lock()

    def next_piece(self) -> memoryview:
        """Where the next piece of the stream is to be received; the oldest one is gone then."""
        with self._lock:
            slot = self._begun % self._count
            self._begun += 1
        return self._buffer[slot * PIECE_BYTES : (slot + 1) * PIECE_BYTES]

    def copy(self, buffer: memoryview, offset: int, end: int) -> int:
        """Copies to `buffer` what the stream has from `offset` on, as far as it lies in one piece
        and before `end`, up to which all has been received. Returns the count of bytes, 0 when it
        is no longer here."""
        number, inside = divmod(offset, PIECE_BYTES)
        size = min(len(buffer), PIECE_BYTES - inside, end - offset)
        with self._lock:
            if number < self._begun - self._count:
                return 0
            start = number % self._count * PIECE_BYTES + inside
            buffer[:size] = self._buffer[start : start + size]
        return size
