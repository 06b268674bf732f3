"""Sending shards until each has its copies: chains, retries, replacement of nodes that fail.

One `Transfers` serves one store. Decisions are taken on the event loop; each transfer runs in a
thread of a small pool. Nothing is believed but what a node reported after storing its copy.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

import structlog

from ckptd.client.cluster import Cluster, Node
from ckptd.client.progress import Progress
from ckptd.core import bitmaps, limits
from ckptd.core.placement import Placement
from ckptd.errors import (
    CkptdError,
    Draining,
    NoRoom,
    NotAuthorized,
    NotEnoughNodes,
    PeerBusy,
    PeerError,
    PeerStalled,
    PeerUnreachable,
    SourceChanged,
)
from ckptd.net.bulk import BulkChannel, ShardSender, push_shard
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport

_log = structlog.get_logger(__name__)

_STORED: Final = ("durable", "present")
_NODE_FAILURES_MAX: Final = 3  # in a row; then a node gets no more shards of this store
# Asking again is no use.
_FULL: Final = ("no_room", "medium_failed", "store_operation_failed", Draining.kind)
_CORRUPT: Final = "shard_corrupt"  # what a node says of bytes that are not the announced ones


class ShardBytes(Protocol):
    """One shard's bytes, for one transfer at a time."""

    def piece(self, offset: int, size: int) -> memoryview: ...
    def digest(self) -> bytes: ...
    def close(self) -> None: ...


@dataclass
class Shard:
    """A shard to protect: `open` gives its bytes, `holders` are the nodes that confirmed it."""

    digest: bytes
    size: int
    open: Callable[[], ShardBytes]
    holders: set[str] = field(default_factory=set)
    bad_holders: set[str] = field(default_factory=set)  # found out during a transfer
    durable_at_s: dict[str, float] = field(default_factory=dict)  # by node, monotonic clock


