"""Room for shards: what is free on the file system above the reserve, and who was promised it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ckptd.errors import NoRoom
from ckptd.store.filesystem import FileSystem, Volume


@dataclass(frozen=True, slots=True)
class Room:
    """Room of a store: size of its file system, bytes of shards (quarantined ones included), and
    bytes that may still be filled with shards: above the reserve, and not promised to anybody."""

    bytes_total: int
    bytes_used: int
    bytes_free: int


class Reservation:
    """Room promised to one file and not yet visible in the free room of the file system."""

    def __init__(self, keeper: RoomKeeper, size_bytes: int) -> None:
        self._keeper = keeper
        self._outstanding_bytes = size_bytes

    def shrink(self, size_bytes: int) -> None:
        """`size_bytes` of it are on the disk now."""
        taken = min(size_bytes, self._outstanding_bytes)
        self._outstanding_bytes -= taken
        self._keeper.give_back(taken)

    def release(self) -> None:
        """Give back what is left. May be called twice."""
        self.shrink(self._outstanding_bytes)


class RoomKeeper:
    """Promises room above the reserve of one file system. Thread-safe.

    `reserve` is a count of bytes (`int`) or a fraction of the file system (`float` below 1).
    """

    def __init__(self, path: str, filesystem: FileSystem, reserve: int | float) -> None:
        if reserve < 0 or (isinstance(reserve, float) and reserve >= 1):
            raise ValueError("the reserve is a count of bytes or a fraction below 1")
        self._path = path
        self._filesystem = filesystem
        self._reserve = reserve
        self._lock = threading.Lock()
        self._outstanding_bytes = 0

    def take(self, size_bytes: int) -> Reservation:
        """Promise room for a file of `size_bytes`; `NoRoom` when there is not enough."""
        with self._lock:
            volume = self._filesystem.volume(self._path)
            blocks = -(-size_bytes // volume.block_bytes) * volume.block_bytes
            usable = self._usable_bytes(volume)
            if blocks > usable:
                raise NoRoom(
                    f"{self._path}: a shard needs {blocks} bytes, {usable} are free above the "
                    f"reserve of {self._reserve_bytes(volume)}",
                    next=f"df -h {self._path}; then ckptd prune --dry-run",
                )
            self._outstanding_bytes += blocks
        return Reservation(self, blocks)

    def give_back(self, size_bytes: int) -> None:
        """End a promise, or the part of it that is on the disk now."""
        with self._lock:
            self._outstanding_bytes -= size_bytes

    def room(self, used_bytes: int) -> Room:
        """The room of the file system, of which this store's files take `used_bytes`."""
        with self._lock:
            volume = self._filesystem.volume(self._path)
            return Room(volume.total_bytes, used_bytes, self._usable_bytes(volume))

    def _usable_bytes(self, volume: Volume) -> int:
        free_bytes = volume.free_bytes - self._reserve_bytes(volume) - self._outstanding_bytes
        return max(0, free_bytes)

    def _reserve_bytes(self, volume: Volume) -> int:
        if isinstance(self._reserve, float):
            return int(volume.total_bytes * self._reserve)
        return self._reserve
