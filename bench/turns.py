"""One turn of one side: a new source, stored, restored, compared, and everything deleted.

The source has held still for a moment when it is stored, as one that the watcher has let settle:
what was written within the last two seconds is read once more by ckptd
(docs/decisions/one-reading.md), which an option shows.

Each side's files are deleted right after its turn, so that both sides begin with the memory and the
disk blocks that the other one has just given back: the first use of fresh memory on a virtual
machine costs more than anything else in a leg.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.payload import require_equal, require_room, write_random
from bench.processes import Leg, measure
from bench.sides import Side

SETTLED_S: Final = 3.0


def take_turn(
    side: Side, directory: Path, size_bytes: int, *, settled: bool = True
) -> dict[str, Leg]:
    """Both legs of one turn, by name. Unless `settled`, the source is stored as soon as it is
    written. Raises MeasurementFailed."""
    source = directory / "source" / "weights.bin"
    source.parent.mkdir(exist_ok=True)
    require_room(directory, size_bytes)
    write_random(source, size_bytes)
    if settled:
        os.sync()  # first, so that the disk is at rest afterwards, too
        time.sleep(SETTLED_S)
    output = directory / "output"
    output.mkdir(exist_ok=True)
    store = measure(side.store(source), side.daemons(), output)
    side.check_stored(source, output)
    restore = measure(side.restore(source), side.daemons(), output)
    require_equal(source, side.restored(source))
    source.unlink()
    side.clear()
    return {"store": store, "restore": restore}


@contextlib.contextmanager
def workplace(parent: Path | None) -> Iterator[Path]:
    """A temporary directory below `parent` (default: that of the system), deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="ckptd-bench-", dir=parent) as name:
        yield Path(name)
    os.sync()


@contextlib.contextmanager
def running(*sides: Side) -> Iterator[None]:
    """Starts the sides, and stops them whatever happens, an end by SIGTERM included."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with contextlib.ExitStack() as stack:
        for side in sides:
            stack.callback(side.stop)
            side.start()
        yield
