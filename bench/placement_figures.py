"""The figures in docs/decisions/placement.md: simulated stores on cards of given speeds.

    PYTHONPATH=src python bench/placement_figures.py

Every card writes one shard after the other at its speed; the network is never in the way. A number
of shards is in flight at once, and the planner learns from what finishes, as in a real store.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from ckptd.core.copysets import best_bytes_per_s
from ckptd.core.placement import Candidate, Placement

MB = 1_000_000
SHARD_BYTES = 32 * 2**20
SHARDS = 30  # about 1 GB
CASES: Sequence[tuple[str, Sequence[float], Sequence[int]]] = (
    ("four equal", (37, 37, 37, 37), ()),
    ("mixed", (21, 7, 12.5, 33), ()),
    ("one slow, one middling", (7, 21, 35, 35), ()),
    ("one slow", (37, 37, 37, 7), ()),
    ("one full", (37, 37, 37, 37), (0,)),
    ("three equal", (37, 37, 37), ()),
    ("five equal", (37, 37, 37, 37, 37), ()),
    ("an SSD and four cards", (330, 37, 37, 21, 21), ()),
)


def simulate(
    speeds: Sequence[float], full: Sequence[int], *, known: bool, in_flight: int
) -> tuple[float, set[frozenset[str]]]:
    """Seconds until all shards are stored twice, and the sets that were used."""
    names = [f"n{index}" for index in range(len(speeds))]
    placement = Placement(
        [
            Candidate(name, name, "", 0 if index in full else 10**12, speed * MB * known)
            for index, (name, speed) in enumerate(zip(names, speeds, strict=True))
        ],
        copies=2,
    )
    free_at = dict.fromkeys(names, 0.0)
    done: list[tuple[float, str, float]] = []
    copies_left: list[float] = []
    sets: set[frozenset[str]] = set()
    now = 0.0
    for _ in range(SHARDS):
        while len([end for end in copies_left if end > now]) >= in_flight:
            now, name, seconds = heapq.heappop(done)
            placement.finished(name, SHARD_BYTES, seconds)
        chosen = placement.choose(SHARD_BYTES)
        sets.add(frozenset(chosen))
        for name in chosen:
            seconds = SHARD_BYTES / (speeds[names.index(name)] * MB)
            free_at[name] = max(now, free_at[name]) + seconds
            heapq.heappush(done, (free_at[name], name, seconds))
        copies_left.append(max(free_at[name] for name in chosen))
    return max(free_at.values()), sets


def main() -> None:
    print("| cards, MB/s | best | equal split | all known | learned, 8 in flight | sets | fatal |")
    print("|---|---|---|---|---|---|---|")
    total = SHARDS * SHARD_BYTES / MB
    for title, speeds, full in CASES:
        working = [speed for index, speed in enumerate(speeds) if index not in full]
        best = total / best_bytes_per_s(working, 2)
        equal = total * 2 / len(working) / min(working)
        seconds, sets = simulate(speeds, full, known=True, in_flight=SHARDS)
        learned, _ = simulate(speeds, full, known=False, in_flight=8)
        pairs = len(list(itertools.combinations(speeds, 2)))
        cards = ", ".join(f"{speed:g}" for speed in speeds)
        print(
            f"| {title}: {cards} | {best:.1f} s | {equal:.1f} s | {seconds:.1f} s | "
            f"{learned:.1f} s | {len(sets)} | {len(sets)} of {pairs} |"
        )


if __name__ == "__main__":
    main()
