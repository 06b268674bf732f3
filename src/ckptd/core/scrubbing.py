"""When which copies are re-read, and what bad readings mean. Decisions only.

Every copy is re-read within the scrub interval, oldest check first, at an even pace: a card that
holds little is read little at a time, and never faster than the configured rate. A check is left
alone while it is young; that time and a pass together take less than the interval.

A bad reading may be the fault of the copy, or of the reading: a Pi on a weak supply reads wrong
bytes from a good card. One copy that is bad is rot. Several in one sample at one moment are rather
the node, so nothing goes to quarantine then; the same copies are looked at again, several times
over a while, and only what is bad each time is believed to be.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

_PASS_SHARE: Final = 0.7  # of the interval, that reading all copies once takes
_YOUNG_SHARE: Final = 0.25  # of the interval, for which a check is left alone
SAMPLE_COPIES: Final = 8  # that are read at least before a bad reading is judged
SUSPICIOUS_COPIES: Final = 3  # bad readings in one sample from which on the node is suspect
SUSPECT_ROUNDS: Final = 3  # further looks after which what is bad is believed to be
_LONGEST_WAIT_MAX_S: Final = 60.0
_LONGEST_WAIT_SHARE: Final = 0.05  # of the interval: with the other shares, no more than all of it
_SUSPECT_PAUSE_MAX_S: Final = 600.0
_RETRY_QUARANTINED_MAX_S: Final = 6 * 3600.0
_RECORD_MIN_S: Final = 600.0
_RECORD_MAX_S: Final = 3600.0
_RECORD_SHARE: Final = 0.01


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast copies are re-read: each within `interval_s`, at most `rate_bytes_per_s`."""

    interval_s: float
    rate_bytes_per_s: float

    def bytes_per_s(self, total_bytes: int) -> float:
        """The speed for a store with `total_bytes` of shards."""
        return min(self.rate_bytes_per_s, total_bytes / (self.interval_s * _PASS_SHARE))

    def rest_s(self, read_bytes: int, total_bytes: int) -> float:
        """How long after the begin of reading `read_bytes` the next reading may begin."""
        speed = self.bytes_per_s(total_bytes)
        return read_bytes / speed if speed > 0 else 0.0

    def due_in_s(self, age_s: float) -> float:
        """In how many seconds a copy that was checked `age_s` ago may be read again."""
        return max(0.0, self.interval_s * _YOUNG_SHARE - age_s)

    def keeps_up(self, total_bytes: int) -> bool:
        """Whether the rate suffices to read all copies within the interval."""
        return total_bytes <= self.rate_bytes_per_s * self.interval_s * _PASS_SHARE

    @property
    def longest_wait_s(self) -> float:
        """After which it is looked again what there is to do: the store may have grown."""
        return min(_LONGEST_WAIT_MAX_S, self.interval_s * _LONGEST_WAIT_SHARE)

    @property
    def suspect_pause_s(self) -> float:
        """Between two looks at the copies for which the node is suspect."""
        return min(_SUSPECT_PAUSE_MAX_S, self.interval_s * _YOUNG_SHARE)

    @property
    def retry_quarantined_s(self) -> float:
        """Between two readings of what is in quarantine."""
        return min(_RETRY_QUARANTINED_MAX_S, self.interval_s * _YOUNG_SHARE)


class Verdict(enum.Enum):
    """What to do after a sample was read."""

    GOOD = "good"  # go on
    LOOK_FURTHER = "look further"  # read more copies now, then judge again
    CONFIRM = "confirm"  # read the bad ones again; still bad, they are
    SUSPECT = "suspect"  # the node reads wrong: decide nothing now


def judge(looked: int, bad: int, *, more: bool, rounds: int = 0) -> Verdict:
    """What `bad` bad readings among `looked` copies mean. `more`: there are copies left to look
    at. `rounds`: how often the same copies were found bad before while the node was suspect."""
    if not bad:
        return Verdict.GOOD
    if bad >= SUSPICIOUS_COPIES and rounds < SUSPECT_ROUNDS:
        return Verdict.SUSPECT
    if looked < SAMPLE_COPIES and more and not rounds:
        return Verdict.LOOK_FURTHER
    return Verdict.CONFIRM


def record_is_due(since_s: float, checked: int, total: int) -> bool:
    """Whether the times of the last checks are to be written down: `since_s` after the last time,
    with `checked` of `total` copies checked since. Rarely, because a card wears."""
    if not checked or since_s < _RECORD_MIN_S:
        return False
    return since_s >= _RECORD_MAX_S or checked >= total * _RECORD_SHARE


class Quarantined(enum.Enum):
    """What to do with a quarantined copy."""

    KEEP = "keep"
    RETRY = "retry"  # read it once more: the reading may have been bad
    DROP = "drop"


def decide_quarantined(
    *, since_retry_s: float, healed_for_s: float | None, grace_s: float, pace: Pace
) -> Quarantined:
    """`since_retry_s`: since it was read last (infinite: not since the start). `healed_for_s`:
    how long it is known that all copies wanted are good without it; None while it is not."""
    if since_retry_s >= pace.retry_quarantined_s:
        return Quarantined.RETRY
    if healed_for_s is not None and healed_for_s >= grace_s:
        return Quarantined.DROP
    return Quarantined.KEEP
