"""Retention: what each rule keeps, and what goes under no rule."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.headers import VersionHeader, age_of
from ckptd.core.limits import TOMBSTONE_VERSIONS_MAX
from ckptd.core.retention import (
    KeepBest,
    Plan,
    RetentionRule,
    batches,
    plan,
    prudent_now_s,
    unjustified,
)
from ckptd.core.training_state import NOT_FINITE, is_finite

NOW_S = 1_800_000_000.0
HOUR_S = 3600.0


def version(
    order: int,
    name: str = "run/latest",
    *,
    age_s: float = 0.0,
    step: int | None = None,
    created: str | None = None,
    nan: bool = False,
    **recorded: float | None,
) -> VersionHeader:
    """A version with its order as its id, `age_s` old at NOW_S; `nan`: its loss is no number."""
    metrics = {metric: value for metric, value in recorded.items() if value is not None}
    if nan:
        metrics[NOT_FINITE] = 1.0
    if created is None:
        created = datetime.fromtimestamp(NOW_S - age_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return VersionHeader(
        id=f"{order:064x}",
        kind="manifest",
        order=order,
        created=created,
        name=name,
        content_id=f"{order:064x}",
        size=1,
        files=1,
        shards=1,
        copies=2,
        step=step,
        metrics=metrics,
    )


def apply(
    versions: Sequence[VersionHeader],
    *rules: RetentionRule,
    unprotected: Sequence[int] = (),
    pinned: Sequence[int] = (),
) -> Plan:
    return plan(
        versions,
        rules,
        protected={v.id for v in versions if v.order not in unprotected},
        pinned={f"{order:064x}" for order in pinned},
        now_s=NOW_S,
    )


def left(found: Plan) -> list[int]:
    return sorted(each.version.order for each in found.keep)


def gone(found: Plan) -> list[int]:
    return sorted(each.version.order for each in found.delete)


def reason(found: Plan, order: int) -> str:
    reasons = {each.version.order: each.reason for each in found.keep}
    reasons |= {each.version.order: each.reason for each in found.delete}
    return reasons[order]


def latest(count: int) -> list[VersionHeader]:
    return [version(order) for order in range(1, count + 1)]


def steps(*numbers: int) -> list[VersionHeader]:
    return [version(n, f"run/step-{n}", step=n) for n in numbers]


LAST_3 = RetentionRule(keep_last=3)


def test_keep_last_counts_the_versions_of_a_name() -> None:
    found = apply(latest(10), LAST_3)
    assert left(found) == [8, 9, 10]
    assert gone(found) == list(range(1, 8))
    assert [each.version.order for each in found.delete] == list(range(7, 0, -1))
    assert {each.justified_by for each in found.delete} == {f"{10:064x}"}
    assert reason(found, 1) == "not among the newest 3"
    assert reason(found, 9) == "among the newest 3"


def test_keep_last_counts_the_names_of_a_run_and_apart_from_that_their_versions() -> None:
    versions = [version(10 * n + m, f"run/step-{n}") for n in range(1, 6) for m in range(4)]
    assert left(apply(versions, LAST_3)) == [31, 32, 33, 41, 42, 43, 51, 52, 53]


def test_runs_are_counted_apart_and_the_first_rule_that_fits_decides() -> None:
    versions = [version(n, f"{run}/step-{n}") for run, n in zip("aabbcc", range(6), strict=True)]
    found = apply(
        versions, RetentionRule(runs="a", keep_last=1), RetentionRule(runs="[ab]", keep_last=2)
    )
    assert gone(found) == [0]
    assert reason(found, 4) == "no rule is for its run"


def test_checkpoints_directly_below_a_root_are_one_run() -> None:
    versions = [version(n, f"step-{n}") for n in range(4)]
    assert left(apply(versions, RetentionRule(runs="*", keep_last=2))) == [2, 3]


def test_without_rules_everything_stays() -> None:
    assert gone(apply(latest(5))) == []


def test_keep_every_steps_takes_the_first_at_or_above_each_multiple() -> None:
    rule = RetentionRule(keep_last=1, keep_every_steps=1000)
    assert left(apply(steps(0, 500, 1000, 1500, 2000, 2500), rule)) == [0, 1000, 2000, 2500]
    assert left(apply(steps(313, 626, 939, 1252, 1565, 1878, 2191, 2504), rule)) == [
        1252,
        2191,
        2504,
    ]


def test_keep_every_steps_takes_the_newest_version_of_a_step_and_passes_by_unknown_ones() -> None:
    versions = [version(n, "run/step-1000", step=1000) for n in (1, 2)]
    versions += [version(3, "run/odd"), version(4, "run/last")]
    found = apply(versions, RetentionRule(keep_last=1, keep_every_steps=1000))
    assert left(found) == [2, 4]
    assert reason(found, 2) == "one of every 1000 steps"
    assert reason(found, 3) == "not among the newest 1, nor the one of every 1000 steps"


def test_keep_every_takes_the_first_of_each_such_time() -> None:
    start_s = NOW_S - NOW_S % HOUR_S - 3 * HOUR_S  # a full hour
    versions = [
        version(n, age_s=NOW_S - start_s - n * HOUR_S / 4) for n in range(12)
    ]  # four an hour
    found = apply(versions, RetentionRule(keep_every_s=HOUR_S))
    assert left(found) == [0, 4, 8, 11]
    assert reason(found, 4) == "one of every such time"
    assert reason(found, 11) == "the newest protected version of its run"


def test_keep_within_keeps_what_is_younger() -> None:
    versions = [version(n, age_s=HOUR_S * (10 - n)) for n in range(10)]
    found = apply(versions, RetentionRule(keep_within_s=2.5 * HOUR_S))
    assert left(found) == [8, 9]
    assert reason(found, 8) == "younger than keep_within"
    assert reason(found, 3) == "not younger than keep_within"


@pytest.mark.parametrize(
    "rule", [RetentionRule(keep_within_s=HOUR_S), RetentionRule(keep_every_s=HOUR_S)]
)
def test_what_claims_to_come_from_the_future_expires_nothing_and_does_not_expire(
    rule: RetentionRule,
) -> None:
    ahead = version(1, age_s=-10 * 365 * 86_400)
    unreadable = version(2, created="sometime")
    found = apply([ahead, unreadable, version(3, age_s=9 * HOUR_S), version(4)], rule)
    assert {1, 2} <= set(left(found))
    assert reason(found, 1) == reason(found, 2) == "its time of creation is not in the past"
    # They fill nobody's place: what an hour of the past has to offer stays.
    assert 4 in left(found)
    assert (3 in left(found)) == (rule.keep_every_s is not None)


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 4)])
def test_keep_best(mode: str, best: int) -> None:
    versions = [
        version(n, f"run/step-{n}", eval_loss=loss)
        for n, loss in enumerate([3.0, 1.0, 0.5, 2.0, 9.0, 4.0])
    ]
    versions.append(version(7, "run/step-7"))
    rule = RetentionRule(keep_best=KeepBest("eval_loss", "min" if mode == "min" else "max"))
    found = apply(versions, rule)
    assert left(found) == [best, 7]
    assert reason(found, best) == "best eval_loss"
    assert reason(found, 1) == "not the best"


def test_of_equally_good_ones_the_newest_is_the_best_and_without_metrics_nothing_is() -> None:
    rule = RetentionRule(keep_last=1, keep_best=KeepBest("eval_loss", "min"))
    same = [version(n, f"run/step-{n}", eval_loss=1.0) for n in range(3)]
    assert left(apply([*same, version(9, "run/end")], rule)) == [2, 9]
    assert left(apply(latest(3), rule)) == [3]


def test_pins_stay_in_addition() -> None:
    found = apply(latest(6), LAST_3, pinned=[1])
    assert left(found) == [1, 4, 5, 6]
    assert reason(found, 1) == "pinned"


# -- what never happens


def test_what_is_not_protected_takes_nobodys_place_and_does_not_go_before_something_newer_is() -> (
    None
):
    found = apply(latest(8), LAST_3, unprotected=[5, 6, 7, 8])
    assert left(found) == [2, 3, 4, 5, 6, 7, 8]
    assert reason(found, 5) == "nothing newer of its run is protected"


def test_what_is_not_protected_stays_where_the_rule_wants_it_and_goes_where_it_does_not() -> None:
    rule = RetentionRule(keep_last=1, keep_every_steps=1000)
    found = apply(steps(1000, 1500, 2000, 2500, 3000), rule, unprotected=[1000, 1500])
    assert left(found) == [1000, 2000, 3000]


def test_the_last_protected_version_of_a_run_stays_whatever_the_rule_wants() -> None:
    rule = RetentionRule(keep_every_steps=1000)
    assert left(apply(steps(10, 20, 30), rule)) == [30]
    assert left(apply(steps(10, 20, 30), rule, unprotected=[20, 30])) == [10, 20, 30]
    assert gone(apply(steps(10, 20, 30), rule, unprotected=[10, 20, 30])) == []


def test_an_older_version_stays_until_the_newer_one_of_its_name_is_protected() -> None:
    versions = [version(1, "run/a"), version(3, "run/b"), version(5, "run/a")]
    rule = RetentionRule(keep_last=1)
    found = apply(versions, rule, unprotected=[5])
    assert left(found) == [1, 3, 5]
    assert "the newer version of its name is not protected yet" in reason(found, 1)
    assert left(apply(versions, rule)) == [5]


def test_only_the_newest_protected_version_stays_for_an_unprotected_one() -> None:
    versions = [version(n, "run/a") for n in (1, 2, 9)] + [version(5, "run/b")]
    assert left(apply(versions, RetentionRule(keep_last=1), unprotected=[9])) == [2, 5, 9]


def test_losses_that_are_no_numbers_never_count() -> None:
    versions = [version(n, f"run/step-{n}", nan=n > 4) for n in range(1, 9)]
    found = apply(versions, LAST_3)
    assert left(found) == [2, 3, 4, 6, 7, 8]
    assert reason(found, 5).startswith("its loss is not finite")
    assert {e.justified_by for e in found.delete} == {f"{4:064x}"}
    better = apply([*versions, version(9, "run/step-9")], LAST_3)
    assert left(better) == [3, 4, 9]


def test_a_loss_that_is_no_number_is_never_the_best_nor_one_of_every_so_many() -> None:
    rule = RetentionRule(keep_every_steps=10, keep_best=KeepBest("eval_loss", "min"))
    versions = [
        version(10, "run/10", step=10, nan=True, eval_loss=0.0),
        version(11, "run/11", step=11, eval_loss=1.0),
        version(12, "run/12", step=12, eval_loss=2.0),
    ]
    assert left(apply(versions, rule)) == [11, 12]


def test_versions_without_any_finite_loss() -> None:
    versions = [version(n, nan=True) for n in range(1, 6)]
    assert left(apply(versions, LAST_3)) == [3, 4, 5]
    # A good version that is not protected is worth more than bad ones that are.
    good = version(6)
    assert left(apply([*versions, good], LAST_3, unprotected=[6])) == [3, 4, 5, 6]
    found = apply([version(0), *versions], LAST_3, unprotected=[0])
    assert 0 in left(found)
    # Also where the rule wants neither.
    found = apply([version(0), *versions], RetentionRule(keep_every_steps=5), unprotected=[0])
    assert left(found) == [0, 5]
    # With no keep_last the newest stays; what is younger than keep_within does, too.
    assert left(apply(versions, RetentionRule(keep_every_steps=5))) == [5]
    old = [version(n, nan=True, age_s=(9 - n) * HOUR_S) for n in range(5)]
    within = RetentionRule(keep_within_s=6.5 * HOUR_S)
    assert left(apply([*old, version(9)], within)) == [3, 4, 9]


_VERSIONS = st.lists(
    st.tuples(
        st.sampled_from(["run/a", "run/b", "run/c", "other/a", "single"]),
        st.integers(0, 30) | st.none(),
        st.integers(-5, 50),
        st.booleans(),
        st.sampled_from([None, 0.5, 1.0, 2.0]),
    ),
    max_size=12,
)
_RULES = st.builds(
    RetentionRule,
    runs=st.sampled_from(["*", "run", "other"]),
    keep_last=st.none() | st.integers(1, 3),
    keep_every_steps=st.none() | st.integers(1, 10),
    keep_every_s=st.none() | st.just(7 * HOUR_S),
    keep_within_s=st.none() | st.just(11 * HOUR_S),
    keep_best=st.none() | st.just(KeepBest("loss", "min")),
)


@given(_VERSIONS, st.lists(_RULES, max_size=2), st.sets(st.integers(0, 11)), st.sets(st.just(3)))
def test_whatever_the_rules_say(
    rows: list[tuple[str, int | None, int, bool, float | None]],
    rules: list[RetentionRule],
    unprotected: set[int],
    pinned: set[int],
) -> None:
    versions = [
        version(order, name, step=step, age_s=age * HOUR_S, nan=nan, loss=loss)
        for order, (name, step, age, nan, loss) in enumerate(rows)
    ]
    found = apply(versions, *rules, unprotected=sorted(unprotected), pinned=sorted(pinned))
    assert sorted(left(found) + gone(found)) == list(range(len(versions)))
    by_id = {each.id: each for each in versions}
    for dropped in found.delete:
        mine, justifying = dropped.version, by_id[dropped.justified_by]
        assert justifying.order in left(found)
        assert justifying.order not in unprotected
        assert justifying.run == mine.run
        assert mine.order not in pinned
        if is_finite(mine.metrics):
            assert age_of(justifying) > age_of(mine)
            assert is_finite(justifying.metrics)
    # Applied again to what is left, it drops nothing.
    again = apply(
        [each.version for each in found.keep],
        *rules,
        unprotected=sorted(unprotected),
        pinned=sorted(pinned),
    )
    assert gone(again) == []


# -- large plans, tombstones, clocks


def test_more_than_half_of_the_live_versions_waits_for_somebody() -> None:
    assert not apply(latest(6), LAST_3).is_large(None)
    assert apply(latest(7), LAST_3).is_large(None)
    assert not apply([], LAST_3).is_large(None)


def test_what_came_since_the_rules_were_last_applied_may_go_again() -> None:
    found = apply(latest(20), LAST_3)
    assert not found.is_large({f"{n:064x}" for n in (1, 2, 3)})
    assert found.is_large({f"{n:064x}" for n in (1, 2, 3, 4)})


def test_a_tombstone_for_each_version_that_justifies_and_not_too_long() -> None:
    count = TOMBSTONE_VERSIONS_MAX + 5
    versions = [version(n, "a/x") for n in range(1, count)]
    versions += [version(count + n, "b/x") for n in range(3)]
    found = batches(apply(versions, RetentionRule(keep_last=1)).delete)
    assert [len(each.versions) for each in found] == [TOMBSTONE_VERSIONS_MAX, 3, 2]
    assert [int(each.justified_by, 16) for each in found] == [count - 1, count - 1, count + 2]
    dropped = [v.order for each in found for v in each.versions]
    assert sorted(dropped) == [*range(1, count - 1), count, count + 1]


def test_what_waits_in_vain_is_justified_anew_by_something_newer_of_its_run() -> None:
    dead = [version(5, "run/a"), version(8, "run/a"), version(1, "other/a")]
    live = [version(3, "run/a"), version(7, "run/b"), version(9, "run/c")]
    found = unjustified(dead, live, protected={f"{n:064x}" for n in (3, 7)})
    assert [(e.version.order, int(e.justified_by, 16)) for e in found] == [(5, 7)]


def test_a_clock_that_runs_ahead_expires_nothing() -> None:
    year_s = 365 * 86_400.0
    assert prudent_now_s(NOW_S, []) == NOW_S
    assert prudent_now_s(NOW_S + 10 * year_s, [NOW_S, NOW_S + 1]) == NOW_S
    assert prudent_now_s(NOW_S, [NOW_S + 10 * year_s, NOW_S + 1, NOW_S + 2]) == NOW_S
    assert prudent_now_s(NOW_S, [0.0, NOW_S - 2, NOW_S - 1]) == NOW_S - 2
