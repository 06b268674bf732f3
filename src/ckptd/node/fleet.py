"""The other workers as the steward sees them now: who is there, and what each says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ckptd.core import limits
from ckptd.core.steward import Standing, Standings, steward
from ckptd.core.workers import Worker
from ckptd.errors import PeerError
from ckptd.node.ports import Clock, Network
from ckptd.wire import messages
from ckptd.wire.messages import NodeStatus


class Sight(NamedTuple):
    """All remembered workers, and what those that answered say of themselves, by node."""

    workers: tuple[Worker, ...]
    statuses: Mapping[str, NodeStatus]

    @property
    def up(self) -> list[str]:
        """The workers that can be asked."""
        return [worker.node for worker in self.workers if worker.up]


class Fleet:
    """Looks at the workers. `standings` is what this node knows of all, itself included; `status`
    is what it says of itself."""

    def __init__(
        self,
        *,
        node_id: str,
        standings: Callable[[], Standings],
        status: Callable[[], NodeStatus],
        network: Network,
        clock: Clock,
    ) -> None:
        self.node_id = node_id
        self._standings = standings
        self._status = status
        self._network = network
        self._clock = clock
        self._failed_since_s: dict[str, float] = {}

    @property
    def is_steward(self) -> bool:
        """Whether this node is the steward."""
        return steward(self._standings().values()) == self.node_id

    def standings(self) -> Standings:
        """What this node knows of all."""
        return self._standings()

    async def look(self) -> Sight:
        """Asks all workers that are there how they are."""
        known = {node: each for node, each in self._standings().items() if each.is_worker}
        live = [node for node, each in known.items() if each.is_live]
        answers = await asyncio.gather(*(self._ask(node) for node in live))
        statuses = {node: told for node, told in zip(live, answers, strict=True) if told}
        self._note_failures(known, statuses)
        workers = tuple(self._worker(known[node], statuses.get(node)) for node in sorted(known))
        return Sight(workers, statuses)

    async def _ask(self, node: str) -> NodeStatus | None:
        if node == self.node_id:
            return self._status()
        try:
            status, _ = await self._network.request(
                node, messages.Ping(), NodeStatus, timeout_s=limits.CONNECT_TIMEOUT_S
            )
        except PeerError:
            return None  # it is known soon enough whether it is gone
        return status

    def _note_failures(
        self, known: Mapping[str, Standing], statuses: Mapping[str, NodeStatus]
    ) -> None:
        now_s = self._clock.monotonic_s()
        failed = {node for node, standing in known.items() if standing.failed}
        failed |= {node for node, status in statuses.items() if status.state == "failed"}
        self._failed_since_s = {node: self._failed_since_s.get(node, now_s) for node in failed}

    def _worker(self, standing: Standing, status: NodeStatus | None) -> Worker:
        absent_s = standing.absent_s
        failed_since_s = self._failed_since_s.get(standing.node)
        if failed_since_s is not None:
            absent_s = max(absent_s or 0.0, self._clock.monotonic_s() - failed_since_s)
        # One that reads wrong bytes from its own disk is given no more of them.
        takes_more = status is not None and status.state != "suspect"
        return Worker(
            node=standing.node,
            boot_id=standing.boot_id,
            zone=standing.zone,
            absent_s=absent_s,
            draining=standing.draining,
            maintenance=standing.maintenance_s > 0,
            bytes_used=status.bytes_used if status else 0,
            bytes_free=status.bytes_free if status and takes_more else 0,
            write_bytes_per_s=status.write_bytes_per_s if status else 0.0,
            queued_bytes=status.queued_bytes if status else 0,
        )
