"""One shard in motion: read from its file, or received into the store."""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Callable

from ckptd.core.limits import BULK_BUFFER_BYTES
from ckptd.errors import ShardCorrupt
from ckptd.store import durable
from ckptd.store.durable import NewFile
from ckptd.store.filesystem import FileSystem, aligned_buffer
from ckptd.store.medium import Medium
from ckptd.store.room import Reservation


class ShardReader:
    """Reads one shard by position; any number of threads may `read_into` at once, one asks for
    pieces.

    The bytes are as the disk gives them: whoever uses them compares the hash. The reader stays
    usable when the shard gets a new copy, or loses its name, meanwhile. Errors: `MediumFailed`,
    `StoreOperationFailed`.
    """

    def __init__(
        self, filesystem: FileSystem, medium: Medium, descriptor: int, digest: bytes, size: int
    ) -> None:
        self._filesystem = filesystem
        self._medium = medium
        self._descriptor = descriptor
        self._closing = threading.Lock()
        self._past_cache = False
        self._buffer: memoryview | None = None
        self.digest = digest
        self.size = size

    def fileno(self) -> int:
        """The file's descriptor, -1 when closed."""
        return self._descriptor

    def bypass_cache(self) -> None:
        """Read past the page cache from now on, as far as buffers and offsets are whole blocks:
        what is handed out once is not read again soon."""
        with self._medium.operation(f"read shard {self.digest.hex()}"):
            self._past_cache = self._filesystem.bypass_cache(self._descriptor, True)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset` on; returns the count of bytes, less only at the end."""
        with self._medium.operation(f"read shard {self.digest.hex()}"):
            count = self._read_past_cache(buffer, offset) if self._past_cache else 0
            if count == len(buffer) or (count and offset + count >= self.size):
                return count
            return count + durable.read_fully(
                self._filesystem, self._descriptor, buffer[count:], offset + count
            )

    def _read_past_cache(self, buffer: memoryview, offset: int) -> int:
        """One read of whole blocks. When it brings less than was asked for and more is there, what
        follows is read through the cache."""
        count = 0
        try:
            count = self._filesystem.pread_into(self._descriptor, buffer, offset)
        except OSError as error:
            # No whole blocks, a buffer at an odd address, or a medium with larger blocks.
            if error.errno != errno.EINVAL:
                raise
        if count < len(buffer) and offset + count < self.size:
            self._filesystem.bypass_cache(self._descriptor, False)
            self._past_cache = False
        return count

    def piece(self, offset: int, size: int) -> memoryview:
        """What follows at `offset`, at least one byte and at most `size` of them, which is at most
        BULK_BUFFER_BYTES. Good until the next call. Raises `ShardCorrupt` where the file ends."""
        if self._buffer is None:
            self._buffer = aligned_buffer(BULK_BUFFER_BYTES)
        view = self._buffer[:size]
        if not (count := self.read_into(view, offset)):
            raise ShardCorrupt(self.digest.hex())
        return view[:count]

    def read(self, size_bytes: int, offset: int) -> bytes:
        """Up to `size_bytes` bytes at `offset`."""
        buffer = bytearray(max(0, min(size_bytes, self.size - offset)))
        count = self.read_into(memoryview(buffer), offset)
        return bytes(buffer[:count])

    def close(self) -> None:
        """Close the file. May be called twice; raises nothing, but a disk's error is noted."""
        with self._closing:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            try:
                self._filesystem.close(descriptor)
            except OSError as error:
                self._medium.translate(f"close shard {self.digest.hex()}", error)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class IncomingShard:
    """A shard that is being received: temporary until `commit` has returned.

    One thread writes and commits. Other threads may read what was written (`reader`, `written`,
    `wait_written`), during and after it. After any error the shard is discarded.
    """

    def __init__(
        self,
        digest: bytes,
        size: int,
        *,
        file: NewFile,
        reservation: Reservation,
        filesystem: FileSystem,
        medium: Medium,
        publish: Callable[[NewFile, bytes, int], None],
        discarded: Callable[[], None],
    ) -> None:
        self.digest = digest
        self.size = size
        self._file = file
        self._reservation = reservation
        self._filesystem = filesystem
        self._medium = medium
        self._publish = publish
        self._discarded = discarded
        self._hash = hashlib.sha256()
        self._progress = threading.Condition()
        self._ended = False
        self._committed = False

    @property
    def written(self) -> int:
        """Bytes that were written so far, and that a `reader` can read."""
        return self._file.written

    @property
    def ended(self) -> bool:
        """Whether nothing more will be written: committed, aborted or failed."""
        return self._ended

    @property
    def committed(self) -> bool:
        """Whether the shard is durable."""
        return self._committed

    def write(self, data: memoryview | bytes | bytearray) -> None:
        """Append `data`. Errors: `ShardCorrupt` past the announced size, `NoRoom`,
        `MediumFailed`, `StoreOperationFailed`."""
        view = memoryview(data).cast("B")
        if self.written + len(view) > self.size:
            self._refuse()
        try:
            with self._medium.operation(f"write shard {self.digest.hex()}"):
                self._file.append(view)
        except Exception:
            self.abort()
            raise
        self._reservation.shrink(len(view))
        with self._progress:
            self._progress.notify_all()
        # Last, so that a reader behind the writer need not wait for it.
        self._hash.update(view)

    def commit(self) -> None:
        """Compare size and hash, and make the shard durable under its name.

        When this returns, the shard survives a loss of power. Errors: `ShardCorrupt` (the bytes
        are not the announced ones and were discarded), `NoRoom`, `MediumFailed`,
        `StoreOperationFailed`; after each of them nothing counts as stored.
        """
        if self.written != self.size or self._hash.digest() != self.digest:
            self._refuse()
        try:
            self._publish(self._file, self.digest, self.size)
        except Exception:
            self.abort()
            raise
        self._committed = True
        self._end()

    def abort(self) -> None:
        """Discard what was written. May be called twice, and after `commit` (then: nothing)."""
        if not self._ended:
            self._file.discard()
            self._end()

    def reader(self) -> ShardReader:
        """A reader behind the writer with a descriptor of its own; the caller closes it.

        To be made before `commit`. It reads what `written` counts, and goes on to do so after
        `commit` and after `abort`.
        """
        with self._medium.operation(f"read shard {self.digest.hex()}"):
            descriptor = self._file.open_again()
        return ShardReader(self._filesystem, self._medium, descriptor, self.digest, self.size)

    def wait_written(self, beyond: int, timeout_s: float) -> int:
        """Wait until more than `beyond` bytes are written, until it `ended`, or for `timeout_s`
        seconds; returns `written`."""
        with self._progress:
            self._progress.wait_for(lambda: self.written > beyond or self._ended, timeout_s)
        return self.written

    def _refuse(self) -> None:
        self.abort()
        self._discarded()
        raise ShardCorrupt(self.digest.hex())

    def _end(self) -> None:
        self._reservation.release()
        with self._progress:
            self._ended = True
            self._progress.notify_all()
