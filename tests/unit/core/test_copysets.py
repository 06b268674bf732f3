"""Few sets of nodes: formulas and families."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptd.core.copysets import (
    SLOWDOWN_MAX,
    Copyset,
    attainable_room,
    best_bytes_per_s,
    fewest_copysets,
    finish_s,
    soonest,
)

speeds_of_cards = st.sampled_from([6.0, 7.0, 12.5, 21.0, 33.0, 35.0, 37.0, 100.0, 330.0])


def named(speeds: list[float]) -> dict[str, float]:
    return {f"n{index}": speed for index, speed in enumerate(speeds)}


def alone(speeds: dict[str, float]) -> dict[str, str]:
    """Every node a machine of its own."""
    return {node: node for node in speeds}


def sets_of(*members: str) -> set[Copyset]:
    return {frozenset(member.split()) for member in members}


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 4))
def test_attainable_room_is_the_largest_r(free: list[int], copies: int) -> None:
    fits = [r for r in range(400) if sum(min(f, r) for f in free) >= copies * r]
    assert attainable_room(free, copies) == max(fits)


@pytest.mark.parametrize(
    ("free", "copies", "room"),
    [
        ([10, 10, 10, 10], 2, 20),
        ([100, 10, 10], 2, 20),  # the large one can only pair up with the small ones
        ([100, 0], 2, 0),
        ([7], 1, 7),
    ],
)
def test_attainable_room_of_known_cases(free: list[int], copies: int, room: int) -> None:
    assert attainable_room(free, copies) == room


@given(st.lists(speeds_of_cards, min_size=1, max_size=7), st.integers(1, 3))
def test_the_best_time_is_where_the_shares_add_up_to_the_copies(
    speeds: list[float], copies: int
) -> None:
    best = best_bytes_per_s(speeds, copies)
    if len(speeds) < copies:
        assert best == 0
    else:
        assert sum(min(1.0, speed / best) for speed in speeds) == pytest.approx(copies)


def test_the_soonest_set_is_that_of_the_soonest_slowest_node() -> None:
    speeds, queued = {"a": 10.0, "b": 5.0}, {"a": 30, "b": 0}
    assert soonest(frozenset("ab"), speeds, queued, 10) == (4.0, 6.0)


def test_four_equal_cards_form_two_disjoint_pairs() -> None:
    speeds = named([35.0] * 4)
    family = fewest_copysets(speeds, alone(speeds), 2)
    assert set(family) == sets_of("n0 n1", "n2 n3")
    lost = [dead for dead in itertools.combinations(speeds, 2) if frozenset(dead) in family]
    assert len(lost) == 2, "of six"
    assert finish_s(family, speeds, 100) == pytest.approx(100 / best_bytes_per_s([35.0] * 4, 2))


@pytest.mark.parametrize(
    ("speeds", "copies", "expected"),
    [
        ([35, 35], 2, sets_of("n0 n1")),
        ([35, 35, 35], 2, sets_of("n0 n1", "n0 n2", "n1 n2")),
        ([7, 21, 35, 35], 2, sets_of("n0 n1", "n2 n3")),
        ([35, 7, 7, 7, 7], 2, sets_of("n0 n1", "n0 n2", "n0 n3", "n0 n4")),
        ([35, 35, 35, 35, 35, 35], 3, sets_of("n0 n1 n2", "n3 n4 n5")),
        ([35, 7], 1, sets_of("n0", "n1")),
        ([35, 35, 35, 35, 35], 2, sets_of("n0 n1", "n2 n3", "n3 n4")),
        ([21, 7, 12.5, 33], 2, sets_of("n0 n3", "n2 n3", "n1 n2")),
    ],
)
def test_sensible_sets(speeds: list[float], copies: int, expected: set[Copyset]) -> None:
    cards = named(speeds)
    assert set(fewest_copysets(cards, alone(cards), copies)) == expected


@given(st.lists(st.floats(30.0, 40.0), min_size=4, max_size=4))
def test_alike_cards_form_the_same_pairs_however_they_were_measured(speeds: list[float]) -> None:
    cards = named(speeds)
    assert set(fewest_copysets(cards, alone(cards), 2)) == sets_of("n0 n1", "n2 n3")


def test_speeds_are_compared_exactly_where_alike_is_too_slow() -> None:
    speeds = named([34.0, 50.0, 50.0, 34.0, 50.0, 50.0])  # neighbours by id: 68 of 89 MB/s
    family = fewest_copysets(speeds, alone(speeds), 3)
    assert set(family) == sets_of("n1 n2 n4", "n0 n3 n5")


def fewest_possible(speeds: dict[str, float], copies: int, at_most: int) -> int:
    """By trying out all families with fewer than `at_most` sets."""
    limit = 400 / best_bytes_per_s(list(speeds.values()), copies) * SLOWDOWN_MAX
    everything = [frozenset(s) for s in itertools.combinations(sorted(speeds), copies)]
    for count in range(1, at_most):
        for family in itertools.combinations(everything, count):
            covers = len(frozenset().union(*family)) == len(speeds)
            if covers and finish_s(family, speeds, 400) <= limit:
                return count
    return at_most


@settings(max_examples=25)
@given(st.lists(speeds_of_cards, min_size=2, max_size=4))
def test_hardly_more_sets_than_the_fewest_possible(speeds: list[float]) -> None:
    cards = named(speeds)
    found = len(fewest_copysets(cards, alone(cards), 2))
    assert found <= fewest_possible(cards, 2, found) + 1


@example([(6.0, 0), (6.0, 2), (6.0, 1), (12.5, 0)], 2, [{0, 1}, {0, 1}])
@given(
    st.lists(st.tuples(speeds_of_cards, st.integers(0, 5)), min_size=1, max_size=8),
    st.integers(1, 3),
    st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=3), max_size=4),
)
def test_every_family_is_valid_and_fast_enough(
    nodes: list[tuple[float, int]], copies: int, hints: list[set[int]]
) -> None:
    speeds = named([speed for speed, _ in nodes])
    groups = {f"n{index}": group for index, (_, group) in enumerate(nodes)}
    by_group = [
        sum(speeds[node] for node in speeds if groups[node] == group)
        for group in set(groups.values())
    ]
    copies = min(copies, len(by_group))
    preferred = [frozenset(f"n{index}" for index in hint) for hint in hints]
    family = fewest_copysets(speeds, groups, copies, preferred)
    assert len(set(family)) == len(family) > 0
    for copyset in family:
        assert copyset <= speeds.keys()
        assert len(copyset) == len({groups[node] for node in copyset}) == copies
    assert frozenset().union(*family) == speeds.keys()
    best_s = 400 / best_bytes_per_s(by_group, copies)
    one_more_s = len(family) / min(speeds.values())
    assert finish_s(family, speeds, 400) <= SLOWDOWN_MAX * best_s + one_more_s


def test_sets_in_use_are_kept_while_they_are_fast_enough() -> None:
    crossed = list(sets_of("n0 n2", "n1 n3"))
    speeds = named([35.0, 34.0, 36.0, 33.0])
    assert set(fewest_copysets(speeds, alone(speeds), 2, crossed)) == set(crossed)
    slower = named([35.0, 7.0, 7.0, 35.0])
    assert set(fewest_copysets(slower, alone(slower), 2, crossed)) == sets_of("n0 n3", "n1 n2")


def test_new_nodes_form_sets_of_their_own_beside_those_in_use() -> None:
    crossed = list(sets_of("n0 n2", "n1 n3"))
    speeds = named([35.0] * 6)
    assert set(fewest_copysets(speeds, alone(speeds), 2, crossed)) == {
        *crossed,
        frozenset({"n4", "n5"}),
    }


def test_sets_in_use_that_are_not_needed_get_nothing_new() -> None:
    speeds = named([35.0] * 4)
    history = [frozenset(s.split()) for s in ("n0 n2", "n1 n3", "n0 n1", "n2 n3")]
    assert fewest_copysets(speeds, alone(speeds), 2, history) == history[:2]
