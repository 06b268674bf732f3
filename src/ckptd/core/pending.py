"""Which checkpoints wait for what: the state machine between seeing a checkpoint and storing it.

It is told what scans saw, what was found when a checkpoint was looked at closely, and how a store
ended; it answers which checkpoints are to be looked at, which to store, and when to come again.
Times are seconds of a monotonic clock and always arguments.

    settling --complete and quiet--> ready --taken--> storing --> stored
     ^  |  ^                                             |
     |  |  +---------------- changed --------------------+
     |  v                                                v
    incomplete: looked at every retry                  failed: tried again after retry

Each checkpoint waits for itself alone: none holds up another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Literal, NamedTuple, TypeAlias

from msgspec import Struct

from ckptd.core import limits
from ckptd.core.checkpoint_units import RefusedUnit, Unit
from ckptd.core.completeness import Assessment, Complete, Incomplete

Phase: TypeAlias = Literal[
    "settling", "incomplete", "ready", "storing", "stored", "failed", "left out", "refused"
]
READS_MAX: Final = 3
"""Consistent reads that are tried of a checkpoint that changes all the time, before it gets
another `settle_max` to come to rest."""
RETRY_DOUBLINGS_MAX: Final = 5
AWAKE_S: Final = 3600.0
"""For how long an incomplete checkpoint that nobody changes keeps the machine awake."""


class Key(NamedTuple):
    """A checkpoint: the root (as in the config) and its path relative to that."""

    root: str
    path: str


class Timing(Struct, frozen=True):
    """The settings of a root, in seconds."""

    settle_s: float = 2.0
    settle_max_s: float = 60.0
    retry_s: float = 10.0


class Sighting(Struct, frozen=True, gc=False):
    """A unit as a scan saw it. `fingerprint` is that of its members, `done` that its marker says
    that it is finished."""

    unit: Unit
    fingerprint: bytes
    done: bool = False


class Job(Struct, frozen=True):
    """A checkpoint to store now. `excluded` paths, relative to it, are not part of it.
    `warnings` are for people."""

    key: Key
    unit: Unit
    fingerprint: bytes
    excluded: frozenset[str]
    warnings: tuple[str, ...]


class Row(Struct, frozen=True):
    """One checkpoint for `ckptd status`. `age_s`: how long it has been waiting. `name` is "" when
    it cannot have one; `path` is "" for a root as a whole."""

    root: str
    path: str
    name: str
    phase: Phase
    reason: str
    age_s: float


class _Tracked:
    """What is known of one checkpoint."""

    __slots__ = (
        "assessment", "changed_at", "changing_since", "failures", "fingerprint", "look_at",
        "phase", "reads", "reason", "since", "stored", "taken", "unit",
    )  # fmt: skip

    def __init__(self, unit: Unit, fingerprint: bytes, now: float) -> None:
        self.unit = unit
        self.fingerprint = fingerprint  # as last seen, b"" once gone
        self.stored = b""  # as last stored
        self.taken = b""  # of the store under way
        self.assessment: Complete | None = None
        self.phase: Phase = "settling"
        self.reason = ""
        self.since = now  # when it began to wait
        self.changed_at = now
        self.changing_since = now  # when it was last at rest
        self.look_at: float | None = now
        self.reads = 0
        self.failures = 0

    def is_waiting(self) -> bool:
        return self.phase not in ("stored", "left out")


class PendingQueue:
    """All checkpoints below the watched roots. `roots`: the timing of each root."""

    def __init__(self, roots: Mapping[str, Timing]) -> None:
        self._roots = dict(roots)
        self._tracked: dict[Key, _Tracked] = {}
        self._names: dict[str, Key] = {}
        self._remembered: dict[Key, bytes] = {}
        self._refused: dict[Key, tuple[str, float]] = {}
        self._faults: dict[str, tuple[str, float]] = {}
        self._overflow: dict[str, int] = {}

    # -- what scans saw

    def remember(self, key: Key, fingerprint: bytes) -> None:
        """The checkpoint was stored with this fingerprint before: if a scan finds it unchanged,
        it is not read again. Only a hint, because a store recognises content that exists."""
        self._remembered.pop(key, None)
        self._remembered[key] = fingerprint
        if len(self._remembered) > limits.WATCHED_CHECKPOINTS_MAX:
            del self._remembered[next(iter(self._remembered))]

    def remembered(self) -> Iterator[tuple[Key, bytes]]:
        """What to hand to `remember` after a restart."""
        yield from self._remembered.items()
        for key, tracked in self._tracked.items():
            if tracked.stored:
                yield key, tracked.stored

    def scanned(
        self, root: str, sightings: Iterable[Sighting], refused: Iterable[RefusedUnit], now: float
    ) -> None:
        """A scan saw the whole root: what it did not see is gone."""
        self._faults.pop(root, None)
        self._overflow[root] = 0
        by_key = {Key(root, sighting.unit.path): sighting for sighting in sightings}
        for key in [key for key in self._tracked if key.root == root and key not in by_key]:
            self.gone(key)
        refusals = {Key(root, unit.path): unit.reason for unit in refused}
        for key, sighting in by_key.items():
            holder = self._names.get(sighting.unit.name, key)
            if holder != key:
                refusals[key] = f"its name is taken by the one in {holder.root}: set watch[].prefix"
            elif key in self._tracked or len(self._tracked) < limits.WATCHED_CHECKPOINTS_MAX:
                self._see(key, sighting, now)
            else:
                self._overflow[root] += 1
        before = {key: row for key, row in self._refused.items() if key.root == root}
        for key in before:
            del self._refused[key]
        for key, reason in refusals.items():
            if len(self._refused) < limits.WATCHED_CHECKPOINTS_MAX:
                self._refused[key] = (reason, before[key][1] if key in before else now)

    def seen(self, root: str, sighting: Sighting, now: float) -> None:
        """One known checkpoint was looked at again."""
        key = Key(root, sighting.unit.path)
        if key in self._tracked:
            self._see(key, sighting, now)

    def gone(self, key: Key) -> None:
        """A checkpoint is not there any more. What was stored of it stays stored, and if it comes
        back as it was (a disk mounted again), it is not read again."""
        tracked = self._tracked.get(key)
        if tracked is None:
            return
        if tracked.phase == "storing":
            tracked.fingerprint = b""  # forgotten when the store ends
            return
        del self._tracked[key]
        del self._names[tracked.unit.name]
        if tracked.stored:
            self.remember(key, tracked.stored)

    def root_failed(self, root: str, reason: str, now: float) -> None:
        """A root cannot be read at all (unmounted, no permission). What was seen in it is kept
        and waits: none of it counts as gone."""
        since = self._faults[root][1] if root in self._faults else now
        self._faults[root] = (reason, since)

    def touch(self, key: Key, now: float) -> None:
        """Something happened below a known checkpoint: it is looked at as soon as it may have come
        to rest, or now if it was stored."""
        tracked = self._tracked.get(key)
        if tracked is not None and tracked.phase != "storing":
            pause_s = 0.0 if not tracked.is_waiting() else self._timing(key).settle_s
            tracked.look_at = _earlier(tracked.look_at, now + pause_s)

    def retry_failed(self, now: float) -> None:
        """What kept stores from working may be over (a node came back, room was made)."""
        for tracked in self._tracked.values():
            if tracked.phase == "failed":
                tracked.look_at = now

    def key_above(self, root: str, path: str) -> Key | None:
        """The innermost known checkpoint that `path` is or lies in."""
        while True:
            key = Key(root, path)
            if key in self._tracked:
                return key
            if not path:
                return None
            path = path.rpartition("/")[0]

    def unit(self, key: Key) -> Unit | None:
        """The unit of a known checkpoint."""
        tracked = self._tracked.get(key)
        return None if tracked is None else tracked.unit

    def _timing(self, key: Key) -> Timing:
        return self._roots[key.root]

    def _see(self, key: Key, sighting: Sighting, now: float) -> None:
        tracked = self._tracked.get(key)
        if tracked is None:
            tracked = self._tracked[key] = _Tracked(sighting.unit, sighting.fingerprint, now)
            self._names[sighting.unit.name] = key
            if self._remembered.pop(key, b"") == sighting.fingerprint:
                self._rest(tracked, sighting.fingerprint)
            return
        tracked.unit = sighting.unit
        if sighting.fingerprint == tracked.fingerprint:
            if sighting.done and tracked.phase == "settling":
                tracked.look_at = now
            return
        self._changed(tracked, sighting.fingerprint, self._timing(key), now)
        if sighting.done and tracked.phase == "settling":
            tracked.look_at = now

    def _changed(self, tracked: _Tracked, fingerprint: bytes, timing: Timing, now: float) -> None:
        if not tracked.is_waiting() or now - tracked.changed_at >= timing.settle_s:
            tracked.changing_since = now  # it was at rest before
        if not tracked.is_waiting():
            tracked.since = now
            tracked.phase = "settling"
        tracked.fingerprint = fingerprint
        tracked.changed_at = now
        if tracked.phase == "storing":
            return
        if tracked.phase != "incomplete":  # there the reason still says most
            tracked.phase = "settling"
            tracked.reason = _settling(timing)
        tracked.assessment = None
        tracked.look_at = _earlier(tracked.look_at, now + timing.settle_s)

    # -- looking closely

    def due(self, now: float) -> list[Key]:
        """What is to be looked at now, the longest due first: scan it alone (`seen` or `gone`),
        then assess it (`assessed`)."""
        due = [
            (tracked.look_at, key)
            for key, tracked in self._tracked.items()
            if tracked.look_at is not None
            and tracked.look_at <= now
            and key.root not in self._faults
        ]
        return [key for _, key in sorted(due)]

    def unchanged_s(self, key: Key, now: float) -> float:
        """For how long a known checkpoint was not seen to change."""
        return now - self._tracked[key].changed_at

    def assessed(self, key: Key, fingerprint: bytes, assessment: Assessment, now: float) -> None:
        """What a close look found, at the checkpoint as it was with this fingerprint."""
        tracked = self._tracked.get(key)
        if tracked is None or tracked.phase == "storing":
            return
        timing = self._timing(key)
        if fingerprint != tracked.fingerprint:
            self._changed(tracked, fingerprint, timing, now)
        if tracked.stored == tracked.fingerprint:
            self._rest(tracked, fingerprint)
            return
        tracked.assessment = None
        if isinstance(assessment, Incomplete):
            tracked.phase, tracked.reason = "incomplete", assessment.reason
            tracked.look_at = now + timing.retry_s
        elif not isinstance(assessment, Complete):
            tracked.phase, tracked.reason = "left out", assessment.warning
            tracked.look_at = None
        elif assessment.done or self._may_be_read(tracked, timing, now):
            tracked.phase, tracked.reason = "ready", "waits for its turn to be stored"
            tracked.assessment = assessment
            tracked.look_at = None
        else:
            tracked.phase = "settling"
            tracked.reason = tracked.reason if tracked.reads else _settling(timing)
            hurried_at = tracked.changing_since + timing.settle_max_s
            tracked.look_at = min(tracked.changed_at + timing.settle_s, hurried_at)

    @staticmethod
    def _may_be_read(tracked: _Tracked, timing: Timing, now: float) -> bool:
        at_rest = now - tracked.changed_at >= timing.settle_s
        return at_rest or now - tracked.changing_since >= timing.settle_max_s

    # -- storing

    def has_ready(self) -> bool:
        """Whether there is something to `take`. What is ready in a root that cannot be read now
        has to wait."""
        return any(self._ready())

    def _ready(self) -> Iterator[tuple[float, Key]]:
        for key, tracked in self._tracked.items():
            if tracked.phase == "ready" and key.root not in self._faults:
                yield tracked.since, key

    def take(self, now: float) -> Job | None:
        """The checkpoint that has been waiting longest of those that are ready; it counts as
        being stored until `stored`, `source_changed` or `failed` is called."""
        _, key = min(self._ready(), default=(0.0, None))
        if key is None:
            return None
        tracked = self._tracked[key]
        assert tracked.assessment is not None
        tracked.phase, tracked.reason = "storing", "is being stored"
        tracked.taken = tracked.fingerprint
        tracked.look_at = None  # nothing comes of looking at it now
        return Job(
            key,
            tracked.unit,
            tracked.fingerprint,
            tracked.assessment.excluded,
            tracked.assessment.warnings,
        )

    def put_back(self, key: Key, now: float) -> None:
        """It was taken, but is not what was looked at any more: look again (`seen`, `assessed`)."""
        tracked = self._ended(key)
        if tracked is not None:
            tracked.phase, tracked.look_at = "settling", now

    def stored(self, key: Key, now: float) -> None:
        """The store that `take` began has ended well, or found that nothing is to be stored (the
        content was removed on purpose). What changed meanwhile is pending again."""
        tracked = self._ended(key)
        if tracked is None:
            return
        tracked.stored = tracked.taken
        if tracked.fingerprint == tracked.taken:
            self._rest(tracked, tracked.taken)
            return
        tracked.reads = tracked.failures = 0
        tracked.phase, tracked.since = "settling", tracked.changed_at
        tracked.changing_since = tracked.changed_at
        tracked.reason = _settling(self._timing(key))
        tracked.look_at = tracked.changed_at + self._timing(key).settle_s

    def source_changed(self, key: Key, now: float) -> None:
        """The checkpoint changed while it was read: it is pending again. One that changes all the
        time is read again at once, `READS_MAX` times in all."""
        tracked = self._ended(key)
        if tracked is None:
            return
        timing = self._timing(key)
        tracked.phase, tracked.changed_at = "settling", now
        tracked.reads += 1
        tracked.reason = f"changed while it was read ({tracked.reads} of {READS_MAX} tries)"
        tracked.look_at = now + timing.settle_s
        if tracked.reads >= READS_MAX:
            tracked.reads = 0
            tracked.changing_since = now
        elif now - tracked.changing_since >= timing.settle_max_s:
            tracked.look_at = now

    def failed(self, key: Key, reason: str, now: float) -> None:
        """The store failed for another reason, given in words. It is tried again after `retry`,
        and later and later as long as that fails and nothing changes."""
        tracked = self._ended(key)
        if tracked is None:
            return
        pause_s = self._timing(key).retry_s * 2 ** min(tracked.failures, RETRY_DOUBLINGS_MAX)
        tracked.failures += 1
        tracked.phase, tracked.reason = "failed", reason
        tracked.look_at = now + pause_s

    def _ended(self, key: Key) -> _Tracked | None:
        tracked = self._tracked[key]
        assert tracked.phase == "storing", f"{key} is not being stored"
        if tracked.fingerprint:
            return tracked
        tracked.phase = "failed"
        self.gone(key)
        return None

    @staticmethod
    def _rest(tracked: _Tracked, fingerprint: bytes) -> None:
        tracked.stored = fingerprint
        tracked.phase, tracked.reason = "stored", ""
        tracked.assessment = None
        tracked.look_at = None
        tracked.reads = tracked.failures = 0

    # -- for people, and for the loop around it

    def wake_at(self) -> float | None:
        """When something is due next; None: only when a scan sees something new."""
        return min(
            (
                tracked.look_at
                for key, tracked in self._tracked.items()
                if tracked.look_at is not None and key.root not in self._faults
            ),
            default=None,
        )

    def counts(self) -> dict[Phase, int]:
        """How many checkpoints are in each phase."""
        counts: Counter[Phase] = Counter(tracked.phase for tracked in self._tracked.values())
        counts["refused"] = len(self._refused)
        return dict(counts)

    def is_busy(self, now: float) -> bool:
        """Whether the machine shall stay awake: something is being stored, or may soon be."""
        return any(
            tracked.phase in ("settling", "ready", "storing")
            or (tracked.is_waiting() and now - tracked.changed_at < AWAKE_S)
            for tracked in self._tracked.values()
        )

    def rows(self, now: float) -> list[Row]:
        """What waits, longest first, at most `limits.PENDING_ROWS_MAX` rows: roots that cannot be
        read first."""
        rows = [
            Row(root, "", "", "failed", reason, now - since)
            for root, (reason, since) in sorted(self._faults.items())
        ]
        rows += [
            Row(root, "", "", "refused", f"{count} more checkpoints are not watched", 0.0)
            for root, count in sorted(self._overflow.items())
            if count
        ]
        waiting = [
            Row(key.root, key.path, tracked.unit.name, tracked.phase, tracked.reason,
                now - tracked.since)
            for key, tracked in self._tracked.items()
            if tracked.is_waiting()
        ]  # fmt: skip
        waiting += [
            Row(key.root, key.path, "", "refused", reason, now - since)
            for key, (reason, since) in self._refused.items()
        ]
        waiting.sort(key=lambda row: (-row.age_s, row.root, row.path))
        return [*rows, *waiting][: limits.PENDING_ROWS_MAX]

    def left_out(self) -> list[Row]:
        """Checkpoints that are not stored because only something unfinished and forgotten is
        there; `reason` is a warning for people."""
        return [
            Row(key.root, key.path, tracked.unit.name, tracked.phase, tracked.reason, 0.0)
            for key, tracked in self._tracked.items()
            if tracked.phase == "left out"
        ]


def _settling(timing: Timing) -> str:
    return f"still changing: waits for {timing.settle_s:g} s of quiet"


def _earlier(one: float | None, other: float) -> float:
    return other if one is None else min(one, other)
