"""How numbers, times and tables look to people. Whatever came from elsewhere is made printable:
a file name must not move the cursor of whoever lists it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_GAP: Final = "  "


def printable(text: str) -> str:
    """`text` with everything escaped that is not to be seen."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> str:
    """Rows below a header, in columns; those numbered in `right` (from 0) end at the same place."""
    lines = [header, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        _GAP.join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def size(size_bytes: float) -> str:
    """Three digits and a binary unit: `1.95 GiB`."""
    value = float(size_bytes)
    for unit in _UNITS:
        if value < 1023.5 or unit == _UNITS[-1]:
            break
        value /= 1024
    if unit == "B" or value >= 99.95:
        return f"{value:.0f} {unit}"
    return f"{value:.1f} {unit}" if value >= 9.995 else f"{value:.2f} {unit}"


def duration(seconds: float | None) -> str:
    """A rough span: `40 s`, `3 min`, `2 h`, `5 d`; `never` for None."""
    if seconds is None:
        return "never"
    for unit, length_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def moment(time: str | None) -> str:
    """An RFC 3339 time of a document as `2026-01-02 03:04:05`; `-` for None. Still UTC."""
    return "-" if time is None else time[:19].replace("T", " ")


def count(number: int, singular: str, plural: str = "") -> str:
    """`1 shard`, `2 shards`."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
