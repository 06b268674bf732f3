"""Having planned copies made: each holder is asked to send its part, all holders at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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
    targets that did."""

    done_copies: int = 0
    done_bytes: int = 0
    failed: set[str] = field(default_factory=set)
    worked: set[str] = field(default_factory=set)


class Sending:
    """Asks holders to send. `rate_bytes_per_s` is what goes to one node from all holders."""

    def __init__(self, network: Network, rate_bytes_per_s: float) -> None:
        self._network = network
        self._rate_bytes_per_s = rate_bytes_per_s
        self.slice_bytes = rate_bytes_per_s * limits.COPY_SLICE_S
        """What one holder sends in one call, and at least one shard."""

    async def send(self, copies: Sequence[Copy]) -> Outcome:
        """Has copies made for about COPY_SLICE_S; those that there was no time for are left out,
        and planned anew by whoever wants them."""
        outcome = Outcome()
        sources: dict[str, set[str]] = {}
        by_source: dict[str, list[Copy]] = {}
        for copy in copies:
            sources.setdefault(copy.target, set()).add(copy.source)
            by_source.setdefault(copy.source, []).append(copy)
        rates = {
            target: self._rate_bytes_per_s / len(sending) for target, sending in sources.items()
        }
        async with asyncio.TaskGroup() as group:
            for source, its_copies in by_source.items():
                work = self._have_sent(source, its_copies, rates, outcome)
                group.create_task(work, name=f"copies from {source}")
        return outcome

    async def _have_sent(
        self, source: str, copies: list[Copy], rates: dict[str, float], outcome: Outcome
    ) -> None:
        budget_bytes = self.slice_bytes
        groups: dict[tuple[str, str], list[Copy]] = {}
        for copy in copies:
            if budget_bytes <= 0:
                break
            budget_bytes -= copy.size
            groups.setdefault((copy.target, copy.version), []).append(copy)
        for (target, version), some in groups.items():
            if target in outcome.failed:
                continue
            request = messages.CopyShards(
                bytes.fromhex(version), tuple(copy.shard for copy in some), target, rates[target]
            )
            try:
                reply, _ = await self._network.request(
                    source,
                    request,
                    messages.CopyShardsReply,
                    timeout_s=limits.REQUEST_TIMEOUT_S,
                )
            except PeerBusy:
                return
            except PeerError as error:
                _log.warning("copies_not_sent", node=source, target=target, reason=error.message)
                outcome.failed.add(source)
                return
            self._note(source, target, some, reply, outcome)

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
