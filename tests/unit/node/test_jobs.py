"""Background jobs on virtual time: slices, pauses that last, failures that do not hide."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.store.workload import make_store
from tests.virtual_time import run_virtual

from ckptd.core import limits
from ckptd.core.job_names import JOB_NAMES
from ckptd.errors import MediumFailed, NoRoom, NotFound
from ckptd.node.jobs import JobProgress, Jobs, PausedJobs
from ckptd.observe.metrics import Metrics
from ckptd.store import layout
from ckptd.store.filesystem import OPERATING_SYSTEM
from ckptd.store.state_file import StateFile

_T = TypeVar("_T")


async def on_disk(work: Callable[[], _T]) -> _T:
    await asyncio.sleep(0.001)  # others run meanwhile, as they do when it is a thread
    return work()


class Sample:
    """A job that notes when its slices begin. `errors` are raised by its next slices."""

    def __init__(self, name: str = "scrub", wait_s: float = 10.0, slice_s: float = 0.0) -> None:
        self.name = name
        self.wait_s = wait_s
        self.slice_s = slice_s
        self.errors: list[Exception] = []
        self.began_s: list[float] = []
        self.own_error = ""
        self.disk_failed = False
        self.ended = 0
        self._changed = asyncio.Condition()

    def progress(self) -> JobProgress:
        if self.disk_failed:
            raise MediumFailed("the disk was pulled out")
        return JobProgress(len(self.began_s), 100, self.own_error)

    async def nth_slice(self, number: int) -> None:
        """Returns when the `number`-th slice has ended."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.ended >= number)

    async def step(self) -> float:
        try:
            return await self._step()
        finally:
            self.ended += 1
            async with self._changed:
                self._changed.notify_all()

    async def _step(self) -> float:
        self.began_s.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.slice_s)
        if self.errors:
            raise self.errors.pop(0)
        return self.wait_s


class Saved:
    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()
        self.error: Exception | None = None
        self.count = 0

    def save(self, names: frozenset[str]) -> None:
        if self.error is not None:
            raise self.error
        self.count += 1
        self.names = names


class Supervised:
    """Jobs, and everything around them."""

    def __init__(self, *jobs: Sample, paused: frozenset[str] = frozenset()) -> None:
        self.saved = Saved()
        self.metrics = Metrics(CollectorRegistry(), version="1")
        self.jobs = Jobs(
            jobs,
            paused=paused,
            save=self.saved.save,
            on_disk=on_disk,
            metrics=self.metrics,
            rng=random.Random(1),
        )

    def run_for(self, work: Callable[[], Awaitable[None]]) -> None:
        """Runs the jobs on virtual time until `work` has ended."""

        async def main() -> None:
            running = asyncio.create_task(self.jobs.run())
            await work()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

        run_virtual(main())

    def failures(self, job: str) -> float:
        line = f'ckptd_job_failures_total{{job="{job}"}} '
        text = self.metrics.text().decode()
        return float(text.split(line)[1].split("\n")[0])

    def state(self, name: str = "scrub") -> str:
        return next(view.state for view in self.jobs.views() if view.name == name)

    def error(self, name: str = "scrub") -> str:
        return next(view.last_error for view in self.jobs.views() if view.name == name)


def test_slices_follow_each_other_after_the_time_that_each_asks_for() -> None:
    job, other = Sample(wait_s=10), Sample("gc", wait_s=25)
    supervised = Supervised(job, other)
    supervised.run_for(lambda: asyncio.sleep(31))
    assert job.began_s == [0, 10, 20, 30]
    assert other.began_s == [0, 25]


def test_a_wake_shortens_the_wait_and_is_not_lost_during_a_slice() -> None:
    job = Sample(wait_s=100, slice_s=2)
    supervised = Supervised(job)

    async def work() -> None:
        await asyncio.sleep(1)  # in its first slice
        assert supervised.state() == "running"
        supervised.jobs.wake("scrub")
        await asyncio.sleep(9)
        assert supervised.state() == "waiting"
        supervised.jobs.wake("scrub")
        supervised.jobs.wake("trim")  # not a job of this node
        await asyncio.sleep(1)

    supervised.run_for(work)
    assert job.began_s == [0, 2, 10]


def test_a_failed_job_is_tried_again_later_and_later_and_says_why_until_it_went_well() -> None:
    job = Sample(wait_s=1000)
    job.errors = [NoRoom("full"), ValueError("bug"), NoRoom("full")]
    supervised = Supervised(job)

    async def work() -> None:
        await asyncio.sleep(0.4)
        assert (supervised.state(), supervised.error()) == ("failed", "full")
        await job.nth_slice(2)
        await asyncio.sleep(0.1)
        assert (supervised.state(), supervised.error()) == ("failed", "ValueError: bug")
        await job.nth_slice(4)
        await asyncio.sleep(0.1)
        assert (supervised.state(), supervised.error()) == ("waiting", "")

    supervised.run_for(work)
    pauses_s = [later - before for before, later in zip(job.began_s, job.began_s[1:], strict=False)]
    for pause_s, longest_s in zip(pauses_s, (1, 2, 4), strict=True):
        assert longest_s / 2 <= pause_s <= longest_s
    assert supervised.failures("scrub") == 3


