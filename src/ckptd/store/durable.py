"""The only place that decides which calls, in which order, make bytes and names durable.

A file is written under a temporary name, flushed, renamed to its name, and the directory of that
name is flushed. A name is therefore either absent or leads to whole bytes, whatever moment the
power goes; and after `publish` has returned it is there. A directory that was made on the way is
flushed into its parent before anything in it counts.

A flush that failed once proves nothing when it succeeds the second time (the kernel may have
dropped the dirty pages), so no file is flushed again: it is removed, and has to be written anew.
"""

from __future__ import annotations

import errno
import itertools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Final

from ckptd.store.filesystem import BLOCK_BYTES, FileSystem

_NEW_FILE_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL
_temporary_numbers = itertools.count()


class FileTooLong(OSError):
    """A file is longer than any that the store writes in its place."""


class NewFile:
    """A file on its way into the store: temporary until `publish` has returned.

    One thread writes. `written` may be read by any thread: bytes below it can be read back through
    `open_again()`. After an error from any method the temporary file is gone (or, where even that
    fails, left to the next start, which empties incoming/).
    """

    def __init__(self, filesystem: FileSystem, path: str) -> None:
        self._filesystem = filesystem
        self.path = path
        self.written = 0
        self._past_cache = False
        self._descriptor: int | None = filesystem.open(self.path, _NEW_FILE_FLAGS)

    def reserve(self, size_bytes: int) -> bool:
        """Take room on disk for `size_bytes`; False where the file system cannot do that."""
        try:
            return self._filesystem.fallocate(self._opened(), size_bytes)
        except OSError:
            self.discard()
            raise

    def bypass_cache(self) -> None:
        """Write past the page cache from now on, where that is possible: what is stored is not
        read again soon, and taking pages for it costs more than hashing it."""
        try:
            self._past_cache = self._filesystem.bypass_cache(self._opened(), True)
        except OSError:
            self.discard()
            raise

    def append(self, data: memoryview) -> None:
        """Write all of `data` (a view of bytes) behind what was written so far."""
        try:
            if self._past_cache:
                data = data[self._append_past_cache(data) :]
            self._append(data)
        except OSError:
            self.discard()
            raise

    def _append_past_cache(self, data: memoryview) -> int:
        """Write the whole blocks of `data`; returns their size. What is left, and all that comes
        after it, has to go through the cache."""
        whole = len(data) - len(data) % BLOCK_BYTES
        before = self.written
        try:
            self._append(data[:whole])
        except OSError as error:
            # A medium with larger blocks, or a buffer at an odd address.
            if error.errno != errno.EINVAL:
                raise
        done = self.written - before
        if done < len(data):
            self._filesystem.bypass_cache(self._opened(), False)
            self._past_cache = False
        return done

    def _append(self, data: memoryview) -> None:
        descriptor = self._opened()
        position = 0
        while position < len(data):
            count = self._filesystem.pwrite(descriptor, data[position:], self.written)
            position += count
            self.written += count

    def open_again(self) -> int:
        """A descriptor of its own for a reader behind the writer; the caller closes it."""
        return self._filesystem.open(self.path, os.O_RDONLY)

    def publish(
        self, target: str, *, renaming: AbstractContextManager[object] | None = None
    ) -> None:
        """Make the file durable as `target`, whose directory must be durable itself.

        The rename alone happens inside `renaming`. When the flush of the directory fails, whole
        bytes may lie under the name, but nobody was told so: they are written anew.
        """
        try:
            self._filesystem.fsync(self._opened())
            self._close()
            with renaming or nullcontext():
                self._filesystem.rename(self.path, target)
        except OSError:
            self.discard()
            raise
        self._filesystem.fsync_directory(os.path.dirname(target))

    def discard(self) -> None:
        """Remove the temporary file; errors are left to the next start. May be called twice."""
        try:
            self._close()
        except OSError:
            pass  # nothing counts on these bytes any more
        _remove_if_possible(self._filesystem, self.path)

    def _opened(self) -> int:
        if self._descriptor is None:
            raise ValueError("the file is published or discarded already")
        return self._descriptor

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            self._filesystem.close(descriptor)


def temporary_path(incoming: str, label: str) -> str:
    """A path in incoming/ that no other file of this process has; `label` is for the reader."""
    return os.path.join(incoming, f"{label}.{next(_temporary_numbers)}")


def write_file(filesystem: FileSystem, temporary: str, target: str, data: bytes) -> None:
    """Write a small file in one go and make it durable as `target`. Raises `OSError`."""
    file = NewFile(filesystem, temporary)
    file.append(memoryview(data))
    file.publish(target)


def make_directory(filesystem: FileSystem, path: str) -> None:
    """Make one directory durably. Raises `OSError`.

    One that is there already is flushed into its parent all the same: the process that made it may
    have died before it did so.
    """
    made = True
    try:
        filesystem.mkdir(path)
    except FileExistsError:
        made = False
    try:
        filesystem.fsync_directory(os.path.dirname(path))
    except OSError:
        if made:
            _remove_directory_if_possible(filesystem, path)
        raise


def flush_move(filesystem: FileSystem, source: str, target: str) -> None:
    """Make a rename durable that was done before: first the new name, then the loss of the old."""
    filesystem.fsync_directory(os.path.dirname(target))
    filesystem.fsync_directory(os.path.dirname(source))


def read_file(
    filesystem: FileSystem, path: str, max_bytes: int, *, uncached: bool = False
) -> bytes:
    """All bytes of a file; `FileTooLong` when they are more than `max_bytes`."""
    descriptor = filesystem.open(path, os.O_RDONLY)
    try:
        if uncached:
            filesystem.drop_cache(descriptor)
        size = filesystem.identify(descriptor).size_bytes
        if size > max_bytes:
            raise FileTooLong(errno.EFBIG, f"longer than {max_bytes} bytes", path)
        buffer = bytearray(size)
        count = read_fully(filesystem, descriptor, memoryview(buffer), 0)
        return bytes(buffer[:count])
    finally:
        filesystem.close(descriptor)


def read_fully(filesystem: FileSystem, descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset` on; returns the count of bytes, less only at the file's end."""
    position = 0
    while position < len(buffer):
        count = filesystem.pread_into(descriptor, buffer[position:], offset + position)
        if count == 0:
            break
        position += count
    return position


def _remove_if_possible(filesystem: FileSystem, path: str) -> None:
    try:
        filesystem.unlink(path)
    except OSError:
        pass  # gone already, or the disk fails: the error that led here says so


def _remove_directory_if_possible(filesystem: FileSystem, path: str) -> None:
    try:
        filesystem.rmdir(path)
    except OSError:
        pass  # see above
