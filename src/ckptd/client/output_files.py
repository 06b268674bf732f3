"""The files that a restore writes: room taken beforehand, written at any place from any thread."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ckptd.client.range_writer import BlockRange, PlainRange, range_of_file
from ckptd.errors import NoRoom, Refused
from ckptd.store.filesystem import OPERATING_SYSTEM

_OPEN_MAX: Final = 64
_PREALLOCATE_FROM_BYTES: Final = 256 * 1024
WRITEBACK_BYTES: Final = 8 * 1024 * 1024
"""The disk is told to begin after so many bytes, so that the flush at the end is short."""


@dataclass(frozen=True)
class OutputFile:
    """A file to write. `path` is relative to the staging directory."""

    path: str
    size: int
    mode: int


class _CannotBypass(Exception):
    """This file system, or its medium, has no direct I/O in blocks of ours."""


@dataclass
class _Open:
    descriptor: int
    users: int = 0


class OutputFiles:
    """Writes and reads `files` below `root`, keeping the last few open. Thread-safe.

    Raises NoRoom, or Refused with the file that the disk failed at.
    """

    def __init__(self, root: str, files: Sequence[OutputFile]) -> None:
        self._root = root
        self._files = files
        self._lock = threading.Lock()
        # By output, and whether what is written there goes past the page cache.
        self._open: OrderedDict[tuple[int, bool], _Open] = OrderedDict()
        self._can_bypass = True

    def path(self, output: int) -> str:
        """Where an output lies."""
        return os.path.join(self._root, self._files[output].path)

    def preallocate(self) -> None:
        """Makes all files, each of its final size, with room on the disk where it can be had."""
        for output, file in enumerate(self._files):
            with self._errors(output):
                # Not through the cache: each is opened once here, and most are small.
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                descriptor = os.open(self.path(output), flags, 0o600)
                try:
                    found = os.fstat(descriptor)
                    taken = found.st_blocks * 512 >= file.size
                    if file.size >= _PREALLOCATE_FROM_BYTES and not taken:
                        OPERATING_SYSTEM.fallocate(descriptor, file.size)
                    if found.st_size != file.size:
                        os.ftruncate(descriptor, file.size)
                finally:
                    os.close(descriptor)

    def write(self, output: int, view: memoryview, offset: int) -> None:
        """Writes all of `view` at `offset`."""
        with self._errors(output), self._opened(output) as descriptor:
            done = 0
            while done < len(view):
                done += os.pwrite(descriptor, view[done:], offset + done)
            block = offset // WRITEBACK_BYTES
            if (offset + len(view)) // WRITEBACK_BYTES != block:
                _begin_writeback(descriptor, block * WRITEBACK_BYTES, WRITEBACK_BYTES)

    def write_blocks(self, output: int, view: memoryview, offset: int) -> None:
        """As `write`, past the page cache where that is possible: whole blocks, from an aligned
        buffer."""
        if self._can_bypass:
            try:
                with self._errors(output), self._opened(output, past_cache=True) as descriptor:
                    done = 0
                    while done < len(view):
                        done += os.pwrite(descriptor, view[done:], offset + done)
                return
            except _CannotBypass:
                self._can_bypass = False
        self.write(output, view, offset)

    def range_writer(self, output: int, offset: int, length: int) -> PlainRange | BlockRange:
        """As in Outputs of `pull_threads`."""
        return range_of_file(self, output, offset, length)

    def read_into(self, output: int, view: memoryview, offset: int) -> int:
        """Reads at `offset`; the count of bytes, 0 at the end."""
        with self._errors(output), self._opened(output) as descriptor:
            return os.preadv(descriptor, [view], offset)

    def finish(self, output: int) -> None:
        """Gives a file its mode, and returns when it is on the medium."""
        with self._errors(output), self._opened(output) as descriptor:
            os.fchmod(descriptor, self._files[output].mode)
            OPERATING_SYSTEM.fsync(descriptor)

    def close(self) -> None:
        """Closes all files."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1].descriptor)

    @contextlib.contextmanager
    def _opened(self, output: int, *, past_cache: bool = False) -> Iterator[int]:
        key = output, past_cache
        with self._lock:
            entry = self._open.pop(key, None)
            if entry is None:
                self._make_room()
                entry = _Open(self._descriptor(output, past_cache=past_cache))
            self._open[key] = entry
            entry.users += 1
        try:
            yield entry.descriptor
        except OSError as error:
            if past_cache and error.errno == errno.EINVAL:  # a medium with larger blocks
                raise _CannotBypass from error
            raise
        finally:
            with self._lock:
                entry.users -= 1

    def _descriptor(self, output: int, *, past_cache: bool) -> int:
        descriptor = os.open(self.path(output), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if past_cache and not OPERATING_SYSTEM.bypass_cache(descriptor, True):
                raise _CannotBypass
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _make_room(self) -> None:
        if len(self._open) >= _OPEN_MAX:
            for key, entry in self._open.items():
                if not entry.users:
                    del self._open[key]
                    os.close(entry.descriptor)
                    return

    @contextlib.contextmanager
    def _errors(self, output: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_error(self.path(output), error) from error


def disk_error(path: str, error: OSError) -> NoRoom | Refused:
    """What an error of the target's disk means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoRoom(
            f"{path}: {error.strerror}", next=f"df -h {os.path.dirname(path)}; then restore again"
        )
    return Refused(f"{path}: {error.strerror or error}")


if sys.platform == "linux":
    # sync_file_range(2): Python does not offer it.
    _SYNC_FILE_RANGE_WRITE = 2
    _sync_file_range = ctypes.CDLL(None, use_errno=True).sync_file_range
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    _sync_file_range.restype = ctypes.c_int

    def _begin_writeback(descriptor: int, offset: int, size: int) -> None:
        # A hint: where it fails, the flush at the end does all of the work, and reports errors.
        _sync_file_range(descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)

else:

    def _begin_writeback(descriptor: int, offset: int, size: int) -> None:
        """The system begins by itself."""
