"""Reading one copy from the medium and comparing it with its name. Decides nothing about it."""

from __future__ import annotations

import enum
import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple

from ckptd.core import limits
from ckptd.store.filesystem import FileIdentity, FileSystem
from ckptd.store.medium import Medium


class VerifyResult(enum.StrEnum):
    """What a re-read of one copy has shown."""

    OK = "ok"
    MISSING = "missing"
    CORRUPT = "corrupt"  # the bytes that were read have another hash
    UNREADABLE = "unreadable"


class Look(NamedTuple):
    """What one reading of a file has shown, and of which file. `read_bytes`: how many were read.
    `salted`: the SHA-256 of the salt that was asked for and what was read; empty without one."""

    result: VerifyResult
    identity: FileIdentity | None = None
    read_bytes: int = 0
    salted: bytes = b""


def read_copy(
    filesystem: FileSystem, medium: Medium, path: str, digest: bytes, *, salt: bytes = b""
) -> Look:
    """Reads the file at `path` past the page cache and compares its SHA-256 with `digest`.

    With a `salt` the same bytes are hashed a second time, behind it. An I/O error is UNREADABLE,
    and sets the medium's failed state when the disk is to blame.
    """
    try:
        descriptor = filesystem.open(path, os.O_RDONLY)
        try:
            identity = filesystem.identify(descriptor)
            if identity.size_bytes > limits.SHARD_SIZE_MAX_BYTES:
                return Look(VerifyResult.CORRUPT, identity)
            filesystem.drop_cache(descriptor)
            hashes = [hashlib.sha256()] + ([hashlib.sha256(salt)] if salt else [])
            read_bytes = _hash_file(filesystem, descriptor, identity.size_bytes, hashes)
            # What nobody else reads shall not push out what others do.
            filesystem.drop_cache(descriptor)
        finally:
            filesystem.close(descriptor)
    except FileNotFoundError:
        return Look(VerifyResult.MISSING)
    except OSError as error:
        medium.translate(f"verify shard {digest.hex()}", error)
        return Look(VerifyResult.UNREADABLE)
    if hashes[0].digest() != digest:
        return Look(VerifyResult.CORRUPT, identity, read_bytes)
    return Look(VerifyResult.OK, identity, read_bytes, hashes[1].digest() if salt else b"")


def _hash_file(
    filesystem: FileSystem, descriptor: int, size_bytes: int, hashes: Sequence[hashlib._Hash]
) -> int:
    # One byte at least: a read into nothing would look like the end of the file.
    piece_bytes = max(1, min(size_bytes, limits.STORE_READ_PIECE_BYTES))
    buffer = memoryview(bytearray(piece_bytes))
    offset = 0
    while count := filesystem.pread_into(descriptor, buffer, offset):
        for hashed in hashes:
            hashed.update(buffer[:count])
        offset += count
    return offset
