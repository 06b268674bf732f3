"""Placement: machines, zones, room, speed, and few sets."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.copysets import SLOWDOWN_MAX, attainable_room, best_bytes_per_s
from ckptd.core.machines import machine_key
from ckptd.core.placement import SPEED_UNKNOWN_BYTES_PER_S, Candidate, Placement

MB = 1_000_000
SHARD = 32 * 2**20
PLENTY = 10**15


def nodes(
    *speeds_mb_per_s: float, rooms: list[int] | None = None, zones: str = ""
) -> list[Candidate]:
    """Candidates n0, n1, … on machines of their own; `zones` has one letter for each."""
    return [
        Candidate(
            node_id=f"n{index}",
            machine=f"boot{index}",
            zone=zones[index] if zones else "",
            room_bytes=PLENTY if rooms is None else rooms[index],
            write_bytes_per_s=speed * MB,
        )
        for index, speed in enumerate(speeds_mb_per_s)
    ]


def fill(placement: Placement, count: int) -> Counter[frozenset[str]]:
    """How often each set was chosen for `count` shards."""
    return Counter(frozenset(placement.choose(SHARD)) for _ in range(count))


def loads(sets: Counter[frozenset[str]]) -> Counter[str]:
    shards: Counter[str] = Counter()
    for copyset, count in sets.items():
        for node in copyset:
            shards[node] += count
    return shards


speeds_lists = st.lists(st.sampled_from([6, 7, 12.5, 21, 33, 35, 100, 330]), min_size=2, max_size=7)


# -- speed


@settings(max_examples=60)
@given(speeds_lists, st.integers(1, 3))
def test_done_within_a_quarter_more_than_the_best_split(speeds: list[float], copies: int) -> None:
    copies = min(copies, len(speeds))
    sets = fill(Placement(nodes(*speeds), copies), 200)
    shards = loads(sets)
    seconds = max(shards[f"n{index}"] / speed for index, speed in enumerate(speeds))
    best_s = 200 / best_bytes_per_s(speeds, copies)
    # Whole shards: the last one of each set may come to lie on its slowest node.
    assert seconds <= SLOWDOWN_MAX * best_s + len(sets) / min(speeds)


@settings(max_examples=60)
@given(speeds_lists)
def test_the_share_follows_the_speed(speeds: list[float]) -> None:
    sets = fill(Placement(nodes(*speeds), 2), 200)
    shards = loads(sets)
    best = best_bytes_per_s(speeds, 2)
    for index, speed in enumerate(speeds):
        fair = 200 * min(1.0, speed / best)
        assert shards[f"n{index}"] <= SLOWDOWN_MAX * fair + len(sets) * speed / min(speeds)


def test_a_card_with_a_fifth_of_the_speed_gets_a_fifth() -> None:
    shards = loads(fill(Placement(nodes(7, 35, 7, 35), 2), 120))
    assert shards == {"n0": 20, "n2": 20, "n1": 100, "n3": 100}


def test_four_equal_cards_use_two_pairs_at_full_speed() -> None:
    sets = fill(Placement(nodes(35, 35, 35, 35), 2), 100)
    assert sorted(sets.values()) == [50, 50]
    failures = itertools.combinations(("n0", "n1", "n2", "n3"), 2)
    lost = [dead for dead in failures if frozenset(dead) in sets]
    assert len(lost) == 2, "of six"


def test_no_card_stays_idle() -> None:
    assert loads(fill(Placement(nodes(35, 35, 35, 35, 35), 2), 100)).keys() == {
        f"n{index}" for index in range(5)
    }


def test_the_chain_begins_with_the_fastest_card() -> None:
    assert Placement(nodes(7, 35, 21), 3).choose(SHARD) == ("n1", "n2", "n0")


def test_a_queue_is_time_too() -> None:
    busy, idle, other = nodes(35, 35, 7)
    busy = Candidate("n0", "boot0", "", PLENTY, 35 * MB, queued_bytes=100 * SHARD)
    assert Placement([busy, idle, other], 1).choose(SHARD) == ("n1",)
    placement = Placement([busy, idle], 2)
    placement.choose(SHARD)
    placement.finished("n0", SHARD, SHARD / (35 * MB))
    assert placement._queued == {"n0": 0, "n1": SHARD}, "what others had asked for came first"


def test_measurements_move_the_load() -> None:
    placement = Placement(nodes(35, 35, 35, 35), 2)
    chosen = placement.choose(SHARD)
    slow = chosen[0]
    for _ in range(20):
        placement.finished(slow, SHARD, SHARD / (3.5 * MB))
    assert placement.speed_bytes_per_s(slow) == pytest.approx(3.5 * MB, rel=0.01)
    shards = loads(fill(placement, 100))
    others = [shards[f"n{index}"] for index in range(4) if f"n{index}" != slow]
    assert shards[slow] < min(others) / 3


def test_one_slow_shard_does_not_condemn_a_node() -> None:
    placement = Placement(nodes(35, 35), 2)
    placement.choose(SHARD)
    placement.finished("n0", SHARD, SHARD / (0.35 * MB))
    assert 24 * MB < placement.speed_bytes_per_s("n0") < 25 * MB
    placement.finished("n0", SHARD, 0.0)
    assert 24 * MB < placement.speed_bytes_per_s("n0") < 25 * MB, "no time, no measurement"


def test_a_node_that_was_never_measured_is_tried_at_once_and_then_believed() -> None:
    placement = Placement(nodes(0, 21, 35), 2)
    assert placement.speed_bytes_per_s("n0") == 35 * MB
    assert "n0" in placement.choose(SHARD)
    placement.finished("n0", SHARD, SHARD / (7 * MB))
    assert placement.speed_bytes_per_s("n0") == pytest.approx(7 * MB)
    unmeasured = Placement(nodes(0, 0), 1)
    assert unmeasured.speed_bytes_per_s("n0") == SPEED_UNKNOWN_BYTES_PER_S


# -- machines and zones

clusters = st.lists(
    st.builds(
        Candidate,
        node_id=st.uuids().map(str),
        machine=st.sampled_from(["", "x", "y", "z"]),
        zone=st.sampled_from(["", "a", "b"]),
        room_bytes=st.integers(0, 12) | st.just(PLENTY),
        write_bytes_per_s=st.sampled_from([0.0, 7.0, 21.0, 35.0]),
        queued_bytes=st.integers(0, 20),
    ),
    max_size=7,
    unique_by=lambda candidate: candidate.node_id,
)


@given(clusters, st.integers(1, 4), st.lists(st.integers(1, 5), max_size=25), st.data())
def test_distinct_machines_and_never_over_the_room(
    candidates: list[Candidate], copies: int, sizes: list[int], data: st.DataObject
) -> None:
    placement = Placement(candidates, copies)
    keys = {c.node_id: machine_key(c.node_id, c.machine, c.zone) for c in candidates}
    left = {c.node_id: c.room_bytes for c in candidates}
    some_nodes = st.sets(st.sampled_from(sorted(left)), max_size=2) if left else st.just(set())
    for size in sizes:
        exclude, already = data.draw(some_nodes), data.draw(some_nodes)
        chosen = placement.choose(size, exclude=exclude, already=already)
        taken = {keys[node] for node in already}
        assert not set(chosen) & (exclude | already)
        assert len({keys[node] for node in chosen} | taken) == len(chosen) + len(taken)
        free_machines = {
            keys[node] for node in left if left[node] >= size and node not in exclude
        } - taken
        assert len(chosen) == max(0, min(copies - len(taken), len(free_machines)))
        for node in chosen:
            left[node] -= size
            assert left[node] == placement.room_bytes(node) >= 0


def test_two_nodes_of_one_machine_never_hold_two_copies() -> None:
    twins = [
        Candidate("a", "one", "", PLENTY, 330 * MB),
        Candidate("b", "one", "", PLENTY, 330 * MB),
        Candidate("c", "two", "", PLENTY, 7 * MB),
    ]
    for copyset in fill(Placement(twins, 2), 20):
        assert "c" in copyset
    assert len(Placement(twins[:2], 2).choose(SHARD)) == 1


def test_distinct_zones_are_preferred() -> None:
    sets = fill(Placement(nodes(35, 35, 35, 21, zones="aaab"), 2), 30)
    assert all("n3" in copyset for copyset in sets)


def test_zones_are_no_reason_to_refuse() -> None:
    assert len(Placement(nodes(35, 35, zones="aa"), 2).choose(SHARD)) == 2
    candidates = nodes(35, 35, 35, rooms=[PLENTY, PLENTY, 2 * SHARD], zones="aab")
    sets = fill(Placement(candidates, 2), 10)
    assert sum(count for copyset, count in sets.items() if "n2" in copyset) == 2
    assert sets[frozenset({"n0", "n1"})] == 8


def test_three_copies_use_both_of_two_zones() -> None:
    sets = fill(Placement(nodes(35, 35, 35, 35, 7, zones="aaaab"), 3), 30)
    assert all("n4" in copyset for copyset in sets)
    sets = fill(Placement(nodes(35, 35, 35, 35, 7, zones="aabbc"), 4), 30)
    assert all("n4" in copyset and len(copyset) == 4 for copyset in sets)


# -- room


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from([6, 7, 35, 330]), st.sampled_from("abc")),
        min_size=2,
        max_size=6,
    ),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_everything_that_fits_is_placed(
    cards: list[tuple[int, float, str]], copies: int, odd_bytes: int
) -> None:
    rooms = [room * 4 + odd_bytes for room, _, _ in cards]
    zones = "".join(zone for _, _, zone in cards)
    placement = Placement(nodes(*(c[1] for c in cards), rooms=rooms, zones=zones), copies)
    placed = 0
    while len(placement.choose(4)) == copies:
        placed += 1
    assert placed == attainable_room([room // 4 for room in rooms], copies)


def test_a_large_card_that_everything_needs_is_used_however_slow() -> None:
    candidates = nodes(35, 35, 3, rooms=[10 * SHARD, 10 * SHARD, 20 * SHARD])
    sets = fill(Placement(candidates, 2), 20)
    assert all("n2" in copyset and len(copyset) == 2 for copyset in sets)


def test_one_full_card_leaves_the_others_working() -> None:
    sets = fill(Placement(nodes(35, 35, 35, 35, rooms=[0, PLENTY, PLENTY, PLENTY]), 2), 30)
    assert loads(sets) == {"n1": 20, "n2": 20, "n3": 20}


def test_released_room_can_be_used_again() -> None:
    placement = Placement(nodes(35, 35, rooms=[SHARD, SHARD]), 2)
    assert len(placement.choose(SHARD)) == 2
    assert placement.choose(SHARD) == ()
    placement.released("n1", SHARD)
    assert placement.room_bytes("n1") == SHARD
    assert placement.choose(SHARD, already=["n0"]) == ("n1",)


# -- nodes that come and go


def test_fewer_machines_than_copies_give_what_there_is() -> None:
    assert Placement(nodes(35), 2).choose(SHARD) == ("n0",)
    assert Placement([], 2).choose(SHARD) == ()


def test_a_removed_node_is_never_chosen_again() -> None:
    placement = Placement(nodes(35, 35, 35, 35), 2)
    fill(placement, 4)
    placement.remove("n0")
    assert loads(fill(placement, 40)).keys() == {"n1", "n2", "n3"}


def test_a_missing_copy_goes_where_a_set_is_complete_again() -> None:
    placement = Placement(nodes(35, 35, 35, 35), 2)
    pairs = fill(placement, 10)
    for node in ("n0", "n1", "n2", "n3"):
        (partner,) = placement.choose(SHARD, already=[node])
        assert frozenset({node, partner}) in pairs
    assert placement.choose(SHARD, already=["n0", "n1"]) == ()
    assert placement.choose(SHARD, already=["n0", "stranger"]) == ()
    assert placement.choose(SHARD, already=["n0"], exclude=["n1"]) in {("n2",), ("n3",)}
    assert len(placement.choose(SHARD, already=["stranger"])) == 1


@pytest.mark.parametrize(("holder", "partner"), [("n0", "n1"), ("n2", "n3"), ("n3", "n2")])
def test_a_first_repair_completes_the_sets_that_a_store_would_use(
    holder: str, partner: str
) -> None:
    assert Placement(nodes(35, 35, 35, 35), 2).choose(SHARD, already=[holder]) == (partner,)


def test_a_repair_with_too_few_machines_places_what_it_can() -> None:
    assert Placement(nodes(35, 35), 3).choose(SHARD, already=["n0"]) == ("n1",)


def test_the_sets_of_earlier_versions_are_used_again() -> None:
    first = Placement(nodes(35, 34, 33, 32), 2)
    fill(first, 10)
    assert len(first.used_sets) == 2
    second = Placement(nodes(33, 35, 34, 36), 2, used_sets=first.used_sets)
    fill(second, 10)
    assert set(second.used_sets) == set(first.used_sets)


def test_equal_inputs_give_equal_choices() -> None:
    def sequence(candidates: list[Candidate]) -> list[tuple[str, ...]]:
        placement = Placement(candidates, 2)
        return [placement.choose(SHARD) for _ in range(30)]

    candidates = nodes(7, 35, 21, 35, 12.5)
    assert sequence(candidates) == sequence(candidates[::-1])


def test_many_different_exclusions_do_not_pile_up() -> None:
    placement = Placement(nodes(*[35] * 8), 2)
    for excluded in itertools.chain.from_iterable(
        itertools.combinations([f"n{index}" for index in range(8)], size) for size in (1, 2, 3)
    ):
        assert not set(placement.choose(1, exclude=excluded)) & set(excluded)
    assert len(placement._plans) <= 64
