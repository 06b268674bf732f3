"""What is bounded on a node's bulk side: connections (each has a thread), and slots for transfers.

Whoever asks for too much is told so at once; nothing here is waited for. One peer can never take
everything: it has caps of its own, and connections on which nothing is asked make room.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ckptd.core import limits
from ckptd.net.bulk_channel import BulkChannel


class Slots:
    """`count` slots, at most `per_peer` of them for one peer. Thread-safe; never waited for."""

    def __init__(self, count: int, *, per_peer: int | None = None) -> None:
        self._free = count
        self._per_peer = count if per_peer is None else per_peer
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        return self._free

    def take(self, peer: str) -> bool:
        with self._lock:
            if not self._free or self._taken[peer] >= self._per_peer:
                return False
            self._free -= 1
            self._taken[peer] += 1
            return True

    def give_back(self, peer: str) -> None:
        with self._lock:
            self._free += 1
            self._taken[peer] -= 1
            if not self._taken[peer]:
                del self._taken[peer]


@dataclass(eq=False)
class BulkConnection:
    """One authenticated connection. `hop` is None until it said hello; `idle_since_s` (monotonic)
    is None while something is asked on it."""

    channel: BulkChannel
    hop: int | None = None
    idle_since_s: float | None = None


class BulkConnections:
    """All bulk connections of a node. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._open: dict[BulkConnection, None] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._open)

    @property
    def closed(self) -> bool:
        return self._closed

    def admit(self, channel: BulkChannel) -> BulkConnection | None:
        """A place for a new connection, or None when it must be closed."""
        with self._lock:
            if self._closed or not (
                self._has_room(
                    limits.BULK_CONNECTIONS_PER_PEER_MAX,
                    lambda other: other.channel.peer == channel.peer,
                )
                and self._has_room(limits.BULK_CONNECTIONS_MAX, lambda _: True)
            ):
                return None
            connection = BulkConnection(channel)
            self._open[connection] = None
            return connection

    def enter(self, connection: BulkConnection, hop: int) -> bool:
        """Whether this connection may serve `hop` from now on."""
        with self._lock:
            if not self._has_room(
                limits.BULK_CONNECTIONS_PER_HOP_MAX, lambda other: other.hop == hop
            ):
                return False
            connection.hop = hop
            return True

    def begin_idle(self, connection: BulkConnection) -> bool:
        """Nothing is asked at the moment; False when the connection shall end instead."""
        with self._lock:
            connection.idle_since_s = time.monotonic()
            return not self._closed and connection in self._open

    def begin_work(self, connection: BulkConnection) -> bool:
        """A request comes in; False when the place was given away meanwhile."""
        with self._lock:
            connection.idle_since_s = None
            return connection in self._open

    def leave(self, connection: BulkConnection) -> None:
        """The connection has ended."""
        with self._changed:
            self._open.pop(connection, None)
            self._changed.notify_all()

    def close(self) -> None:
        """Admits no more, and ends those that are idle."""
        with self._lock:
            self._closed = True
            self._interrupt(other for other in self._open if other.idle_since_s is not None)

    def interrupt_all(self) -> None:
        """Ends all connections, whatever they are doing."""
        with self._lock:
            self._interrupt(self._open)

    def wait_empty(self, timeout_s: float) -> bool:
        """Waits until all connections have ended; whether they have."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout_s)

    def _interrupt(self, connections: Iterable[BulkConnection]) -> None:
        for connection in connections:
            connection.channel.interrupt()

    def _has_room(self, limit: int, counts: Callable[[BulkConnection], bool]) -> bool:
        """Whether fewer than `limit` connections count; if not, the one that has been idle for
        longest makes room. Its owner sees the end of the connection before it asks again."""
        crowd = [other for other in self._open if counts(other)]
        if len(crowd) < limit:
            return True
        idle = [(other.idle_since_s, other) for other in crowd if other.idle_since_s is not None]
        if not idle:
            return False
        _, oldest = min(idle, key=lambda pair: pair[0])
        del self._open[oldest]
        oldest.channel.interrupt()
        return True
