"""The last pieces of a shard that is coming in, in memory, for whoever passes it on.

What is written goes past the page cache, so reading behind the writer would mean reading from the
disk. A forwarder that keeps up sends from here instead, and holds the piece that it sends; one that
does not finds its next piece overwritten and reads the file. So a slow next node delays its own
copy only: the receiver always has the other places.
"""

from __future__ import annotations

import threading

from ckptd.core.limits import BULK_BUFFER_BYTES as PIECE_BYTES
from ckptd.store.filesystem import aligned_buffer


class RecentPieces:
    """The last `count` pieces of a stream that is cut into pieces of PIECE_BYTES from its start.

    One thread receives (`next_piece`); one other may `hold` a piece, for which there have to be at
    least two places.
    """

    def __init__(self, count: int) -> None:
        self._buffer = aligned_buffer(count * PIECE_BYTES)
        self._pieces = [-1] * count  # by place: the number of the piece there, -1 for none
        self._held = -1  # the place of the piece that is held, -1 for none
        self._lock = threading.Lock()

    def next_piece(self) -> memoryview:
        """Where the next piece of the stream is to be received; the oldest one that nobody holds is
        gone then."""
        with self._lock:
            free = (place for place in range(len(self._pieces)) if place != self._held)
            place = min(free, key=self._pieces.__getitem__)
            self._pieces[place] = max(self._pieces) + 1
        return self._buffer[place * PIECE_BYTES : (place + 1) * PIECE_BYTES]

    def hold(self, offset: int, end: int) -> memoryview:
        """What the stream has from `offset` on, as far as it lies in one piece and before `end`, up
        to which all has been received; empty when it is no longer here. It stays as it is until
        the next call."""
        number, inside = divmod(offset, PIECE_BYTES)
        size = min(PIECE_BYTES - inside, end - offset)
        with self._lock:
            self._held = self._pieces.index(number) if number in self._pieces else -1
            if self._held < 0:
                return self._buffer[:0]
            start = self._held * PIECE_BYTES + inside
        return self._buffer[start : start + size]
