"""One round of questions about versions: what is missing where, and who has a copy too many.

A round takes many steps when there are many versions. What is kept of a version is a few numbers,
and only while something is missing; what is kept of shards is 8 bytes each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from ckptd.core.headers import VersionHeader
from ckptd.core.repair import Needs, SeenShards, VersionCopies
from ckptd.core.trimming import droppers, fullest
from ckptd.core.workers import Worker
from ckptd.node.inventories import batches

SETS_KEPT_MAX: Final = 64


@dataclass
class Totals:
    """Distinct shards of the versions of a round: to be copied (with the bytes of the copies),
    with too few copies, with none, and with a copy too many."""

    queued_shards: int = 0
    queued_bytes: int = 0
    under_replicated: int = 0
    unrecoverable: int = 0
    surplus: int = 0


@dataclass
class Scan:
    """A round over `headers`. `urgencies` are of the versions that lack something, `fine` those
    that lack nothing; `sets` are the sets of nodes that shards lie on, with how many do; `asked`
    are the nodes that there were questions for, `silent` those that left one unanswered, and are
    asked no more in this round."""

    headers: Sequence[VersionHeader]
    is_full: bool
    started_s: float
    totals: Totals = field(default_factory=Totals)
    urgencies: dict[str, int] = field(default_factory=dict)
    fine: set[str] = field(default_factory=set)
    young: int = 0
    sets: Counter[frozenset[str]] = field(default_factory=Counter)
    asked: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._seen = SeenShards()
        self._batches = batches(self.headers)
        self._dropping: Counter[str] = Counter()  # bytes, by node

    def next_batch(self) -> list[VersionHeader] | None:
        """The versions to ask about next; None at the end of the round."""
        return next(self._batches, None)

    def note(
        self, version: VersionCopies, needs: Needs, workers: dict[str, Worker], *, is_young: bool
    ) -> dict[str, list[bytes]]:
        """Takes in the answers about one version. Returns by node which copies are too many.

        What `is_young` may be under way to its nodes just now: nothing is counted or queued."""
        shortage = needs.shortage(version)
        if is_young and (shortage.missing or shortage.lost):
            self.young += 1
            return {}
        if shortage.urgency is not None:
            self.urgencies[version.version] = shortage.urgency
        if not shortage.missing and not shortage.lost:
            self.fine.add(version.version)
        surplus: dict[str, list[bytes]] = {}
        known: dict[frozenset[str], tuple[str, ...]] = {}
        for index, (need, holders) in enumerate(needs.each(version)):
            shard, size = version.shards[index]
            is_new = self._seen.add(shard)
            if need.lost:
                self.totals.unrecoverable += is_new
            elif need.missing:
                self.totals.queued_shards += is_new
                self.totals.queued_bytes += is_new * need.missing * size
                self.totals.under_replicated += is_new and need.missing > need.drained
            else:
                if holders not in known:
                    known[holders] = droppers(holders, version.copies, workers)
                    self._note_set(holders)
                if known[holders] and is_new and not is_young:
                    dropper = fullest(known[holders], workers, self._dropping)
                    self._dropping[dropper] += size
                    self.totals.surplus += 1
                    surplus.setdefault(dropper, []).append(shard)
        return surplus

    def _note_set(self, holders: frozenset[str]) -> None:
        if holders in self.sets or len(self.sets) < SETS_KEPT_MAX:
            self.sets[holders] += 1
