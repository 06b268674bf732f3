"""The names of the background jobs: for `ckptd jobs`, for the wire, as a label of metrics."""

from __future__ import annotations

from typing import Final

REPAIR: Final = "repair"
TRIM: Final = "trim"
REBALANCE: Final = "rebalance"
RETENTION: Final = "retention"
GC: Final = "gc"
SCRUB: Final = "scrub"
JOB_NAMES: Final = (REPAIR, TRIM, REBALANCE, RETENTION, GC, SCRUB)
