"""Sizes, rates, durations and addresses as people write them in a config or on a command line.

Every `parse_*` raises `ValueError` with a sentence that says what is allowed; every `format_*`
writes text that its `parse_*` reads back to the same value.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from ckptd.core.limits import QUANTITY_MAX_BYTES, QUANTITY_MAX_S

_SIZE_UNITS: Final = {
    "B": 1,
    "kB": 1000,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
}
_DURATION_UNITS_MS: Final = {
    "ms": 1,
    "s": 1000,
    "m": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
    "w": 604_800_000,
}
# Sixteen digits before the point reach every limit; more would only feed the arithmetic.
_QUANTITY: Final = re.compile(r"([0-9]{1,16})(?:\.([0-9]{1,6}))?\s?([A-Za-z%]*)", re.ASCII)
_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", re.ASCII)
_HOST_V6: Final = re.compile(r"[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]{1,32})?", re.ASCII)
_PORT: Final = re.compile(r"[0-9]{1,5}", re.ASCII)


class Address(NamedTuple):
    """A TCP address. `host` is a name or an IP address without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _scaled(text: str, units: dict[str, int]) -> int | None:
    """`text` times its unit, in the smallest unit; None when it has another form.

    Done in integers: a float would turn 0.1MB into something that is not written back alike.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None or match[3] not in units:
        return None
    whole, fraction, unit = int(match[1]), match[2] or "", units[match[3]]
    scaled_fraction, rest = divmod(int(fraction or "0") * unit, 10 ** len(fraction))
    return None if rest else whole * unit + scaled_fraction


def parse_size(text: str) -> int:
    """Bytes of a size such as `32MiB`, `1.5GB` or `4096B`."""
    size_bytes = _scaled(text, _SIZE_UNITS)
    if size_bytes is None:
        raise ValueError(f"{text!r} is not a size: write a number and B, kB, MB, GB, TB, KiB, …")
    if size_bytes > QUANTITY_MAX_BYTES:
        raise ValueError(f"{text!r} is larger than {format_size(QUANTITY_MAX_BYTES)}")
    return size_bytes


def parse_rate(text: str) -> int:
    """Bytes per second of a rate such as `20MB/s`."""
    if not text.endswith("/s"):
        raise ValueError(f"{text!r} is not a rate: write a size per second, such as 20MB/s")
    return parse_size(text.removesuffix("/s"))


def parse_percent(text: str) -> float:
    """Percent as a number from 0 to 100, of text such as `5%`."""
    match = _QUANTITY.fullmatch(text)
    if match is None or match[3] != "%":
        raise ValueError(f"{text!r} is not a share: write a number and %")
    percent = float(f"{match[1]}.{match[2] or '0'}")
    if percent > 100:
        raise ValueError(f"{text!r} is more than 100%")
    return percent


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `2s`, `10m`, `24h` or `14d`."""
    milliseconds = _scaled(text, _DURATION_UNITS_MS)
    if milliseconds is None:
        raise ValueError(f"{text!r} is not a duration: write a number and ms, s, m, h, d or w")
    if milliseconds > QUANTITY_MAX_S * 1000:
        raise ValueError(f"{text!r} is longer than {format_duration(QUANTITY_MAX_S)}")
    return milliseconds / 1000


def parse_address(text: str) -> Address:
    """An address `HOST:PORT`, or `[HOST]:PORT` when HOST is an IPv6 address.

    Port 0 is read; whether "any free port" makes sense is for the caller to say.
    """
    host, colon, port_text = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    pattern = _HOST_V6 if bracketed else _HOST
    host = host[1:-1] if bracketed else host
    if not colon or not pattern.fullmatch(host) or not _PORT.fullmatch(port_text):
        raise ValueError(f'{text!r} is not an address: write "HOST:PORT" (IPv6: "[HOST]:PORT")')
    if int(port_text) > 65535:
        raise ValueError(f"{text!r}: there is no port above 65535")
    return Address(host, int(port_text))


def format_size(size_bytes: int) -> str:
    """The shortest exact text of a size: `32MiB`, `20MB`, `4097B`."""
    for unit in ("TiB", "TB", "GiB", "GB", "MiB", "MB", "KiB", "kB"):
        if size_bytes and size_bytes % _SIZE_UNITS[unit] == 0:
            return f"{size_bytes // _SIZE_UNITS[unit]}{unit}"
    return f"{size_bytes}B"


def format_rate(rate_bytes_per_s: int) -> str:
    """The shortest exact text of a rate: `20MB/s`."""
    return f"{format_size(rate_bytes_per_s)}/s"


def format_duration(duration_s: float) -> str:
    """The shortest exact text of a duration, to the millisecond: `10m`, `1500ms`."""
    milliseconds = round(duration_s * 1000)
    for unit in ("d", "h", "m", "s"):
        if milliseconds and milliseconds % _DURATION_UNITS_MS[unit] == 0:
            return f"{milliseconds // _DURATION_UNITS_MS[unit]}{unit}"
    return f"{milliseconds}ms"


def format_percent(percent: float) -> str:
    """The text of a share: `5%`, `2.5%`."""
    return f"{percent:.6f}".rstrip("0").rstrip(".") + "%"
