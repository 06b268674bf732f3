"""The directory next to the target in which a restore comes together.

Its name follows from target and version, so that a restore that was cut off finds what it has
already written. Nothing in it is trusted then: each shard is hashed again. Nothing is ever written
through a symlink, or outside of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from ckptd.client.output_files import OutputFiles, disk_error
from ckptd.client.pull_threads import WantedShard
from ckptd.client.restore_plan import RestorePlan
from ckptd.client.target import remove_tree
from ckptd.core import limits
from ckptd.errors import NoRoom, Refused
from ckptd.store.filesystem import OPERATING_SYSTEM

_FLUSHES_AT_ONCE: Final = 4
_HASHES_AT_ONCE: Final = 2
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Staging:
    """The staging directory at `path` for `plan`. Raises NoRoom or Refused for errors of the disk.

    `prepare` opens and locks it, `finish` makes it durable, `close` ends the lock. `resumed` tells
    whether something of an earlier restore was found in it.
    """

    def __init__(self, path: str, plan: RestorePlan) -> None:
        self.path = path
        self._plan = plan
        self._lock: int | None = None
        self.resumed = False
        self.files = OutputFiles(path, plan.files)

    def prepare(self) -> None:
        """Makes the directory with all files at their final size; nothing before there is room."""
        try:
            self._check_room()
            self._make()
            self._clean("", {path for path, _ in self._plan.directories})
            for path, _ in self._plan.directories:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(os.path.join(self.path, path), 0o700)
        except OSError as error:
            raise disk_error(self.path, error) from error
        self.files.preallocate()
        for output, head in self._plan.heads.items():
            self.files.write(output, memoryview(head), 0)

    def _check_room(self) -> None:
        parent = os.path.dirname(self.path)
        volume = OPERATING_SYSTEM.volume(parent)
        block = volume.block_bytes
        wanted = sum(-(-file.size // block) * block for file in self._plan.files)
        wanted += block * (len(self._plan.directories) + len(self._plan.symlinks) + 1)
        wanted -= _allocated_bytes(self.path)
        if wanted > volume.free_bytes:
            raise NoRoom(
                f"{parent} has {volume.free_bytes} bytes free, the restore needs {wanted}",
                next=f"df -h {parent}; make room, or choose another --to",
            )

    def _make(self) -> None:
        try:
            os.mkdir(self.path, 0o700)
        except FileExistsError:
            self.resumed = True
        self._lock = os.open(self.path, _DIRECTORY_FLAGS)
        found = os.fstat(self._lock)
        if found.st_uid != os.geteuid():
            raise Refused(
                f"{self.path} belongs to another user", next="remove it, or choose another --to"
            )
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(found, os.lstat(self.path))
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise Refused(
                f"another restore of this version is at work in {self.path}",
                next="wait for it, or choose another --to",
            )
        os.fchmod(self._lock, 0o700)

    def _clean(self, relative: str, directories: set[str]) -> None:
        """Removes what does not belong here, all symlinks included, and makes the rest writable."""
        files = {file.path for file in self._plan.files}
        with os.scandir(os.path.join(self.path, relative)) as found:
            entries = list(found)
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode) and path in directories:
                os.chmod(entry.path, 0o700)
                self._clean(path, directories)
            elif stat.S_ISREG(mode) and path in files and entry.stat().st_nlink == 1:
                os.chmod(entry.path, 0o600)
            else:
                remove_tree(entry.path)

    def matching(self, shard: WantedShard) -> bool:
        """Whether the bytes of a shard are in the files already."""
        covered = 0
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(limits.BULK_BUFFER_BYTES))
        for write in shard.writes:
            if write.shard_offset != covered:
                return False  # a hole or an overlap: its hash cannot be made from one reading
            done = 0
            while done < write.length:
                view = buffer[: min(len(buffer), write.length - done)]
                count = self.files.read_into(write.output_index, view, write.output_offset + done)
                if not count:
                    return False
                digest.update(view[:count])
                done += count
            covered += write.length
        return covered == shard.size and digest.digest() == shard.digest

    def present(self, stop: threading.Event) -> set[int]:
        """The numbers, in the plan, of the shards that need not be fetched again."""
        if not self.resumed:
            return set()

        def look(index: int) -> bool:
            return not stop.is_set() and self.matching(self._plan.shards[index])

        with ThreadPoolExecutor(_HASHES_AT_ONCE, thread_name_prefix="resume") as pool:
            found = pool.map(look, range(len(self._plan.shards)))
            return {index for index, here in enumerate(found) if here}

    def finish(self) -> None:
        """Symlinks, modes, and everything on the medium."""
        with ThreadPoolExecutor(_FLUSHES_AT_ONCE, thread_name_prefix="flush") as pool:
            for _ in pool.map(self.files.finish, range(len(self._plan.files))):
                pass
        self.files.close()
        try:
            for path, link_target in self._plan.symlinks:
                os.symlink(link_target, os.path.join(self.path, path))
            for path, mode in reversed(self._plan.directories):
                _finish_directory(os.path.join(self.path, path), mode)
            _finish_directory(self.path, self._plan.root_mode)
        except OSError as error:
            raise disk_error(self.path, error) from error

    def close(self) -> None:
        """Closes the files and gives up the lock; what was written stays."""
        self.files.close()
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def discard(self) -> None:
        """Removes the directory: nothing in it is worth keeping."""
        if self._lock is not None:
            remove_tree(self.path)
        self.close()


def _finish_directory(path: str, mode: int) -> None:
    # Opened first: the mode may not even allow its owner to read it.
    descriptor = os.open(path, _DIRECTORY_FLAGS)
    try:
        os.fchmod(descriptor, mode)
        try:
            OPERATING_SYSTEM.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems do not flush directories
                raise
    finally:
        os.close(descriptor)


def _allocated_bytes(path: str) -> int:
    """Room that a staging directory takes already."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
    return total
