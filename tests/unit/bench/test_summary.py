"""Medians, ratios and tables."""

import pytest
from bench.summary import Spread, ratio, spread, table


def test_the_spread_is_median_least_and_most() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread([4.0, 1.0, 2.0, 3.0]).median == 2.5
    assert spread([3.0, 1.0, 2.0]).text() == "2.00 (1.00–3.00)"


def test_the_ratio_is_ours_over_theirs_by_medians_and_by_turn() -> None:
    found = ratio([4.0, 6.0, 5.0], [2.0, 4.0, 10.0])
    assert found.of_medians == 5.0 / 4.0
    assert found.of_turns == (2.0, 1.5, 0.5)


def test_turns_that_do_not_pair_up_have_no_ratio() -> None:
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_a_table_lines_up_with_numbers_to_the_right() -> None:
    assert table(["leg", "s"], [["store", "3.10"], ["restore", "12.50"]]).splitlines() == [
        "| leg     |     s |",
        "| ------- | ----: |",
        "| store   |  3.10 |",
        "| restore | 12.50 |",
    ]


def test_a_table_without_rows_is_still_a_table() -> None:
    assert table(["a"], []).splitlines() == ["| a   |", "| --- |"]
