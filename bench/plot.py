"""A line plot as SVG: one logarithmic axis of sizes, one linear axis of seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

_WIDTH: Final = 640
_HEIGHT: Final = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 110, 40, 50
# Told apart by people with any colour vision, on white and on black.
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73")
_TICK_STEPS: Final = (1.0, 2.0, 5.0, 10.0)
_TICKS: Final = 6


def tick_step(most: float) -> float:
    """The distance of the ticks of an axis from 0 to `most`: 1, 2 or 5 times a power of ten."""
    rough = most / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in _TICK_STEPS if step * power >= rough * 0.999)


def line_plot(
    title: str, sizes: Sequence[tuple[int, str]], series: Mapping[str, Sequence[float]]
) -> str:
    """The SVG text. `sizes` are bytes and labels of the points, rising; each of `series` has one
    value in seconds for each size."""
    step = tick_step(max(value for values in series.values() for value in values))
    top = step * math.ceil(max(value for values in series.values() for value in values) / step)
    first, last = math.log2(sizes[0][0]), math.log2(sizes[-1][0])

    def across(size_bytes: int) -> float:
        share = (math.log2(size_bytes) - first) / (last - first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def up(seconds: float) -> float:
        return _HEIGHT - _BOTTOM - seconds / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for tick in range(round(top / step) + 1):
        height = up(tick * step)
        parts.append(
            f'<path d="M{_LEFT} {height:.1f}H{_WIDTH - _RIGHT}" stroke="#dddddd"/>'
            f'<text x="{_LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">'
            f"{tick * step:g}</text>"
        )
    for size_bytes, label in sizes:
        parts.append(
            f'<text x="{across(size_bytes):.1f}" y="{_HEIGHT - _BOTTOM + 18}" '
            f'text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 10}">size of a shard; seconds upward</text>')
    for number, (name, values) in enumerate(series.items()):
        colour = _COLOURS[number]
        points = [(across(size), up(value)) for (size, _), value in zip(sizes, values, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(
            f'<text x="{_WIDTH - _RIGHT + 30}" y="{_TOP + 18 * number}" fill="{colour}">'
            f"{escape(name)}</text>"
        )
    return "\n".join([*parts, "</svg>", ""])
