"""The disk of a simulated node: the model that loses what was not flushed, with room, time, faults.

Each call of the store's port takes virtual time, so that others run in between, and reaches the
disk of the process that makes it.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from typing import Any, Final

from tests.model_disk import Directory, File, ModelDisk
from tests.simulation.kernel import Process, ProcessDied, current_process
from tests.simulation.threads import kernel

from ckptd.store import filesystem
from ckptd.store.filesystem import DirectoryEntry, Volume

STORE: Final = "/srv/ckptd"
_BLOCK_BYTES: Final = 4096

# How long calls take, in seconds: (least, most). What is not listed takes none.
_DURATIONS_S: Final = {
    "fsync": (0.001, 0.05),
    "fsync_directory": (0.001, 0.03),
    "rename": (0.0, 0.002),
    "unlink": (0.0, 0.002),
    "pwrite": (0.0, 0.004),
    "open": (0.0, 0.001),
}
_PAUSE_SHARE: Final = {"fsync": 1.0, "fsync_directory": 1.0, "pwrite": 0.3, "open": 0.1}


class SimulatedDisk(ModelDisk):
    """A `FileSystem`. `capacity_bytes` may change, `fault` is the errno that every call fails with,
    `bad_reads` how many of the next reads of shards give a wrong bit."""

    def __init__(
        self, chooser: random.Random, *, capacity_bytes: int, root: Directory | None = None
    ) -> None:
        super().__init__(
            root, can_allocate=chooser.random() < 0.7, can_bypass=chooser.random() < 0.7
        )
        self._chooser = chooser
        self.capacity_bytes = capacity_bytes
        self.fault = 0
        self.bad_reads = 0
        self.slowness = 1.0
        self.last_call: tuple[str, int] | None = None  # dies after so many of these calls
        self.on_last_call: Callable[[], None] = lambda: None
        self.on_removed: Callable[[str, bytes], None] | None = None
        self.arrived_s: dict[str, float] = {}  # when a shard got its name, or a path in quarantine
        self.used_bytes = sum(
            _rounded(len(node.seen)) for node in self._nodes() if isinstance(node, File)
        )
        if root is None:
            self.make_parents(STORE)

    def make_parents(self, path: str) -> None:
        """Makes what lies above `path`, durably."""
        for parent in _parents(path):
            try:
                super().mkdir(parent)
            except FileExistsError:
                continue
        self.make_all_durable()

    def after_crash(self, *, power_cut: bool) -> SimulatedDisk:
        """What the next process finds. Without a power cut that is everything that was written."""
        self.last_call = None
        if not power_cut:
            self.restart_process()
            return self
        root = self.root_after_power_cut(self._chooser)
        disk = SimulatedDisk(self._chooser, capacity_bytes=self.capacity_bytes, root=root)
        disk.slowness = self.slowness
        disk.on_removed = self.on_removed
        return disk

    def duration_s(self, call: str) -> float:
        """How long a call takes; 0 for no pause at all."""
        if self._chooser.random() >= _PAUSE_SHARE.get(call, 0.5):
            return 0.0
        least, most = _DURATIONS_S[call]
        return self._chooser.uniform(least, most) * self.slowness

    def check(self, path: str) -> None:
        if self.fault:
            raise OSError(self.fault, os.strerror(self.fault), path)

    # The port, where it differs from the model

    def volume(self, path: str) -> Volume:
        free = max(0, self.capacity_bytes - self.used_bytes)
        return Volume(self.capacity_bytes, free, _BLOCK_BYTES)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        file = self._descriptors[descriptor].file
        before = _rounded(len(file.seen))
        grown = _rounded(max(len(file.seen), offset + len(data))) - before
        if self.used_bytes + grown > self.capacity_bytes:
            raise OSError(errno.ENOSPC, "no space left on device")
        count = super().pwrite(descriptor, data, offset)
        self.used_bytes += grown
        return count

    def pread_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        count = super().pread_into(descriptor, buffer, offset)
        if self.bad_reads and count > 1000:
            self.bad_reads -= 1
            buffer[count // 2] ^= 1
        return count

    def rename(self, source: str, target: str) -> None:
        directory, name = self._parent(target)
        replaced = directory.seen.get(name)
        super().rename(source, target)
        if target.startswith(f"{STORE}/shards/"):
            self.arrived_s[name] = kernel().now_s
        elif target.startswith(f"{STORE}/quarantine/"):
            self.arrived_s[target] = kernel().now_s
        if isinstance(replaced, File):
            self.used_bytes -= _rounded(len(replaced.seen))

    def unlink(self, path: str) -> None:
        directory, name = self._parent(path)
        node = directory.seen.get(name)
        super().unlink(path)
        if isinstance(node, File):
            self.used_bytes -= _rounded(len(node.seen))
            is_copy = path.startswith((f"{STORE}/shards/", f"{STORE}/quarantine/"))
            if is_copy and self.on_removed is not None:
                self.on_removed(path, bytes(node.seen))

    # For those who check and damage

    def durable_files(self, path: str) -> dict[str, File]:
        """By name, the files below a directory that are there now, and will be after a power cut:
        a removal that was not flushed counts, a new name that was not does not."""
        directory = self._durable_directory(path)
        names = {} if directory is None else directory.durable
        return {
            name: node
            for name, node in names.items()
            if isinstance(node, File) and directory and directory.seen.get(name) is node
        }

    def _durable_directory(self, path: str) -> Directory | None:
        directory: Directory = self.root
        for part in path.strip("/").split("/"):
            found = directory.durable.get(part)
            if not isinstance(found, Directory):
                return None
            directory = found
        return directory

    def shards(self) -> dict[str, File]:
        """All copies whose names are on the medium, by name."""
        found: dict[str, File] = {}
        above = self._durable_directory(f"{STORE}/shards")
        for name in above.durable if above is not None else ():
            found.update(self.durable_files(f"{STORE}/shards/{name}"))
        return found

    def quarantined(self) -> dict[str, list[File]]:
        """By id, the shards and documents in quarantine, and the shards that are on their way there
        or back: such a move loses no name without the other one being there."""
        shards = self._durable_directory(f"{STORE}/shards")
        above = [] if shards is None else list(shards.durable.values())
        directories = [each for each in above if isinstance(each, Directory)]
        quarantine = self._durable_directory(f"{STORE}/quarantine")
        if quarantine is not None:
            directories.append(quarantine)
        named = {id(file) for directory in directories for file in directory.durable.values()}
        lying = self.shards().values()
        found: dict[str, list[File]] = {}
        for directory in directories:
            for name, file in directory.seen.items():
                if isinstance(file, File) and id(file) in named and file not in lying:
                    found.setdefault(name[:64], []).append(file)
        return found

    def flip_bit(self, file: File) -> None:
        position = self._chooser.randrange(len(file.durable))
        content = bytearray(file.durable)
        content[position] ^= 1 << self._chooser.randrange(8)
        file.durable = bytes(content)
        file.seen[:] = content


def _rounded(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def _parents(path: str) -> list[str]:
    parts = path.strip("/").split("/")[:-1]
    return ["/" + "/".join(parts[: count + 1]) for count in range(len(parts))]


_CALLS: Final = (
    "open", "close", "pwrite", "pread_into", "fsync", "fsync_directory", "fallocate",
    "rename", "mkdir", "rmdir", "unlink", "list_directory", "identify", "identify_path",
    "drop_cache", "bypass_cache", "volume", "lock",
)  # fmt: skip
_NEVER_FAIL: Final = frozenset({"close"})


def route_calls() -> None:
    """From now on the operating system's calls go to the disk of the process that makes them."""
    for name in _CALLS:
        setattr(filesystem.OperatingSystem, name, _routed(name))


