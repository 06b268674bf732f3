"""Pauses after failures double up to a limit, and are spread."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.backoff import backoff_s


@given(failures=st.integers(1, 10**9), seed=st.integers())
def test_between_half_and_all_of_what_has_doubled(failures: int, seed: int) -> None:
    longest_s = min(300.0, 1.0 * 2.0 ** min(failures - 1, 100))
    found_s = backoff_s(failures, first_s=1.0, max_s=300.0, rng=random.Random(seed))
    assert longest_s / 2 <= found_s <= longest_s


def test_two_that_failed_together_do_not_come_back_together() -> None:
    rng = random.Random(1)
    assert len({backoff_s(3, first_s=1.0, max_s=300.0, rng=rng) for _ in range(10)}) == 10
