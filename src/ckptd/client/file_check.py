"""Hashes the files of a restore behind the shards that arrive, in a thread of its own.

Every shard was compared already; this compares what can be read back from the file with the
manifest, over the seams of shards, before the file gets its name.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from ckptd.core.layout import PartLike
from ckptd.errors import IntegrityError
from ckptd.store.filesystem import BLOCK_BYTES, aligned_buffer

_PIECE_BYTES: Final = 1024 * 1024
_WAIT_S: Final = 1.0

ReadBlocks = Callable[[int, memoryview, int], int]
"""(output, view, offset) -> count of bytes; as `OutputFiles.read_blocks`."""


class CheckedFile(NamedTuple):
    """A file to hash: `parts` in file order, by the manifest's numbers of shards.

    `sha256` in hex; None: not compared.
    """

    path: str
    parts: Sequence[PartLike]
    sha256: str | None


class FileCheck:
    """Hashes `files` as far as their shards are there. `shard_done` may be called by any thread."""

    def __init__(self, files: Sequence[CheckedFile], shards: int, read_blocks: ReadBlocks) -> None:
        self._files = files
        self._read_blocks = read_blocks
        self._done = bytearray(shards)
        self._changed = threading.Condition()
        self._waiting: dict[int, list[int]] = {}  # by shard, the files that cannot go on without
        self._ready: deque[int] = deque()
        # By file, how far it is: its hash, the next part, the offset in the file.
        self._states: dict[int, tuple[hashlib._Hash, int, int]] = {}
        self._unfinished = 0
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="file hashes", daemon=True)
        for number, file in enumerate(files):
            if file.sha256 is not None:
                self._unfinished += 1
                self._queue(number, 0)
        self._thread.start()

    def shard_done(self, shard: int) -> None:
        """The bytes of shard number `shard` are in the files."""
        with self._changed:
            self._done[shard] = 1
            if numbers := self._waiting.pop(shard, None):
                self._ready.extend(numbers)
                self._changed.notify_all()

    def finish(self) -> None:
        """Waits until all files are hashed; to be called when all shards are done.

        Raises IntegrityError for a file that has not its recorded hash, and what reading raises.
        """
        with self._changed:
            while self._unfinished and self._error is None and self._thread.is_alive():
                self._changed.wait(_WAIT_S)
            error = self._error
        self.close()
        if error is not None:
            raise error

    def close(self) -> None:
        """Stops the thread. May be called twice."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    def _queue(self, number: int, part_index: int) -> None:
        """Makes a file ready, or lets it wait for the shard of its next part."""
        parts = self._files[number].parts
        shard = parts[part_index].shard_index if part_index < len(parts) else None
        if shard is None or self._done[shard]:
            self._ready.append(number)
        else:
            self._waiting.setdefault(shard, []).append(number)

    def _run(self) -> None:
        buffer = aligned_buffer(_PIECE_BYTES)
        try:
            while (number := self._next()) is not None:
                self._advance(number, buffer)
        except BaseException as error:  # the edge of this thread: `finish` raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> int | None:
        with self._changed:
            while not (self._ready or self._ended):
                self._changed.wait(_WAIT_S)
            return None if self._ended else self._ready.popleft()

    def _advance(self, number: int, buffer: memoryview) -> None:
        """Hashes a file up to the first part whose shard is missing."""
        file = self._files[number]
        digest, part_index, offset = self._states.pop(number, (hashlib.sha256(), 0, 0))
        while part_index < len(file.parts) and self._done[file.parts[part_index].shard_index]:
            end = offset + file.parts[part_index].length
            while offset < end and not self._ended:
                skipped = offset % BLOCK_BYTES
                count = self._read_blocks(number, buffer, offset - skipped)
                piece = buffer[skipped : min(count, skipped + end - offset)]
                if not piece:
                    raise IntegrityError(f"{file.path} became shorter while it was restored")
                digest.update(piece)
                offset += len(piece)
            part_index += 1
        with self._changed:
            if part_index < len(file.parts):
                self._states[number] = (digest, part_index, offset)
                self._queue(number, part_index)
                return
        if digest.hexdigest() != file.sha256 and not self._ended:
            raise IntegrityError(
                f"{file.path}: what was read back does not have the recorded hash, although every "
                "shard had: suspect this machine's disk or memory",
                next="check the disk (dmesg), then restore again",
            )
        with self._changed:
            self._unfinished -= 1
            self._changed.notify_all()
