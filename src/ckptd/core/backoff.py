"""How long to wait before something that failed is tried again."""

from __future__ import annotations

from random import Random
from typing import Final

from ckptd.core import limits

_DOUBLINGS_MAX: Final = 32


def backoff_s(failures: int, *, first_s: float, max_s: float, rng: Random) -> float:
    """Seconds to wait after `failures` (at least 1) failures in a row.

    Doubles from `first_s` up to `max_s`; of that, a part between half and all, so that many who
    failed together do not come back together.
    """
    doublings: int = min(failures - 1, _DOUBLINGS_MAX)
    longest_s: float = min(max_s, first_s * 2**doublings)
    return longest_s * rng.uniform(0.5, 1.0)


def handshake_pause_s(failures: int, rng: Random) -> float:
    """Seconds before a connection is tried again whose handshake was cut off `failures` times."""
    most_s = limits.CONNECT_TIMEOUT_S
    return backoff_s(failures, first_s=limits.HANDSHAKE_RETRY_MIN_S, max_s=most_s, rng=rng)
