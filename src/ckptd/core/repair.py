"""Which copies are missing, and which node shall send which shard to which other one.

Copies count as everywhere: on distinct machines, and where the manifest is too. Those of a
draining node are good to read and to send from, but others take their place. The planner asks for
nothing and orders no removal: what is too much is dropped by its holder (`ckptd.core.trimming`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct

from ckptd.core import limits
from ckptd.core.availability import holders_from_bitmaps
from ckptd.core.machines import MachineKey
from ckptd.core.placement import Candidate, Placement
from ckptd.core.workers import Absences, Worker, presumed_holders

REFILL_BELOW: Final = 0.5
"""A node with less than this part of what the others use on average is new or was wiped: it is
given the missing copies first, …"""
REFILL_UNTIL: Final = 0.9
"""… until it uses this part."""


class VersionCopies(Struct, frozen=True):
    """A live version, and who has what of it.

    `copies` is the wanted number. `shards` are digest and size in bytes of each shard, in the
    manifest's order. `bitmaps` are the answers of the workers that were asked: None for one that
    has no manifest; one that gave no answer is missing.
    """

    version: str
    order: int
    copies: int
    shards: Sequence[tuple[bytes, int]]
    bitmaps: Mapping[str, bytes | None]

    def holders(self) -> tuple[frozenset[str], ...]:
        """The nodes with the manifest that hold each of the shards."""
        told = {node: bitmap for node, bitmap in self.bitmaps.items() if bitmap is not None}
        return holders_from_bitmaps(told, len(self.shards))


class Need(Struct, frozen=True):
    """What one shard lacks.

    `live` is the number of machines that hold it now, `missing` how many copies are to be made,
    of which `drained` only because a holder is to be emptied.
    """

    live: int
    missing: int
    drained: int

    @property
    def lost(self) -> bool:
        """Whether no copy is left to send from, and none is presumed."""
        return not self.live and self.missing > 0

    @property
    def urgency(self) -> int:
        """Sorts the most endangered first: fewest copies left; a drain comes last."""
        if self.missing > self.drained:
            return self.live
        return limits.CLUSTER_NODES_MAX + self.live


class Copy(Struct, frozen=True):
    """A copy to be made: `source` sends a shard of `size` bytes to `target`."""

    version: str
    shard: bytes
    size: int
    source: str
    target: str


class Shortage(Struct, frozen=True):
    """What one version lacks. `urgency` is that of its most endangered shard, None when nothing
    is missing that could be made. `missing` and `lost` are indices into its shards: those with
    too few copies, and those with none."""

    urgency: int | None
    missing: tuple[int, ...]
    lost: tuple[int, ...]


class Needs:
    """Says what is missing. Made anew whenever a worker comes, goes or changes."""

    def __init__(self, workers: Sequence[Worker], absences: Absences, *, now_ms: int) -> None:
        self._workers = {worker.node: worker for worker in workers}
        self._absences = absences
        self._now_ms = now_ms

    def presumed(self, version: VersionCopies) -> frozenset[str]:
        """The workers that may have what they do not tell: they are away for a while, or have given
        no answer for a while."""
        away = presumed_holders(self._absences.presumed, version.order, now_ms=self._now_ms)
        silent = {n for n, worker in self._workers.items() if worker.up}.difference(version.bitmaps)
        return away | silent - self._absences.unheard

    def each(self, version: VersionCopies) -> Iterator[tuple[Need, frozenset[str]]]:
        """For each shard what it lacks, and its holders, in the manifest's order."""
        presumed = self.presumed(version)
        known: dict[frozenset[str], Need] = {}
        for holders in version.holders():
            need = known.get(holders)
            if need is None:
                need = known[holders] = self._need(holders, presumed, version.copies)
            yield need, holders

    def shortage(self, version: VersionCopies) -> Shortage:
        """What the version lacks."""
        missing, lost, urgencies = [], [], set()
        for index, (need, _) in enumerate(self.each(version)):
            if need.lost:
                lost.append(index)
            elif need.missing:
                missing.append(index)
                urgencies.add(need.urgency)
        return Shortage(min(urgencies, default=None), tuple(missing), tuple(lost))

    def _need(self, holders: frozenset[str], presumed: frozenset[str], copies: int) -> Need:
        kept = {self._workers[n].machine for n in holders if self._takes_part(n, draining=False)}
        live = {self._workers[n].machine for n in holders if self._takes_part(n, draining=True)}
        hoped = {self._workers[n].machine for n in presumed if n in self._workers}
        missing = max(0, copies - len(kept | hoped))
        absent = max(0, copies - len(live | hoped))
        return Need(live=len(live), missing=missing, drained=missing - absent)

    def _takes_part(self, node: str, *, draining: bool) -> bool:
        worker = self._workers.get(node)
        return worker is not None and worker.up and (draining or not worker.draining)


