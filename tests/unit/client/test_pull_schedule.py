"""Who fetches what: nothing is lost, nothing is fetched by two, nobody is waited for needlessly."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.client.pull_schedule import STALLED_AFTER_S, Attempt, Schedule


def take(schedule: Schedule, place: str, now_s: float = 0.0) -> Attempt:
    attempt = schedule.take(place, now_s)
    assert attempt is not None
    return attempt


def test_a_shard_is_fetched_by_one_place_at_a_time() -> None:
    schedule = Schedule([10, 10], [("a", "b"), ("a", "b")])
    assert (take(schedule, "a").shard, take(schedule, "b").shard) == (0, 1)
    assert schedule.take("a", 0.1) is None
    assert schedule.needed("a")


def test_places_work_in_proportion_to_their_speed() -> None:
    schedule = Schedule([1] * 100, [("fast", "slow")] * 100)
    now_s = 0.0
    under_way = {"fast": take(schedule, "fast"), "slow": take(schedule, "slow")}
    ends_s = {"fast": 0.1, "slow": 0.4}
    while not schedule.finished:
        place = min(ends_s, key=lambda name: ends_s[name])
        now_s = ends_s[place]
        under_way[place].moved(1, now_s)
        assert schedule.finish(under_way[place], now_s)
        attempt = schedule.take(place, now_s)
        if attempt is None:
            ends_s.pop(place)
        else:
            under_way[place] = attempt
            ends_s[place] = now_s + (0.1 if place == "fast" else 0.4)
    assert schedule.received() == {"fast": 80, "slow": 20}
    assert schedule.fallbacks == 0


def test_a_bad_copy_is_never_asked_for_again() -> None:
    schedule = Schedule([10], [("a", "b")])
    schedule.fail(take(schedule, "a"), copy_is_bad=True)
    assert schedule.take("a", 0.0) is None
    assert not schedule.needed("a")
    attempt = take(schedule, "b")
    assert schedule.finish(attempt, 1.0) and schedule.finished
    assert schedule.fallbacks == 1
    assert schedule.excluded(0) == ("a",)


def test_a_shard_without_a_place_is_hopeless() -> None:
    schedule = Schedule([10, 10], [("a", "b"), ()])
    assert schedule.hopeless == [1]
    schedule.fail(take(schedule, "a"), copy_is_bad=True)
    schedule.fail(take(schedule, "b"), copy_is_bad=True)
    assert schedule.hopeless == [0, 1]
    assert not schedule.finished


def test_after_a_broken_connection_others_are_asked_first() -> None:
    schedule = Schedule([10], [("a", "b")])
    schedule.fail(take(schedule, "a"), copy_is_bad=False)
    assert schedule.take("a", 0.0) is None
    schedule.fail(take(schedule, "b"), copy_is_bad=False)
    assert take(schedule, "a").shard == 0  # nobody else is left: it is tried again
    assert schedule.hopeless == []


def test_a_busy_place_costs_nothing() -> None:
    schedule = Schedule([10], [("a", "b")])
    schedule.put_back(take(schedule, "a"))
    assert take(schedule, "b").shard == 0
    assert schedule.fallbacks == 0


def test_a_lost_place_gives_up_what_it_was_doing() -> None:
    schedule = Schedule([10, 10], [("a", "b"), ("a",)])
    attempt = take(schedule, "a")
    schedule.lose("a")
    assert attempt.cancelled
    assert schedule.take("a", 0.0) is None and not schedule.needed("a")
    assert take(schedule, "b").shard == 0
    assert schedule.hopeless == [1]
    assert schedule.lost() == ["a"]
    assert not schedule.finish(attempt, 9.0)
    schedule.lose("a")


def test_an_unreachable_place_counts_as_one_fallback() -> None:
    schedule = Schedule([10], [("a", "b")])
    schedule.unreachable("a")
    schedule.unreachable("a")
    assert schedule.fallbacks == 1


def test_what_a_place_is_stuck_with_is_taken_over_once() -> None:
    schedule = Schedule([100], [("a", "b")])
    stuck = take(schedule, "a", 0.0)
    stuck.moved(10, 0.5)
    assert schedule.take("b", 0.5 + STALLED_AFTER_S - 0.01) is None
    taken = take(schedule, "b", 0.5 + STALLED_AFTER_S)
    assert stuck.cancelled and taken.shard == 0
    assert schedule.fallbacks == 1
    # The slow one does not take it back, however long that takes.
    assert schedule.take("a", 1000.0) is None
    schedule.fail(stuck, copy_is_bad=False)
    assert schedule.fallbacks == 1
    assert not schedule.finish(stuck, 3.0)
    assert schedule.finish(taken, 3.0) and schedule.finished


def test_a_far_slower_place_loses_its_shard_but_a_little_slower_one_does_not() -> None:
    for speed, taken_over in ((0.5, True), (5.0, False)):
        schedule = Schedule([10, 100], [("fast",), ("slow", "fast")])
        slow = take(schedule, "slow")
        done = take(schedule, "fast")
        assert schedule.finish(done, 1.0)  # 10 bytes per second
        slow.moved(int(speed * 2), 2.0)
        assert (schedule.take("fast", 2.0) is not None) == taken_over
        assert slow.cancelled == taken_over


def test_a_bad_copy_found_after_a_take_over_is_remembered() -> None:
    schedule = Schedule([100], [("a", "b")])
    stuck = take(schedule, "a")
    take(schedule, "b", STALLED_AFTER_S)
    schedule.fail(stuck, copy_is_bad=True)
    assert schedule.excluded(0) == ("a",)


def test_a_bad_copy_found_after_a_take_over_may_have_been_the_last() -> None:
    schedule = Schedule([100], [("a", "b")])
    stuck = take(schedule, "a")
    taken_over = take(schedule, "b", STALLED_AFTER_S)
    schedule.fail(taken_over, copy_is_bad=True)
    assert schedule.hopeless == []
    schedule.fail(stuck, copy_is_bad=True)
    assert schedule.hopeless == [0]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    places=st.integers(1, 5),
    shards=st.integers(0, 30),
    copies=st.integers(1, 3),
)
def test_every_shard_is_done_unless_all_its_copies_are_bad(
    seed: int, places: int, shards: int, copies: int
) -> None:
    """Random failures, stalls, take-overs and deaths, on a clock of its own."""
    chance = random.Random(seed)
    names = [f"n{number}" for number in range(places)]
    held = [tuple(chance.sample(names, min(copies, places))) for _ in range(shards)]
    bad = {(s, p) for s in range(shards) for p in held[s] if chance.random() < 0.15}
    dead = {name for name in names if chance.random() < 0.1}
    schedule = Schedule([chance.randint(1, 9) for _ in range(shards)], held)
    under_way: dict[str, list[Attempt]] = {name: [] for name in names}
    done: Counter[int] = Counter()
    failures = 0
    now_s = 0.0
    for _ in range(20_000):
        active = [n for n in schedule.everywhere if schedule.needed(n) or under_way[n]]
        if schedule.finished or not active:
            break
        now_s += chance.random()
        name = chance.choice(active)
        if name in dead:
            schedule.lose(name)
            under_way[name].clear()
            continue
        if under_way[name] and chance.random() < 0.6:
            attempt = under_way[name].pop()
            if (attempt.shard, name) in bad:
                schedule.fail(attempt, copy_is_bad=True)
            elif chance.random() < 0.1 and failures < 50:
                failures += 1
                schedule.fail(attempt, copy_is_bad=False)
            elif chance.random() < 0.1:
                schedule.put_back(attempt)
            elif schedule.finish(attempt, now_s):
                done[attempt.shard] += 1
        elif schedule.needed(name) and len(under_way[name]) < 2:
            taken = schedule.take(name, now_s)
            if taken is not None:
                owners = [a for own in under_way.values() for a in own if a.shard == taken.shard]
                assert all(owner.cancelled for owner in owners)
                under_way[name].append(taken)
    good = [any(p not in dead and (s, p) not in bad for p in held[s]) for s in range(shards)]
    assert dict(done) == {s: 1 for s in range(shards) if good[s]}
    assert schedule.finished == all(good)
    assert set(schedule.hopeless) >= {s for s in range(shards) if not good[s]}
    assert {s for s in schedule.hopeless if good[s]} == set()


def test_sizes_and_places_belong_together() -> None:
    with pytest.raises(ValueError):
        Schedule([1], [])
