"""Hashing a source once: the SHA-256 of each shard and of each file from the same reading."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from ckptd.client.source import File, Source
from ckptd.core.cutting import Piece, ShardPlan
from ckptd.core.limits import BULK_BUFFER_BYTES
from ckptd.errors import SourceChanged

BLOCK_BYTES: Final = 1024 * 1024
_OPEN_FILES_MAX: Final = 16


@dataclass(frozen=True)
class HashedShard:
    """A shard of a source: where its bytes are, and what they hash to."""

    digest: bytes
    size: int
    pieces: tuple[Piece, ...]


class OpenFiles:
    """The files of a source, opened when needed; the last few stay open."""

    def __init__(self, files: list[File]) -> None:
        self._files = files
        self._open: OrderedDict[int, int] = OrderedDict()

    def descriptor(self, index: int) -> int:
        """The descriptor of file number `index`. Raises SourceChanged."""
        descriptor = self._open.pop(index, -1)
        if descriptor < 0:
            if len(self._open) >= _OPEN_FILES_MAX:
                os.close(self._open.popitem(last=False)[1])
            descriptor = self._files[index].open()
        self._open[index] = descriptor
        return descriptor

    def read_into(self, index: int, view: memoryview, offset: int) -> int:
        """Fills `view` from `offset` on; at least one byte. Raises SourceChanged at the end."""
        try:
            count = os.preadv(self.descriptor(index), [view], offset)
        except OSError as error:
            raise SourceChanged(f"{self._files[index].location}: {error.strerror}") from error
        if not count:
            raise SourceChanged(f"{self._files[index].location} became shorter")
        return count

    def close(self) -> None:
        """Closes all of them."""
        while self._open:
            os.close(self._open.popitem()[1])


class _FileHash:
    """The SHA-256 of a file that is read from its start to its end."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.position = 0

    def update(self, view: memoryview) -> None:
        """What follows at `position`."""
        self._hash.update(view)
        self.position += len(view)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class SourceHasher:
    """Reads a source in the order of its shards.

    The hash of a file follows its pieces while they come in order. What lies between them (a
    header that is packed later, say) is read in addition, so that a file's hash always covers the
    file from its start to its end.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._hashes: defaultdict[int, _FileHash] = defaultdict(_FileHash)
        self._buffer = memoryview(bytearray(BLOCK_BYTES))

    def shards(self, plans: Iterable[ShardPlan]) -> Iterator[HashedShard]:
        """The hashed shards one by one. Blocks on the disk. Raises SourceChanged."""
        files = OpenFiles(self._source.files)
        try:
            for plan in plans:
                shard = hashlib.sha256()
                for piece in plan.pieces:
                    self._hash_piece(files, piece, shard)
                yield HashedShard(shard.digest(), plan.size, plan.pieces)
            for index, file in enumerate(self._source.files):
                self._catch_up(files, index, file.size)
        finally:
            files.close()

    def file_hashes(self) -> list[str]:
        """SHA-256 of each file, once `shards` is exhausted."""
        hashes = [self._hashes[index] for index in range(len(self._source.files))]
        assert [hashed.position for hashed in hashes] == [file.size for file in self._source.files]
        return [hashed.hexdigest() for hashed in hashes]

    def check_fresh(self, stop: threading.Event) -> None:
        """Reads those files again whose times cannot tell whether they held still. Blocks on the
        disk. Raises SourceChanged, also when `stop` is set meanwhile.

        What is the same then was so when the first reading of all files ended, unless it was
        changed and changed back. The later this comes, the more it sees: times are set when a write
        begins, and when a page of a mapping is first written to, not when the last byte comes.
        """
        for file, hashed in zip(self._source.files, self.file_hashes(), strict=True):
            if self._source.is_racy(file) and hash_file(file, stop) != hashed:
                raise SourceChanged(f"{file.location} changed while it was being stored")

    def _hash_piece(self, files: OpenFiles, piece: Piece, shard: hashlib._Hash) -> None:
        self._catch_up(files, piece.file_index, piece.offset)
        whole = self._hashes[piece.file_index]
        offset, end = piece.offset, piece.offset + piece.length
        while offset < end:
            view = self._read(files, piece.file_index, offset, end)
            shard.update(view)
            if offset == whole.position:
                whole.update(view)
            offset += len(view)

    def _catch_up(self, files: OpenFiles, index: int, offset: int) -> None:
        """Hashes the file itself up to `offset`, where its next piece begins."""
        whole = self._hashes[index]
        while whole.position < offset:
            whole.update(self._read(files, index, whole.position, offset))

    def _read(self, files: OpenFiles, index: int, offset: int, end: int) -> memoryview:
        """The next block of a file, at most up to `end`."""
        view = self._buffer[: min(BLOCK_BYTES, end - offset)]
        return view[: files.read_into(index, view, offset)]


class PieceReader:
    """The bytes of one shard, read from the files of the source. One thread at a time."""

    def __init__(self, source: Source, shard: HashedShard) -> None:
        self._files = OpenFiles(source.files)
        self._pieces = shard.pieces
        self._starts: list[int] = []
        start = 0
        for piece in shard.pieces:
            self._starts.append(start)
            start += piece.length
        self._current = 0
        self._buffer = memoryview(bytearray(BULK_BUFFER_BYTES))

    def piece(self, offset: int, size: int) -> memoryview:
        """As ShardSource of `ckptd.net.bulk`. Raises SourceChanged."""
        while offset >= self._starts[self._current] + self._pieces[self._current].length:
            self._current += 1
        while offset < self._starts[self._current]:
            self._current -= 1
        piece = self._pieces[self._current]
        inside = offset - self._starts[self._current]
        view = self._buffer[: min(size, piece.length - inside)]
        return view[: self._files.read_into(piece.file_index, view, piece.offset + inside)]

    def digest(self) -> bytes:
        """SHA-256 of the shard as the files are now."""
        hashed = hashlib.sha256()
        size = self._starts[-1] + self._pieces[-1].length
        offset = 0
        while offset < size:
            piece = self.piece(offset, BULK_BUFFER_BYTES)
            hashed.update(piece)
            offset += len(piece)
        return hashed.digest()

    def close(self) -> None:
        self._files.close()


class BytesReader:
    """A shard that is in memory: the tensor index."""

    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)

    def piece(self, offset: int, size: int) -> memoryview:
        """As ShardSource of `ckptd.net.bulk`."""
        return self._content[offset : offset + size]

    def digest(self) -> bytes:
        """SHA-256 of the bytes."""
        return hashlib.sha256(self._content).digest()

    def close(self) -> None:
        self._content.release()


def hash_file(file: File, stop: threading.Event) -> str:
    """SHA-256 of a file as it is now. Raises SourceChanged, also when `stop` is set meanwhile."""
    descriptor = file.open()
    try:
        hashed = hashlib.sha256()
        buffer = memoryview(bytearray(BLOCK_BYTES))
        while count := os.readv(descriptor, [buffer]):
            hashed.update(buffer[:count])
            if stop.is_set():
                raise SourceChanged(f"{file.location} was not read to its end")
        return hashed.hexdigest()
    finally:
        os.close(descriptor)
