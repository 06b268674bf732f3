"""The plot: every point where its value belongs."""

import xml.etree.ElementTree as ElementTree

import pytest
from bench.plot import line_plot, tick_step

SVG = "{http://www.w3.org/2000/svg}"
SIZES = [(1024, "1KiB"), (2048, "2KiB"), (8192, "8 & more")]


def points(text: str) -> dict[str, list[tuple[float, float]]]:
    """By colour."""
    return {
        line.attrib["stroke"]: [
            (float(x), float(y))
            for x, y in (pair.split(",") for pair in line.attrib["points"].split())
        ]
        for line in ElementTree.fromstring(text).iter(f"{SVG}polyline")
    }


@pytest.mark.parametrize(
    ("most", "step"), [(6.0, 1.0), (6.1, 2.0), (30.0, 5.0), (0.5, 0.1), (55.0, 10.0)]
)
def test_ticks_are_round_and_few(most: float, step: float) -> None:
    assert tick_step(most) == pytest.approx(step)


def test_sizes_are_logarithmic_and_seconds_linear_from_zero() -> None:
    lines = points(line_plot("title", SIZES, {"store": [4.0, 2.0, 3.0]}))
    ((first, second, third),) = lines.values()
    assert (third[0] - second[0]) == pytest.approx(2 * (second[0] - first[0]), abs=0.2)
    assert (third[1] - first[1]) == pytest.approx((second[1] - third[1]), abs=0.2)
    assert first[1] < third[1] < second[1], "SVG counts downward"


def test_each_series_has_its_own_colour_and_name() -> None:
    text = line_plot("a < b", SIZES, {"store": [1.0, 2.0, 3.0], "restore": [3.0, 2.0, 1.0]})
    assert len(points(text)) == 2
    shown = [element.text for element in ElementTree.fromstring(text).iter(f"{SVG}text")]
    assert {"a < b", "store", "restore", "8 & more"} <= set(shown)


def test_a_value_is_missing() -> None:
    with pytest.raises(ValueError):
        line_plot("title", SIZES, {"store": [1.0, 2.0]})
