"""The results of a comparison, as they lie in bench/results.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from bench.floor import GIB, Passes, Prices
from bench.machine import Machine
from bench.processes import Cpu, Leg
from bench.summary import Ratio, ratio

FORMAT: Final = 1
LIMIT: Final = 1.3
"""A ratio above this is too slow to be called comparable."""
QUIET_SHARE: Final = 0.15
"""When others use more than this share of all cores, wall time says little about the programs."""


class Results(msgspec.Struct, frozen=True):
    """All turns of one run: `legs` by leg (store, restore), then by side (ckptd, rsync)."""

    format: int
    measured: str
    size_bytes: int
    turns: int
    machine: Machine
    prices: Prices
    passes: dict[str, dict[str, Passes]]
    legs: dict[str, dict[str, list[Leg]]]
    ratios: dict[str, float]
    """By leg: median seconds of ckptd over median seconds of rsync."""

    def seconds(self, leg: str, side: str) -> list[float]:
        return [turn.seconds for turn in self.legs[leg][side]]

    def cpu_per_gib(self, leg: str, side: str) -> list[float]:
        """CPU seconds of all processes together for each GiB of the checkpoint, by turn."""
        return [turn.cpu_total * GIB / self.size_bytes for turn in self.legs[leg][side]]

    def others_cpu(self, leg: str, side: str) -> list[float]:
        return [turn.other_cpu_seconds for turn in self.legs[leg][side]]

    def disturbance(self) -> float:
        """The share of all cores that others used, in the leg and side that it was worst for."""
        return max(
            others_share(turns, self.machine.cores)
            for sides in self.legs.values()
            for turns in sides.values()
        )

    def ratio(self, leg: str) -> Ratio:
        return leg_ratio(self.legs, leg)

    def floor(self, leg: str, side: str) -> float:
        """CPU seconds per GiB that the passes alone cost."""
        return self.prices.of(self.passes[leg][side])

    def median_cpu(self, leg: str, side: str) -> dict[str, Cpu]:
        """By process: the median over the turns."""
        turns = self.legs[leg][side]
        return {
            label: Cpu(
                statistics.median(turn.cpu[label].user for turn in turns),
                statistics.median(turn.cpu[label].system for turn in turns),
            )
            for label in turns[0].cpu
        }

    def peak_bytes(self, leg: str, side: str) -> dict[str, int]:
        """By process: the greatest of all turns."""
        return greatest(turn.peak_bytes for turn in self.legs[leg][side])

    def too_slow(self) -> list[str]:
        """The legs whose ratio of medians is above the limit."""
        return [leg for leg, value in self.ratios.items() if value > LIMIT]


def leg_ratio(legs: dict[str, dict[str, list[Leg]]], leg: str) -> Ratio:
    """ckptd over rsync."""
    ours, theirs = ([turn.seconds for turn in legs[leg][side]] for side in ("ckptd", "rsync"))
    return ratio(ours, theirs)


def others_share(turns: Sequence[Leg], cores: int) -> float:
    """The share of all cores that others used, at the median over the turns of a leg."""
    return statistics.median(turn.other_cpu_seconds / (turn.seconds * cores) for turn in turns)


def disturbed(share: float) -> list[str]:
    """A sentence of warning when others used too much of the machine; else nothing."""
    if share <= QUIET_SHARE:
        return []
    return [
        f"DISTURBED: other processes used {share:.0%} of the machine; measure again when it is "
        "idle, wall time and ratios say little about the programs here"
    ]


def greatest(peaks: Iterable[dict[str, int]]) -> dict[str, int]:
    """For each process the greatest of its values."""
    found: dict[str, int] = {}
    for turn in peaks:
        for label, value in turn.items():
            found[label] = max(found.get(label, 0), value)
    return found


def encode(results: msgspec.Struct) -> bytes:
    """The JSON file of results: indented, keys as declared, a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n"
