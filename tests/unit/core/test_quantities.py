"""Sizes, rates, durations, shares and addresses: what is read, what is refused, what is written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.limits import QUANTITY_MAX_BYTES, QUANTITY_MAX_S
from ckptd.core.quantities import (
    Address,
    format_duration,
    format_percent,
    format_rate,
    format_size,
    parse_address,
    parse_duration,
    parse_percent,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0B", 0),
        ("4096B", 4096),
        ("32MiB", 32 * 1024**2),
        ("20MB", 20_000_000),
        ("20 MB", 20_000_000),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("0.1MB", 100_000),
        ("1kB", 1000),
        ("1KB", 1000),
        ("2TB", 2 * 10**12),
        ("1TiB", 1024**4),
    ],
)
def test_a_size_is_read_in_bytes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "32",
        "MiB",
        "-1MB",
        "1Mb",
        "1mib",
        "1e3MB",
        "0.5B",
        "1.MB",
        "1MB/s",
        "１MB",
        "1MB\n",
        "x",
    ],
)
def test_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_a_size_beyond_the_limit_is_refused() -> None:
    assert parse_size("1024TiB") == QUANTITY_MAX_BYTES
    with pytest.raises(ValueError, match="larger than"):
        parse_size("1025TiB")


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [
        ("250ms", 0.25),
        ("2s", 2.0),
        ("1.5s", 1.5),
        ("10m", 600.0),
        ("24h", 86_400.0),
        ("2w", 1209600),
    ],
)
def test_a_duration_is_read_in_seconds(text: str, duration_s: float) -> None:
    assert parse_duration(text) == duration_s


@pytest.mark.parametrize("text", ["", "10", "10min", "1h30m", "-1s", "0.1ms", "forever"])
def test_text_that_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


def test_a_duration_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than"):
        parse_duration("3651d")


def test_a_rate_is_a_size_per_second() -> None:
    assert parse_rate("20MB/s") == 20_000_000
    with pytest.raises(ValueError, match="is not a rate"):
        parse_rate("20MB")
    with pytest.raises(ValueError, match="is not a size"):
        parse_rate("fast/s")


@pytest.mark.parametrize(("text", "percent"), [("5%", 5.0), ("2.5%", 2.5), ("100%", 100.0)])
def test_a_share_is_read_in_percent(text: str, percent: float) -> None:
    assert parse_percent(text) == percent


@pytest.mark.parametrize("text", ["5", "%", "-5%", "5%%", "101%", "5MB"])
def test_text_that_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_percent(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:7701", Address("0.0.0.0", 7701)),
        ("pi-1.local:7701", Address("pi-1.local", 7701)),
        ("[::1]:7701", Address("::1", 7701)),
        ("[fe80::1%eth0]:1", Address("fe80::1%eth0", 1)),
        ("localhost:0", Address("localhost", 0)),
    ],
)
def test_an_address_is_read_and_written_alike(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    ["", "7701", ":7701", "host", "host:", "host:x", "host:65536", "::1:7701", "a b:1", "[host]:1",
     "h/../x:1", "host:-1", "host:٣"],
)  # fmt: skip
def test_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_address(text)


@given(st.integers(0, QUANTITY_MAX_BYTES))
def test_a_size_reads_back_as_it_was_written(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes
    assert parse_rate(format_rate(size_bytes)) == size_bytes


@given(st.integers(0, QUANTITY_MAX_S * 1000))
def test_a_duration_reads_back_as_it_was_written(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == milliseconds / 1000


@given(st.integers(0, 100_000_000))
def test_a_share_reads_back_as_it_was_written(millionths: int) -> None:
    percent = millionths / 1_000_000
    assert parse_percent(format_percent(percent)) == percent


def test_the_shortest_exact_unit_is_written() -> None:
    assert format_size(32 * 1024**2) == "32MiB"
    assert format_size(20_000_000) == "20MB"
    assert format_size(4097) == "4097B"
    assert format_duration(600) == "10m"
    assert format_duration(1.5) == "1500ms"
    assert format_percent(5) == "5%"
