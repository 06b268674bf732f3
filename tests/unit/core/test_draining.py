"""Which copies a node must give away before it may go."""

from __future__ import annotations

from ckptd.core.availability import Holdings
from ckptd.core.draining import needed_here
from ckptd.core.machines import machine_key

ALL = frozenset({"a", "b", "c", "d"})


def holdings(*shards: str, copies: int = 2, manifest: frozenset[str] = ALL) -> Holdings:
    return Holdings(copies, manifest, tuple(frozenset(holders) for holders in shards))


def test_a_shard_is_needed_until_others_have_all_its_copies() -> None:
    found = needed_here("a", holdings("ab", "abc", "bc", "a", "b"), {}, leaving=())
    assert found == [True, False, False, True, False]


def test_copies_on_nodes_that_leave_too_do_not_count() -> None:
    assert needed_here("a", holdings("abc"), {}, leaving={"a", "b"}) == [True]
    assert needed_here("a", holdings("abcd"), {}, leaving={"a", "b"}) == [False]


def test_copies_without_the_manifest_do_not_count() -> None:
    found = needed_here("a", holdings("abc", manifest=frozenset({"a", "b"})), {}, leaving=())
    assert found == [True]


def test_two_nodes_of_one_machine_are_one_copy() -> None:
    machines = {node: machine_key(node, "kernel", "") for node in ("b", "c")}
    assert needed_here("a", holdings("abc"), machines, leaving=()) == [True]
    assert needed_here("a", holdings("abcd"), machines, leaving=()) == [False]


def test_a_node_that_does_not_answer_may_hold_whatever_is_short() -> None:
    found = needed_here("a", holdings("b", "bc"), {}, leaving=(), answers=False)
    assert found == [True, False]
    assert needed_here("a", holdings("b", "bc"), {}, leaving=()) == [False, False]


def test_the_copies_wanted_decide() -> None:
    assert needed_here("a", holdings("abc", copies=3), {}, leaving=()) == [True]
    assert needed_here("a", holdings("abcd", copies=3), {}, leaving=()) == [False]
