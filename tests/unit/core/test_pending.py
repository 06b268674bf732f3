"""What waits for what, on virtual time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core import limits
from ckptd.core.checkpoint_units import RefusedUnit, Unit
from ckptd.core.completeness import Assessment, Complete, Incomplete, LeftOut
from ckptd.core.pending import AWAKE_S, READS_MAX, Job, Key, PendingQueue, Sighting, Timing

ROOT = "/data"
OTHER = "/other"
TIMING = Timing(settle_s=2.0, settle_max_s=60.0, retry_s=10.0)
A = Key(ROOT, "run/step-1")
B = Key(ROOT, "run/step-2")


def sighting(key: Key, content: str, *, done: bool = False, name: str = "") -> Sighting:
    return Sighting(Unit(key.path, name or key.path, "directory"), content.encode(), done)


class World:
    """A queue, the checkpoints that exist with a text for their content, and a clock."""

    def __init__(self) -> None:
        self.queue = PendingQueue({ROOT: TIMING, OTHER: TIMING})
        self.now = 1000.0
        self.there: dict[Key, str] = {}
        self.faults: dict[Key, Assessment] = {}
        self.done: set[Key] = set()
        self.looks = 0

    def write(self, key: Key, content: str) -> None:
        self.there[key] = content

    def scan(self, root: str = ROOT) -> None:
        sightings = [
            sighting(key, content, done=key in self.done)
            for key, content in self.there.items()
            if key.root == root
        ]
        self.queue.scanned(root, sightings, [], self.now)

    def look(self) -> None:
        """Looks at everything that is due now."""
        for key in self.queue.due(self.now):
            self.looks += 1
            if key not in self.there:
                self.queue.gone(key)
                continue
            content, done = self.there[key], key in self.done
            self.queue.seen(key.root, sighting(key, content, done=done), self.now)
            found = self.faults.get(key, Complete(done=done))
            self.queue.assessed(key, content.encode(), found, self.now)

    def pass_s(self, seconds: float, *, take: bool = False) -> list[Job]:
        """Lets time pass, looking whenever something is due; takes and stores what gets ready."""
        end = self.now + seconds
        jobs = []
        while True:
            self.look()
            while take and (job := self.queue.take(self.now)) is not None:
                jobs.append(job)
                self.queue.stored(job.key, self.now)
            at = self.queue.wake_at()
            if at is None or at > end:
                self.now = end
                return jobs
            assert at > self.now or take, "looks at the same moment again and again"
            self.now = max(at, self.now)

    def phase(self, key: Key) -> str:
        rows = [row for row in self.queue.rows(self.now) if (row.root, row.path) == key]
        return rows[0].phase if rows else "at rest"

    def reason(self, key: Key) -> str:
        return next(row.reason for row in self.queue.rows(self.now) if (row.root, row.path) == key)


@pytest.fixture
def world() -> World:
    return World()


def stored(world: World, key: Key = A, content: str = "one") -> None:
    """Brings a checkpoint to rest as stored."""
    world.write(key, content)
    world.scan(key.root)
    assert [job.key for job in world.pass_s(5, take=True)] == [key]


# -- coming to rest


def test_a_complete_checkpoint_waits_until_it_is_quiet(world: World) -> None:
    world.write(A, "one")
    world.scan()
    world.pass_s(1.9)
    assert world.phase(A) == "settling"
    assert world.reason(A) == "still changing: waits for 2 s of quiet"
    assert world.queue.take(world.now) is None
    world.pass_s(0.1)
    assert world.phase(A) == "ready"
    job = world.queue.take(world.now)
    assert job == Job(A, Unit(A.path, A.path, "directory"), b"one", frozenset(), ())
    assert world.phase(A) == "storing"
    assert world.queue.take(world.now) is None
    world.queue.stored(A, world.now)
    assert world.phase(A) == "at rest"
    assert world.queue.counts() == {"stored": 1, "refused": 0}


def test_every_change_begins_the_quiet_time_anew(world: World) -> None:
    world.write(A, "0")
    for number in range(10):
        world.write(A, str(number))
        world.scan()
        world.pass_s(1.5)
        assert world.phase(A) == "settling"
    world.pass_s(0.5)
    assert world.phase(A) == "ready"


def test_a_change_while_it_is_ready_takes_it_back(world: World) -> None:
    world.write(A, "one")
    world.scan()
    world.pass_s(3)
    world.write(A, "two")
    world.scan()
    assert world.queue.take(world.now) is None
    assert [job.fingerprint for job in world.pass_s(3, take=True)] == [b"two"]


def test_a_done_marker_skips_the_quiet_time(world: World) -> None:
    world.done.add(A)
    world.write(A, "one")
    world.scan()
    world.look()
    assert world.phase(A) == "ready"


def test_a_marker_that_comes_later_ends_the_quiet_time(world: World) -> None:
    world.write(A, "one")
    world.scan()
    world.pass_s(0.5)
    world.done.add(A)
    world.scan()
    world.look()
    assert world.phase(A) == "ready"
    world.write(A, "two")
    world.scan()
    world.look()
    assert world.queue.take(world.now) is not None


def test_what_was_excluded_and_warned_of_goes_with_the_job(world: World) -> None:
    world.faults[A] = Complete(excluded=frozenset({"a.tmp"}), warnings=("left out",))
    world.write(A, "one")
    world.scan()
    (job,) = world.pass_s(3, take=True)
    assert job.excluded == {"a.tmp"}
    assert job.warnings == ("left out",)


def test_a_look_that_sees_a_change_begins_anew(world: World) -> None:
    world.write(A, "one")
    world.scan()
    world.pass_s(1)
    world.queue.assessed(A, b"two", Complete(), world.now + 5)
    assert world.phase(A) == "settling"


# -- not complete


def test_an_incomplete_one_says_why_and_is_looked_at_every_retry(world: World) -> None:
    world.faults[A] = Incomplete("w has 1.2 of 2.4 GB")
    world.write(A, "one")
    world.scan()
    world.pass_s(95)
    assert world.looks == 10
    assert (world.phase(A), world.reason(A)) == ("incomplete", "w has 1.2 of 2.4 GB")
    assert world.queue.unchanged_s(A, world.now) == 95
    (row,) = world.queue.rows(world.now)
    assert (row.name, row.age_s) == (A.path, 95)
    del world.faults[A]
    world.pass_s(10)
    assert world.phase(A) == "ready"


def test_a_change_of_an_incomplete_one_is_looked_at_sooner_and_the_reason_stays(
    world: World,
) -> None:
    world.faults[A] = Incomplete("half")
    world.write(A, "one")
    world.scan()
    world.pass_s(5)
    del world.faults[A]
    world.write(A, "two")
    world.scan()
    assert world.reason(A) == "half"
    world.pass_s(1.9)
    assert world.looks == 1
    world.pass_s(0.1)
    assert world.phase(A) == "ready"


def test_an_incomplete_one_holds_up_no_other(world: World) -> None:
    world.faults[A] = Incomplete("half")
    world.write(A, "one")
    world.write(B, "two")
    world.scan()
    assert [job.key for job in world.pass_s(30, take=True)] == [B]


def test_what_is_left_out_does_not_wait_until_it_changes(world: World) -> None:
    world.faults[A] = LeftOut("forgotten")
    world.write(A, "one")
    world.scan()
    world.pass_s(100)
    assert world.looks == 1
    assert world.phase(A) == "at rest"
    assert [row.reason for row in world.queue.left_out()] == ["forgotten"]
    assert not world.queue.is_busy(world.now)
    del world.faults[A]
    world.write(A, "two")
    world.scan()
    assert len(world.pass_s(3, take=True)) == 1
    assert world.queue.left_out() == []


# -- changing all the time


def test_after_settle_max_of_change_it_is_read_three_times_and_then_gets_time_again(
    world: World,
) -> None:
    reads: list[float] = []
    started = world.now
    for number in range(1400):
        world.write(A, str(number))
        world.scan()
        world.look()
        while (job := world.queue.take(world.now)) is not None:
            reads.append(world.now - started)
            world.queue.source_changed(job.key, world.now)
            world.look()
        world.now += 0.1
    assert len(reads) == 2 * READS_MAX
    assert all(60 <= at < 61 for at in reads[:READS_MAX])
    assert all(at >= 120 for at in reads[READS_MAX:])


def test_a_consistent_read_of_one_that_changes_all_the_time_is_stored(world: World) -> None:
    stores = 0
    for number in range(1300):
        world.write(A, str(number))
        world.scan()
        world.look()
        if world.queue.take(world.now) is not None:
            stores += 1
            world.queue.stored(A, world.now)
        world.now += 0.1
    assert stores == 2


def test_a_source_that_changed_waits_for_quiet_and_says_so(world: World) -> None:
    world.write(A, "one")
    world.scan()
    world.pass_s(3)
    assert world.queue.take(world.now) is not None
    world.queue.source_changed(A, world.now)
    world.pass_s(1)
    assert world.reason(A) == "changed while it was read (1 of 3 tries)"
    assert len(world.pass_s(3, take=True)) == 1


# -- changes of what is stored or being stored


def test_what_is_stored_is_not_stored_again(world: World) -> None:
    stored(world)
    for _ in range(3):
        world.scan()
        assert world.pass_s(20, take=True) == []
    world.queue.touch(A, world.now)
    assert world.pass_s(20, take=True) == []
    assert world.phase(A) == "at rest"


def test_an_overwritten_one_is_stored_again(world: World) -> None:
    stored(world)
    world.write(A, "two")
    world.scan()
    assert world.phase(A) == "settling"
    assert [job.fingerprint for job in world.pass_s(5, take=True)] == [b"two"]


def test_a_long_stored_one_that_changes_gets_its_quiet_time(world: World) -> None:
    stored(world)
    world.pass_s(1000)
    world.write(A, "two")
    world.scan()
    world.pass_s(1.9)
    assert world.phase(A) == "settling"


def test_a_change_back_to_what_is_stored_rests(world: World) -> None:
    stored(world)
    world.write(A, "two")
    world.scan()
    world.write(A, "one")
    world.scan()
    assert world.pass_s(5, take=True) == []
    assert world.phase(A) == "at rest"


def test_a_change_while_it_is_stored_is_stored_afterwards(world: World) -> None:
    world.write(A, "one")
    world.scan()
    world.pass_s(3)
    assert world.queue.take(world.now) is not None
    world.now += 10
    world.write(A, "two")
    world.scan()
    world.look()
    world.queue.touch(A, world.now)
    assert world.phase(A) == "storing"
    world.queue.assessed(A, b"two", Complete(), world.now)
    assert world.phase(A) == "storing"
    world.queue.stored(A, world.now)
    assert world.phase(A) == "settling"
    assert [job.fingerprint for job in world.pass_s(3, take=True)] == [b"two"]


def test_two_hundred_overwrites_end_with_the_last(world: World) -> None:
    taken = []
    for number in range(200):
        world.write(A, str(number))
        world.scan()
        taken += world.pass_s(0.7, take=True)
    taken += world.pass_s(10, take=True)
    assert taken[-1].fingerprint == b"199"


def test_a_deleted_one_is_forgotten_and_a_new_one_is_stored(world: World) -> None:
    stored(world)
    del world.there[A]
    world.scan()
    assert world.queue.counts() == {"refused": 0}
    assert world.queue.unit(A) is None
    world.write(A, "new")
    world.scan()
    assert [job.fingerprint for job in world.pass_s(5, take=True)] == [b"new"]


def test_one_that_comes_back_as_it_was_is_not_read_again(world: World) -> None:
    stored(world)
    del world.there[A]
    world.scan()
    world.write(A, "one")
    world.scan()
    assert world.pass_s(5, take=True) == []


def test_one_that_is_gone_before_it_was_stored_leaves_nothing(world: World) -> None:
    world.write(A, "one")
    world.scan()
    del world.there[A]
    world.look()
    assert world.queue.rows(world.now) == []
    assert list(world.queue.remembered()) == []
    world.queue.gone(A)
    world.queue.touch(A, world.now)
    world.queue.seen(ROOT, sighting(A, "late"), world.now)
    world.queue.assessed(A, b"late", Complete(), world.now)
    assert world.queue.counts() == {"refused": 0}


@pytest.mark.parametrize("how", ["stored", "source_changed", "failed", "put_back"])
def test_one_deleted_while_it_is_stored_is_forgotten_when_that_ends(world: World, how: str) -> None:
    world.write(A, "one")
    world.scan()
    world.pass_s(3)
    assert world.queue.take(world.now) is not None
    del world.there[A]
    world.scan()
    assert world.phase(A) == "storing"
    if how == "failed":
        world.queue.failed(A, "no", world.now)
    else:
        getattr(world.queue, how)(A, world.now)
    assert world.queue.counts() == {"refused": 0}


def test_a_renamed_one_is_a_new_one(world: World) -> None:
    stored(world)
    world.there = {B: "one"}
    world.scan()
    assert [job.key for job in world.pass_s(5, take=True)] == [B]


def test_what_is_put_back_is_looked_at_again_at_once(world: World) -> None:
    world.write(A, "one")
    world.scan()
    world.pass_s(3)
    assert world.queue.take(world.now) is not None
    world.queue.put_back(A, world.now)
    assert world.queue.due(world.now) == [A]
    assert world.phase(A) == "settling"


# -- failures


def test_a_failure_is_tried_again_later_and_later(world: World) -> None:
    world.write(A, "one")
    world.scan()
    tries: list[float] = []
    while len(tries) < 8:
        world.look()
        if (job := world.queue.take(world.now)) is not None:
            tries.append(world.now)
            world.queue.failed(job.key, "no node answers", world.now)
            assert (world.phase(A), world.reason(A)) == ("failed", "no node answers")
        at = world.queue.wake_at()
        assert at is not None
        world.now = at
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses == [10, 20, 40, 80, 160, 320, 320]


def test_a_failed_one_is_tried_at_once_when_the_reason_may_be_over(world: World) -> None:
    world.write(A, "one")
    world.write(B, "two")
    world.scan()
    world.pass_s(3)
    for _ in range(2):
        job = world.queue.take(world.now)
        assert job is not None
        if job.key == A:
            world.queue.failed(A, "no room", world.now)
        else:
            world.queue.stored(B, world.now)
    world.queue.retry_failed(world.now)
    assert world.queue.due(world.now) == [A]
    assert len(world.pass_s(1, take=True)) == 1


def test_only_what_is_being_stored_can_end() -> None:
    world = World()
    world.write(A, "one")
    world.scan()
    with pytest.raises(AssertionError):
        world.queue.stored(A, world.now)


# -- roots


def test_a_root_that_cannot_be_read_says_so_and_forgets_nothing(world: World) -> None:
    stored(world)
    world.write(B, "two")
    world.scan()
    world.queue.root_failed(ROOT, "not mounted", world.now)
    world.now += 50
    world.queue.root_failed(ROOT, "not mounted", world.now)
    (fault, waiting) = world.queue.rows(world.now)
    assert (fault.root, fault.path, fault.reason, fault.age_s) == (ROOT, "", "not mounted", 50)
    assert waiting.path == B.path
    assert world.queue.due(world.now) == []
    assert world.queue.wake_at() is None
    world.scan()
    assert [job.key for job in world.pass_s(5, take=True)] == [B]


def test_nothing_is_taken_from_a_root_that_cannot_be_read(world: World) -> None:
    world.write(A, "one")
    world.scan()
    world.pass_s(3)
    assert world.queue.has_ready()
    world.queue.root_failed(ROOT, "gone", world.now)
    assert world.queue.counts()["ready"] == 1
    assert not world.queue.has_ready(), "whoever asks again at once would never rest"
    assert world.queue.take(world.now) is None
    world.scan()
    assert world.queue.has_ready()
    assert world.queue.take(world.now) is not None
    assert not world.queue.has_ready()


def test_what_is_being_stored_is_not_looked_at(world: World) -> None:
    world.write(A, "one")
    world.scan()
    world.pass_s(3)
    world.queue.touch(A, world.now)
    assert world.queue.take(world.now) is not None
    world.now += 60
    assert (world.queue.due(world.now), world.queue.wake_at()) == ([], None)


def test_roots_do_not_disturb_each_other(world: World) -> None:
    other = Key(OTHER, "x")
    stored(world)
    stored(world, other)
    world.scan()
    world.queue.root_failed(OTHER, "gone", world.now)
    assert world.queue.counts()["stored"] == 2


def test_one_name_in_two_roots_is_refused_in_the_second(world: World) -> None:
    world.queue.scanned(ROOT, [sighting(A, "one", name="same")], [], world.now)
    clash = sighting(Key(OTHER, "b"), "two", name="same")
    world.queue.scanned(OTHER, [clash], [], world.now)
    assert ROOT in world.reason(Key(OTHER, "b"))
    world.queue.scanned(ROOT, [], [], world.now)
    world.queue.scanned(OTHER, [clash], [], world.now)
    assert world.phase(Key(OTHER, "b")) == "settling"


def test_what_cannot_have_a_name_waits_with_the_reason(world: World) -> None:
    refused = RefusedUnit("a@b", "has an @")
    world.queue.scanned(ROOT, [], [refused], world.now)
    world.now += 30
    world.queue.scanned(ROOT, [], [refused], world.now)
    (row,) = world.queue.rows(world.now)
    assert (row.path, row.name, row.phase, row.reason, row.age_s) == (
        "a@b", "", "refused", "has an @", 30
    )  # fmt: skip
    world.queue.scanned(OTHER, [], [], world.now)
    assert world.queue.counts()["refused"] == 1
    world.queue.scanned(ROOT, [], [], world.now)
    assert world.queue.rows(world.now) == []


# -- what is asked of it


def test_a_remembered_one_is_not_read_again(world: World) -> None:
    stored(world)
    again = World()
    for key, fingerprint in world.queue.remembered():
        again.queue.remember(key, fingerprint)
    assert list(again.queue.remembered()) == [(A, b"one")]
    again.there = {A: "one", B: "two"}
    again.scan()
    assert [job.key for job in again.pass_s(5, take=True)] == [B]
    assert dict(again.queue.remembered()) == {A: b"one", B: b"two"}


def test_a_remembered_one_that_changed_is_stored(world: World) -> None:
    world.queue.remember(A, b"old")
    world.write(A, "new")
    world.scan()
    assert len(world.pass_s(5, take=True)) == 1


def test_the_checkpoint_above_a_path_is_found(world: World) -> None:
    world.write(A, "one")
    world.write(Key(ROOT, "run"), "two")
    world.scan()
    assert world.queue.key_above(ROOT, "run/step-1/sub/w") == A
    assert world.queue.key_above(ROOT, "run/step-1") == A
    assert world.queue.key_above(ROOT, "run/x") == Key(ROOT, "run")
    assert world.queue.key_above(ROOT, "other") is None
    assert world.queue.key_above(OTHER, "run") is None


def test_what_happened_to_a_stored_one_is_looked_at_at_once(world: World) -> None:
    stored(world)
    world.queue.touch(A, world.now)
    assert world.queue.due(world.now) == [A]
    world.write(B, "two")
    world.scan()
    world.look()
    world.queue.touch(B, world.now + 1)
    assert world.queue.wake_at() == world.now + 2


def test_the_longest_waiting_one_is_taken_first(world: World) -> None:
    world.write(B, "two")
    world.scan()
    world.pass_s(1)
    world.write(A, "one")
    world.scan()
    world.pass_s(5)
    job = world.queue.take(world.now)
    assert job is not None
    assert job.key == B


def test_the_machine_stays_awake_while_something_may_be_stored_soon(world: World) -> None:
    assert not world.queue.is_busy(world.now)
    world.faults[A] = Incomplete("half")
    world.write(A, "one")
    world.scan()
    assert world.queue.is_busy(world.now)
    world.pass_s(AWAKE_S - 1)
    assert world.queue.is_busy(world.now)
    world.pass_s(2)
    assert not world.queue.is_busy(world.now)
    world.write(A, "two")
    world.scan()
    assert world.queue.is_busy(world.now)


def test_everything_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WATCHED_CHECKPOINTS_MAX", 3)
    monkeypatch.setattr(limits, "PENDING_ROWS_MAX", 4)
    sightings = [sighting(Key(ROOT, f"s{n}"), "x") for n in range(5)]
    refused = [RefusedUnit(f"r{n}", "no") for n in range(5)]
    world.queue.scanned(ROOT, sightings, refused, world.now)
    assert world.queue.counts() == {"settling": 3, "refused": 3}
    rows = world.queue.rows(world.now)
    assert len(rows) == 4
    assert rows[0].reason == "2 more checkpoints are not watched"
    world.queue.scanned(ROOT, sightings[3:], [], world.now)
    assert world.queue.counts() == {"settling": 2, "refused": 0}
    for number in range(5):
        world.queue.remember(Key(ROOT, f"m{number}"), b"x")
    assert [key.path for key, _ in world.queue.remembered()] == ["m2", "m3", "m4"]


ACTIONS = ["write", "delete", "scan", "look", "store", "change", "fail", "break", "mend", "away"]


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.sampled_from([A, B]), st.integers(0, 3))))
def test_whatever_happens_in_the_end_the_last_content_is_stored(
    actions: list[tuple[str, Key, int]],
) -> None:
    world = World()
    last: dict[Key, bytes] = {}
    taken: list[Job] = []
    for number, (action, key, seconds) in enumerate(actions):
        world.now += seconds
        match action:
            case "write":
                world.write(key, str(number))
            case "delete":
                world.there.pop(key, None)
            case "scan":
                world.scan()
            case "look":
                world.look()
            case "break":
                world.faults[key] = Incomplete("half")
            case "mend":
                world.faults.pop(key, None)
            case "away":
                world.queue.root_failed(ROOT, "away", world.now)
            case _:
                if (job := world.queue.take(world.now)) is not None:
                    taken.append(job)
                if taken:
                    job = taken.pop(0)
                    if action == "store":
                        last[job.key] = job.fingerprint
                        world.queue.stored(job.key, world.now)
                    elif action == "change":
                        world.queue.source_changed(job.key, world.now)
                    else:
                        world.queue.failed(job.key, "no", world.now)
    for job in taken:
        last[job.key] = job.fingerprint
        world.queue.stored(job.key, world.now)
    world.faults.clear()
    world.scan()
    for job in world.pass_s(500, take=True):
        last[job.key] = job.fingerprint
    for key, content in world.there.items():
        assert last[key] == content.encode()
    assert world.queue.rows(world.now) == []
