"""When copies were last hashed, as it is kept over restarts. See docs/formats/disk.md.

Only for the order of scrubbing and for people: whether a copy may be counted on is never decided
by what stands here, because a disk may have done anything since.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import Final

MAGIC: Final = b"ckptd-checks-1\n"
PREFIX_BYTES: Final = 8
_CHECK: Final = struct.Struct(f">{PREFIX_BYTES}sI")
_HASH_BYTES: Final = 32
LATEST_S: Final = 2**32 - 1


def encode(checks: Iterable[tuple[bytes, float]]) -> bytes:
    """The file's content for (digest, seconds since 1970) in order of the digests. Times that do
    not fit (a clock that lies by a century) are left out."""
    data = bytearray(MAGIC)
    for digest, at_s in checks:
        if 0 < at_s <= LATEST_S:
            data += _CHECK.pack(digest[:PREFIX_BYTES], int(at_s))
    with memoryview(data) as written, written[len(MAGIC) :] as packed:
        hashed = hashlib.sha256(packed).digest()
    data += hashed
    return bytes(data)


def decode(data: bytes) -> Iterator[tuple[bytes, int]] | None:
    """(first bytes of a digest, seconds since 1970) in the order in which they were written; None
    when the content is damaged or of another format."""
    packed = memoryview(data)[len(MAGIC) : -_HASH_BYTES]
    whole = len(data) >= len(MAGIC) + _HASH_BYTES and len(packed) % _CHECK.size == 0
    if not whole or not data.startswith(MAGIC):
        return None
    if hashlib.sha256(packed).digest() != data[-_HASH_BYTES:]:
        return None
    return _CHECK.iter_unpack(packed)


def max_bytes(shards: int) -> int:
    """The longest file for this many shards."""
    return len(MAGIC) + _HASH_BYTES + shards * _CHECK.size
