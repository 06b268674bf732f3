"""The steward's job "repair": finds what has too few copies and has them made, worst first.

Who is steward asks every worker about every live version when something has changed, and once in a
while; between two rounds only about versions that are new or lack something. Copies go from worker
to worker: the steward asks a holder to send, within `repair.rate`, and moves no shard itself. It
tells holders of copies that are too many, too; what they do about that is up to them.

Nothing is remembered over a restart, and need not be: whatever was done shows in the next answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from functools import partial
from typing import Final, NamedTuple

import structlog
from msgspec import structs

from ckptd.config import RepairConfig
from ckptd.core import limits
from ckptd.core.headers import VersionHeader
from ckptd.core.repair import Copy, Needs, Planner, VersionCopies
from ckptd.core.workers import Absences, judge_absences, recent_bytes
from ckptd.errors import PeerError
from ckptd.node.fleet import Fleet, Sight
from ckptd.node.inventories import Inventories, batches
from ckptd.node.jobs import JobProgress
from ckptd.node.ports import Clock, Network, OnDisk
from ckptd.node.records import Records
from ckptd.node.repair_scan import Scan, Totals
from ckptd.node.sending import Outcome, Sending
from ckptd.observe.metrics import Metrics
from ckptd.wire import messages

_log = structlog.get_logger(__name__)

_VERSIONS_AT_ONCE: Final = 16
_SILENT_MIN_S: Final = 0.001  # 0 means that it answers


class Repairer:
    """As `ckptd.node.jobs.Job`; does nothing on a node that is not the steward."""

    name = "repair"

    def __init__(
        self,
        *,
        fleet: Fleet,
        inventories: Inventories,
        records: Records,
        network: Network,
        config: RepairConfig,
        metrics: Metrics,
        on_disk: OnDisk,
        clock: Clock,
    ) -> None:
        self._fleet = fleet
        self._inventories = inventories
        self._records = records
        self._network = network
        self._config = config
        self._metrics = metrics
        self._on_disk = on_disk
        self._clock = clock
        self._sending = Sending(network, config.rate_bytes_per_s)
        self._settle_s = min(config.after_s, limits.REPAIR_SETTLE_MAX_S)
        self._forget()

    def _forget(self) -> None:
        self._steward = False
        self._scan: Scan | None = None
        self._totals: Totals | None = None
        self._queue: dict[str, int] = {}
        self._fine: set[str] = set()
        self._sets: tuple[frozenset[str], ...] = ()
        self._refilling: frozenset[str] = frozenset()
        self._avoid_until_s: dict[str, float] = {}
        self._failures: Counter[str] = Counter()  # in a row
        self._done_bytes = 0
        self._absences = Absences()
        self._silent_since_s: dict[str, float] = {}
        self._silent_pause_s = limits.REPAIR_SCAN_GAP_S
        self._waiting_since_s = 0.0
        self._stuck = ""
        self._shape: object = None
        self._counts: dict[str, tuple[int, int, float]] = {}
        self._digest = b""
        self._full_due = True
        self._new_due_s: float | None = None
        self._next_scan_s = 0.0
        self._next_full_s = 0.0

    # -- what is told to others

    def progress(self) -> JobProgress:
        """As `Job.progress`."""
        left = self._totals.queued_bytes if self._totals else 0
        return JobProgress(self._done_bytes, self._done_bytes + left, self._stuck)

    def view(self) -> messages.RepairView | None:
        """What the steward knows; None on another node, and before the first round."""
        if self._totals is None:
            return None
        held_s = self._clock.monotonic_s() - self._waiting_since_s
        # Whoever has just started has not heard of everybody yet: that is no news.
        held_back = self._absences.waiting if held_s >= limits.REPAIR_WAIT_SHOWN_S else ""
        waiting = "; ".join(text for text in (held_back, self._stuck) if text)
        return messages.RepairView(
            queued_shards=self._totals.queued_shards,
            queued_bytes=self._totals.queued_bytes,
            under_replicated=self._totals.under_replicated,
            unrecoverable=self._totals.unrecoverable,
            waiting=waiting[: limits.REFUSED_TEXT_MAX],
        )

    def is_idle(self) -> bool:
        """Whether a whole round has found nothing missing and nothing too much, and none is due."""
        totals = self._totals
        at_rest = self._scan is None and not self._full_due and not self._queue
        return totals is not None and at_rest and not totals.queued_shards and not totals.surplus

    def look_again(self) -> None:
        """Copies have moved: the next round is about all versions."""
        self._full_due = True

    # -- the job

    async def step(self) -> float:
        """As `Job.step`."""
        if not self._fleet.is_steward:
            if self._steward:
                self._forget()
                self._metrics.repair(None, None, None)
            return limits.REPAIR_LOOK_S
        self._steward = True
        sight = self._with_silence(await self._fleet.look())
        self._note(sight)
        until_s = self._clock.monotonic_s() + limits.COPY_SLICE_S
        if self._scan is None:
            self._begin_scan()
        if self._scan is not None and not await self._go_on(self._scan, sight, until_s):
            return 0.0
        moved = await self._repair(sight) if self._queue else False
        self._tell_metrics()
        return 0.0 if moved else limits.REPAIR_LOOK_S

    def _tell_metrics(self) -> None:
        if (totals := self._totals) is not None:
            self._metrics.repair(totals.queued_bytes, totals.under_replicated, totals.unrecoverable)

    def _with_silence(self, sight: Sight) -> Sight:
        """The same, with how long each has left questions unanswered."""
        now_s = self._clock.monotonic_s()
        workers = tuple(
            structs.replace(worker, silent_s=max(now_s - since_s, _SILENT_MIN_S))
            if (since_s := self._silent_since_s.get(worker.node)) is not None
            else worker
            for worker in sight.workers
        )
        return sight._replace(workers=workers)

    async def _ask(
        self, headers: Sequence[VersionHeader], sight: Sight, but: Collection[str]
    ) -> AsyncIterator[VersionCopies]:
        """What the workers say of these versions, and who says nothing, which counts until it has
        answered in a whole round. Those in `but` are not waited for."""
        asked = [node for node in sight.up if node not in but]
        now_s = self._clock.monotonic_s()
        async for version in self._inventories.ask(headers, asked):
            for node in set(asked).difference(version.bitmaps):
                self._silent_since_s.setdefault(node, now_s)
            yield version

    def _note(self, sight: Sight) -> None:
        """What has changed since the last look, and what is to be asked anew because of it."""
        absences = judge_absences(sight.workers, after_s=self._config.after_s)
        if bool(absences.waiting) != bool(self._absences.waiting):
            self._waiting_since_s = self._clock.monotonic_s()
        if absences.waiting != self._absences.waiting:
            _log.info("repair_waits", reason=absences.waiting or "for nobody any more")
        self._absences = absences
        shape = (
            tuple((w.node, w.up, w.draining, w.maintenance) for w in sight.workers),
            tuple(worker.node for worker in absences.presumed),
            absences.unheard,
        )
        if shape != self._shape:
            self._shape = shape
            self._full_due = True
            self._silent_pause_s = limits.REPAIR_SCAN_GAP_S
        for node, status in sight.statuses.items():
            shards, quarantined, uptime_s = self._counts.get(node, (0, 0, 0.0))
            lost_some = status.shards < shards or status.quarantined > quarantined
            if lost_some or status.uptime_s < uptime_s:
                self._full_due = True
            self._counts[node] = (status.shards, status.quarantined, status.uptime_s)
        digest = self._records.digest()
        if digest != self._digest:
            self._digest = digest
            self._new_due_s = self._clock.monotonic_s()

    # -- asking

    def _begin_scan(self) -> None:
        now_s = self._clock.monotonic_s()
        if now_s < self._next_scan_s:
            return
        live = self._records.live_versions()
        if self._full_due or now_s >= self._next_full_s:
            self._scan = Scan(live, True, now_s)
            self._full_due = False
        elif self._new_due_s is not None and now_s >= self._new_due_s:
            headers = [version for version in live if version.id not in self._fine]
            self._scan = Scan(headers, False, now_s)
        else:
            return
        self._new_due_s = None

    async def _go_on(self, scan: Scan, sight: Sight, until_s: float) -> bool:
        """Asks until the time is over; whether the round has come to its end."""
        needs = self._needs(sight)
        workers = {worker.node: worker for worker in sight.workers}
        scan.asked.update(sight.up)
        while (batch := scan.next_batch()) is not None:
            young = {header.id for header in batch if self._is_young(header)}
            async for version in self._ask(batch, sight, scan.silent):
                scan.silent.update(set(sight.up).difference(version.bitmaps))
                note = partial(
                    scan.note, version, needs, workers, is_young=version.version in young
                )
                for node, shards in (await self._on_disk(note)).items():
                    await self._hint(node, version.version, shards)
            if self._clock.monotonic_s() >= until_s:
                return False
        self._conclude(scan, sight)
        return True

    def _conclude(self, scan: Scan, sight: Sight) -> None:
        now_s = self._clock.monotonic_s()
        took_s = now_s - scan.started_s
        self._scan = None
        self._next_scan_s = now_s + max(
            limits.REPAIR_SCAN_GAP_S, took_s * limits.REPAIR_SCAN_SLOWDOWN
        )
        if scan.is_full:
            self._next_full_s = now_s + limits.REPAIR_SCAN_INTERVAL_S
            self._fine = scan.fine
            self._sets = tuple(sorted(scan.sets, key=lambda each: (-scan.sets[each], sorted(each))))
        else:
            self._fine |= scan.fine
            scan.totals.surplus += self._totals.surplus if self._totals else 0
        if scan.is_full:  # who has answered about everything is silent no more
            known = {worker.node for worker in sight.workers}
            stay = (scan.silent | (self._silent_since_s.keys() - scan.asked)) & known
            self._silent_since_s = {node: self._silent_since_s[node] for node in stay}
        if self._silent_since_s:
            # Who has only just come or gone answers soon; a round may cost much if nobody does.
            pause_s = min(self._silent_pause_s, self._config.after_s)
            self._next_full_s = min(self._next_full_s, now_s + pause_s)
            if scan.is_full:
                longest_s = limits.REPAIR_SILENT_INTERVAL_S
                self._silent_pause_s = min(2 * self._silent_pause_s, longest_s)
        else:
            self._silent_pause_s = limits.REPAIR_SCAN_GAP_S
        if not self._queue and scan.urgencies:
            self._done_bytes = 0
            _log.info("repair_begins", versions=len(scan.urgencies), **vars(scan.totals))
        self._totals = scan.totals
        self._queue = scan.urgencies
        self._stuck = ""
        if scan.young:
            self._look_at_new_in(self._settle_s)
        if scan.totals.surplus:
            self._next_full_s = min(self._next_full_s, now_s + limits.REPAIR_SURPLUS_INTERVAL_S)

    def _look_at_new_in(self, seconds: float) -> None:
        at_s = self._clock.monotonic_s() + seconds
        self._new_due_s = at_s if self._new_due_s is None else min(at_s, self._new_due_s)

    def _is_young(self, header: VersionHeader) -> bool:
        """Whether the version may still be on its way to its nodes."""
        if header.id in self._fine:
            return False
        now_ms = self._clock.wall_s() * 1000
        return now_ms - self._settle_s * 1000 < header.order <= now_ms

    def _needs(self, sight: Sight) -> Needs:
        return Needs(sight.workers, self._absences, now_ms=int(self._clock.wall_s() * 1000))

    async def _hint(self, node: str, version: str, shards: Sequence[bytes]) -> None:
        """Tells a holder that it has too many. It matters little whether it hears it."""
        for start in range(0, len(shards), limits.SHARDS_PER_COPY_MAX):
            some = tuple(shards[start : start + limits.SHARDS_PER_COPY_MAX])
            hint = messages.Surplus(bytes.fromhex(version), some)
            try:
                reply, _ = await self._network.request(
                    node, hint, messages.SurplusReply, timeout_s=limits.CONNECT_TIMEOUT_S
                )
            except PeerError as error:
                _log.debug("surplus_not_told", node=node, reason=error.message)
                return
            if reply.noted < len(some):
                return

    # -- copying

    async def _repair(self, sight: Sight) -> bool:
        """Has some copies made; whether any is new, or there is more to try."""
        copies, gave_up = await self._plan(sight)
        if not self._queue:
            self._look_at_new_in(0.0)  # to see what it has come to
        if gave_up:
            self._stuck = "no node with room for another copy of some shards"
            self._look_at_new_in(limits.REPAIR_AVOID_S)
        if not copies:
            return bool(self._queue)
        outcome = await self._sending.send(copies)
        self._note_failures(outcome)
        self._done_bytes += outcome.done_bytes
        if self._totals is not None:
            self._totals.queued_bytes = max(0, self._totals.queued_bytes - outcome.done_bytes)
            self._totals.queued_shards = max(0, self._totals.queued_shards - outcome.done_copies)
        if outcome.there and not outcome.new_copies:
            # Their nodes do not say that they have them: no other version must wait for that.
            for version_id in outcome.there:
                self._queue.pop(version_id, None)
            self._look_at_new_in(limits.REPAIR_AVOID_S)
            return bool(self._queue)
        return outcome.new_copies > 0

    def _note_failures(self, outcome: Outcome) -> None:
        """A node that fails again and again is passed over for a while. Once or twice is nothing:
        one that has just come back is not connected with all others yet."""
        until_s = self._clock.monotonic_s() + limits.REPAIR_AVOID_S
        for node in outcome.worked:
            self._failures.pop(node, None)
        for node in outcome.failed:
            self._failures[node] += 1
            if self._failures[node] >= limits.REPAIR_FAILURES_MAX:
                self._avoid_until_s[node] = until_s

    async def _plan(self, sight: Sight) -> tuple[list[Copy], bool]:
        """The next copies of the most endangered versions, and whether one was given up for now
        because nobody can take its copies. What lacks nothing any more leaves the queue, too."""
        worst = min(self._queue.values())
        chosen = [v for v, urgency in self._queue.items() if urgency == worst][:_VERSIONS_AT_ONCE]
        catalogue = self._records.catalogue
        headers = [h for v in chosen if (h := catalogue.version(v)) and not catalogue.is_dead(v)]
        needs, planner = self._needs(sight), self._planner(sight)
        copies: list[Copy] = []
        kept: dict[str, int] = {}
        gave_up = False
        for batch in batches(headers):
            async for version in self._ask(batch, sight, self._absences.unheard):
                found = await self._on_disk(partial(_plan_one, version, needs, planner, worst))
                copies += found.copies
                if found.copies or found.urgency not in (None, worst):
                    kept[version.version] = found.urgency or worst
                gave_up = gave_up or (found.urgency == worst and not found.copies)
        for version_id in chosen:
            self._queue.pop(version_id, None)
        self._queue |= kept
        self._refilling = planner.refilling
        return copies[: limits.SHARDS_PER_COPY_MAX], gave_up

    def _planner(self, sight: Sight) -> Planner:
        now_s = self._clock.monotonic_s()
        avoided = {node for node, until_s in self._avoid_until_s.items() if until_s > now_s}
        avoided |= self._absences.unheard | self._sending.late
        workers = [
            structs.replace(worker, bytes_free=0) if worker.node in avoided else worker
            for worker in sight.workers
        ]
        return Planner(
            workers,
            self._needs(sight),
            spare_bytes=recent_bytes(self._records.live_versions()),
            used_sets=self._sets,
            refilling=self._refilling,
        )


class _Planned(NamedTuple):
    """Copies of one version to be made now, and the urgency of what it lacks."""

    copies: list[Copy]
    urgency: int | None


def _plan_one(version: VersionCopies, needs: Needs, planner: Planner, worst: int) -> _Planned:
    urgency = needs.shortage(version).urgency
    if urgency != worst:
        return _Planned([], urgency)  # it has changed since the round: its turn comes later
    most = limits.SHARDS_PER_COPY_MAX
    copies = planner.plan(version, urgency=urgency, limit=most)
    return _Planned(copies or planner.plan(version, limit=most), urgency)
