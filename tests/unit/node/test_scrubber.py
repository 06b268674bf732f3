"""The scrub of a real store on virtual time: what it reads when, and what becomes of bad copies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from prometheus_client import CollectorRegistry
from tests.unit.store.workload import digest_of, make_store, put_shard
from tests.virtual_time import run_virtual

from ckptd.core import limits
from ckptd.core.scrubbing import Pace
from ckptd.errors import MediumFailed
from ckptd.node.quarantine_keeper import QuarantineKeeper
from ckptd.node.scrubber import Scrubber
from ckptd.observe.metrics import Metrics
from ckptd.store import layout
from ckptd.store.filesystem import OperatingSystem
from ckptd.store.marker import StoreDirectory, open_store
from ckptd.store.shards import ShardStore
from ckptd.store.state_file import StateFile
from ckptd.wire.messages import CopyReport, Message

_T = TypeVar("_T")
_A = TypeVar("_A", bound=Message)

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
WALL_S = 1.7e9
SHARD_BYTES = 1000


async def on_disk(work: Callable[[], _T]) -> _T:
    return work()


class LoopClock:
    """The running loop's time; the wall clock is `ahead_s` of it."""

    def __init__(self) -> None:
        self.ahead_s = WALL_S

    def monotonic_s(self) -> float:
        try:
            return asyncio.get_running_loop().time()
        except RuntimeError:
            return 0.0

    def wall_s(self) -> float:
        return self.monotonic_s() + self.ahead_s


class NobodyElse:
    """The network of a node that is alone."""

    async def request(
        self,
        node: str,
        message: Message,
        answer: type[_A],
        *,
        payload: bytes = b"",
        timeout_s: float,
    ) -> tuple[_A, bytes]:
        raise AssertionError("there is nobody to ask")

    async def push(
        self, shard: bytes, size: int, target: str, *, rate_bytes_per_s: float | None = None
    ) -> CopyReport:
        raise AssertionError("there is nobody to push to")


class WatchedDisk(OperatingSystem):
    """Notes which shards are read when; the next `lies[name]` readings of a file are wrong."""

    def __init__(self, clock: LoopClock) -> None:
        self._clock = clock
        self._names: dict[int, str] = {}
        self.read_at_s: dict[str, list[float]] = {}
        self.lies: dict[str, int] = {}

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        descriptor = super().open(path, flags, mode)
        self._names[descriptor] = os.path.basename(path)
        return descriptor

    def pread_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        count = super().pread_into(descriptor, buffer, offset)
        name = self._names[descriptor]
        if count and len(name) >= 64:
            self.read_at_s.setdefault(name, []).append(self._clock.monotonic_s())
            if self.lies.get(name, 0):
                self.lies[name] -= 1
                buffer[0] ^= 1
        return count


class Scrubbed:
    """A store, its scrubber, and what it told."""

    def __init__(self, directory: StoreDirectory, clock: LoopClock, pace: Pace) -> None:
        self.clock = clock
        self.corrupt: list[bytes] = []
        self.metrics = Metrics(CollectorRegistry(), version="1")
        self.store = ShardStore(directory, reserve=0, clock=clock.monotonic_s)
        self.scrubber = Scrubber(
            store=self.store,
            pace=pace,
            record=StateFile(
                directory, layout.CHECK_RECORD, max_bytes=limits.CHECK_RECORD_MAX_BYTES
            ),
            keeper=QuarantineKeeper(
                store=self.store,
                network=NobodyElse(),
                workers=lambda: (),
                copies=2,
                grace_s=60,
                pace=pace,
                clock=clock,
                on_disk=on_disk,
            ),
            clock=clock,
            on_disk=on_disk,
            metrics=self.metrics,
            on_corrupt=self.corrupt.append,
        )

    async def run_for(self, seconds: float) -> None:
        """Runs the job for that long."""

        async def slices() -> None:
            for _ in itertools.count():
                await asyncio.sleep(await self.scrubber.step())

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await slices()

    def metric(self, name: str) -> float | None:
        for line in self.metrics.text().decode().splitlines():
            if line.startswith(f"ckptd_{name} "):
                return float(line.split()[1])
        return None


