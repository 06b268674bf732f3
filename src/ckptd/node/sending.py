"""Having planned copies made: each holder is asked to send its part, all holders at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from ckptd.core import limits
from ckptd.core.repair import Copy
from ckptd.errors import PeerBusy, PeerError
from ckptd.node.ports import Network
from ckptd.wire import messages

_log = structlog.get_logger(__name__)

_DONE: Final = ("durable", "present")


@dataclass
class Outcome:
    """What came of some copies. `failed` are nodes that could not do their part, `worked` are
    targets that did. Of the `done_copies` the `new_copies` were written; the others, of the
    versions `there`, were there already."""

    done_copies: int = 0
    new_copies: int = 0
    done_bytes: int = 0
    failed: set[str] = field(default_factory=set)
    worked: set[str] = field(default_factory=set)
    there: set[str] = field(default_factory=set)

    def add(self, other: Outcome) -> None:
        """Takes in what came of others."""
        self.done_copies += other.done_copies
        self.new_copies += other.new_copies
        self.done_bytes += other.done_bytes
        self.failed |= other.failed
        self.worked |= other.worked
        self.there |= other.there


class Sending:
    """Asks holders to send. `rate_bytes_per_s` is what goes to one node from all holders."""

    def __init__(self, network: Network, rate_bytes_per_s: float) -> None:
        self._network = network
        self._rate_bytes_per_s = rate_bytes_per_s
        self.slice_bytes = rate_bytes_per_s * limits.COPY_SLICE_S
        """What one holder sends in one call, and at least one shard."""
        self._late: dict[asyncio.Task[Outcome], str] = {}

    @property
    def late(self) -> frozenset[str]:
        """Targets that were not waited for, and are still being sent to."""
        return frozenset(target for task, target in self._late.items() if not task.done())

    async def send(self, copies: Sequence[Copy]) -> Outcome:
        """Has copies made for about COPY_SLICE_S; those that there was no time for are left out,
        and planned anew by whoever wants them. Who takes much longer than the others is `late`:
        what comes of it is in the outcome of a later call."""
        sources: dict[str, set[str]] = {}
        for copy in copies:
            sources.setdefault(copy.target, set()).add(copy.source)
        tasks = {
            asyncio.create_task(
                self._have_sent(source, target, some, len(sources[target])),
                name=f"copies from {source} to {target}",
            ): target
            for (source, target), some in self._budgeted(copies).items()
        }
        try:
            await self._wait(tasks.keys())
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        self._late |= tasks
        outcome = Outcome()
        for task in [task for task in self._late if task.done()]:
            del self._late[task]
            outcome.add(task.result())
        return outcome

    @staticmethod
    async def _wait(tasks: Collection[asyncio.Task[Outcome]]) -> None:
        """Until all are done, or some are and the others take much longer."""
        if not tasks:
            return
        done, rest = await asyncio.wait(tasks, timeout=limits.COPY_SLICE_S * 2)
        if rest and not done:
            await asyncio.wait(rest, return_when=asyncio.FIRST_COMPLETED)

    def _budgeted(self, copies: Sequence[Copy]) -> dict[tuple[str, str], list[Copy]]:
        """By source and target what is asked for now: of one source no more than it sends in a
        slice."""
        left_bytes: dict[str, float] = {}
        found: dict[tuple[str, str], list[Copy]] = {}
        for copy in copies:
            left = left_bytes.get(copy.source, self.slice_bytes)
            if left > 0:
                left_bytes[copy.source] = left - copy.size
                found.setdefault((copy.source, copy.target), []).append(copy)
        return found

    async def _have_sent(
        self, source: str, target: str, copies: Sequence[Copy], sources: int
    ) -> Outcome:
        """Copies of one source to one target, which `sources` of them send to."""
        outcome = Outcome()
        by_version: dict[str, list[Copy]] = {}
        for copy in copies:
            by_version.setdefault(copy.version, []).append(copy)
        for version, some in by_version.items():
            request = messages.CopyShards(
                bytes.fromhex(version),
                tuple(copy.shard for copy in some),
                target,
                self._rate_bytes_per_s / sources,
            )
            try:
                reply, _ = await self._network.request(
                    source,
                    request,
                    messages.CopyShardsReply,
                    timeout_s=limits.REQUEST_TIMEOUT_S,
                )
            except PeerBusy:
                break
            except PeerError as error:
                _log.warning("copies_not_sent", node=source, target=target, reason=error.message)
                outcome.failed.add(source)
                break
            self._note(source, target, some, reply, outcome)
            if target in outcome.failed:
                break
        return outcome

    @staticmethod
    def _note(
        source: str,
        target: str,
        copies: list[Copy],
        reply: messages.CopyShardsReply,
        outcome: Outcome,
    ) -> None:
        for copy, report in zip(copies, reply.reports, strict=False):
            if report.state in _DONE:
                outcome.done_copies += 1
                if report.state == "durable":
                    outcome.new_copies += 1
                else:
                    outcome.there.add(copy.version)
                outcome.done_bytes += copy.size
                outcome.worked.add(target)
            elif report.state != "busy":
                _log.warning(
                    "copy_failed",
                    shard=copy.shard.hex(),
                    source=source,
                    target=target,
                    node=report.node,
                    reason=report.message,
                )
                if report.node == target:
                    outcome.failed.add(target)
