"""What is missing, and who sends it to whom."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from ckptd.core import bitmaps
from ckptd.core.repair import (
    Copy,
    Need,
    Needs,
    Planner,
    SeenShards,
    VersionCopies,
)
from ckptd.core.workers import Absences, Worker, judge_absences

SIZE = 100
NOW_MS = 10_000_000
PLENTY = 10**12


def worker(node: str, **changes: object) -> Worker:
    return structs.replace(Worker(node, bytes_used=1000, bytes_free=PLENTY), **changes)


def digest(index: int) -> bytes:
    return bytes([index % 256]) + index.to_bytes(8) + bytes(23)


def version(
    *holders: str, copies: int = 2, no_manifest: str = "", asked: str = "abcd", order: int = 5
) -> VersionCopies:
    """A version with one shard for each text, which names its holders."""
    return VersionCopies(
        version="v" * 64,
        order=order,
        copies=copies,
        shards=[(digest(index), SIZE) for index in range(len(holders))],
        bitmaps={
            node: None if node in no_manifest else bitmaps.pack(node in names for names in holders)
            for node in asked
        },
    )


def needs_of(workers: Sequence[Worker], absences: Absences | None = None) -> Needs:
    return Needs(workers, absences or Absences(), now_ms=NOW_MS)


def planned(
    workers: Sequence[Worker],
    copies: VersionCopies,
    absences: Absences | None = None,
    *,
    spare_bytes: int = 0,
    urgency: int | None = None,
) -> list[Copy]:
    planner = Planner(workers, needs_of(workers, absences), spare_bytes=spare_bytes)
    return planner.plan(copies, urgency=urgency)


FOUR = [worker(node) for node in "abcd"]


# -- what is missing


def test_a_worker_that_gave_no_answer_may_have_it_until_it_was_silent_for_long() -> None:
    lacking = version("a", asked="abc")
    assert planned(FOUR, lacking) == []
    (copy,) = planned(FOUR, lacking, Absences(unheard=frozenset("d")))
    assert copy.source == "a"


def test_what_has_its_copies_needs_nothing() -> None:
    shortage = needs_of(FOUR).shortage(version("ab", "cd", "abc"))
    assert (shortage.urgency, shortage.missing, shortage.lost) == (None, (), ())
    assert planned(FOUR, version("ab", "cd", "abc")) == []


def test_missing_and_lost_are_told_apart() -> None:
    shortage = needs_of(FOUR).shortage(version("ab", "c", "", copies=2))
    assert (shortage.urgency, shortage.missing, shortage.lost) == (1, (1,), (2,))


def test_a_copy_counts_only_where_the_manifest_is() -> None:
    found = list(needs_of(FOUR).each(version("ab", no_manifest="b")))
    assert found == [(Need(live=1, missing=1, drained=0), frozenset("a"))]


def test_two_nodes_on_one_machine_are_one_copy() -> None:
    workers = [worker("a", boot_id="x"), worker("b", boot_id="x"), worker("c"), worker("d")]
    ((need, _),) = needs_of(workers).each(version("ab"))
    assert need == Need(live=1, missing=1, drained=0)
    (copy,) = planned(workers, version("ab"))
    assert copy.target in "cd"


def test_who_gives_no_answer_is_presumed_to_have_everything() -> None:
    assert needs_of(FOUR).shortage(version("a", asked="abc")).missing == ()
    assert planned(FOUR, version("a", asked="abc")) == []


def test_an_unknown_node_counts_for_nothing() -> None:
    shortage = needs_of(FOUR[:3]).shortage(version("ad"))
    assert shortage.missing == (0,)


def test_a_node_that_is_away_for_a_while_counts_for_what_was_stored_before() -> None:
    workers = [*FOUR[:3], worker("d", absent_s=60.0)]
    absences = judge_absences(workers, after_s=600.0)
    assert planned(workers, version("a", asked="abc"), absences) == []
    late = version("a", asked="abc", order=NOW_MS - 1000)
    assert len(planned(workers, late, absences)) == 1
    long = [*FOUR[:3], worker("d", absent_s=700.0)]
    (copy,) = planned(long, version("a", asked="abc"), judge_absences(long, after_s=600.0))
    assert (copy.source, copy.size, copy.shard) == ("a", SIZE, digest(0))
    assert copy.target in "bc"


def test_an_absent_node_that_is_presumed_is_one_copy_and_not_more() -> None:
    workers = [*FOUR[:3], worker("d", absent_s=60.0)]
    absences = judge_absences(workers, after_s=600.0)
    assert len(planned(workers, version("a", asked="abc", copies=3), absences)) == 1


# -- draining


def test_copies_of_a_draining_node_are_good_to_send_and_to_be_replaced() -> None:
    workers = [worker("a", draining=True), *FOUR[1:]]
    ((need, _),) = needs_of(workers).each(version("ab"))
    assert need == Need(live=2, missing=1, drained=1)
    (copy,) = planned(workers, version("ab"))
    assert copy.target in "cd"


def test_nothing_is_sent_to_a_draining_node() -> None:
    workers = [worker(node, draining=True) for node in "bcd"]
    assert planned([FOUR[0], *workers], version("a", "ab")) == []


def test_a_drain_goes_on_while_too_many_are_away_for_repair() -> None:
    workers = [worker("a", draining=True), FOUR[1], *(worker(n, absent_s=700.0) for n in "cd")]
    absences = judge_absences(workers, after_s=600.0)
    assert absences.waiting
    assert planned(workers, version("a", asked="ab"), absences) == []
    unavailable = [worker("c", absent_s=700.0)]
    workers = [worker("a", draining=True), *FOUR[1:2], worker("d"), *unavailable]
    absences = judge_absences(workers, after_s=6000.0)
    copies = planned(workers, version("ab", asked="abd", order=NOW_MS), absences)
    assert [copy.target for copy in copies] == ["d"]


def test_what_only_a_drain_misses_comes_last() -> None:
    workers = [worker("a", draining=True), *FOUR[1:]]
    found = planned(workers, version("ab", "b", "bc", copies=2))
    assert [copy.shard for copy in found] == [digest(1), digest(0)]
    assert [c.shard for c in planned(workers, version("ab", "b"), urgency=1)] == [digest(1)]


# -- who sends, who takes


def test_the_most_endangered_come_first() -> None:
    found = planned(FOUR, version("abc", "a", "ab", "", copies=4))
    assert [copy.shard[0] for copy in found] == [1, 1, 1, 2, 2, 0]


def test_the_sources_share_the_work() -> None:
    found = planned([*FOUR, worker("e")], version(*["ab"] * 10, copies=3, asked="abcde"))
    assert Counter(copy.source for copy in found) == {"a": 5, "b": 5}


def test_no_room_no_copy() -> None:
    workers = [*FOUR[:2], worker("c", bytes_free=SIZE - 1), worker("d", bytes_free=2 * SIZE)]
    found = planned(workers, version("ab", "ab", "ab", copies=3))
    assert [copy.target for copy in found] == ["d", "d"]


def test_repair_for_an_absent_node_leaves_room_for_a_checkpoint() -> None:
    workers = [worker("a"), worker("b", bytes_free=5 * SIZE), worker("c", absent_s=700.0)]
    absences = judge_absences(workers, after_s=600.0)
    lonely = version(*["a"] * 5, asked="ab")
    assert len(planned(workers, lonely, absences, spare_bytes=3 * SIZE)) == 2
    assert planned(workers, lonely, absences, spare_bytes=9 * SIZE) == []


def test_a_copy_that_rotted_gets_back_the_room_that_it_had() -> None:
    workers = [worker("a"), worker("b", bytes_free=5 * SIZE)]
    assert len(planned(workers, version("a", asked="ab"), spare_bytes=9 * SIZE)) == 1


def test_a_wiped_node_is_filled_again_before_others_get_more() -> None:
    workers = [worker(n, bytes_used=100 * SIZE, write_bytes_per_s=9e9) for n in "abc"]
    wiped = worker("d", bytes_used=0, write_bytes_per_s=1e6)
    full = version(*["a", "b", "c"] * 29)
    found = planned([*workers, structs.replace(wiped, bytes_free=PLENTY)], full)
    assert {copy.target for copy in found} == {"d"}
    assert len(found) == 87


def test_a_refill_ends_where_the_others_are() -> None:
    # Equal room, so that used bytes are what counts.
    workers = [worker(n, bytes_used=100 * SIZE, bytes_free=900 * SIZE) for n in "abc"]
    wiped = worker("d", bytes_used=0, bytes_free=1000 * SIZE)
    planner = Planner([*workers, wiped], needs_of([*workers, wiped]), spare_bytes=0)
    assert planner.refilling == {"d"}
    planner.plan(version(*["a", "b", "c"] * 60))
    assert planner.refilling == set()
    half = [*workers, structs.replace(wiped, bytes_used=60 * SIZE)]
    assert Planner(half, needs_of(half), spare_bytes=0).refilling == set()
    again = Planner(half, needs_of(half), spare_bytes=0, refilling={"d", "x"})
    assert again.refilling == {"d"}


def test_a_refill_gives_way_where_it_cannot_help() -> None:
    workers = [worker("a"), worker("b"), worker("d", bytes_used=0, boot_id="x")]
    twin = worker("c", boot_id="x")
    (copy,) = planned([*workers, twin], version("c"))
    assert copy.target in "ab"


def test_three_copies_go_to_the_poor_and_then_to_others() -> None:
    workers = [*FOUR[:3], worker("d", bytes_used=0)]
    found = planned(workers, version("a", copies=3))
    assert {copy.target for copy in found} > {"d"}
    assert len(found) == 2


def test_a_single_node_is_not_poor() -> None:
    assert Planner([worker("a", bytes_free=0)], needs_of([worker("a")]), spare_bytes=0)


def test_not_more_copies_than_are_missing() -> None:
    # b's copy stands on a machine that a's twin shares: placement alone would make one more.
    workers = [*FOUR[:3], worker("d", absent_s=1.0, boot_id="x"), worker("e", boot_id="x")]
    absences = judge_absences(workers, after_s=600.0)
    found = planned(workers, version("ae", asked="abce", copies=3), absences)
    assert len(found) == 1


@settings(max_examples=200)
@given(
    st.lists(st.sets(st.sampled_from("abcde")), min_size=1, max_size=8),
    st.sets(st.sampled_from("abcde")),
    st.sets(st.sampled_from("abcde")),
    st.integers(1, 4),
)
def test_a_plan_is_sound(
    holders: list[set[str]], draining: set[str], away: set[str], copies: int
) -> None:
    workers = [
        worker(n, draining=n in draining, absent_s=700.0 if n in away else None) for n in "abcde"
    ]
    absences = judge_absences(workers, after_s=600.0)
    asked = "".join(sorted(set("abcde") - away))
    found = version(*("".join(sorted(h)) for h in holders), copies=copies, asked=asked)
    by_shard: dict[bytes, list[str]] = {}
    for copy in planned(workers, found, absences):
        index = copy.shard[0]
        live = holders[index] - away
        assert copy.source in live
        assert copy.target not in live | draining | away
        by_shard.setdefault(copy.shard, []).append(copy.target)
    for index, held in enumerate(holders):
        live = held - away
        targets = by_shard.get(digest(index), [])
        assert len(set(targets)) == len(targets)
        possible = len(set("abcde") - away - draining - live)
        wanted = copies - len(live - draining)
        if absences.waiting:
            wanted -= len(away)
        assert len(targets) == (min(possible, max(0, wanted)) if live else 0)


# -- shards that several versions share, and what is urgent


def test_shared_shards_are_counted_once() -> None:
    seen = SeenShards()
    assert [seen.add(digest(n)) for n in (1, 2, 257, 1, 258, 2, 257)] == [
        True, True, True, False, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("need", "urgency"),
    [(Need(1, 1, 0), 1), (Need(2, 1, 0), 2), (Need(2, 1, 1), 66), (Need(1, 2, 1), 1)],
)
def test_urgency(need: Need, urgency: int) -> None:
    assert need.urgency == urgency


def test_what_two_versions_share_is_copied_to_the_same_nodes() -> None:
    """Else each of them would bring a copy of its own, and one of these would be too many."""
    for seed in range(20):
        rng = random.Random(seed)
        workers = [
            worker(n, bytes_used=rng.randrange(3000), write_bytes_per_s=rng.uniform(1e6, 1e8))
            for n in "abcde"
        ]
        lacking = version(*rng.choices("abcde", k=12), asked="abcde")
        again = structs.replace(lacking, version="w" * 64)
        planner = Planner(workers, needs_of(workers), spare_bytes=0)
        first = {(copy.shard, copy.target) for copy in planner.plan(lacking)}
        second = {(copy.shard, copy.target) for copy in planner.plan(again)}
        assert first == second and len(first) == 12


def test_no_more_copies_are_planned_than_asked_for() -> None:
    lacking = version("a", "a", "a", "a")
    for limit, count in ((0, 0), (1, 1), (3, 3), (4, 4), (9, 4), (None, 4)):
        planner = Planner(FOUR, needs_of(FOUR), spare_bytes=0)
        assert len(planner.plan(lacking, limit=limit)) == count


def test_a_shared_copy_fills_its_target_once() -> None:
    workers = [*FOUR[:3], worker("d", bytes_used=0)]  # 600 of 1000 are given to d: still poor
    lacking = version(*["a"] * 6)
    planner = Planner(workers, needs_of(workers), spare_bytes=0)
    for number in range(3):
        copies = planner.plan(structs.replace(lacking, version=f"{number}" * 64))
        assert {copy.target for copy in copies} == planner.refilling == {"d"}


def both(
    workers: Sequence[Worker], first: VersionCopies, second: VersionCopies
) -> list[tuple[str, str, str]]:
    planner = Planner(workers, needs_of(workers), spare_bytes=0)
    plans = [planner.plan(first), planner.plan(structs.replace(second, version="w" * 64))]
    return [(c.version[0], c.source, c.target) for plan in plans for c in plan]


def test_what_is_on_its_way_to_a_holder_of_another_version_is_not_sent_to_it_by_itself() -> None:
    """b has the shard, and only the manifest of the second version."""
    workers = [worker(n, write_bytes_per_s=1e8 if n == "b" else 1e6) for n in "abcd"]
    found = both(workers, version("ab", no_manifest="b"), version("ab", copies=3))
    assert found == [("v", "a", "b"), ("w", "b", "c")]


def test_what_is_on_its_way_to_a_machine_that_has_it_is_no_further_copy() -> None:
    workers = [worker("a"), worker("b", boot_id="x", write_bytes_per_s=1e8),
               worker("c", boot_id="x"), worker("d")]  # fmt: skip
    found = both(workers, version("a"), version("ac", copies=3))
    assert [target for of, _, target in found if of == "w"] == ["d"]


def test_a_twin_of_a_draining_holder_takes_its_place_for_both() -> None:
    workers = [worker("a"), worker("b", boot_id="x", draining=True),
               worker("c", boot_id="x", write_bytes_per_s=1e9), worker("d")]  # fmt: skip
    found = both(workers, version("ab"), version("ab"))
    assert [(of, target) for of, _, target in found] == [("v", "c"), ("w", "c")]


def test_a_version_that_wants_fewer_copies_gets_fewer() -> None:
    found = both(FOUR, version("a", copies=3), version("a", copies=2))
    assert [of for of, _, _ in found] == ["v", "v", "w"]


def test_a_shared_shard_comes_to_its_target_from_one_source() -> None:
    """From two at the same time its bytes would come twice."""
    (_, first, target), (_, second, again) = both(
        FOUR, version("ab", copies=3), version("ab", copies=3)
    )
    assert (first, target) == (second, again)
