"""The file that is stored: random bytes, new for each turn, and the comparison afterwards."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from bench.processes import MeasurementFailed

_BLOCK_BYTES: Final = 4 * 1024 * 1024


def write_random(path: Path, size_bytes: int) -> None:
    """Writes `size_bytes` random bytes, which neither side can deduplicate or compress."""
    with open(path, "wb", buffering=0) as file:
        left = size_bytes
        while left:
            left -= file.write(os.urandom(min(_BLOCK_BYTES, left)))


def require_equal(source: Path, restored: Path) -> None:
    """Raises MeasurementFailed unless both files have the same bytes."""
    if not restored.is_file():
        raise MeasurementFailed(f"{restored} was not restored")
    with open(source, "rb", buffering=0) as ours, open(restored, "rb", buffering=0) as theirs:
        while True:
            block, other = ours.read(_BLOCK_BYTES), theirs.read(_BLOCK_BYTES)
            if block != other:
                raise MeasurementFailed(f"{restored} differs from what was stored")
            if not block:
                return


def require_room(directory: Path, size_bytes: int) -> None:
    """Raises MeasurementFailed when a turn does not fit: source, two copies, one restored."""
    needed = 6 * size_bytes  # with half as much again: a node stops well before its disk is full
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise MeasurementFailed(
            f"{directory} has {free >> 20} MiB free, a turn needs {needed >> 20} MiB: "
            "use --dir or a smaller --size"
        )
