"""What checkpoints held when they were last read, so that a restart need not read them again.

A small file below the node's state. Losing it costs nothing but reading. Believing something wrong
in it could leave a checkpoint unprotected, so it carries its own hash and is thrown away as a whole
when that does not fit.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Final

import structlog

from ckptd.client.source import Source
from ckptd.core import limits

_log = structlog.get_logger(__name__)

FILE: Final = "contents"
_MAGIC: Final = b"ckptd-contents-v1\n"
_ENTRY_BYTES: Final = 64
_HASH_BYTES: Final = 32


class ContentMemory:
    """Content ids by the fingerprint of a checkpoint at its place.

    `path` is the file: a first line, then 64 bytes for each entry (key, content id), least lately
    used first, then the SHA-256 of everything before. One thread at a time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = self._read()
        self._changed = False

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, source: Source) -> str | None:
        """The content id of a source that is what it was when its content was last told."""
        key = fingerprint_of(source)
        found = self._entries.get(key)
        if found is None:
            return None
        self._entries.move_to_end(key)
        return found.hex()

    def put(self, source: Source, content_id: str) -> None:
        """This is what the source holds. One whose times are too fresh is not remembered: its
        next change may leave them as they are."""
        if any(source.is_racy(file) for file in source.files):
            return
        key, value = fingerprint_of(source), bytes.fromhex(content_id)
        if self._entries.get(key) != value:
            self._entries[key] = value
            self._changed = True
        self._entries.move_to_end(key)
        while len(self._entries) > limits.CONTENT_MEMORY_ENTRIES_MAX:
            self._entries.popitem(last=False)

    def save(self) -> None:
        """Writes the file if anything was learned. Blocks. A disk that does not take it is logged:
        nothing depends on it."""
        if not self._changed:
            return
        body = _MAGIC + b"".join(key + value for key, value in self._entries.items())
        temporary = self._path.with_suffix(".new")
        try:
            with open(temporary, "wb") as file:
                file.write(body + hashlib.sha256(body).digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except OSError as error:
            _log.warning(
                "content_memory_not_written",
                path=str(self._path),
                reason=error.strerror,
                next=f"ls -la {self._path.parent}",
            )
            return
        self._changed = False

    def _read(self) -> OrderedDict[bytes, bytes]:
        empty: OrderedDict[bytes, bytes] = OrderedDict()
        try:
            with open(self._path, "rb") as file:
                raw = file.read(limits.CONTENT_MEMORY_MAX_BYTES + 1)
        except OSError:
            return empty
        body, told = raw[:-_HASH_BYTES], raw[-_HASH_BYTES:]
        entries = body.removeprefix(_MAGIC)
        if (
            len(raw) > limits.CONTENT_MEMORY_MAX_BYTES
            or not body.startswith(_MAGIC)
            or len(entries) % _ENTRY_BYTES
            or hashlib.sha256(body).digest() != told
        ):
            _log.warning("content_memory_dropped", path=str(self._path))
            return empty
        for start in range(0, len(entries), _ENTRY_BYTES):
            entry = entries[start : start + _ENTRY_BYTES]
            empty[entry[:32]] = entry[32:]
        return empty


def fingerprint_of(source: Source) -> bytes:
    """32 bytes that change whenever a source moves, or anything in it changes, as far as stat(2)
    shows it."""
    hashed = hashlib.sha256(b"ckptd-fingerprint-v1")

    def add(*fields: object) -> None:
        for field in fields:
            raw = str(field).encode("utf-8", "surrogateescape")
            hashed.update(len(raw).to_bytes(4, "big") + raw)

    add(source.root, source.unit)
    for file in source.files:
        print_ = file.fingerprint
        add("file", file.path, file.mode, print_.device, print_.inode, print_.size)
        add(print_.mtime_ns, print_.ctime_ns)
    for directory in source.directories:
        add("directory", directory.path, directory.mode)
    for link in source.symlinks:
        add("symlink", link.path, link.target)
    return hashed.digest()
