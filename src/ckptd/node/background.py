"""The background work of a running node: which jobs it has by its roles, and what they stand on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ckptd.clock import Clock
from ckptd.config import Config
from ckptd.core import limits
from ckptd.core.scrubbing import Pace
from ckptd.errors import CkptdError
from ckptd.node.jobs import Job, Jobs, PausedJobs
from ckptd.node.members import Members
from ckptd.node.ports import Network, OnDisk
from ckptd.node.quarantine_keeper import QuarantineKeeper
from ckptd.node.scrubber import Scrubber
from ckptd.observe.metrics import Metrics
from ckptd.store import layout
from ckptd.store.marker import StoreDirectory
from ckptd.store.shards import ShardStore
from ckptd.store.state_file import StateFile


@dataclass(frozen=True)
class Ground:
    """What background jobs stand on. `shards` is None on a node that keeps none. `on_corrupt` is
    told each shard whose copy here went to quarantine."""

    config: Config
    directory: StoreDirectory
    shards: ShardStore | None
    members: Members
    network: Network
    clock: Clock
    on_disk: OnDisk
    metrics: Metrics
    on_corrupt: Callable[[bytes], None]

    def other_workers(self) -> list[str]:
        """Ids of the other workers that can be asked now."""
        standings = self.members.standings()
        return sorted(
            node
            for node, standing in standings.items()
            if node != self.members.own and standing.is_worker and standing.is_live
        )


class Background:
    """The jobs of one node. Made on its loop."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._scrubber = None if ground.shards is None else _scrubber(ground, ground.shards)
        state = StateFile(
            ground.directory, layout.PAUSED_JOBS, max_bytes=limits.STATE_FILE_MAX_BYTES
        )
        paused = PausedJobs(state)
        self.jobs = Jobs(
            self._made(),
            paused=_or_none(paused.load),
            save=paused.save,
            on_disk=ground.on_disk,
            metrics=ground.metrics,
            rng=random.Random(),
        )

    def _made(self) -> Sequence[Job]:
        jobs: list[Job] = []
        if self._scrubber is not None:
            jobs.append(self._scrubber)
        return jobs

    @property
    def suspicion(self) -> str:
        """Why this node does not trust what it reads from its own disk; "" while it does."""
        return self._scrubber.suspicion if self._scrubber is not None else ""

    async def run(self) -> None:
        """Runs all jobs until it is cancelled."""
        if self._scrubber is not None:
            await self._ground.on_disk(self._scrubber.load)
        await self.jobs.run()

    async def stop(self) -> None:
        """Keeps what the next process shall know."""
        if self._scrubber is not None:
            await self._ground.on_disk(self._scrubber.stop)


def _or_none(load: Callable[[], frozenset[str]]) -> frozenset[str]:
    try:
        return load()
    except CkptdError:  # the disk has just failed: the node says so, and its jobs do nothing
        return frozenset()


def _scrubber(ground: Ground, shards: ShardStore) -> Scrubber:
    scrub = ground.config.scrub
    pace = Pace(scrub.interval_s, scrub.rate_bytes_per_s)
    keeper = QuarantineKeeper(
        store=shards,
        network=ground.network,
        workers=ground.other_workers,
        copies=ground.config.replication.copies,
        grace_s=ground.config.gc.grace_s,
        pace=pace,
        clock=ground.clock,
        on_disk=ground.on_disk,
    )
    record = StateFile(
        ground.directory, layout.CHECK_RECORD, max_bytes=limits.CHECK_RECORD_MAX_BYTES
    )
    return Scrubber(
        store=shards,
        pace=pace,
        record=record,
        keeper=keeper,
        clock=ground.clock,
        on_disk=ground.on_disk,
        metrics=ground.metrics,
        on_corrupt=ground.on_corrupt,
    )
