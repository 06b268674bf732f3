"""Maintenance ends by itself, whatever the clocks say."""

from __future__ import annotations

import pytest

from ckptd.core.maintenance import MaintenanceClock
from ckptd.core.roster import MaintenanceMark

YEARS_S = 10 * 365 * 86_400.0
MARK = MaintenanceMark("m", created_s=1_000_000.0, seconds=7200)


def left_s(
    clock: MaintenanceClock, mark: MaintenanceMark | None, now_s: float, wall_s: float
) -> float:
    return clock.left_s("pi1", mark, now_s=now_s, wall_s=wall_s)


def test_without_a_mark_there_is_none() -> None:
    assert left_s(MaintenanceClock(), None, 5.0, 1_000_000.0) == 0.0


def test_it_counts_down_and_ends() -> None:
    clock = MaintenanceClock()
    assert left_s(clock, MARK, 50.0, 1_000_000.0) == 7200
    assert left_s(clock, MARK, 150.0, 1_000_100.0) == 7100
    assert left_s(clock, MARK, 50.0 + 7200, 1_007_200.0) == 0
    assert left_s(clock, MARK, 50.0 + 9999, 1_009_999.0) == 0


def test_who_learns_of_it_late_or_restarts_does_not_start_it_anew() -> None:
    assert left_s(MaintenanceClock(), MARK, 5.0, 1_007_000.0) == 200
    assert left_s(MaintenanceClock(), MARK, 5.0, 1_007_300.0) == 0


@pytest.mark.parametrize("wall_s", [1_000_000.0 - YEARS_S, 999_000.0])
def test_a_wall_clock_that_lags_makes_it_no_longer_than_its_length(wall_s: float) -> None:
    clock = MaintenanceClock()
    assert left_s(clock, MARK, 50.0, wall_s) == 7200
    assert left_s(clock, MARK, 50.0 + 7199, wall_s) == 1
    assert left_s(clock, MARK, 50.0 + 7200, wall_s) == 0


def test_a_clock_that_is_set_meanwhile_is_believed() -> None:
    clock = MaintenanceClock()
    assert left_s(clock, MARK, 50.0, 0.0) == 7200
    assert left_s(clock, MARK, 51.0, 1_000_000.0 + YEARS_S) == 0


def test_a_wall_clock_that_runs_ahead_ends_it() -> None:
    assert left_s(MaintenanceClock(), MARK, 50.0, 1_000_000.0 + YEARS_S) == 0


def test_sleep_counts_by_the_wall_clock() -> None:
    clock = MaintenanceClock()
    assert left_s(clock, MARK, 50.0, 1_000_000.0) == 7200
    assert left_s(clock, MARK, 51.0, 1_007_201.0) == 0


def test_another_mark_counts_from_when_it_was_learned_of() -> None:
    clock = MaintenanceClock()
    left_s(clock, MARK, 50.0, 1_000_000.0)
    longer = MaintenanceMark("n", created_s=1_005_000.0, seconds=3600)
    assert left_s(clock, longer, 5050.0, 1_005_000.0) == 3600
    ended = MaintenanceMark("o", created_s=1_005_001.0, seconds=0)
    assert left_s(clock, ended, 5051.0, 1_005_001.0) == 0


def test_each_node_has_its_own() -> None:
    clock = MaintenanceClock()
    assert clock.left_s("pi1", MARK, now_s=0.0, wall_s=0.0) == 7200
    assert clock.left_s("pi2", MARK, now_s=7000.0, wall_s=0.0) == 7200
    assert clock.left_s("pi1", MARK, now_s=7000.0, wall_s=0.0) == 200
