"""What garbage collection may remove on one worker: decisions without a disk or a clock.

A shard goes when no manifest names it that must be kept, when a grace of the node's own running
time is over since a store last wanted it, and when the node has since heard all that at least half
of the other workers know. Whatever is in doubt stays. docs/retention.md explains it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final

from msgspec import Struct

from ckptd.core.catalogue import Catalogue

_DIGEST_BYTES: Final = 32


class Fate(Struct, frozen=True):
    """What may become of a dead version.

    `is_final`: nothing can speak for it any more. Else it goes once one of the versions `if_any`
    (ids) is confirmed protected, and waits as long as none is. `is_pinned`: a pin speaks for it.
    """

    is_final: bool = False
    if_any: frozenset[str] = frozenset()
    is_pinned: bool = False

    @property
    def waits_in_vain(self) -> bool:
        """Whether nothing that could still come to be protected justifies it."""
        return not self.is_final and not self.is_pinned and not self.if_any

    def may_go(self, protected: Collection[str]) -> bool:
        """Whether it may go, with these versions confirmed protected."""
        return self.is_final or any(version_id in protected for version_id in self.if_any)


_FINAL: Final = Fate(is_final=True)


def fate_of(catalogue: Catalogue, version_id: str) -> Fate:
    """What may become of the dead version `version_id`.

    Somebody's `rm` is final. What a policy dropped waits for what justifies it, and as long as a
    pin names it. A version that justifies may have been dropped by the policy itself since: then
    what justifies that one counts. When somebody removed the last of them, and with it everything
    that was left of the run, nothing is there for which the older ones could be kept.
    """
    if any(tombstone.reason == "rm" for tombstone in catalogue.tombstones_of(version_id)):
        return _FINAL
    if catalogue.pins(version_id):
        return Fate(is_pinned=True)
    live: set[str] = set()
    removed = False
    seen: set[str] = set()
    pending = [version_id]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        tombstones = catalogue.tombstones_of(current)
        if not tombstones:
            live.add(current)
        elif any(tombstone.reason == "rm" for tombstone in tombstones):
            removed = True
        else:
            pending += [t.justified_by for t in tombstones if t.justified_by is not None]
    if not live and removed and _is_run_gone(catalogue, version_id):
        return _FINAL
    return Fate(if_any=frozenset(live))


def _is_run_gone(catalogue: Catalogue, version_id: str) -> bool:
    version = catalogue.version(version_id)
    return version is not None and not catalogue.run_versions(version.run)


class Census(Struct, frozen=True):
    """What a node knew at the moment `at_s`: the ids of versions that are live, and what may become
    of the dead ones whose manifests are still here."""

    at_s: float
    live: frozenset[str]
    dead: dict[str, Fate]


def census(catalogue: Catalogue, at_s: float) -> Census:
    """The state of `catalogue`, which is that of the moment `at_s`."""
    dead = {each for each in catalogue.dead_ids if catalogue.version(each) is not None}
    live = frozenset(version.id for version in catalogue.live_versions())
    return Census(at_s, live, {each: fate_of(catalogue, each) for each in dead})


def heard_by_half_s(heard_s: Mapping[str, float | None], others: Collection[str]) -> float | None:
    """Until when the catalogues of at least half of the `others` are known here; None when that
    was never so.

    `heard_s` tells for each node when the last complete exchange with it began, by the clock of the
    result; `others` are the remembered, not forgotten other workers. One at least must have been
    heard: a node that is alone with itself knows nothing.
    """
    needed = max(1, (len(others) + 1) // 2)
    known = [at for node in others if (at := heard_s.get(node)) is not None]
    if len(known) < needed:
        return None
    return sorted(known, reverse=True)[needed - 1]


def is_over(since_s: float, *, grace_s: float, now_s: float, heard_s: float | None) -> bool:
    """Whether the grace that began at `since_s` is over, and half of the others were heard after
    that. All on the clock of the node's running time."""
    over_s = since_s + grace_s
    return over_s <= now_s and heard_s is not None and over_s <= heard_s


class Marks:
    """Which of a store's shards are named by what must be kept: one bit for each.

    `digests` are 32 bytes each, ascending.
    """

    def __init__(self, digests: Iterable[bytes]) -> None:
        self._digests = bytearray()
        for digest in digests:
            self._digests += digest
        self._count = len(self._digests) // _DIGEST_BYTES
        self._bits = bytearray((self._count + 7) // 8)

    def __len__(self) -> int:
        return self._count

    def mark(self, digest: bytes) -> None:
        """This shard is named; one that is not in the store is nothing to mark."""
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            if self._digest(middle) < digest:
                low = middle + 1
            else:
                high = middle
        if low < self._count and self._digest(low) == digest:
            self._bits[low >> 3] |= 1 << (low & 7)

    def unmarked(self) -> Iterator[bytes]:
        """The shards that nothing names, ascending."""
        for index in range(self._count):
            if not self._bits[index >> 3] & (1 << (index & 7)):
                yield self._digest(index)

    def _digest(self, index: int) -> bytes:
        start = index * _DIGEST_BYTES
        return bytes(self._digests[start : start + _DIGEST_BYTES])