def _routed(name: str) -> Callable[..., Any]:
    original = getattr(filesystem.OperatingSystem, name)
    pauses = name in _DURATIONS_S

    def call(self: object, *arguments: Any, **named: Any) -> Any:
        process = current_process()
        if process is None or process.disk is None:
            return original(self, *arguments, **named)
        disk: SimulatedDisk = process.disk
        if not process.alive:
            raise ProcessDied
        if pauses and kernel().current is not None:
            pause_s = disk.duration_s(name)
            if pause_s:
                kernel().block(pause_s, "disk")
        if disk.fault and name not in _NEVER_FAIL:
            disk.check(str(arguments[0]))
        result = getattr(disk, name)(*arguments, **named)
        if disk.last_call is not None and disk.last_call[0] == name:
            _count_down(disk)
        return result

    return call


def _count_down(disk: SimulatedDisk) -> None:
    """After the last call of its process, nothing of it goes on."""
    assert disk.last_call is not None
    name, left = disk.last_call
    disk.last_call = (name, left - 1) if left > 1 else None
    if left <= 1:
        kernel().call_soon(disk.on_last_call, context=kernel().in_process(None))
        if kernel().current is not None:
            kernel().block(None, "death")


__all__ = ["STORE", "DirectoryEntry", "Process", "SimulatedDisk", "route_calls"]
