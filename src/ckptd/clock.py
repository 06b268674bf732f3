"""The clock as an argument: real time in a process, virtual time where a test says so."""

from __future__ import annotations

import time
from typing import Final, Protocol


class Clock(Protocol):
    """What time it is. Code that takes one never reads the `time` module itself."""

    def monotonic_s(self) -> float:
        """Seconds since some moment; never steps back within a process."""

    def wall_s(self) -> float:
        """Seconds since 1970 as this machine believes: it may lie by years, and may jump."""


class SystemClock:
    """The clock of this machine."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()


SYSTEM_CLOCK: Final = SystemClock()