class Transfers:
    """Brings shards to nodes. `bytes_sent` is the payload that left this process,
    `bytes_written` what nodes made durable because of it."""

    def __init__(self, cluster: Cluster, copies: int, progress: Progress) -> None:
        self._cluster = cluster
        self._copies = copies
        self._progress = progress
        self._nodes = {node.id: node for node in cluster.workers}
        self._placement = Placement([node.candidate for node in self._nodes.values()], copies)
        at_once = max(2, min(limits.TRANSFERS_AT_ONCE_MAX, len(self._nodes)))
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="transfer")
        self._slots = asyncio.Semaphore(at_once)
        self._failures: dict[str, int] = {}
        self._failed_at_s: dict[str, float] = {}
        self._left_out: set[str] = set()
        self._without_room: set[str] = set()
        self._leaving: set[str] = set()
        self._free_at_s: dict[str, float] = {}
        self._random = random.Random()
        self._lock = threading.Lock()
        self._channels: set[BulkChannel] = set()
        self._stopping = False
        self._last_error: CkptdError | None = None
        self.bytes_sent = 0
        self.bytes_written = 0

    def close(self) -> None:
        """Interrupts the transfers that are under way, and waits for the threads."""
        with self._lock:
            self._stopping = True
            for channel in self._channels:
                channel.interrupt()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def want(self, copies: int) -> None:
        """From now on each shard shall have this many copies."""
        self._copies = copies
        self._placement.want(copies)

    async def readmit_lost(self) -> None:
        """Looks for the nodes that were lost since this store began; those that are back, at
        another address even, get shards again."""
        for node in await self._cluster.find_again(self._nodes.keys() - self._cluster.nodes.keys()):
            self._nodes[node] = self._cluster.nodes[node]
            self._left_out.discard(node)
            self._failures.pop(node, None)
            self._progress.note(f"{node} is back")

    def distinct(self, holders: Iterable[str]) -> int:
        """How many machines those of these nodes are that still answer. Draining ones do not
        count: their copies will go."""
        nodes = self._cluster.nodes
        return len({nodes[n].machine for n in holders if n in nodes and not nodes[n].is_draining})

    def why_nowhere(self, shard: Shard) -> CkptdError:
        """The error to raise when no node took a copy of `shard`."""
        why = f": {self._last_error.message}" if self._last_error else ""
        nodes = [node for node in self._nodes if node in self._cluster.nodes]
        if nodes and all(
            node in self._without_room or self._placement.room_bytes(node) < shard.size
            for node in nodes
        ):
            return NoRoom(
                f"none of the {len(nodes)} nodes that answer has room for more shards above its "
                f"reserve{why}",
                next="ckptd nodes   (then add a node, or put in a larger disk)",
            )
        if nodes and not set(nodes) - self._draining():
            return NotEnoughNodes(
                f"all {len(nodes)} nodes that answer are draining: they take no new copies",
                next=f"ckptd undrain {nodes[0]}",
            )
        return NotEnoughNodes(
            f"no node took shard {shard.digest.hex()} ({len(nodes)} nodes answer){why}",
            next="ckptd nodes",
        )

    async def protect(self, shard: Shard) -> None:
        """Gives `shard` its copies, as far as there are nodes for them.

        On return `shard.holders` are the nodes that confirmed a copy; fewer than wanted when there
        are not enough nodes with room. Raises SourceChanged when the bytes are no longer there.
        """
        async with self._slots:
            busy_until_s = time.monotonic() + limits.BUSY_GIVE_UP_S
            attempt = 0
            while self.distinct(shard.holders) < self._copies:
                present = (shard.holders & self._cluster.nodes.keys()) - self._draining()
                chain = self._placement.choose(
                    shard.size, exclude=self._unusable(), already=present
                )
                if not chain:
                    return
                busy = await self._try(shard, chain)
                if self.distinct(shard.holders) >= self._copies:
                    return
                if busy and time.monotonic() < busy_until_s:
                    await asyncio.sleep(limits.BUSY_RETRY_S * self._random.uniform(0.5, 1.5))
                    continue
                attempt += 1
                if attempt >= limits.TRANSFER_ATTEMPTS_MAX:
                    return
                pause_s = min(limits.RETRY_PAUSE_MAX_S, limits.RETRY_PAUSE_MIN_S * 2**attempt)
                await asyncio.sleep(pause_s * self._random.uniform(0.5, 1.0))

    def _unusable(self) -> set[str]:
        gone = self._nodes.keys() - self._cluster.nodes.keys()
        return self._left_out | gone | self._draining()

    def _draining(self) -> set[str]:
        return {node.id for node in self._cluster.nodes.values() if node.is_draining}

    async def _try(self, shard: Shard, chain: tuple[str, ...]) -> bool:
        """Sends `shard` down `chain` once, and takes note of what came of it; whether some node
        was only busy."""
        started_s = time.monotonic()
        source = self._source_node(shard)
        try:
            if source is not None:
                # A copy is there already: its node sends it on, and our own link stays free.
                reports = await self._in_thread(partial(self._push, source, shard, chain))
            else:
                reports = await self._in_thread(partial(self._send_chain, shard, chain))
        except PeerBusy as error:
            self._last_error = error
            reports = tuple(CopyReport(node, "busy") for node in chain)
        except (PeerError, NotAuthorized) as error:
            culprit = source.id if source is not None else chain[0]
            if isinstance(error, PeerStalled) and error.node in chain:
                culprit = error.node  # found by our own deadlines: no peer says who is to blame
            if culprit not in chain:
                self._note_failure(culprit, error.kind, error.message, started_s)
                shard.holders.discard(culprit)
            reports = await self._after_break(shard, chain, culprit, error)
        if any(report.code == _CORRUPT for report in reports):
            await self._find_fault(shard, source, reports)
        return self._settle(shard, chain, reports, started_s)

    async def _in_thread(
        self, work: Callable[[], tuple[CopyReport, ...]]
    ) -> tuple[CopyReport, ...]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _after_break(
        self, shard: Shard, chain: tuple[str, ...], culprit: str, error: CkptdError
    ) -> tuple[CopyReport, ...]:
        """Reports for a chain that broke without a result: its nodes are asked what they have
        before any byte is sent again. One that does not even answer this counts as lost."""

        async def ask(node: Node) -> bool:
            reply, _ = await node.control.request(
                messages.Have((shard.digest,), True),
                messages.HaveReply,
                timeout_s=limits.CONNECT_TIMEOUT_S,
            )
            # Hashed by that node since it started: so it is what this store sent, or as good.
            (held,) = bitmaps.unpack(reply.held, 1)
            return held and any(age_s >= 0 for age_s in reply.verified_age_s[:1])

        nodes = self._cluster.nodes
        have = await self._cluster.ask_all(ask, [nodes[node] for node in chain if node in nodes])
        reports = []
        for node in chain:
            if have.get(node):
                reports.append(CopyReport(node, "durable", shard.size))
            elif node == culprit:
                reports.append(CopyReport(node, "failed", 0, error.kind, error.message[:8000]))
            else:
                reports.append(CopyReport(node, "unknown"))
        return tuple(reports)

    async def _find_fault(
        self, shard: Shard, source: Node | None, reports: tuple[CopyReport, ...]
    ) -> None:
        """Some node got other bytes than announced: whose were they?

        Raises SourceChanged when they were ours. A copy from which a node sent is read again by
        that node, and no longer counts when it is bad.
        """
        if source is None:
            await asyncio.get_running_loop().run_in_executor(
                self._threads, partial(_check_source, shard)
            )
        senders = {report.node for report in reports if report.state == "present"}
        senders |= {source.id} if source is not None else set()

        async def verify(node: Node) -> str:
            reply, _ = await node.control.request(
                messages.Verify((shard.digest,)), messages.VerifyReply
            )
            return reply.results[0] if reply.results else "missing"

        nodes = self._cluster.nodes
        found = await self._cluster.ask_all(
            verify, [nodes[node] for node in sorted(senders) if node in nodes]
        )
        bad = {node for node in senders if found.get(node) != "ok"}
        shard.bad_holders |= bad
        shard.holders -= bad
        for node in bad:
            self._progress.note(f"{node} had a bad copy of shard {shard.digest.hex()}")

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
            if report.state in _STORED and node not in shard.bad_holders:
                shard.holders.add(node)
                self._failures.pop(node, None)
                if report.state == "durable":
                    self.bytes_written += shard.size
                    ended_s = shard.durable_at_s.get(node, time.monotonic())
                    self._note_speed(node, shard.size, started_s, ended_s)
                else:
                    self._placement.released(node, shard.size)
                continue
            self._placement.released(node, shard.size)
            if report.state == "busy":
                busy = True
            elif report.state == "failed" and not (report.code == _CORRUPT and shard.bad_holders):
                self._note_failure(node, report.code, report.message, started_s)
        shard.bad_holders.clear()
        return busy

    def _note_speed(self, node: str, size: int, started_s: float, ended_s: float) -> None:
        """The node was busy with this shard since it began, or since it finished the one before,
        until its own copy was durable: a slow tail does not make its head look slow."""
        began_s = max(started_s, self._free_at_s.get(node, 0.0))
        self._free_at_s[node] = max(ended_s, began_s)
        self._placement.finished(node, size, ended_s - began_s)

    def _note_failure(self, node: str, code: str, reason: str, started_s: float) -> None:
        _log.info("copy_failed", node=node, kind=code, reason=reason)
        self._last_error = PeerError(node, (reason or code).removeprefix(f"{node}: "))
        if node in self._left_out:
            return
        if code in _FULL:
            self._left_out.add(node)
            if code == "no_room":
                self._without_room.add(node)
            elif code == Draining.kind:
                self._leaving.add(node)
            self._progress.note(f"{node} takes no more shards: {reason}")
            return
        if started_s < self._failed_at_s.get(node, 0.0):
            return  # one incident broke all transfers that were under way
        self._failed_at_s[node] = time.monotonic()
        self._failures[node] = self._failures.get(node, 0) + 1
        if self._failures[node] >= _NODE_FAILURES_MAX:
            self._left_out.add(node)
            self._progress.note(f"{node} is left out: {reason}")

    # -- one transfer

    def _source_node(self, shard: Shard) -> Node | None:
        """A node that has a copy and can send it on."""
        nodes = self._cluster.nodes
        for node in sorted(shard.holders):
            # A full or draining node takes nothing more, but gives what it has.
            gives = node in self._without_room or node in self._leaving
            if node in nodes and (node not in self._left_out or gives):
                return nodes[node]
        return None

    @contextmanager
    def _channel(self, where: messages.Hop) -> Iterator[BulkChannel]:
        """A bulk channel to a node for the length of the context, which `close` interrupts."""
        bulk = self._cluster.bulk
        channel = bulk.acquire(where.node, where.host, where.port)
        try:
            with self._lock:
                if self._stopping:
                    raise PeerUnreachable(where.node, "this store is over")
                self._channels.add(channel)
            yield channel
        finally:
            with self._lock:
                self._channels.discard(channel)
            bulk.release(where.node, where.host, where.port, channel)

    def _push(self, source: Node, shard: Shard, chain: tuple[str, ...]) -> tuple[CopyReport, ...]:
        hops = tuple(self._nodes[node].hop for node in chain)
        with self._channel(source.hop) as channel:
            return push_shard(channel, messages.PushShard(shard.digest, shard.size, hops))

    def _send_chain(self, shard: Shard, chain: tuple[str, ...]) -> tuple[CopyReport, ...]:
        head, *rest = [self._nodes[node].hop for node in chain]
        request = messages.PutShard(shard.digest, shard.size, tuple(rest))
        with self._channel(head) as channel:
            source = shard.open()
            sender = ShardSender(channel, request, hop=0)
            try:
                sender.negotiate()
                return sender.send(source)
            finally:
                source.close()
                with self._lock:
                    self.bytes_sent += sender.sent_bytes
                    shard.durable_at_s.update(sender.durable_at_s)
                self._progress.node(head.node, sender.sent_bytes)


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
