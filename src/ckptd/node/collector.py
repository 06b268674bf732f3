"""Garbage collection on one worker: shards that nothing needs any more, and then the manifests of
dead versions. What may go is decided in `ckptd.core.collection`; nobody can order it.

A pass takes a census of the versions, marks every shard that a manifest names which must be kept,
and removes the others one by one, each only if nobody touched it for a grace. A manifest that
arrives later, or a pin of one, touches its shards in the moment in which it becomes known, and
whoever is told that a
shard is here touches it too, under the lock under which it would be removed. So no order of events
takes a shard away that somebody was told of.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Final

import structlog

from ckptd.clock import Clock
from ckptd.core.collection import Census, Fate, Marks, heard_by_half_s, is_over
from ckptd.node.confirmation import Confirmation
from ckptd.node.jobs import JobProgress
from ckptd.node.ports import OnDisk
from ckptd.node.records import Records
from ckptd.store.shards import ShardStore

_log = structlog.get_logger(__name__)

_LOOK_MIN_S: Final = 1.0
_LOOK_MAX_S: Final = 60.0
_LOOKS_PER_GRACE: Final = 16
_RELEASES_PER_GRACE: Final = 16  # each reads all manifests
_SWEEPS_PER_GRACE: Final = 4  # for shards that no manifest ever named
_LOOKS_ASIDE_PER_GRACE: Final = 4  # at documents that could not be read
_LOOK_ASIDE_MAX_S: Final = 600.0
_REMOVED_AT_ONCE: Final = 32
_MARKED_AT_ONCE: Final = 16


class _InDoubt(Exception):
    """A manifest that must be kept cannot be read: nobody knows which shards it needs."""


class Collector:
    """The job "gc".

    `others` are the remembered, not forgotten other workers; `heard_s` tells when the last complete
    exchange of documents with one began, by `clock`. `grace_s` is the config's `gc.grace`. `shards`
    is None on a node that keeps none: it drops manifests only.
    """

    name = "gc"

    def __init__(
        self,
        *,
        records: Records,
        shards: ShardStore | None,
        confirmation: Confirmation,
        others: Callable[[], Collection[str]],
        heard_s: Callable[[str], float | None],
        grace_s: float,
        clock: Clock,
        on_disk: OnDisk,
        rng: random.Random,
    ) -> None:
        self._records = records
        self._shards = shards
        self._confirmation = confirmation
        self._others = others
        self._heard_s = heard_s
        self._grace_s = grace_s
        self._clock = clock
        self._on_disk = on_disk
        self._rng = rng
        self._dead_since_s: dict[str, float] = {}
        self._swept_s = clock.monotonic_s()
        self._released_s: float | None = None
        self._looked_aside_s = clock.monotonic_s()
        self._collected_bytes = 0
        self._waits_for = ""

    def progress(self) -> JobProgress:
        """Bytes that were removed since the start, and why nothing is removed now, if so."""
        return JobProgress(self._collected_bytes, self._collected_bytes, self._waits_for)

    async def step(self) -> float:
        """Looks at what died, and removes what has been dead for long enough."""
        await self._look_aside()
        census = await self._census()
        self._note_dead(census)
        self._waits_for = ""
        heard_s = self._heard_by_half_s()
        released = await self._released(census, heard_s) if self._may_release(census) else {}
        sweep_s = self._grace_s / _SWEEPS_PER_GRACE
        if released or census.at_s - self._swept_s >= sweep_s:
            if doubt := self._records.doubt():
                self._waits_for = doubt
            elif heard_s is not None:
                await self._pass(released, heard_s)
        pause_s = min(max(self._grace_s / _LOOKS_PER_GRACE, _LOOK_MIN_S), _LOOK_MAX_S)
        return pause_s * self._rng.uniform(0.8, 1.0)

    async def _look_aside(self) -> None:
        """Without a document that exists nothing is ever collected here."""
        now_s = self._clock.monotonic_s()
        pause_s = min(self._grace_s / _LOOKS_ASIDE_PER_GRACE, _LOOK_ASIDE_MAX_S)
        if now_s - self._looked_aside_s >= pause_s and self._records.lost():
            self._looked_aside_s = now_s
            await self._on_disk(self._records.look_aside)

    async def _census(self) -> Census:
        return await self._on_disk(partial(self._records.census, self._clock.monotonic_s))

    def _note_dead(self, census: Census) -> None:
        for version_id in census.dead:
            self._dead_since_s.setdefault(version_id, census.at_s)
        for version_id in self._dead_since_s.keys() - census.dead.keys():
            del self._dead_since_s[version_id]

    def _heard_by_half_s(self) -> float | None:
        others = self._others()
        heard_s = heard_by_half_s({node: self._heard_s(node) for node in others}, others)
        if heard_s is None:
            self._waits_for = "half of the other workers must have been heard first"
        return heard_s

    def _may_release(self, census: Census) -> bool:
        """Not after every version that dies: of a checkpoint that is overwritten every minute one
        does every minute, and a pass reads all manifests."""
        released_s = self._released_s
        pause_s = self._grace_s / _RELEASES_PER_GRACE
        return released_s is None or census.at_s - released_s >= pause_s

    async def _released(self, census: Census, heard_s: float | None) -> dict[str, Fate]:
        """Dead versions whose grace is over and that, to all that is known, may go."""
        over = {
            version_id: fate
            for version_id, fate in census.dead.items()
            if is_over(
                self._dead_since_s[version_id],
                grace_s=self._grace_s,
                now_s=census.at_s,
                heard_s=heard_s,
            )
        }
        justifying = {each for fate in over.values() if not fate.is_final for each in fate.if_any}
        known = [self._records.catalogue.version(version_id) for version_id in sorted(justifying)]
        self._protected = await self._confirmation.protected(
            [version for version in known if version is not None]
        )
        return {each: fate for each, fate in over.items() if fate.may_go(self._protected)}

    _protected: Collection[str] = ()

    async def _pass(self, released: Iterable[str], heard_s: float) -> None:
        """Removes what nothing names, and drops the manifests of `released`, as far as what has
        become known meanwhile does not speak for them."""
        census = await self._census()
        gone = self._may_go(released, census)
        if self._shards is not None:
            try:
                marks = await self._mark(self._shards, census, gone)
            except _InDoubt as doubt:
                self._waits_for = str(doubt)
                return
            if self._may_go(gone, await self._census()) != gone:
                return  # something speaks for one of them by now: the next pass marks its shards
            # What was heard was heard before the census: whatever came since is younger than this.
            await self._remove(self._shards, marks, heard_s - self._grace_s)
        if gone:
            dropped = await self._on_disk(partial(self._records.drop, gone, self._protected))
            self._released_s = census.at_s
            _log.info("dead_versions_dropped", versions=len(dropped))
        self._swept_s = census.at_s

    def _may_go(self, version_ids: Iterable[str], census: Census) -> set[str]:
        return {
            version_id
            for version_id in version_ids
            if (fate := census.dead.get(version_id)) and fate.may_go(self._protected)
        }

    async def _mark(self, shards: ShardStore, census: Census, gone: Collection[str]) -> Marks:
        marks = await self._on_disk(lambda: Marks(shards.digests()))
        kept = sorted(census.live.union(census.dead).difference(gone))
        for start in range(0, len(kept), _MARKED_AT_ONCE):
            batch = kept[start : start + _MARKED_AT_ONCE]
            await self._on_disk(partial(self._mark_batch, marks, census, batch))
        return marks

    def _mark_batch(self, marks: Marks, census: Census, batch: Collection[str]) -> None:
        for version_id in batch:
            references = self._records.references(version_id)
            if references is not None:
                for digest, _ in references:
                    marks.mark(digest)
            else:  # dead or live: it must be kept, with shards that nobody knows
                raise _InDoubt(f"the manifest of version {version_id} cannot be read")

    async def _remove(self, shards: ShardStore, marks: Marks, untouched_since: float) -> None:
        count = size = 0
        unmarked = list(marks.unmarked())
        for start in range(0, len(unmarked), _REMOVED_AT_ONCE):
            batch = unmarked[start : start + _REMOVED_AT_ONCE]
            removed = await self._on_disk(partial(_remove_batch, shards, batch, untouched_since))
            count += sum(map(bool, removed))
            size += sum(removed)
            self._collected_bytes += sum(removed)
        if count:
            _log.info("shards_collected", shards=count, bytes=size)


def _remove_batch(shards: ShardStore, batch: Iterable[bytes], untouched_since: float) -> list[int]:
    return [shards.remove(digest, untouched_since=untouched_since) for digest in batch]
