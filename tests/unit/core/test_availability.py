"""How safe a version is, and what deaths would cost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.availability import (
    EXIT_CODES,
    Assessment,
    Holdings,
    Outlook,
    State,
    assess,
    holders_from_bitmaps,
    what_if,
    worst,
)
from ckptd.core.machines import machine_key

APART = {node: machine_key(node, f"boot-{node}", "") for node in "abcd"}


def holdings(*shards: str, manifest: str = "abcd", copies: int = 2) -> Holdings:
    """Nodes have one letter; each shard is given by the letters of its holders."""
    return Holdings(copies, frozenset(manifest), tuple(frozenset(shard) for shard in shards))


def state(held: Holdings, *, all_answered: bool = True) -> State:
    return assess(held, APART, all_answered=all_answered).state


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (holdings("ab", "cd"), Assessment(State.PROTECTED, 2, 0, 0)),
        (holdings("abc", "cd"), Assessment(State.PROTECTED, 2, 0, 0)),
        (holdings("ab", "c"), Assessment(State.DEGRADED, 1, 1, 0)),
        (holdings("ab", "ab", manifest="ab"), Assessment(State.PROTECTED, 2, 0, 0)),
        (holdings("ab", "bc", manifest="ab"), Assessment(State.DEGRADED, 2, 1, 0)),
        (holdings("ab", "cd", manifest="ab"), Assessment(State.DEGRADED, 2, 1, 0)),
        (holdings("ab", "b", ""), Assessment(State.UNRECOVERABLE, 0, 1, 1)),
        (holdings("ab", manifest=""), Assessment(State.UNRECOVERABLE, 0, 1, 0)),
        (holdings(manifest="ab"), Assessment(State.PROTECTED, 2, 0, 0)),
        (holdings(manifest="a"), Assessment(State.DEGRADED, 1, 0, 0)),
        (holdings("a", manifest="a", copies=1), Assessment(State.PROTECTED, 1, 0, 0)),
        (holdings("ab", manifest="abc", copies=3), Assessment(State.DEGRADED, 2, 1, 0)),
    ],
)
def test_states(held: Holdings, expected: Assessment) -> None:
    assert assess(held, APART, all_answered=True) == expected


@pytest.mark.parametrize("held", [holdings("ab", ""), holdings("ab", manifest="")])
def test_nothing_is_called_lost_while_a_node_has_not_answered(held: Holdings) -> None:
    assert state(held, all_answered=False) is State.UNAVAILABLE
    assert state(held, all_answered=True) is State.UNRECOVERABLE


def test_two_nodes_of_one_machine_are_one_copy() -> None:
    twins = {"a": machine_key("a", "boot", ""), "b": machine_key("b", "boot", "")}
    assert assess(holdings("ab"), twins, all_answered=True) == Assessment(State.DEGRADED, 1, 1, 0)
    zones = {"a": machine_key("a", "boot", "left"), "b": machine_key("b", "boot", "right")}
    assert assess(holdings("ab"), zones, all_answered=True).state is State.PROTECTED
    assert assess(holdings("ab"), {}, all_answered=True).state is State.PROTECTED


@given(st.lists(st.sets(st.sampled_from("abcd")), max_size=40), st.integers(0, 3))
def test_bitmaps_tell_who_holds_what(shards: list[set[str]], spare_bytes: int) -> None:
    bitmaps = {}
    for node in "abcd":
        bits = sum(1 << index for index, holders in enumerate(shards) if node in holders)
        bitmaps[node] = bits.to_bytes(len(shards) // 8 + 1, "little") + b"\xff" * spare_bytes
    assert holders_from_bitmaps(bitmaps, len(shards)) == tuple(frozenset(s) for s in shards)


def test_without_bitmaps_nobody_holds_anything() -> None:
    assert holders_from_bitmaps({}, 2) == (frozenset(), frozenset())


def test_a_short_bitmap_has_nothing_more() -> None:
    assert holders_from_bitmaps({"a": b"\x01", "b": b""}, 9) == (
        frozenset("a"),
        *[frozenset[str]()] * 8,
    )


# -- what if


def test_disjoint_pairs_lose_data_in_two_of_six_double_failures() -> None:
    versions = {"v": holdings("ab", "cd", "ab")}
    pairs = list(itertools.combinations("abcd", 2))
    fatal = [pair for pair in pairs if not what_if(versions, APART, pair).survives]
    assert fatal == [("a", "b"), ("c", "d")]
    assert len(pairs) == 6


def test_what_if_lists_what_these_deaths_cause() -> None:
    versions = {
        "untouched": holdings("cd", manifest="cd"),
        "lost": holdings("ab", "cd"),
        "manifest lost": holdings("cd", manifest="ab"),
        "degraded": holdings("ac", "bd"),
        "degraded already": holdings("c", manifest="cd"),
        "degraded further": holdings("ac", "c"),
        "lost already": holdings("", "ac"),
        "enough left": holdings("acd", "bcd"),
    }
    outlook = what_if(versions, APART, {"a", "b"})
    assert outlook == Outlook(
        lost=("lost", "manifest lost"), degraded=("degraded", "degraded further")
    )
    assert not outlook.survives
    assert what_if(versions, APART, ()) == Outlook(lost=(), degraded=())


held_by_some = st.builds(
    lambda copies, manifest, shards: holdings(*shards, manifest=manifest, copies=copies),
    st.integers(1, 3),
    st.sets(st.sampled_from("abcd")).map(lambda nodes: "".join(sorted(nodes))),
    st.lists(
        st.sets(st.sampled_from("abcd")).map(lambda nodes: "".join(sorted(nodes))), max_size=5
    ),
)


@given(held_by_some, st.sets(st.sampled_from("abcd")), st.sets(st.sampled_from("abcd")))
def test_more_deaths_never_make_anything_better(
    held: Holdings, first: set[str], second: set[str]
) -> None:
    order = list(State)
    before, after = held.without(first), held.without(first | second)
    assert order.index(state(before)) <= order.index(state(after))
    fewer = what_if({"v": held}, APART, first)
    more = what_if({"v": held}, APART, first | second)
    assert set(fewer.lost) <= set(more.lost)


@given(held_by_some, st.integers(1, 3))
def test_protected_survives_any_deaths_of_fewer_machines_than_copies(
    held: Holdings, deaths: int
) -> None:
    survives = all(
        what_if({"v": held}, APART, dead).survives
        for dead in itertools.combinations("abcd", min(deaths, held.copies - 1))
    )
    manifest_enough = len(held.manifest) > min(deaths, held.copies - 1)
    assert survives or state(held) is not State.PROTECTED or not manifest_enough


# -- the whole cluster


def test_the_worst_state_decides() -> None:
    assert worst([]) is State.PROTECTED
    order = [
        State.PROTECTED,
        State.PENDING,
        State.DEGRADED,
        State.UNAVAILABLE,
        State.UNRECOVERABLE,
        State.UNREACHABLE,
    ]
    for better, worse in itertools.pairwise(order):
        assert worst([worse, better]) is worse
    assert [EXIT_CODES[each] for each in order] == [0, 0, 3, 5, 4, 5]
    assert worst([State.STORING, State.PROTECTED]) is State.PENDING
    assert EXIT_CODES.keys() == set(State)
