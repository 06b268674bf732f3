"""Re-reads every copy of this node in turn, and deals with those that are bad.

What is to be read when, and what a bad reading means, is decided in `core.scrubbing`. When each
copy was checked is written down now and then, so that a restart goes on where the last process was.
Whether a copy counts as checked is never decided by that: see
docs/decisions/old-checks-do-not-count.md.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import structlog

from ckptd.clock import Clock
from ckptd.core import job_names, limits
from ckptd.core.scrubbing import SAMPLE_COPIES, Pace, Verdict, judge, record_is_due
from ckptd.errors import CkptdError
from ckptd.node.jobs import JobProgress
from ckptd.node.ports import OnDisk
from ckptd.node.quarantine_keeper import QuarantineKeeper
from ckptd.observe.metrics import Metrics
from ckptd.store.copy_reader import Look, VerifyResult
from ckptd.store.index import LastCheck
from ckptd.store.shards import CheckSurvey, ShardStore
from ckptd.store.state_file import StateFile

_log = structlog.get_logger(__name__)


@dataclass(eq=False)
class _Suspicion:
    """Copies that read badly, too many at a time to be believed."""

    looks: dict[bytes, Look]
    next_look_s: float
    rounds: int = 0


@dataclass(eq=False)
class _Sample:
    """Copies that were read one after the other, and the bad ones among them."""

    seen: set[bytes] = field(default_factory=set)
    bad: dict[bytes, Look] = field(default_factory=dict)
    read_bytes: int = 0


class Scrubber:
    """The job "scrub" of one node.

    `record` is the file that keeps when copies were checked. `on_corrupt` is told each shard whose
    copy went to quarantine. `keeper` looks after what lies there.
    """

    name = job_names.SCRUB

    def __init__(
        self,
        *,
        store: ShardStore,
        pace: Pace,
        record: StateFile,
        keeper: QuarantineKeeper,
        clock: Clock,
        on_disk: OnDisk,
        metrics: Metrics,
        on_corrupt: Callable[[bytes], None],
    ) -> None:
        self._store = store
        self._pace = pace
        self._record = record
        self._keeper = keeper
        self._clock = clock
        self._on_disk = on_disk
        self._metrics = metrics
        self._on_corrupt = on_corrupt
        self._survey = CheckSurvey([], 0, 0)
        self._surveyed_s = -math.inf
        self._queue: deque[LastCheck] = deque()
        # Not at once: a machine that starts has other things to read.
        self._begin_s = clock.monotonic_s() + pace.longest_wait_s
        self._read_s = -math.inf  # when the last slice began
        self._read_bytes = 0  # in it
        self._read_of_bytes = 0  # what the store held then
        self._suspicion: _Suspicion | None = None
        self._recorded_s = clock.monotonic_s()
        self._checked = 0  # since then

    # -- what others are told

    @property
    def suspicion(self) -> str:
        """Why this node does not trust what it reads; "" while it does."""
        if self._suspicion is None:
            return ""
        return (
            f"{len(self._suspicion.looks)} copies read wrong at about the same time: "
            "rather the power supply or the card than the copies"
        )

    def progress(self) -> JobProgress:
        """`done_bytes` of the store's bytes were hashed within the scrub interval."""
        error = self.suspicion
        if not error and not self._pace.keeps_up(self._survey.total_bytes):
            error = "scrub.rate is too low to read every copy within scrub.interval"
        return JobProgress(self._survey.checked_bytes, self._survey.total_bytes, error)

    def oldest_verified_at(self) -> float | None:
        """When the copy was hashed whose last check is the oldest, in seconds since 1970; None
        when of one copy nobody knows, or when there is none."""
        if not self._queue or self._queue[0].age_s == math.inf:
            return None
        age_s = self._queue[0].age_s + self._clock.monotonic_s() - self._surveyed_s
        return self._clock.wall_s() - age_s

    # -- the job

    def load(self) -> None:
        """Takes in what the last process wrote down. Blocks on the disk."""
        data = self._record.read()
        if data is not None and not self._store.recall_checks(data):
            _log.warning("check_record_unreadable", path=self._record.path)

    def save(self) -> None:
        """Writes down when each copy was checked. Blocks on the disk."""
        self._record.write(self._store.check_record(self._clock.wall_s()))

    async def step(self) -> float:
        """Reads some megabytes, or waits."""
        if self._suspicion is not None:
            wait_s = await self._look_at_suspects(self._suspicion)
        else:
            wait_s = await self._scrub()
        self._metrics.scrub_oldest(self.oldest_verified_at())
        await self._write_record_if_due()
        await self._keeper.step()
        return min(wait_s, self._pace.longest_wait_s)

    async def _scrub(self) -> float:
        begun_s = self._clock.monotonic_s()
        if (wait_s := self._rest_s(begun_s)) > 0:
            return wait_s
        await self._refill()
        if (wait_s := max(self._due_in_s(begun_s), self._begin_s - begun_s)) > 0:
            return wait_s
        sample = _Sample()
        self._read_of_bytes = self._store.total_bytes
        verdict = await self._read(sample)
        self._read_s, self._read_bytes = begun_s, sample.read_bytes
        if verdict is Verdict.SUSPECT:
            self._become_suspect(sample.bad)
        elif verdict is Verdict.CONFIRM:
            await self._confirm(sample.bad)
        await self._refill()
        return self._rest_s(self._clock.monotonic_s())

    def _rest_s(self, now_s: float) -> float:
        """How long to wait because so much was read at once. What was removed since then makes it
        no longer."""
        total_bytes = max(self._store.total_bytes, self._read_of_bytes)
        rest_s = self._pace.rest_s(self._read_bytes, total_bytes)
        return max(0.0, self._read_s + rest_s - now_s)

    def _due_in_s(self, now_s: float) -> float:
        """How long to wait because the oldest check is young."""
        if not self._queue:
            return self._pace.longest_wait_s
        return self._pace.due_in_s(self._queue[0].age_s + now_s - self._surveyed_s)

    async def _read(self, sample: _Sample) -> Verdict:
        """Reads what is due, as much as one slice takes; more when something looks bad."""
        verdict = Verdict.GOOD
        while True:
            full = (
                sample.read_bytes >= limits.SCRUB_SLICE_BYTES
                or len(sample.seen) >= limits.SCRUB_SLICE_COPIES
            )
            if full or not await self._read_next(sample, due=True):
                break
        while True:
            more = any(check.digest not in sample.seen for check in self._queue)
            verdict = judge(len(sample.seen), len(sample.bad), more=more)
            if verdict is not Verdict.LOOK_FURTHER:
                return verdict
            await self._read_next(sample, due=False)

    async def _read_next(self, sample: _Sample, *, due: bool) -> bool:
        """Reads the copy that was checked longest ago, if it is `due`; whether one was."""
        while self._queue:
            check = self._queue[0]
            (age_s,) = self._store.last_checks(
                [(check.digest, check.size_bytes)], self._clock.wall_s()
            )
            if age_s is None or check.digest in sample.seen:
                self._queue.popleft()  # gone, or just read
                continue
            if due and self._pace.due_in_s(age_s) > 0:
                if self._due_in_s(self._clock.monotonic_s()) > 0:
                    return False
                self._queue.popleft()  # somebody else has checked it since the survey
                continue
            self._queue.popleft()
            await self._look(check.digest, sample)
            return True
        return False

    async def _look(self, digest: bytes, sample: _Sample) -> None:
        look = await self._on_disk(partial(self._store.look, digest))
        sample.seen.add(digest)
        sample.read_bytes += look.read_bytes
        self._checked += 1
        self._metrics.scrubbed(look.read_bytes)
        if look.result is VerifyResult.CORRUPT:
            sample.bad[digest] = look

    async def _refill(self) -> None:
        """Looks which copies are next, when too few are known for a sample."""
        if len(self._queue) >= min(SAMPLE_COPIES, len(self._store)) > 0:
            return
        self._surveyed_s = self._clock.monotonic_s()
        self._survey = await self._on_disk(
            partial(
                self._store.survey_checks,
                limits.SCRUB_QUEUE_COPIES,
                self._clock.wall_s(),
                within_s=self._pace.interval_s,
            )
        )
        self._queue = deque(self._survey.oldest)

    # -- bad copies

    async def _confirm(self, bad: dict[bytes, Look]) -> None:
        """Reads bad copies again, some seconds later; what is still bad goes to quarantine."""
        await asyncio.sleep(limits.VERIFY_PAUSE_S)
        for digest, look in bad.items():
            result = await self._on_disk(partial(self._store.look_again, digest, look))
            if result is VerifyResult.CORRUPT:
                self._on_corrupt(digest)
            elif result is VerifyResult.OK:
                _log.warning(
                    "bad_read_not_repeated",
                    shard=digest.hex(),
                    next="vcgencmd get_throttled: a weak supply makes a Pi read wrong bytes",
                )

    def _become_suspect(self, bad: dict[bytes, Look]) -> None:
        self._suspicion = _Suspicion(bad, self._clock.monotonic_s() + self._pace.suspect_pause_s)
        _log.error(
            "node_suspect",
            copies=len(bad),
            reason=self.suspicion,
            next="vcgencmd get_throttled; dmesg | tail; then check supply, cable and card",
        )

    async def _look_at_suspects(self, suspicion: _Suspicion) -> float:
        now_s = self._clock.monotonic_s()
        if now_s < suspicion.next_look_s:
            return suspicion.next_look_s - now_s
        sample = _Sample()
        for digest in suspicion.looks:
            await self._look(digest, sample)
        suspicion.rounds += 1
        verdict = judge(len(sample.seen), len(sample.bad), more=False, rounds=suspicion.rounds)
        if verdict is Verdict.SUSPECT:
            suspicion.looks = sample.bad
            suspicion.next_look_s = now_s + self._pace.suspect_pause_s
            return self._pace.suspect_pause_s
        self._suspicion = None
        _log.info("node_no_longer_suspect", bad=len(sample.bad), rounds=suspicion.rounds)
        await self._confirm(sample.bad)
        return 0.0

    async def _write_record_if_due(self) -> None:
        now_s = self._clock.monotonic_s()
        if record_is_due(now_s - self._recorded_s, self._checked, len(self._store)):
            await self._on_disk(self.save)
            self._recorded_s, self._checked = now_s, 0

    def stop(self) -> None:
        """Writes down how far it is, at the end of the process. Blocks; raises nothing."""
        try:
            self.save()
        except CkptdError as error:
            _log.warning("check_record_not_written", reason=error.message)