class Planner:
    """Plans the copies of one round, and counts what it has given to whom.

    `spare_bytes` is room on each node that is left for the next checkpoint; it is left only while
    a worker is absent: a copy that rotted or a card that was wiped gets back the room that it had.
    `refilling` is what an earlier round said, so that a refill goes on until it is done.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        needs: Needs,
        *,
        spare_bytes: int,
        used_sets: Sequence[Collection[str]] = (),
        refilling: Collection[str] = (),
    ) -> None:
        self._needs = needs
        self._workers = {worker.node: worker for worker in workers}
        self._takers = {worker.node: worker for worker in workers if worker.takes_copies}
        spare = 0 if all(worker.up for worker in workers) else spare_bytes
        self._placement = Placement(
            [
                Candidate(
                    node_id=worker.node,
                    machine=worker.boot_id,
                    zone=worker.zone,
                    room_bytes=max(0, worker.bytes_free - spare),
                    write_bytes_per_s=worker.write_bytes_per_s,
                    queued_bytes=worker.queued_bytes,
                )
                for worker in self._takers.values()
            ],
            1,
            used_sets=used_sets,
        )
        self._given: Counter[str] = Counter()  # bytes, by target
        self._taken: Counter[str] = Counter()  # bytes, by source
        # By shard the targets in this round, and who sends to each.
        self._coming: dict[bytes, dict[str, str]] = {}
        self.refilling = frozenset(n for n in self._takers if self._is_poor(n, refilling))

    def plan(
        self, version: VersionCopies, *, urgency: int | None = None, limit: int | None = None
    ) -> list[Copy]:
        """The copies that the version lacks and that can be made now; only of shards that are as
        urgent as `urgency` if it is given, and no more than `limit` or a few more. The most
        endangered shards come first."""
        self._placement.want(version.copies)
        presumed = self._needs.presumed(version)
        wanted = []
        for index, (need, holders) in enumerate(self._needs.each(version)):
            if need.missing and need.live and urgency in (None, need.urgency):
                wanted.append((need.urgency, index, holders, need.missing))
        wanted.sort(key=lambda row: row[:2])
        copies: list[Copy] = []
        for _, index, holders, missing in wanted:
            if limit is not None and len(copies) >= limit:
                break
            shard, size = version.shards[index]
            # Another version may have the same shard: what is on its way for that one counts here.
            coming = self._coming.setdefault(shard, {})
            shared = self._of_use(coming, holders, presumed)[:missing]
            fresh = self._targets(size, holders.union(shared), presumed)
            for target in (*shared, *fresh):
                source = coming.get(target, "")
                if source not in holders:  # from the same one it comes only once
                    source = min(holders, key=lambda node: (self._taken[node], node))
                    self._taken[source] += size
                coming.setdefault(target, source)
                self._given[target] += size if target in fresh else 0
                copies.append(Copy(version.version, shard, size, source, target))
        return copies

    def _of_use(
        self, coming: Collection[str], holders: frozenset[str], presumed: frozenset[str]
    ) -> list[str]:
        """Those of `coming` that bring a copy to a machine without one that counts."""
        counted = holders.intersection(self._takers) | presumed.intersection(self._workers)
        machines = {self._workers[node].machine for node in counted}
        found: dict[MachineKey, str] = {}
        for node in coming:
            machine = self._workers[node].machine
            if node not in holders and machine not in machines:
                found.setdefault(machine, node)
        return list(found.values())

    def _targets(self, size: int, holders: frozenset[str], presumed: frozenset[str]) -> list[str]:
        kept = {node for node in holders if node in self._takers}
        machines = {self._workers[node].machine for node in kept}
        for node in sorted(presumed):
            worker = self._workers.get(node)
            if worker is not None and worker.machine not in machines:
                machines.add(worker.machine)
                kept.add(node)
        self.refilling = frozenset(n for n in self.refilling if self._is_poor(n, self.refilling))
        found: tuple[str, ...] = ()
        if self.refilling:
            others = self._takers.keys() - self.refilling
            found = self._placement.choose(size, exclude=others, already=kept)
        rest = self._placement.choose(size, already=kept.union(found))
        return [*found, *rest]

    def _is_poor(self, node: str, refilling: Collection[str]) -> bool:
        """Whether the node uses so little that it is filled first."""
        others = [self._fraction(other) for other in self._takers if other != node]
        mean = sum(others) / len(others) if others else 0.0
        part = REFILL_UNTIL if node in refilling else REFILL_BELOW
        return self._fraction(node) < part * mean

    def _fraction(self, node: str) -> float:
        worker = self._takers[node]
        usable = worker.bytes_used + worker.bytes_free
        return (worker.bytes_used + self._given[node]) / usable if usable else 1.0


class SeenShards:
    """Tells shards apart that several versions share: 8 bytes each, whatever there is.

    By the first 8 bytes of the digest; of 100,000 shards two are taken for one with a probability
    of 3e-10, and then a count is off by one.
    """

    def __init__(self) -> None:
        self._buckets = tuple(array("Q") for _ in range(256))

    def add(self, shard: bytes) -> bool:
        """Notes a shard; whether it is new."""
        key = int.from_bytes(shard[:8])
        bucket = self._buckets[shard[0]]
        position = bisect_left(bucket, key)
        if position < len(bucket) and bucket[position] == key:
            return False
        bucket.insert(position, key)
        return True
