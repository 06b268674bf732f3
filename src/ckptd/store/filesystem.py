"""The port through which the store reaches its disk, and the port on the real operating system.

Every call that changes a file or a name below the store goes through one `FileSystem` object, so
that a test can fail the k-th call, stop the process at it, or replay all of them on a model of a
disk that loses power. The calls are those of the operating system: they raise `OSError` and decide
nothing. What order of calls makes bytes durable is decided in `ckptd.store.durable` alone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import sys
from dataclasses import dataclass
from typing import Final, Protocol

BLOCK_BYTES: Final = max(4096, mmap.PAGESIZE)
"""Offset, length and address in memory of whatever goes past the page cache are multiples of this.
At least a page: one that is in the cache in parts is never also written around it."""


def aligned_buffer(size_bytes: int) -> memoryview:
    """A buffer of zeros whose address is a multiple of BLOCK_BYTES.

    It is shared memory: what is read past the page cache into a private page, while the process
    forks, may end up in the child alone (open(2), O_DIRECT).
    """
    return memoryview(mmap.mmap(-1, size_bytes))


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One name in a directory. `size_bytes` is 0 unless `is_file` (a regular file, no link)."""

    name: str
    is_file: bool
    size_bytes: int


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells one file from another that took its name: device, inode, and its size."""

    device: int
    inode: int
    size_bytes: int

    def same_file(self, other: FileIdentity) -> bool:
        """Whether both are one file, however long it is now."""
        return (self.device, self.inode) == (other.device, other.inode)


@dataclass(frozen=True, slots=True)
class Volume:
    """Room of a whole file system. `free_bytes` is what an ordinary user may still write."""

    total_bytes: int
    free_bytes: int
    block_bytes: int


class FileSystem(Protocol):
    """The calls of the operating system that the store uses. All of them raise `OSError`."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """Open a file; never inherited by a child process. Returns the descriptor."""

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write at `offset`; returns the count of bytes taken, which may be less than given."""

    def pread_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        """Read at `offset` into `buffer`; returns the count of bytes, 0 at the end of the file."""

    def fsync(self, descriptor: int) -> None:
        """Return when bytes and size of the file are on the medium (not in a drive's cache)."""

    def fsync_directory(self, path: str) -> None:
        """Return when the names in the directory are on the medium."""

    def fallocate(self, descriptor: int, size_bytes: int) -> bool:
        """Take `size_bytes` of room for the file without writing and without changing its size.

        False where the file system cannot. `OSError` with ENOSPC where there is no room.
        """

    def rename(self, source: str, target: str) -> None:
        """Give a file a new name in one step; a file that had the name loses it."""

    def mkdir(self, path: str) -> None:
        """Make one directory."""

    def rmdir(self, path: str) -> None:
        """Remove one empty directory."""

    def unlink(self, path: str) -> None:
        """Remove one name of a file."""

    def list_directory(self, path: str) -> list[DirectoryEntry]:
        """The names in a directory, in no particular order."""

    def identify(self, descriptor: int) -> FileIdentity:
        """What file a descriptor is."""

    def identify_path(self, path: str) -> FileIdentity:
        """What file a name leads to; a symlink is not followed."""

    def drop_cache(self, descriptor: int) -> None:
        """Make the next reads of this file come from the medium, as far as the system allows."""

    def bypass_cache(self, descriptor: int, on: bool) -> bool:
        """From now on let what is read and written go past the page cache, or (`on` False) through
        it again. Past it, whatever is not made of whole blocks (BLOCK_BYTES) may fail with EINVAL.

        False where the file system cannot do that; then nothing has changed.
        """

    def volume(self, path: str) -> Volume:
        """Room of the file system that holds `path`."""

    def lock(self, descriptor: int) -> None:
        """Lock the file against other processes; `BlockingIOError` if one of them has it."""


class OperatingSystem:
    """`FileSystem` on the real one: Linux and macOS."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

    def pread_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [buffer], offset)

    def fsync(self, descriptor: int) -> None:
        _flush_to_medium(descriptor)

    def fsync_directory(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            _flush_to_medium(descriptor)
        finally:
            os.close(descriptor)

    def fallocate(self, descriptor: int, size_bytes: int) -> bool:
        return size_bytes == 0 or _allocate(descriptor, size_bytes)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def mkdir(self, path: str) -> None:
        os.mkdir(path, 0o755)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def list_directory(self, path: str) -> list[DirectoryEntry]:
        entries = []
        with os.scandir(path) as names:
            for entry in names:
                is_file = entry.is_file(follow_symlinks=False)
                size = entry.stat(follow_symlinks=False).st_size if is_file else 0
                entries.append(DirectoryEntry(entry.name, is_file, size))
        return entries

    def identify(self, descriptor: int) -> FileIdentity:
        found = os.fstat(descriptor)
        return FileIdentity(found.st_dev, found.st_ino, found.st_size)

    def identify_path(self, path: str) -> FileIdentity:
        found = os.stat(path, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return FileIdentity(found.st_dev, found.st_ino, found.st_size)

    def drop_cache(self, descriptor: int) -> None:
        _drop_cache(descriptor)

    def bypass_cache(self, descriptor: int, on: bool) -> bool:
        return _bypass_cache(descriptor, on)

    def volume(self, path: str) -> Volume:
        found = os.statvfs(path)
        return Volume(
            total_bytes=found.f_blocks * found.f_frsize,
            free_bytes=found.f_bavail * found.f_frsize,
            block_bytes=found.f_frsize,
        )

    def lock(self, descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


if sys.platform == "darwin":
    # struct fstore of sys/fcntl.h: flags, position mode, offset, length, bytes allocated.
    _FSTORE = struct.Struct("=Iiqqq")
    _F_PREALLOCATE = 42
    _F_ALLOCATEALL = 4
    _F_PEOFPOSMODE = 3

    def _flush_to_medium(descriptor: int) -> None:
        # fsync(2) on macOS leaves the bytes in the drive's cache; see its manual page.
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)

    def _allocate(descriptor: int, size_bytes: int) -> bool:
        request = _FSTORE.pack(_F_ALLOCATEALL, _F_PEOFPOSMODE, 0, size_bytes, 0)
        try:
            fcntl.fcntl(descriptor, _F_PREALLOCATE, request)
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                return False
            raise
        return True

    def _drop_cache(descriptor: int) -> None:
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)

    def _bypass_cache(descriptor: int, on: bool) -> bool:
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, int(on))
        return True

else:
    _FALLOC_FL_KEEP_SIZE = 1
    _UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)
    # fallocate(2) itself: Python offers only posix_fallocate, which glibc emulates by writing into
    # every block where the file system cannot allocate.
    _fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    _fallocate.restype = ctypes.c_int

    def _flush_to_medium(descriptor: int) -> None:
        os.fsync(descriptor)

    def _allocate(descriptor: int, size_bytes: int) -> bool:
        while _fallocate(descriptor, _FALLOC_FL_KEEP_SIZE, 0, size_bytes) != 0:
            code = ctypes.get_errno()
            if code in _UNSUPPORTED:
                return False
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        return True

    def _drop_cache(descriptor: int) -> None:
        # Only clean pages are dropped, hence the flush before.
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _bypass_cache(descriptor: int, on: bool) -> bool:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | (os.O_DIRECT if on else 0))
        except OSError as error:
            if error.errno == errno.EINVAL:  # fcntl(2): the file system has no direct I/O
                return False
            raise
        return True


OPERATING_SYSTEM = OperatingSystem()
