"""What a manifest lists: every file with the parts of shards that it consists of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckptd.client.hashing import HashedShard
from ckptd.client.source import Source
from ckptd.core.documents import Entry, FileEntry, Part
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
