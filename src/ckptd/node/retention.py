"""Retention: the steward among the coordinators drops what the config's rules do not keep.

It only writes tombstones. Each worker removes shards by itself, when their grace is over and what
justifies the tombstone is still protected (`ckptd.node.collector`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Final

import structlog
from msgspec import Struct

from ckptd.clock import Clock
from ckptd.core import documents, limits
from ckptd.core.documents import Tombstone
from ckptd.core.headers import VersionHeader, removed_contents
from ckptd.core.retention import (
    Batch,
    Plan,
    RetentionRule,
    batches,
    plan,
    prudent_now_s,
    unjustified,
)
from ckptd.core.signing import Signer
from ckptd.errors import CkptdError
from ckptd.node.confirmation import Confirmation
from ckptd.node.jobs import JobProgress
from ckptd.node.ports import Network, OnDisk
from ckptd.node.records import Records
from ckptd.wire import messages

_log = structlog.get_logger(__name__)

_LOOK_S: Final = 1.0
_AGAIN_MIN_S: Final = 10.0  # when nothing became known: protection and ages change all the same
_AGAIN_MAX_S: Final = 300.0


class Outcome(Struct, frozen=True):
    """What was planned, and whether it was done. `waits`: nobody confirmed it yet."""

    plan: Plan
    done: bool
    waits: bool


class Retention:
    """The job "retention".

    `rules` are the config's. `is_steward` says whether this node is the one that applies them now;
    `workers` are the workers that are up. `signer` writes tombstones: a coordinator's.
    """

    name = "retention"

    def __init__(
        self,
        *,
        cluster: str,
        rules: Sequence[RetentionRule],
        records: Records,
        signer: Signer,
        network: Network,
        confirmation: Confirmation,
        workers: Callable[[], Sequence[str]],
        is_steward: Callable[[], bool],
        clock: Clock,
        on_disk: OnDisk,
        rng: random.Random,
    ) -> None:
        self._cluster = cluster
        self._rules = rules
        self._records = records
        self._signer = signer
        self._network = network
        self._confirmation = confirmation
        self._workers = workers
        self._is_steward = is_steward
        self._clock = clock
        self._on_disk = on_disk
        self._rng = rng
        self._one_at_a_time = asyncio.Lock()
        self._seen: frozenset[str] | None = None  # live when the rules were last applied
        self._looked_at: bytes = b""
        self._again_s = 0.0
        self._pause_s = _AGAIN_MIN_S
        self._waits_for = ""

    def progress(self) -> JobProgress:
        """Why versions that the rules drop are still there, if so."""
        return JobProgress(last_error=self._waits_for)

    async def step(self) -> float:
        """Applies the rules when something became known, or after a while."""
        if not self._rules or not self._is_steward():
            self._seen = None  # another one applies them: what came meanwhile is not known here
            self._waits_for = ""
            return _LOOK_S
        digest = self._records.digest()
        now_s = self._clock.monotonic_s()
        if digest != self._looked_at:
            self._pause_s = _AGAIN_MIN_S
        elif now_s < self._again_s:
            return _LOOK_S
        else:
            self._pause_s = min(2 * self._pause_s, _AGAIN_MAX_S)
        await self.apply()
        self._looked_at = digest
        self._again_s = now_s + self._pause_s
        return _LOOK_S

    async def apply(self, *, dry_run: bool = False, confirmed: bool = False) -> Outcome:
        """Plans, and writes the tombstones, unless it is a dry run or a large plan that nobody
        `confirmed` (`Plan.is_large`). Raises what writing to this node's own disk raises."""
        async with self._one_at_a_time:
            found, protected = await self._plan()
            waits = bool(found.delete) and not confirmed and found.is_large(self._seen)
            if dry_run:
                return Outcome(found, done=False, waits=waits)
            self._waits_for = _why_it_waits(found) if waits else ""
            dead = await self._unjustified(protected)
            for batch in [*([] if waits else batches(found.delete)), *dead]:
                await self._write(batch)
            if not waits:
                self._seen = frozenset(kept.version.id for kept in found.keep)
            return Outcome(found, done=not waits, waits=waits)

    # -- planning

    async def _plan(self) -> tuple[Plan, set[str]]:
        """The plan, and the versions that were found protected for it.

        Nobody is asked about what the rules would keep anyway. If what they keep is protected, the
        rest need not be; if not, it must be known which of the rest is.
        """
        live = await self._on_disk(self._records.live_versions)
        pinned = {version.id for version in live if self._records.catalogue.pins(version.id)}
        now_s = await self._now_s()
        make = partial(plan, live, self._rules, pinned=pinned, now_s=now_s)
        hoped_for = make(protected={version.id for version in live})
        runs = {dropped.version.run for dropped in hoped_for.delete}
        if not runs:
            return hoped_for, set()
        kept = [each.version for each in hoped_for.keep if each.version.run in runs]
        protected = await self._confirmation.protected(kept)
        if len(protected) < len(kept):
            rest = [each.version for each in hoped_for.delete]
            protected |= await self._confirmation.protected(rest)
        return make(protected=protected), protected

    async def _now_s(self) -> float:
        own_s = self._clock.wall_s()
        if all(r.keep_every_s is None and r.keep_within_s is None for r in self._rules):
            return own_s
        clocks = await asyncio.gather(*(self._clock_of(node) for node in self._workers()))
        return prudent_now_s(own_s, [told for told in clocks if told is not None])

    async def _clock_of(self, node: str) -> float | None:
        try:
            status, _ = await self._network.request(
                node,
                messages.GetStatus(),
                messages.NodeStatus,
                timeout_s=limits.REQUEST_TIMEOUT_S,
            )
        except CkptdError:
            return None
        return status.clock_ms / 1000

    async def _unjustified(self, protected: Collection[str]) -> list[Batch]:
        """New tombstones for dead versions that wait in vain, because what justified them was
        removed by somebody."""
        waiting = await self._on_disk(self._records.unjustified)
        if not waiting:
            return []
        live = await self._on_disk(self._records.live_versions)
        runs = {version.run for version in waiting}
        asked = [v for v in live if v.run in runs and v.id not in protected]
        known = set(protected) | await self._confirmation.protected(asked)
        return batches(unjustified(waiting, live, protected=known))

    # -- writing

    async def _write(self, batch: Batch) -> None:
        wall_s = self._clock.wall_s()
        order = max(int(wall_s * 1000), 1 + self._records.catalogue.highest_order)
        raw = documents.encode(
            Tombstone(
                format=1,
                cluster=self._cluster,
                order=order,
                created=datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                nonce=f"{self._rng.getrandbits(128):032x}",
                reason="retention",
                versions=tuple(version.id for version in batch.versions),
                contents=removed_contents(batch.versions),
                justified_by=batch.justified_by,
            )
        )
        signature = self._signer.sign(raw)
        await self._on_disk(partial(self._records.put, raw, signature))
        _log.info(
            "versions_dropped",
            versions=len(batch.versions),
            names=sorted({version.name for version in batch.versions})[:8],
            justified_by=batch.justified_by,
        )
        payload = messages.encode_documents((messages.SignedDocument(raw, signature),))
        await asyncio.gather(*(self._bring(node, payload) for node in self._workers()))

    async def _bring(self, node: str, payload: bytes) -> None:
        """Hands a tombstone to a worker now; one that does not take it gets it by its next
        exchange of documents."""
        try:
            await self._network.request(
                node,
                messages.PutDocuments(1),
                messages.PutDocumentsReply,
                payload=payload,
                timeout_s=limits.REQUEST_TIMEOUT_S,
            )
        except CkptdError as error:
            _log.debug("tombstone_not_brought", node=node, reason=error.message)


def _why_it_waits(found: Plan) -> str:
    live = len(found.delete) + len(found.keep)
    return (
        f"the rules drop {len(found.delete)} of {live} live versions, more than half: "
        "see ckptd prune --dry-run, then ckptd prune --confirm"
    )


def answer(outcome: Outcome) -> messages.PruneReply:
    """What `ckptd prune` is told."""

    def rows(found: Sequence[tuple[VersionHeader, str]]) -> tuple[messages.PruneRow, ...]:
        return tuple(
            messages.PruneRow(bytes.fromhex(version.id), reason[: limits.PRUNE_REASON_MAX])
            for version, reason in found[: limits.PRUNE_ROWS_MAX]
        )

    delete = [(each.version, each.reason) for each in outcome.plan.delete]
    keep = [(each.version, each.reason) for each in outcome.plan.keep]
    return messages.PruneReply(
        delete=rows(delete),
        keep=rows(keep),
        delete_count=len(delete),
        keep_count=len(keep),
        waits=outcome.waits,
    )
