"""The steward's job "rebalance": moves copies from full nodes to empty ones, when all is well.

A move is a copy, made as in repair, and a hint to its old holder that it has one too many. So a
move is never on the way to losing anything, and stopping in the middle costs a copy at most.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import structlog

from ckptd.core import limits
from ckptd.core.rebalancing import Move, next_move, shards_to_move
from ckptd.core.repair import Copy
from ckptd.core.workers import recent_bytes
from ckptd.node.fleet import Fleet, Sight
from ckptd.node.inventories import Inventories, batches
from ckptd.node.jobs import JobProgress
from ckptd.node.ports import Network
from ckptd.node.records import Records
from ckptd.node.repairer import Repairer
from ckptd.node.sending import Sending

_log = structlog.get_logger(__name__)


class Rebalancer:
    """As `ckptd.node.jobs.Job`; does nothing on a node that is not the steward, and nothing while
    `repairer` has anything to do."""

    name = "rebalance"

    def __init__(
        self,
        *,
        fleet: Fleet,
        inventories: Inventories,
        records: Records,
        repairer: Repairer,
        network: Network,
        rate_bytes_per_s: float,
    ) -> None:
        self._fleet = fleet
        self._inventories = inventories
        self._records = records
        self._repairer = repairer
        self._sending = Sending(network, rate_bytes_per_s)
        self._move: Move | None = None
        self._copies: AsyncIterator[list[Copy]] | None = None
        self._done_bytes = 0
        self._left_bytes = 0

    def progress(self) -> JobProgress:
        """As `Job.progress`."""
        return JobProgress(self._done_bytes, self._done_bytes + self._left_bytes)

    async def step(self) -> float:
        """As `Job.step`."""
        if not self._fleet.is_steward or not self._repairer.is_idle():
            self._copies = None
            return limits.REBALANCE_LOOK_S
        sight = await self._fleet.look()
        if self._copies is None and not self._begin(sight):
            return limits.REBALANCE_LOOK_S
        assert self._copies is not None
        copies = await anext(self._copies, None)
        if copies is None:
            self._copies = None
            self._repairer.look_again()  # and tell the old holders
            return limits.REBALANCE_LOOK_S
        outcome = await self._sending.send(copies)
        self._done_bytes += outcome.done_bytes
        self._left_bytes = max(0, self._left_bytes - outcome.done_bytes)
        return 0.0 if outcome.done_copies else limits.REBALANCE_LOOK_S

    def _begin(self, sight: Sight) -> bool:
        """Whether there is something to move; then it is begun."""
        if any(worker.node not in sight.statuses for worker in sight.workers):
            return False  # how full it is, is not known
        move = next_move(
            sight.workers,
            moving=self._move is not None,
            spare_bytes=recent_bytes(self._records.live_versions()),
        )
        self._move = move
        if move is None:
            self._done_bytes = self._left_bytes = 0
            return False
        _log.info("rebalance", source=move.source, target=move.target, bytes=move.size_bytes)
        self._left_bytes = min(move.size_bytes, limits.REBALANCE_ROUND_BYTES)
        self._copies = self._choose(move, sight, self._left_bytes)
        return True

    async def _choose(self, move: Move, sight: Sight, size_bytes: int) -> AsyncIterator[list[Copy]]:
        """The copies of one round, some at a time."""
        workers = {worker.node: worker for worker in sight.workers}
        chosen: set[bytes] = set()
        for batch in batches(self._records.live_versions()):
            async for version in self._inventories.ask(batch, sight.up):
                found = [
                    copy
                    for copy in shards_to_move(move, version, workers, size_bytes=size_bytes)
                    if copy.shard not in chosen
                ]
                chosen.update(copy.shard for copy in found)
                size_bytes -= sum(copy.size for copy in found)
                for some in self._slices(found):
                    yield some
                if size_bytes <= 0:
                    return

    def _slices(self, copies: list[Copy]) -> Iterator[list[Copy]]:
        """The copies in parts that one call sends."""
        some: list[Copy] = []
        size_bytes = 0
        for copy in copies:
            full = size_bytes >= self._sending.slice_bytes
            if some and (full or len(some) >= limits.SHARDS_PER_COPY_MAX):
                yield some
                some, size_bytes = [], 0
            some.append(copy)
            size_bytes += copy.size
        if some:
            yield some
