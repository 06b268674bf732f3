"""Medians, ranges, ratios and tables: the arithmetic of the results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Median, least and greatest of some values."""

    median: float
    least: float
    most: float

    def text(self, digits: int = 2) -> str:
        """`3.10 (2.95–3.42)`."""
        return f"{self.median:.{digits}f} ({self.least:.{digits}f}–{self.most:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


class Ratio(NamedTuple):
    """How much longer one side takes: by the medians, and in each turn."""

    of_medians: float
    of_turns: tuple[float, ...]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """`ours` over `theirs`, turn by turn. Raises ValueError when the turns do not pair up."""
    turns = tuple(our / their for our, their in zip(ours, theirs, strict=True))
    return Ratio(statistics.median(ours) / statistics.median(theirs), turns)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown that is also readable as it is: columns padded, numbers to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    right = [
        bool(rows) and all(_is_number(row[column]) for row in rows) for column in range(len(header))
    ]

    def padded(cells: Sequence[str]) -> str:
        filled = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(cells, widths, right, strict=True)
        )
        return f"| {' | '.join(filled)} |"

    rule = [
        "-" * (width - 1) + (":" if number else "-")
        for width, number in zip(widths, right, strict=True)
    ]
    return "\n".join([padded(lines[0]), padded(rule), *(padded(line) for line in lines[1:])])


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell in ("", "–")