def test_pauses_after_failures_have_an_end_and_begin_anew() -> None:
    job = Sample(wait_s=10_000)
    job.errors = [NoRoom("full")] * 12
    supervised = Supervised(job)

    async def work() -> None:
        await job.nth_slice(13)
        job.errors = [NoRoom("full")]
        supervised.jobs.wake("scrub")
        await asyncio.sleep(limits.JOB_RETRY_MIN_S)

    supervised.run_for(work)
    pauses_s = [later - before for before, later in zip(job.began_s, job.began_s[1:], strict=False)]
    assert max(pauses_s[:12]) <= limits.JOB_RETRY_MAX_S
    assert pauses_s[-1] <= limits.JOB_RETRY_MIN_S


def test_one_that_fails_does_not_stop_the_others() -> None:
    bad, good = Sample("trim"), Sample("gc", wait_s=10)
    bad.errors = [RuntimeError("bug")] * 100
    supervised = Supervised(bad, good)
    supervised.run_for(lambda: asyncio.sleep(21))
    assert good.began_s == [0, 10, 20]
    assert supervised.failures("gc") == 0


def test_what_a_job_says_itself_is_shown_and_long_texts_are_cut() -> None:
    job = Sample()
    job.own_error = "e" * 2000
    supervised = Supervised(job)
    (view,) = supervised.jobs.views()
    assert view.last_error == "e" * limits.JOB_ERROR_TEXT_MAX
    assert (view.name, view.done_bytes, view.total_bytes) == ("scrub", 0, 100)


def test_a_job_that_cannot_say_how_far_it_is_says_why() -> None:
    """A node must be able to answer how it is, above all when its disk has failed."""
    job = Sample()
    job.disk_failed = True
    (view,) = Supervised(job).jobs.views()
    assert "pulled out" in view.last_error


def test_a_paused_job_rests_until_it_is_resumed_and_wakes_do_not_move_it() -> None:
    job = Sample(wait_s=10, slice_s=2)
    supervised = Supervised(job)

    async def work() -> None:
        await asyncio.sleep(1)
        await supervised.jobs.set_paused("scrub", True)
        assert supervised.state() == "running"  # the slice goes to its end
        await asyncio.sleep(2)
        assert supervised.state() == "paused"
        supervised.jobs.wake("scrub")
        await asyncio.sleep(97)
        assert job.began_s == [0]
        await supervised.jobs.set_paused("scrub", False)
        await asyncio.sleep(1)
        assert supervised.state() == "running"

    supervised.run_for(work)
    assert job.began_s == pytest.approx([0, 100], abs=0.1)


def test_a_job_that_was_paused_before_the_start_stays_paused() -> None:
    job, other = Sample(), Sample("gc", wait_s=100)
    supervised = Supervised(job, other, paused=frozenset({"scrub"}))
    supervised.run_for(lambda: asyncio.sleep(50))
    assert job.began_s == []
    assert other.began_s == [0]
    assert supervised.state() == "paused"


def test_a_pause_that_cannot_be_kept_is_refused_and_changes_nothing() -> None:
    job = Sample(wait_s=10)
    supervised = Supervised(job)
    supervised.saved.error = MediumFailed("gone")

    async def work() -> None:
        with pytest.raises(MediumFailed):
            await supervised.jobs.set_paused("scrub", True)
        await asyncio.sleep(11)

    supervised.run_for(work)
    assert job.began_s == [0, 10]
    assert supervised.jobs.paused == frozenset()


def test_only_changes_are_written_and_two_at_once_do_not_undo_each_other() -> None:
    supervised = Supervised(Sample())

    async def work() -> None:
        await supervised.jobs.set_paused("scrub", True)
        await supervised.jobs.set_paused("scrub", True)
        assert supervised.saved.count == 1
        await asyncio.gather(
            *(supervised.jobs.set_paused(name, True) for name in ("gc", "trim", "repair"))
        )

    supervised.run_for(work)
    assert supervised.saved.names == {"scrub", "gc", "trim", "repair"}


def test_an_unknown_name_is_refused() -> None:
    supervised = Supervised(Sample())
    with pytest.raises(NotFound, match="scrub"):
        run_virtual(supervised.jobs.set_paused("scrap", True))
    with pytest.raises(ValueError, match="name of its own"):
        Supervised(Sample("scrap"))
    with pytest.raises(ValueError, match="name of its own"):
        Supervised(Sample(), Sample())


def test_pauses_survive_in_the_store(tmp_path: Path) -> None:
    with make_store(str(tmp_path / "store"), OPERATING_SYSTEM) as directory:
        file = StateFile(directory, layout.PAUSED_JOBS, max_bytes=limits.STATE_FILE_MAX_BYTES)
        paused = PausedJobs(file)
        assert paused.load() == frozenset()
        paused.save(frozenset(JOB_NAMES))
        assert paused.load() == frozenset(JOB_NAMES)
        for rubbish in (
            b"",
            b"[]",
            b"{}",
            b'{"format": "ckptd-jobs-1"}',
            b'{"format": "ckptd-jobs-9", "paused": ["gc"]}',
            b"\xff",
        ):
            file.write(rubbish)
            assert paused.load() == frozenset()
        file.write(b'{"format": "ckptd-jobs-1", "paused": ["gc", "of a later version", 7]}')
        assert paused.load() == {"gc"}
