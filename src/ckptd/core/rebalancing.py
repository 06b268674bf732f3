"""Moving copies from full nodes to empty ones, after machines joined or drained.

A move is a copy to the emptier node; the fuller one then has one too many, and drops it as any
excess copy (`ckptd.core.trimming`). Moves cost wear and time, so they begin only when the nodes are
far apart, and end when they are close.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from ckptd.core.repair import Copy, VersionCopies
from ckptd.core.workers import Worker

BEGIN_APART: Final = 0.15
"""Moving begins when the used fractions of the fullest and the emptiest node are this far apart,
…"""
END_APART: Final = 0.05
"""… and ends when they are this close."""


class Move(Struct, frozen=True):
    """`source` is to hand about `size_bytes` to `target`."""

    source: str
    target: str
    size_bytes: int


def next_move(workers: Sequence[Worker], *, moving: bool, spare_bytes: int) -> Move | None:
    """What to move next; None when all is even enough, or a worker is absent: then room is needed
    for other things.

    `moving` is whether the last answer was a move. `spare_bytes` is room that is left on the
    target for the next checkpoint.
    """
    if not all(worker.up for worker in workers):
        return None
    takers = sorted((w for w in workers if w.takes_copies), key=lambda w: (w.used_fraction, w.node))
    if len(takers) < 2:
        return None
    emptiest, fullest = takers[0], takers[-1]
    apart = fullest.used_fraction - emptiest.used_fraction
    if apart <= (END_APART if moving else BEGIN_APART):
        return None
    mean = sum(worker.used_fraction for worker in takers) / len(takers)
    too_much = (fullest.used_fraction - mean) * (fullest.bytes_used + fullest.bytes_free)
    too_little = (mean - emptiest.used_fraction) * (emptiest.bytes_used + emptiest.bytes_free)
    size = min(int(too_much), int(too_little), emptiest.bytes_free - spare_bytes)
    return Move(fullest.node, emptiest.node, size) if size > 0 else None


def shards_to_move(
    move: Move, version: VersionCopies, workers: Mapping[str, Worker], *, size_bytes: int
) -> list[Copy]:
    """Shards of the version, up to `size_bytes` together, whose copies on the move's source may as
    well be on its target: that is on no machine and in no zone of another holder."""
    target = workers[move.target]
    movable: dict[frozenset[str], bool] = {}
    found: list[Copy] = []
    if version.bitmaps.get(move.target) is None:
        return []  # it has no manifest yet: its copies would not count
    for (shard, size), holders in zip(version.shards, version.holders(), strict=True):
        if holders not in movable:
            movable[holders] = _is_movable(move, target, holders, workers, version.copies)
        if movable[holders] and size <= size_bytes:
            size_bytes -= size
            found.append(Copy(version.version, shard, size, move.source, move.target))
    return found


def _is_movable(
    move: Move,
    target: Worker,
    holders: Collection[str],
    workers: Mapping[str, Worker],
    copies: int,
) -> bool:
    if move.source not in holders or move.target in holders:
        return False
    if any(node not in workers for node in holders) or len(holders) != copies:
        return False  # short or too many: repair and trimming come first
    others = [workers[node] for node in holders if node != move.source]
    if any(other.machine == target.machine for other in others):
        return False
    return _zones([*others, target]) >= _zones([*others, workers[move.source]])


def _zones(workers: Iterable[Worker]) -> int:
    return len({worker.zone for worker in workers})
