"""The background work of a running node: which jobs it has by its roles, and what they stand on."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ckptd.clock import Clock
from ckptd.config import Config
from ckptd.core import limits
from ckptd.core.scrubbing import Pace
from ckptd.core.signing import Signer
from ckptd.errors import CkptdError, Refused
from ckptd.net.control_connection import Answer, Progress
from ckptd.node.collector import Collector
from ckptd.node.confirmation import Confirmation
from ckptd.node.inventories import Inventories
from ckptd.node.jobs import Job, Jobs, PausedJobs
from ckptd.node.members import Members
from ckptd.node.ports import Network, OnDisk
from ckptd.node.quarantine_keeper import QuarantineKeeper
from ckptd.node.records import Records
from ckptd.node.retention import Retention, answer
from ckptd.node.scrubber import Scrubber
from ckptd.node.upkeep import Upkeep
from ckptd.observe.metrics import Metrics
from ckptd.store import layout
from ckptd.store.copy_reader import VerifyResult
from ckptd.store.marker import StoreDirectory
from ckptd.store.shards import ShardStore
from ckptd.store.state_file import StateFile
from ckptd.wire import messages
from ckptd.wire.messages import Message


@dataclass(frozen=True)
class Ground:
    """What background jobs stand on. `shards` is None on a node that keeps none. `on_corrupt` is
    told each shard whose copy here went to quarantine; `suspect` re-reads one that may be bad.
    `status` is what the node says of itself."""

    config: Config
    directory: StoreDirectory
    shards: ShardStore | None
    records: Records
    members: Members
    network: Network
    clock: Clock
    on_disk: OnDisk
    metrics: Metrics
    on_corrupt: Callable[[bytes], None]
    signer: Signer
    known_until_s: Callable[[str], float | None]
    status: Callable[[], messages.NodeStatus]
    suspect: Callable[[bytes], Awaitable[VerifyResult]]

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
        inventories = Inventories(
            node_id=ground.members.own,
            network=ground.network,
            records=ground.records,
            shards=ground.shards,
            copies=ground.config.replication.copies,
            on_disk=ground.on_disk,
            clock=ground.clock,
        )
        confirmation = Confirmation(inventories, ground.members.standings, ground.on_disk)
        self._collector = _collector(ground, confirmation)
        is_coordinator = ground.config.is_coordinator
        self._retention = _retention(ground, confirmation) if is_coordinator else None
        self._upkeep = Upkeep(
            node_id=ground.members.own,
            config=ground.config,
            records=ground.records,
            shards=ground.shards,
            inventories=inventories,
            standings=ground.members.standings,
            status=ground.status,
            suspect=ground.suspect,
            network=ground.network,
            metrics=ground.metrics,
            on_disk=ground.on_disk,
            clock=ground.clock,
        )
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
        if ground.shards is not None:
            self._upkeep.trimmer.wake = partial(self.jobs.wake, "trim")

    def _made(self) -> Sequence[Job]:
        jobs: list[Job] = [self._collector]
        if self._retention is not None:
            jobs.append(self._retention)
        if self._scrubber is not None:
            jobs.append(self._scrubber)
        return [*jobs, *self._upkeep.jobs]

    async def answer(self, asker: str, message: Message, progress: Progress) -> Answer:
        """Answers what the node `asker` asks of the jobs."""
        handler = self._upkeep.handlers.get(type(message))
        if handler is None:
            raise Refused(f"this node has not the role to answer {type(message).__name__}")
        return await handler(asker, message, progress)

    def repair_view(self) -> messages.RepairView | None:
        """What this node knows of missing copies as the steward."""
        return self._upkeep.repairer.view()

    @property
    def suspicion(self) -> str:
        """Why this node does not trust what it reads from its own disk; "" while it does."""
        return self._scrubber.suspicion if self._scrubber is not None else ""

    async def prune(self, request: messages.Prune) -> messages.PruneReply:
        """Applies the retention rules now, or tells what that would do. Raises Refused on a node
        that is no coordinator."""
        if self._retention is None:
            raise Refused("only a coordinator applies retention rules", next="ckptd nodes")
        return answer(
            await self._retention.apply(dry_run=request.dry_run, confirmed=request.confirmed)
        )

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


def _collector(ground: Ground, confirmation: Confirmation) -> Collector:
    return Collector(
        records=ground.records,
        shards=ground.shards,
        confirmation=confirmation,
        others=lambda: ground.members.roster.workers() - {ground.members.own},
        heard_s=ground.known_until_s,
        grace_s=ground.config.gc.grace_s,
        clock=ground.clock,
        on_disk=ground.on_disk,
        rng=random.Random(),
    )


def _retention(ground: Ground, confirmation: Confirmation) -> Retention:
    return Retention(
        cluster=ground.config.cluster,
        rules=ground.config.retention,
        records=ground.records,
        signer=ground.signer,
        network=ground.network,
        confirmation=confirmation,
        workers=ground.other_workers,
        is_steward=ground.members.is_steward,
        clock=ground.clock,
        on_disk=ground.on_disk,
        rng=random.Random(),
    )


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