def content(number: int) -> bytes:
    return f"{number:04}".encode() * (SHARD_BYTES // 4)


def name(number: int) -> str:
    return digest_of(content(number)).hex()


PACE = Pace(interval_s=10 * DAY_S, rate_bytes_per_s=1e6)


class Place:
    """Where the tests below keep their store; `opened` starts a process on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = LoopClock()
        self.disk = WatchedDisk(self.clock)

    def run(
        self,
        work: Callable[[Scrubbed], Awaitable[None]],
        *,
        shards: int = 0,
        pace: Pace = PACE,
        load: bool = True,
    ) -> None:
        """A process of its own, on a loop of its own, that first stores so many shards."""

        async def main() -> None:
            first = not self.path.exists()
            directory = (
                make_store(str(self.path), self.disk)
                if first
                else open_store(str(self.path), filesystem=self.disk)
            )
            with directory:
                scrubbed = Scrubbed(directory, self.clock, pace)
                if load:
                    scrubbed.scrubber.load()
                for number in range(shards):
                    put_shard(scrubbed.store, content(number))
                await work(scrubbed)

        run_virtual(main())

    def damage(self, number: int) -> None:
        path = Path(layout.shard_path(str(self.path), digest_of(content(number))))
        path.write_bytes(b"?" + content(number)[1:])

    @property
    def read(self) -> set[str]:
        return {file for file in self.disk.read_at_s if len(file) == 64}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """With slices of one shard: as small to the shards here as they are to real ones."""
    monkeypatch.setattr(limits, "SCRUB_SLICE_BYTES", SHARD_BYTES)
    return Place(tmp_path / "store")


def test_every_copy_is_read_within_the_interval_evenly_and_not_while_it_is_young(
    place: Place,
) -> None:
    async def work(scrubbed: Scrubbed) -> None:
        place.disk.read_at_s.clear()
        await scrubbed.run_for(20 * DAY_S)

    place.run(work, shards=40)
    assert len(place.read) == 40
    for times_s in place.disk.read_at_s.values():
        gaps_s = [b - a for a, b in zip([0.0, *times_s], times_s, strict=False)]
        assert len(times_s) >= 2
        assert all(2.5 * DAY_S <= gap_s <= 10 * DAY_S for gap_s in gaps_s)
    every = sorted(at_s for times_s in place.disk.read_at_s.values() for at_s in times_s)
    assert all(b - a > HOUR_S for a, b in itertools.pairwise(every)), "evenly"


def test_a_large_store_is_read_at_the_configured_rate_and_says_that_it_cannot_keep_up(
    place: Place,
) -> None:
    pace = Pace(interval_s=50.0, rate_bytes_per_s=500.0)

    async def work(scrubbed: Scrubbed) -> None:
        await scrubbed.run_for(1000)
        assert scrubbed.metric("scrub_bytes_total") == pytest.approx(500 * 1000, rel=0.2)
        assert "scrub.rate" in scrubbed.scrubber.progress().last_error

    place.run(work, shards=100, pace=pace)


def test_small_copies_are_read_many_at_a_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SCRUB_SLICE_BYTES", 10**9)
    monkeypatch.setattr(limits, "SCRUB_SLICE_COPIES", 7)

    async def work(scrubbed: Scrubbed) -> None:
        await asyncio.sleep(5 * DAY_S)
        place.disk.read_at_s.clear()
        await scrubbed.scrubber.step()
        assert len(place.read) == 7

    async def two_are_due(scrubbed: Scrubbed) -> None:
        for number in range(40):
            if number == 2:
                await asyncio.sleep(5 * DAY_S)
            scrubbed.store.verify(digest_of(content(number)), pause_s=0)
        place.disk.read_at_s.clear()
        await scrubbed.scrubber.step()
        assert place.read == {name(0), name(1)}, "what is young is left alone"

    place.run(work, shards=40)
    place.run(two_are_due)


def test_what_is_left_after_much_was_removed_is_read_within_the_interval(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause after a slice is that of the store of which it was a part."""
    monkeypatch.setattr(limits, "SCRUB_SLICE_BYTES", 10**9)

    async def work(scrubbed: Scrubbed) -> None:
        await asyncio.sleep(5 * DAY_S)
        await scrubbed.scrubber.step()
        assert len(place.read) == 40
        for number in range(1, 40):
            scrubbed.store.remove(digest_of(content(number)), untouched_since=math.inf)
        assert len(scrubbed.store) == 1
        place.disk.read_at_s.clear()
        await scrubbed.run_for(10 * DAY_S)
        assert place.read == {name(0)}

    place.run(work, shards=40)


def test_progress_tells_how_much_was_hashed_within_the_interval(place: Place) -> None:
    async def first(scrubbed: Scrubbed) -> None:
        await scrubbed.run_for(1)
        assert scrubbed.scrubber.progress() == (10 * SHARD_BYTES, 10 * SHARD_BYTES, "")

    async def unknown(scrubbed: Scrubbed) -> None:
        assert await scrubbed.scrubber.step() > 0
        assert scrubbed.scrubber.progress().done_bytes <= 2 * SHARD_BYTES

    place.run(first, shards=10)
    place.run(unknown)


def test_an_empty_store_rests(place: Place) -> None:
    async def work(scrubbed: Scrubbed) -> None:
        assert await scrubbed.scrubber.step() == 60.0
        assert scrubbed.scrubber.oldest_verified_at() is None
        assert scrubbed.metric("scrub_oldest_verified_timestamp_seconds") is None

    place.run(work)


def test_a_restart_goes_on_where_the_last_process_was(place: Place) -> None:
    async def half(scrubbed: Scrubbed) -> None:
        place.disk.read_at_s.clear()
        while len(place.read) < 20:
            await scrubbed.run_for(HOUR_S)
        scrubbed.scrubber.stop()
        place.clock.ahead_s += scrubbed.clock.monotonic_s()  # the next process begins at 0

    async def rest(scrubbed: Scrubbed) -> None:
        assert all(
            scrubbed.store.verified_at(digest) is None for digest in scrubbed.store.digests()
        ), "old checks do not count"
        await scrubbed.scrubber.step()
        at_s = scrubbed.scrubber.oldest_verified_at()
        assert at_s == pytest.approx(WALL_S, abs=DAY_S)
        assert scrubbed.metric("scrub_oldest_verified_timestamp_seconds") == at_s
        while len(place.read) < 15:
            await scrubbed.run_for(HOUR_S)

    place.run(half, shards=40)
    before = place.read
    place.disk.read_at_s.clear()
    place.run(rest)
    assert not place.read & before


def test_without_a_record_all_is_read_again_and_a_damaged_one_is_none(place: Place) -> None:
    async def work(scrubbed: Scrubbed) -> None:
        scrubbed.scrubber.stop()

    async def again(scrubbed: Scrubbed) -> None:
        place.disk.read_at_s.clear()
        await scrubbed.run_for(8 * DAY_S)

    place.run(work, shards=5)
    (place.path / layout.CHECK_RECORD).write_bytes(b"rubbish")
    place.run(again)
    assert len(place.read) == 5
    assert all(times_s[0] < 8 * DAY_S for times_s in place.disk.read_at_s.values())


def test_times_are_written_while_it_runs_but_rarely(place: Place) -> None:
    written_s: list[float] = []

    async def work(scrubbed: Scrubbed) -> None:
        save = scrubbed.scrubber.save

        def noted() -> None:
            written_s.append(scrubbed.clock.monotonic_s())
            save()

        scrubbed.scrubber.save = noted  # type: ignore[method-assign]
        await scrubbed.run_for(20 * DAY_S)

    place.run(work, shards=40)
    assert (place.path / layout.CHECK_RECORD).stat().st_size == 15 + 40 * 12 + 32
    assert 40 <= len(written_s) <= 150
    assert min(b - a for a, b in itertools.pairwise(written_s)) >= 600


@pytest.mark.parametrize("ahead_s", [-50 * 365 * DAY_S, 50 * 365 * DAY_S])
def test_a_clock_that_lies_keeps_no_copy_from_being_read(place: Place, ahead_s: float) -> None:
    async def stored(scrubbed: Scrubbed) -> None:
        place.clock.ahead_s += ahead_s
        scrubbed.scrubber.stop()
        place.clock.ahead_s -= ahead_s

    async def again(scrubbed: Scrubbed) -> None:
        place.disk.read_at_s.clear()
        await scrubbed.run_for(8 * DAY_S)

    place.run(stored, shards=5)
    place.run(again)
    assert len(place.read) == 5


def test_one_bad_copy_is_quarantined_within_seconds_of_the_first_bad_reading(
    place: Place,
) -> None:
    async def work(scrubbed: Scrubbed) -> None:
        place.damage(7)
        place.disk.read_at_s.clear()
        await scrubbed.run_for(12 * DAY_S)
        assert scrubbed.corrupt == [digest_of(content(7))]
        assert len(scrubbed.store) == 39

    place.run(work, shards=40)
    first_s, second_s = place.disk.read_at_s[name(7)]
    assert limits.VERIFY_PAUSE_S <= second_s - first_s < 10
    # Others were read in between: had they been bad, it would have been the node.
    assert sum(first_s <= t < second_s for ts in place.disk.read_at_s.values() for t in ts) >= 8


def test_a_bad_reading_that_is_not_repeated_moves_nothing(place: Place) -> None:
    async def work(scrubbed: Scrubbed) -> None:
        place.disk.lies[name(3)] = 1
        await scrubbed.run_for(12 * DAY_S)
        assert scrubbed.corrupt == [] and len(scrubbed.store) == 10
        assert scrubbed.store.counters.bad_reads_not_repeated == 1

    place.run(work, shards=10)


def test_several_bad_readings_at_once_make_the_node_suspect_and_move_nothing(
    place: Place,
) -> None:
    async def work(scrubbed: Scrubbed) -> None:
        for number in range(40):  # a weak supply: all is read wrong, once, and once more
            place.disk.lies[name(number)] = 2
        while not scrubbed.scrubber.suspicion:
            await scrubbed.run_for(HOUR_S / 100)
        assert "read wrong" in scrubbed.scrubber.progress().last_error
        unchecked = [d for d in scrubbed.store.digests() if scrubbed.store.verified_at(d) is None]
        assert len(unchecked) >= 3, "what was read wrong counts no more"
        for number in range(40):
            place.disk.lies[name(number)] = 0
        await scrubbed.run_for(3 * HOUR_S)
        assert not scrubbed.scrubber.suspicion
        assert scrubbed.corrupt == [] and len(scrubbed.store) == 40

    place.run(work, shards=40)


def test_copies_that_stay_bad_are_believed_to_be_after_a_while(place: Place) -> None:
    bad = {3, 4, 5, 6}

    async def work(scrubbed: Scrubbed) -> None:
        for number in bad:
            place.damage(number)
        while not scrubbed.scrubber.suspicion:
            await scrubbed.run_for(60)
        since_s = scrubbed.clock.monotonic_s()
        while scrubbed.scrubber.suspicion:
            assert scrubbed.corrupt == []
            await scrubbed.run_for(60)
        assert scrubbed.clock.monotonic_s() - since_s > 1000
        await scrubbed.run_for(8 * DAY_S)
        assert set(scrubbed.corrupt) == {digest_of(content(number)) for number in bad}
        assert len(scrubbed.store) == 4

    place.run(work, shards=8)


def test_what_is_gone_or_was_read_meanwhile_is_not_read(place: Place) -> None:
    async def work(scrubbed: Scrubbed) -> None:
        await scrubbed.scrubber.step()  # the queue is made
        os.unlink(layout.shard_path(str(place.path), digest_of(content(1))))
        scrubbed.store.verify(digest_of(content(1)), pause_s=0)
        await asyncio.sleep(5 * DAY_S)
        scrubbed.store.verify(digest_of(content(2)), pause_s=0)
        place.disk.read_at_s.clear()
        await scrubbed.run_for(DAY_S)

    place.run(work, shards=40)
    assert name(1) not in place.read and name(2) not in place.read
    assert len(place.read) > 2


def test_what_others_have_checked_meanwhile_makes_no_haste(place: Place) -> None:
    """After `ckptd verify --all` the queue is full of copies that are not due any more."""

    async def work(scrubbed: Scrubbed) -> None:
        await scrubbed.scrubber.step()  # the queue is made
        await asyncio.sleep(3 * DAY_S)  # all of it is due
        for number in range(40):
            scrubbed.store.verify(digest_of(content(number)), pause_s=0)
        steps = 0
        end_s = scrubbed.clock.monotonic_s() + HOUR_S
        while scrubbed.clock.monotonic_s() < end_s and steps < 1000:
            steps += 1
            await asyncio.sleep(await scrubbed.scrubber.step())
        assert steps < 100

    place.run(work, shards=40)


def test_a_quarantined_copy_that_reads_well_comes_back(place: Place) -> None:
    async def work(scrubbed: Scrubbed) -> None:
        place.disk.lies[name(3)] = 2
        scrubbed.store.verify(digest_of(content(3)), pause_s=0)
        assert len(scrubbed.store) == 9
        await scrubbed.run_for(1)
        assert len(scrubbed.store) == 10 and scrubbed.store.quarantined() == []

    place.run(work, shards=10)


def test_a_failed_disk_ends_the_slice_and_the_process_still_stops(place: Place) -> None:
    async def work(scrubbed: Scrubbed) -> None:
        await asyncio.sleep(5 * DAY_S)
        scrubbed.store._medium.fail("pulled out")
        with pytest.raises(MediumFailed):
            await scrubbed.scrubber.step()
        scrubbed.scrubber.stop()

    place.run(work, shards=3)
    assert not (place.path / layout.CHECK_RECORD).exists()


def test_the_oldest_check_is_unknown_as_long_as_one_copy_is(place: Place) -> None:
    async def work(scrubbed: Scrubbed) -> None:
        await scrubbed.scrubber.step()
        assert scrubbed.scrubber.oldest_verified_at() == WALL_S
        place.damage(1)
        scrubbed.store.look(digest_of(content(1)))
        survey = scrubbed.store.survey_checks(1, 0.0, within_s=1)
        assert survey.oldest[0].age_s == math.inf

    place.run(work, shards=3)


def test_what_came_since_is_read_at_the_pace_of_all(place: Place) -> None:
    async def work(scrubbed: Scrubbed) -> None:
        await asyncio.sleep(5 * DAY_S)
        await scrubbed.scrubber.step()
        assert len(place.read) == 1
        for number in range(1, 40):
            put_shard(scrubbed.store, content(number))
        await scrubbed.run_for(10 * DAY_S)
        assert place.read == {name(number) for number in range(40)}

    place.run(work, shards=1)
