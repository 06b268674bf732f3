"""Numbers, times and tables for people."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.cli import tables


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * 1024**2, "10.0 MiB"),
        (1024**2 - 1, "1.00 MiB"),
        (200 * 1024**3, "200 GiB"),
        (5000 * 1024**4, "5000 TiB"),
    ],
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert tables.size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "never"), (0.2, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (2e5, "2 d")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert tables.duration(seconds) == text


def test_moments_and_counts() -> None:
    assert tables.moment("2026-01-02T03:04:05.123Z") == "2026-01-02 03:04:05"
    assert tables.moment(None) == "-"
    assert tables.count(1, "copy", "copies") == "1 copy"
    assert tables.count(0, "shard") == "0 shards"


@given(st.text())
def test_nothing_that_is_printed_can_move_the_cursor(text: str) -> None:
    shown = tables.printable(text)
    assert shown.isprintable()
    assert (shown == text) == text.isprintable()


def test_a_table_has_columns() -> None:
    assert tables.table(
        ("NAME", "SIZE", ""), [("a", "1 B", "x"), ("long\nname", "12 KiB", "")], right=(1,)
    ) == ("NAME          SIZE\na              1 B  x\nlong\\nname  12 KiB")
