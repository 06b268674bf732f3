"""How fast copies are re-read, what bad readings mean, when things are written down."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.scrubbing import (
    SAMPLE_COPIES,
    SUSPECT_ROUNDS,
    SUSPICIOUS_COPIES,
    Pace,
    Quarantined,
    Verdict,
    decide_quarantined,
    judge,
    record_is_due,
)

DAY_S = 86_400.0
PACE = Pace(interval_s=14 * DAY_S, rate_bytes_per_s=10e6)


@given(
    interval_s=st.floats(1, 1e8),
    rate=st.floats(1e3, 1e9),
    sizes=st.lists(st.integers(1, 2**28), min_size=1, max_size=200),
)
def test_what_was_received_at_once_is_read_within_the_interval_or_at_the_full_rate(
    interval_s: float, rate: float, sizes: list[int]
) -> None:
    pace = Pace(interval_s, rate)
    total = sum(sizes)
    at_s = pace.longest_wait_s + pace.due_in_s(0)
    for size in sizes:
        assert pace.rest_s(size, total) >= size / rate * 0.999, "never faster than the rate"
        at_s += pace.rest_s(size, total)
    rounded_s = interval_s * (1 + 1e-9)  # of many sums
    assert at_s <= rounded_s or not pace.keeps_up(total)
    assert pace.bytes_per_s(total) == rate or pace.keeps_up(total)


def test_a_store_that_holds_little_is_read_little_at_a_time() -> None:
    assert PACE.bytes_per_s(40 * 10**9) == pytest.approx(47_241, rel=0.01)
    assert PACE.bytes_per_s(10**15) == 10e6
    assert PACE.rest_s(0, 0) == 0.0
    assert PACE.rest_s(10, 0) == 0.0, "gone meanwhile: nothing to wait for"


def test_a_young_check_is_left_alone() -> None:
    assert PACE.due_in_s(0) == 3.5 * DAY_S
    assert PACE.due_in_s(3 * DAY_S) == 0.5 * DAY_S
    assert PACE.due_in_s(4 * DAY_S) == PACE.due_in_s(math.inf) == 0.0


def test_waits_shrink_with_the_interval() -> None:
    assert (PACE.suspect_pause_s, PACE.retry_quarantined_s) == (600, 6 * 3600)
    short = Pace(interval_s=10, rate_bytes_per_s=1e6)
    assert (short.suspect_pause_s, short.retry_quarantined_s) == (2.5, 2.5)
    assert (PACE.longest_wait_s, short.longest_wait_s) == (60, 0.5)


@pytest.mark.parametrize(
    ("looked", "bad", "more", "rounds", "expected"),
    [
        (0, 0, True, 0, Verdict.GOOD),
        (1, 0, True, 0, Verdict.GOOD),
        (1, 1, True, 0, Verdict.LOOK_FURTHER),
        (SAMPLE_COPIES - 1, 1, True, 0, Verdict.LOOK_FURTHER),
        (SAMPLE_COPIES, 1, True, 0, Verdict.CONFIRM),
        (1, 1, False, 0, Verdict.CONFIRM),
        (SUSPICIOUS_COPIES, SUSPICIOUS_COPIES, True, 0, Verdict.SUSPECT),
        (64, SUSPICIOUS_COPIES, True, 0, Verdict.SUSPECT),
        (64, SUSPICIOUS_COPIES - 1, True, 0, Verdict.CONFIRM),
        # while the node is suspect, only the same copies are looked at
        (3, 3, False, 1, Verdict.SUSPECT),
        (3, 3, False, SUSPECT_ROUNDS - 1, Verdict.SUSPECT),
        (3, 3, False, SUSPECT_ROUNDS, Verdict.CONFIRM),
        (3, 2, True, 1, Verdict.CONFIRM),
        (3, 0, False, 1, Verdict.GOOD),
    ],
)
def test_one_bad_copy_is_rot_several_at_once_are_the_node(
    looked: int, bad: int, more: bool, rounds: int, expected: Verdict
) -> None:
    assert judge(looked, bad, more=more, rounds=rounds) is expected


@pytest.mark.parametrize(
    ("since_s", "checked", "total", "expected"),
    [
        (1e9, 0, 1000, False),
        (599, 1000, 1000, False),
        (600, 9, 1000, False),
        (600, 10, 1000, True),
        (3600, 1, 1000, True),
        (600, 1, 0, True),
    ],
)
def test_times_of_checks_are_written_rarely(
    since_s: float, checked: int, total: int, expected: bool
) -> None:
    assert record_is_due(since_s, checked, total) is expected


@pytest.mark.parametrize(
    ("since_retry_s", "healed_for_s", "expected"),
    [
        (math.inf, None, Quarantined.RETRY),
        (math.inf, 1e9, Quarantined.RETRY),  # read once more before it goes
        (1.0, None, Quarantined.KEEP),
        (1.0, 59.0, Quarantined.KEEP),
        (1.0, 60.0, Quarantined.DROP),
        (6 * 3600.0, None, Quarantined.RETRY),
    ],
)
def test_quarantined_bytes_are_tried_again_and_go_once_they_are_healed_for_the_grace(
    since_retry_s: float, healed_for_s: float | None, expected: Quarantined
) -> None:
    found = decide_quarantined(
        since_retry_s=since_retry_s, healed_for_s=healed_for_s, grace_s=60.0, pace=PACE
    )
    assert found is expected
