"""What a node measures of its transfers: for placement, for metrics."""

from __future__ import annotations

import threading
from typing import Final

from ckptd.observe.metrics import Metrics

_WEIGHT: Final = 0.2  # of the newest shard in the moving average


class Traffic:
    """Counts transfers. Thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._write_bytes_per_s = 0.0
        self._queued_bytes = 0

    @property
    def write_bytes_per_s(self) -> float:
        """How fast this node makes shards durable, in bytes per second; 0 before the first."""
        return self._write_bytes_per_s

    @property
    def queued_bytes(self) -> int:
        """Bytes of shards that are being taken in."""
        return self._queued_bytes

    def expect(self, size: int) -> None:
        """A shard of `size` bytes is about to be taken in (negative: it ended)."""
        with self._lock:
            self._queued_bytes += size

    def written(self, size: int, busy_s: float) -> None:
        """A shard became durable; writing, hashing and syncing it took `busy_s` seconds."""
        speed = size / max(busy_s, 1e-6)
        with self._lock:
            if self._write_bytes_per_s:
                self._write_bytes_per_s += _WEIGHT * (speed - self._write_bytes_per_s)
            else:
                self._write_bytes_per_s = speed
        self._metrics.written(size)

    def sent(self, peer: str, size: int, seconds: float) -> None:
        """A shard went to `peer`."""
        self._metrics.transfer("sent", peer, size, seconds)

    def received(self, peer: str, size: int, seconds: float) -> None:
        """A shard came from `peer`."""
        self._metrics.transfer("received", peer, size, seconds)

    def error(self, kind: str) -> None:
        """A transfer failed; `kind` is the error class's stable word."""
        self._metrics.transfer_error(kind)

    def store_error(self, kind: str) -> None:
        """This node could not store a shard."""
        self._metrics.store_failure(kind)
