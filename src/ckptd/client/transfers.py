"""Sending shards until each has its copies: chains, retries, replacement of nodes that fail.

One `Transfers` serves one store. Decisions are taken on the event loop; each transfer runs in a
thread of a small pool. Nothing is believed but what a node reported after storing its copy.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

import structlog

from ckptd.client.cluster import Cluster, Node
from ckptd.client.progress import Progress
from ckptd.core import limits
from ckptd.core.placement import Candidate, Placement
from ckptd.errors import CkptdError, PeerBusy, PeerError, SourceChanged
from ckptd.net.bulk import ShardSender, push_shard
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport

_log = structlog.get_logger(__name__)

_STORED: Final = ("durable", "present")
_NODE_FAILURES_MAX: Final = 3  # in a row; then a node gets no more shards of this store


class ShardBytes(Protocol):
    """One shard's bytes, for one transfer at a time."""

    def read_into(self, buffer: memoryview, offset: int) -> int: ...
    def digest(self) -> bytes: ...
    def close(self) -> None: ...


@dataclass
class Shard:
    """A shard to protect: `open` gives its bytes, `holders` are the nodes that confirmed it."""

    digest: bytes
    size: int
    open: Callable[[], ShardBytes]
    holders: set[str] = field(default_factory=set)


class Transfers:
    """Brings shards to nodes. `bytes_sent` is the payload that left this process,
    `bytes_written` what nodes made durable because of it."""

    def __init__(self, cluster: Cluster, copies: int, progress: Progress) -> None:
        self._cluster = cluster
        self._copies = copies
        self._progress = progress
        self._nodes = {node.id: node for node in cluster.workers}
        self._placement = Placement(
            [
                Candidate(
                    node_id=node.id,
                    machine=node.hello.boot_id,
                    zone=node.hello.zone,
                    room_bytes=node.status.bytes_free,
                    write_bytes_per_s=node.status.write_bytes_per_s,
                    queued_bytes=node.status.queued_bytes,
                )
                for node in self._nodes.values()
            ],
            copies,
        )
        at_once = max(2, min(limits.TRANSFERS_AT_ONCE_MAX, len(self._nodes)))
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="transfer")
        self._slots = asyncio.Semaphore(at_once)
        self._failures: dict[str, int] = {}
        self._full: set[str] = set()
        self._free_at_s: dict[str, float] = {}
        self._random = random.Random()
        self._counting = threading.Lock()
        self.bytes_sent = 0
        self.bytes_written = 0
        self.last_error: CkptdError | None = None

    def close(self) -> None:
        """Waits for the threads; call `Cluster.bulk.close` before when they shall not finish."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def distinct(self, holders: Iterable[str]) -> int:
        """How many machines these nodes are."""
        return len({self._nodes[node].machine for node in holders if node in self._nodes})

    async def protect(self, shard: Shard) -> None:
        """Gives `shard` its copies, as far as there are nodes for them.

        On return `shard.holders` are the nodes that confirmed a copy; fewer than wanted when there
        are not enough nodes with room. Raises SourceChanged when the bytes are no longer there.
        """
        async with self._slots:
            busy_until_s = time.monotonic() + limits.BUSY_GIVE_UP_S
            attempt = 0
            while self.distinct(shard.holders) < self._copies:
                chain = self._placement.choose(
                    shard.size, exclude=self._full, already=shard.holders
                )
                if not chain:
                    return
                started_s = time.monotonic()
                try:
                    reports = await self._send(shard, chain)
                except PeerBusy as error:
                    self._placement_failed(chain, shard.size)
                    if time.monotonic() > busy_until_s:
                        self.last_error = error
                        return
                    await asyncio.sleep(limits.BUSY_RETRY_S * self._random.uniform(0.5, 1.5))
                    continue
                except PeerError as error:
                    reports = self._blame(error, chain)
                busy = self._settle(shard, chain, reports, started_s)
                if self.distinct(shard.holders) >= self._copies:
                    return
                attempt += 1
                if busy and time.monotonic() < busy_until_s:
                    attempt -= 1
                if attempt >= limits.TRANSFER_ATTEMPTS_MAX:
                    return
                pause_s = min(
                    limits.RETRY_PAUSE_MAX_S, limits.RETRY_PAUSE_MIN_S * 2 ** min(attempt, 10)
                )
                await asyncio.sleep(pause_s * self._random.uniform(0.5, 1.0))

    def _placement_failed(self, chain: Iterable[str], size: int) -> None:
        for node in chain:
            self._placement.released(node, size)

    def _blame(self, error: PeerError, chain: tuple[str, ...]) -> tuple[CopyReport, ...]:
        """Reports for a chain that broke without a result: nothing is confirmed."""
        culprit = error.node if error.node in chain else chain[0]
        return tuple(
            CopyReport(
                node,
                "failed" if node == culprit else "unknown",
                0,
                error.kind if node == culprit else "",
                error.reason[:8000],
            )
            for node in chain
        )

    def _settle(
        self,
        shard: Shard,
        chain: tuple[str, ...],
        reports: tuple[CopyReport, ...],
        started_s: float,
    ) -> bool:
        """Takes note of what the nodes said; whether one of them was only busy."""
        by_node = {report.node: report for report in reports}
        busy = False
        for node in chain:
            report = by_node.get(node, CopyReport(node, "unknown"))
            if report.state in _STORED:
                shard.holders.add(node)
                self._failures.pop(node, None)
                if report.state == "durable":
                    self.bytes_written += shard.size
                    self._note_speed(node, shard.size, started_s)
                else:
                    self._placement.released(node, shard.size)
                continue
            self._placement.released(node, shard.size)
            if report.state == "busy":
                busy = True
            elif report.state == "failed":
                self._note_failure(node, report)
        return busy

    def _note_speed(self, node: str, size: int, started_s: float) -> None:
        """The node was busy with this shard since it began, or since it finished the one before."""
        now_s = time.monotonic()
        began_s = max(started_s, self._free_at_s.get(node, 0.0))
        self._free_at_s[node] = now_s
        self._placement.finished(node, size, now_s - began_s)

    def _note_failure(self, node: str, report: CopyReport) -> None:
        _log.info("copy_failed", node=node, kind=report.code, reason=report.message)
        self.last_error = PeerError(node, report.message or report.code)
        if report.code in ("no_room", "medium_failed", "store_operation_failed"):
            self._full.add(node)
            self._progress.note(f"{node} takes no more shards: {report.message}")
            return
        self._failures[node] = self._failures.get(node, 0) + 1
        if self._failures[node] >= _NODE_FAILURES_MAX and node not in self._full:
            self._full.add(node)
            self._progress.note(f"{node} is left out: {report.message}")

    # -- one transfer

    async def _send(self, shard: Shard, chain: tuple[str, ...]) -> tuple[CopyReport, ...]:
        """One try to bring `shard` to the nodes of `chain`."""
        source = self._source_node(shard)
        if source is not None:
            # A copy is there already: its node sends it on, and our own link stays free.
            work = partial(self._push, source, shard, chain)
        else:
            work = partial(self._send_chain, shard, chain)
        loop = asyncio.get_running_loop()
        reports = await loop.run_in_executor(self._threads, work)
        if any(report.code == "shard_corrupt" for report in reports):
            await loop.run_in_executor(self._threads, partial(_check_source, shard))
        return reports

    def _source_node(self, shard: Shard) -> Node | None:
        holders = [self._nodes[node] for node in sorted(shard.holders) if node in self._nodes]
        usable = [node for node in holders if node.id not in self._full]
        return usable[0] if usable else None

    def _push(self, source: Node, shard: Shard, chain: tuple[str, ...]) -> tuple[CopyReport, ...]:
        hops = tuple(self._nodes[node].hop for node in chain)
        where = source.hop
        channel = self._cluster.bulk.acquire(where.node, where.host, where.port)
        try:
            return push_shard(channel, messages.PushShard(shard.digest, shard.size, hops))
        finally:
            self._cluster.bulk.release(where.node, where.host, where.port, channel)

    def _send_chain(self, shard: Shard, chain: tuple[str, ...]) -> tuple[CopyReport, ...]:
        head, *rest = [self._nodes[node].hop for node in chain]
        request = messages.PutShard(shard.digest, shard.size, tuple(rest))
        channel = self._cluster.bulk.acquire(head.node, head.host, head.port)
        source = shard.open()
        sender = ShardSender(channel, request, hop=0)
        try:
            sender.negotiate()
            return sender.send(source, memoryview(bytearray(limits.BULK_BUFFER_BYTES)))
        finally:
            source.close()
            with self._counting:
                self.bytes_sent += sender.sent_bytes
            self._progress.node(head.node, sender.sent_bytes)
            self._cluster.bulk.release(head.node, head.host, head.port, channel)


def _check_source(shard: Shard) -> None:
    """After a node found other bytes than promised: were they ours? Raises SourceChanged."""
    source = shard.open()
    try:
        if source.digest() != shard.digest:
            raise SourceChanged(
                "the checkpoint changed while it was being stored",
                next="store it again when the training has finished writing it",
            )
    finally:
        source.close()
