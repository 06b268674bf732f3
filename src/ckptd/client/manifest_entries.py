"""What a manifest lists: every file with the parts of shards that it consists of; and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckptd.client.hashing import HashedShard
from ckptd.client.source import Source
from ckptd.core.cutting import Piece
from ckptd.core.documents import Entry, FileEntry, Manifest, Part
from ckptd.core.names import path_to_json


def entries_of(
    source: Source, hashes: Sequence[str], placed: Iterable[HashedShard], shards: Sequence[bytes]
) -> tuple[Entry, ...]:
    """The entries of `source`, by path.

    `hashes` are the files' SHA-256 in their order, `placed` all shards that were cut (equal ones
    each time), `shards` the digests in the order in which the manifest names them.
    """
    index_of = {digest: index for index, digest in enumerate(shards)}
    parts: list[list[tuple[int, Part]]] = [[] for _ in source.files]
    for hashed in placed:
        start = 0
        for piece in hashed.pieces:
            part = Part(index_of[hashed.digest], start, piece.length)
            parts[piece.file_index].append((piece.offset, part))
            start += piece.length
    files = [
        FileEntry(
            path=path_to_json(file.path),
            mode=file.mode,
            size=file.size,
            sha256=hashes[index],
            parts=tuple(part for _, part in sorted(parts[index], key=lambda item: item[0])),
        )
        for index, file in enumerate(source.files)
    ]
    entries: list[Entry] = [*files, *source.directories, *source.symlinks]
    return tuple(sorted(entries, key=lambda entry: entry.path))


def shards_of(manifest: Manifest, source: Source) -> list[HashedShard | None]:
    """Where the bytes of the manifest's shards are in `source`, which has the same content.

    None for a shard that does not consist of the files alone: the tensor index.
    """
    number_of = {path_to_json(file.path): number for number, file in enumerate(source.files)}
    found: list[list[tuple[int, Piece]]] = [[] for _ in manifest.shards]
    for entry in manifest.entries:
        if isinstance(entry, FileEntry):
            offset = 0
            for part in entry.parts:
                piece = Piece(number_of[entry.path], offset, part.length)
                found[part.shard_index].append((part.offset, piece))
                offset += part.length
    return [
        _joined(bytes.fromhex(reference.shard), reference.size, sorted(pieces))
        for reference, pieces in zip(manifest.shards, found, strict=True)
    ]


def _joined(digest: bytes, size: int, pieces: list[tuple[int, Piece]]) -> HashedShard | None:
    """The shard, if the pieces cover it. Equal bytes may stand at one place several times."""
    chosen: list[Piece] = []
    end = 0
    for start, piece in pieces:
        if start == end:
            chosen.append(piece)
            end += piece.length
    return HashedShard(digest, size, tuple(chosen)) if end == size else None
