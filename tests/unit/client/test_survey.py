"""Who is presumed to hold what, and what follows for the state of a version."""

from __future__ import annotations

import pytest

from ckptd.client.cluster import AbsentNode, Inventoried
from ckptd.client.survey import (
    holdings_of,
    judge,
    presumed_nodes,
    timestamp,
    verified_at,
)
from ckptd.core.availability import Holdings, State
from ckptd.core.headers import VersionHeader

NOW_MS = 1_800_000_000_000


def header(*, shards: int, copies: int = 2) -> VersionHeader:
    return VersionHeader(
        id="a" * 64,
        kind="manifest",
        order=NOW_MS - 3_600_000,
        created="2026-01-02T03:04:05Z",
        name="run/step-1",
        content_id="b" * 64,
        size=1,
        files=1,
        shards=shards,
        copies=copies,
        step=None,
        metrics={},
    )


def absent(
    node_id: str = "n9", seen_s: float | None = 5.0, roles: tuple[str, ...] = ("worker",)
) -> AbsentNode:
    return AbsentNode(node_id, "10.0.0.9:7701", "does not answer", seen_s, roles)


def presumed(node: AbsentNode, order: int = NOW_MS - 60_000) -> list[str]:
    return presumed_nodes([node], order, now_ms=NOW_MS, repair_after_s=600)


def test_a_node_that_was_seen_lately_is_presumed_to_keep_its_copies() -> None:
    assert presumed(absent()) == ["n9"]
    assert presumed(absent(roles=())) == ["n9"], "its roles are not known"


@pytest.mark.parametrize(
    "node",
    [
        absent(seen_s=600.0),
        absent(seen_s=None),
        absent(node_id=""),
        absent(roles=("coordinator",)),
    ],
    ids=["too long ago", "never seen", "no id known", "keeps no shards"],
)
def test_nobody_else_is_presumed_to(node: AbsentNode) -> None:
    assert presumed(node) == []


@pytest.mark.parametrize("order", [NOW_MS - 5_000, NOW_MS, NOW_MS + 10**9])
def test_what_was_written_after_the_node_went_is_not_on_it(order: int) -> None:
    assert presumed(absent(seen_s=5.0), order) == []
    assert presumed(absent(seen_s=5.0), NOW_MS - 5_001) == ["n9"]


def holdings(manifest: str, *shards: str, copies: int = 2) -> Holdings:
    return Holdings(
        copies=copies,
        manifest=frozenset(manifest),
        shards=tuple(frozenset(holders) for holders in shards),
    )


def test_a_presumed_copy_turns_degraded_into_protected_and_nothing_else() -> None:
    short = holdings("abc", "ab", "c")
    assert judge(short, {}, all_answered=False).state is State.DEGRADED
    hoped = judge(short, {}, all_answered=False, presumed=["d"])
    assert hoped.state is State.PROTECTED
    assert (hoped.min_copies, hoped.under_replicated) == (1, 0), "only confirmed copies are told"
    lost = holdings("abc", "ab", "")
    assert judge(lost, {}, all_answered=False, presumed=["d", "e"]).state is State.UNAVAILABLE


def test_a_presumed_node_stands_for_one_copy_of_each_shard() -> None:
    short = holdings("abc", "ab", "c", copies=3)
    assert judge(short, {}, all_answered=False, presumed=["d"]).state is State.DEGRADED
    assert judge(short, {}, all_answered=False, presumed=["d", "e"]).state is State.PROTECTED


def test_a_lonely_manifest_is_presumed_elsewhere_too() -> None:
    lonely = holdings("a", "ab")
    assert judge(lonely, {}, all_answered=False).state is State.DEGRADED
    assert judge(lonely, {}, all_answered=False, presumed=["d"]).state is State.PROTECTED


def test_the_larger_number_of_copies_is_wanted() -> None:
    answers = {"a": Inventoried(b"\x03", 1.0), "b": Inventoried(b"\x01", 1.0), "c": None}
    found = holdings_of(header(shards=2, copies=1), answers, copies=2)
    assert found == holdings("ab", "ab", "a")
    assert holdings_of(header(shards=2, copies=3), answers, copies=2).copies == 3


def test_the_oldest_check_of_all_copies_counts() -> None:
    answers = {"a": Inventoried(b"\x01", 10.0), "b": Inventoried(b"\x01", 300.0), "c": None}
    assert verified_at(answers, 1000.0) == 700.0
    nothing_held = {**answers, "d": Inventoried(b"\x00", -1.0)}
    assert verified_at(nothing_held, 1000.0) == 700.0
    unknown = {**answers, "d": Inventoried(b"\x01", -1.0)}
    assert verified_at(unknown, 1000.0) is None
    assert verified_at({}, 1000.0) is None


def test_times_are_rfc_3339_in_utc() -> None:
    assert timestamp(0.9) == "1970-01-01T00:00:00Z"
    assert timestamp(None) is None
