"""The index of a store's shards: packed arrays, 64 bytes a shard, whatever the store holds.

Digests are spread evenly over 256 buckets by their first byte, so that adding one moves a few
kilobytes and not the whole index. Not thread-safe: `ShardStore` holds its lock around it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

_DIGEST_BYTES: Final = 32
NEVER: Final = -1.0  # in `verified_at`: not hashed since this process has started


class LastCheck(NamedTuple):
    """A shard and the seconds since its bytes were last hashed, by this process or, as far as that
    is known, by one before it; infinite when nobody knows of any time."""

    age_s: float
    digest: bytes
    size_bytes: int


class _Bucket:
    """Shards whose digests share the first byte: parallel arrays in order of the digests."""

    __slots__ = ("digests", "recorded_at", "sizes", "touched_at", "verified_at")

    def __init__(self) -> None:
        self.digests = bytearray()
        self.sizes = array("Q")
        self.verified_at = array("d")
        self.touched_at = array("d")
        # By the wall clock, from before this process. Counts only while `verified_at` is NEVER.
        self.recorded_at = array("d")

    def find(self, digest: bytes) -> tuple[int, bool]:
        """(position of the digest or of where it belongs, whether it is there)."""
        low, high = 0, len(self.sizes)
        digests = self.digests
        while low < high:
            middle = (low + high) // 2
            if digests[middle * _DIGEST_BYTES : (middle + 1) * _DIGEST_BYTES] < digest:
                low = middle + 1
            else:
                high = middle
        start = low * _DIGEST_BYTES
        return low, digests[start : start + _DIGEST_BYTES] == digest

    def age_s(self, position: int, now: float, wall_s: float) -> float:
        """Seconds since the last hash; a recorded time ahead of the clock is not believed."""
        if self.verified_at[position] != NEVER:
            return max(0.0, now - self.verified_at[position])
        recorded = self.recorded_at[position]
        return wall_s - recorded if NEVER != recorded <= wall_s else math.inf


class ShardIndex:
    """Digest → size in bytes, time of the last hash, time of the last touch."""

    def __init__(self) -> None:
        self._buckets = tuple(_Bucket() for _ in range(256))
        self._count = 0
        self.total_bytes = 0

    def __len__(self) -> int:
        return self._count

    def set(self, digest: bytes, size_bytes: int, *, verified_at: float, touched_at: float) -> None:
        """Add a shard, or replace what is known of it."""
        bucket = self._buckets[digest[0]]
        position, found = bucket.find(digest)
        if found:
            self.total_bytes += size_bytes - bucket.sizes[position]
            bucket.sizes[position] = size_bytes
            bucket.verified_at[position] = verified_at
            bucket.touched_at[position] = touched_at
            return
        start = position * _DIGEST_BYTES
        bucket.digests[start:start] = digest
        bucket.sizes.insert(position, size_bytes)
        bucket.verified_at.insert(position, verified_at)
        bucket.touched_at.insert(position, touched_at)
        bucket.recorded_at.insert(position, NEVER)
        self._count += 1
        self.total_bytes += size_bytes

    def remove(self, digest: bytes) -> bool:
        """Forget a shard; whether it was known."""
        bucket = self._buckets[digest[0]]
        position, found = bucket.find(digest)
        if not found:
            return False
        self.total_bytes -= bucket.sizes.pop(position)
        bucket.verified_at.pop(position)
        bucket.touched_at.pop(position)
        bucket.recorded_at.pop(position)
        del bucket.digests[position * _DIGEST_BYTES : (position + 1) * _DIGEST_BYTES]
        self._count -= 1
        return True

    def size(self, digest: bytes) -> int | None:
        """Size in bytes; None when the shard is not here."""
        bucket = self._buckets[digest[0]]
        position, found = bucket.find(digest)
        return bucket.sizes[position] if found else None

    def verified_at(self, digest: bytes) -> float | None:
        """When the shard was last hashed; None when it is not here or was not since the start."""
        bucket = self._buckets[digest[0]]
        position, found = bucket.find(digest)
        if not found or bucket.verified_at[position] == NEVER:
            return None
        return bucket.verified_at[position]

    def touched_at(self, digest: bytes) -> float | None:
        """When the shard was last wanted by a store; None when it is not here."""
        bucket = self._buckets[digest[0]]
        position, found = bucket.find(digest)
        return bucket.touched_at[position] if found else None

    def set_verified(self, digest: bytes, size_bytes: int, now: float) -> None:
        """Record a good hash and the size it was found with; nothing when the shard is not here."""
        bucket = self._buckets[digest[0]]
        position, found = bucket.find(digest)
        if found:
            self.total_bytes += size_bytes - bucket.sizes[position]
            bucket.sizes[position] = size_bytes
            bucket.verified_at[position] = now

    def set_unverified(self, digest: bytes) -> None:
        """Forget all that is known of when the shard was hashed."""
        bucket = self._buckets[digest[0]]
        position, found = bucket.find(digest)
        if found:
            bucket.verified_at[position] = NEVER
            bucket.recorded_at[position] = NEVER

    def recall(self, prefix: bytes, wall_s: float) -> None:
        """Record that the shard whose digest begins with `prefix` was hashed at this time of the
        wall clock, before this process; nothing when it is not here."""
        bucket = self._buckets[prefix[0]]
        position, _ = bucket.find(prefix.ljust(_DIGEST_BYTES, b"\0"))
        start = position * _DIGEST_BYTES
        if bucket.digests[start : start + len(prefix)] == prefix:
            bucket.recorded_at[position] = wall_s

    def last_checks(self, first_byte: int, now: float, wall_s: float) -> list[LastCheck]:
        """The shards whose digests begin with this byte. `now` is by the clock of `verified_at`,
        `wall_s` by that of `recall`; a recorded time ahead of it is not believed."""
        bucket = self._buckets[first_byte]
        found = []
        for position, size_bytes in enumerate(bucket.sizes):
            start = position * _DIGEST_BYTES
            digest = bytes(bucket.digests[start : start + _DIGEST_BYTES])
            found.append(LastCheck(bucket.age_s(position, now, wall_s), digest, size_bytes))
        return found

    def last_check(self, digest: bytes, size_bytes: int, now: float, wall_s: float) -> float | None:
        """Seconds since the shard was last hashed, as in `last_checks`; None when it is not here
        with this size."""
        bucket = self._buckets[digest[0]]
        position, found = bucket.find(digest)
        if not found or bucket.sizes[position] != size_bytes:
            return None
        return bucket.age_s(position, now, wall_s)

    def touch(self, digest: bytes, now: float) -> bool:
        """Record that a store wants the shard; False when it is not here. An earlier time than the
        recorded one changes nothing: two stores may want it at once."""
        bucket = self._buckets[digest[0]]
        position, found = bucket.find(digest)
        if found:
            bucket.touched_at[position] = max(bucket.touched_at[position], now)
        return found

    def bucket_digests(self, first_byte: int) -> list[bytes]:
        """The digests that begin with this byte, in order: 1/256 of the store at a time."""
        digests = bytes(self._buckets[first_byte].digests)
        return [
            digests[start : start + _DIGEST_BYTES]
            for start in range(0, len(digests), _DIGEST_BYTES)
        ]

    def memory_bytes(self) -> int:
        """Bytes that the arrays take, their spare room included."""
        return sum(array_.__sizeof__() for array_ in self._arrays())

    def _arrays(self) -> Iterator[bytearray | array[int] | array[float]]:
        for bucket in self._buckets:
            yield bucket.digests
            yield bucket.sizes
            yield bucket.verified_at
            yield bucket.touched_at
            yield bucket.recorded_at

    def load(self, shards: Iterable[tuple[bytes, int]], now: float) -> None:
        """Add many shards as found by a scan: never verified, touched now."""
        for digest, size_bytes in shards:
            self.set(digest, size_bytes, verified_at=NEVER, touched_at=now)
