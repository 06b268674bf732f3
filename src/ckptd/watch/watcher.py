"""Scans, looks closely, and keeps the queue of what is to be stored.

`step` does what is due and blocks on the disk, so it runs in a thread; everything else answers at
once and may be called from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from ckptd.clock import SYSTEM_CLOCK, Clock
from ckptd.config import WatchRoot
from ckptd.core import limits
from ckptd.core.checkpoint_units import (
    CHECKPOINT_MARKER,
    STEP_NAME,
    Members,
    Unit,
    find_units,
    members,
)
from ckptd.core.completeness import assess
from ckptd.core.pending import Key, PendingQueue, Phase, Row, Sighting, Timing
from ckptd.core.training_state import TrainingState
from ckptd.errors import RootUnreadable
from ckptd.watch.events import RootEvents
from ckptd.watch.probes import Probes, read_training_state
from ckptd.watch.scanner import RootScanner

_log = structlog.get_logger(__name__)

SCAN_SHARE: Final = 20
"""Scans of a root take at most one part in so many of the time."""
EVENT_SCAN_SHARE: Final = 4
EVENT_PAUSE_S: Final = 0.25
"""Events come in bursts; a scan waits for so long after the first one."""
LOOKS_PER_STEP: Final = 64
_TAKES_MAX: Final = 3


class _Root:
    def __init__(self, config: WatchRoot) -> None:
        self.config = config
        self.root = str(config.root)
        self.scanner = RootScanner(self.root)
        self.scan_at = 0.0
        self.scanned_at = -1e9
        self.scan_s = 0.0
        self.inode = 0
        self.failed = True  # until the first scan

    def hurry(self, now: float) -> None:
        """An event asks for a scan of the whole root."""
        earliest = self.scanned_at + EVENT_SCAN_SHARE * self.scan_s
        self.scan_at = min(self.scan_at, max(now + EVENT_PAUSE_S, earliest))


@dataclass(frozen=True)
class Taken:
    """A checkpoint to store now. `excluded` paths, relative to it, are no part of it; `warnings`
    are for people; `state` is its step and metrics."""

    key: Key
    unit: Unit
    fingerprint: bytes
    excluded: frozenset[str]
    warnings: tuple[str, ...]
    state: TrainingState

    @property
    def name(self) -> str:
        """What it is stored as."""
        return self.unit.name

    @property
    def location(self) -> Path:
        """Where it lies."""
        return Path(self.key.root, self.unit.path)


class Watcher:
    """The watched roots of a config. `wake` is called (from any thread) when `step` is due earlier
    than it said. With `events` False only scans are made."""

    def __init__(
        self,
        roots: Sequence[WatchRoot],
        *,
        wake: Callable[[], None] = lambda: None,
        events: bool = True,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._clock = clock
        self._wake = wake
        self._lock = threading.Lock()
        self._roots = {str(config.root): _Root(config) for config in roots}
        self._queue = PendingQueue(
            {
                str(config.root): Timing(config.settle_s, config.settle_max_s, config.retry_s)
                for config in roots
            }
        )
        self._probes = Probes()
        self._happened: set[tuple[str, str]] = set()
        self._events = RootEvents(self._note) if events else None

    # -- watching

    def step(self) -> float:
        """Does what is due; returns when to come again, on the monotonic clock. Blocks."""
        self._take_events()
        for root in self._roots.values():
            if root.scan_at <= self._clock.monotonic_s():
                self._scan(root)
        with self._lock:
            due = self._queue.due(self._clock.monotonic_s())
        for key in due[:LOOKS_PER_STEP]:
            self._look(key)
        with self._lock:
            wake_at = self._queue.wake_at()
        scans = [root.scan_at for root in self._roots.values()]
        return min(
            [*scans, *([] if wake_at is None else [wake_at])],
            default=self._clock.monotonic_s() + 3600,
        )

    def close(self) -> None:
        """Ends the threads of the file events."""
        if self._events is not None:
            self._events.close()

    def _note(self, root: str, path: str) -> None:
        with self._lock:
            if len(self._happened) < limits.EVENTS_WAITING_MAX:
                self._happened.add((root, path))
        self._wake()

    def _take_events(self) -> None:
        with self._lock:
            happened, self._happened = self._happened, set()
            now = self._clock.monotonic_s()
            for name, path in happened:
                key = self._queue.key_above(name, path)
                unit = self._queue.unit(key) if key is not None else None
                if key is None or unit is None or _is_of_the_tree(unit, path):
                    self._roots[name].hurry(now)
                if key is not None:
                    self._queue.touch(key, now)

    def _scan(self, root: _Root) -> None:
        started = self._clock.monotonic_s()
        try:
            snapshot = root.scanner.scan()
        except RootUnreadable as error:
            self._root_failed(root, error)
        else:
            if self._events is not None and (root.failed or root.inode != root.scanner.inode):
                self._events.follow(root.root)
            root.failed, root.inode = False, root.scanner.inode
            config = root.config
            found = find_units(snapshot, prefix=config.prefix, pattern=config.pattern)
            sightings = []
            for unit in found.units:
                content = members(snapshot, unit)
                if content is not None:
                    sightings.append(_sighting(unit, content))
            with self._lock:
                self._queue.scanned(root.root, sightings, found.refused, self._clock.monotonic_s())
        root.scanned_at = self._clock.monotonic_s()
        root.scan_s = root.scanned_at - started
        root.scan_at = root.scanned_at + max(root.config.retry_s, SCAN_SHARE * root.scan_s)

    def _root_failed(self, root: _Root, error: RootUnreadable) -> None:
        if not root.failed or root.scanned_at < 0:
            _log.warning("watched_root_unreadable", root=root.root, reason=error.message,
                         next=error.next)  # fmt: skip
        if not root.failed and self._events is not None:
            self._events.leave(root.root)
        root.failed = True
        with self._lock:
            self._queue.root_failed(root.root, error.message, self._clock.monotonic_s())

    def _look(self, key: Key) -> None:
        with self._lock:
            unit = self._queue.unit(key)
        if unit is None:
            return
        root = self._roots[key.root]
        try:
            content = root.scanner.members(unit)
        except RootUnreadable as error:
            self._root_failed(root, error)
            return
        if content is None:
            self._probes.forget(key)
            with self._lock:
                self._queue.gone(key)
            return
        examined = self._probes.examine(key, unit, content)
        with self._lock:
            if self._queue.unit(key) is None:
                return
            now = self._clock.monotonic_s()
            sighting = _sighting(unit, content)
            self._queue.seen(key.root, sighting, now)
            assessment = assess(
                unit,
                content,
                examined,
                wall_ns=int(self._clock.wall_s() * 1e9),
                unchanged_s=self._queue.unchanged_s(key, now),
            )
            self._queue.assessed(key, sighting.fingerprint, assessment, now)

    # -- storing

    def take(self) -> Taken | None:
        """The next checkpoint to store, None when none is ready. It counts as being stored until
        `stored`, `source_changed` or `failed` is called with its key. Blocks on the disk."""
        for _ in range(_TAKES_MAX):
            with self._lock:
                job = self._queue.take(self._clock.monotonic_s())
            if job is None:
                return None
            content = self._now(job.key, job.unit)
            if content is not None and content.fingerprint() == job.fingerprint:
                return Taken(
                    key=job.key,
                    unit=job.unit,
                    fingerprint=job.fingerprint,
                    # Directories of their own may have come since; they are no change of it.
                    excluded=job.excluded | content.excluded,
                    warnings=job.warnings,
                    state=read_training_state(job.key, job.unit, content),
                )
            with self._lock:
                self._queue.put_back(job.key, self._clock.monotonic_s())
            self._look(job.key)
        return None

    def is_unchanged(self, taken: Taken) -> bool:
        """Whether it still is what was found complete. Blocks on the disk."""
        content = self._now(taken.key, taken.unit)
        if content is None or content.fingerprint() != taken.fingerprint:
            return False
        return content.excluded <= taken.excluded

    def _now(self, key: Key, unit: Unit) -> Members | None:
        try:
            return self._roots[key.root].scanner.members(unit)
        except RootUnreadable:
            return None

    def stored(self, key: Key) -> None:
        """It is stored, or its content is not to be stored (it was removed on purpose)."""
        self._probes.forget(key)
        with self._lock:
            self._queue.stored(key, self._clock.monotonic_s())
        self._wake()

    def source_changed(self, key: Key) -> None:
        """It changed while it was read."""
        with self._lock:
            self._queue.source_changed(key, self._clock.monotonic_s())
        self._wake()

    def failed(self, key: Key, reason: str) -> None:
        """It could not be stored; `reason` is for people."""
        with self._lock:
            self._queue.failed(key, reason, self._clock.monotonic_s())
        self._wake()

    def retry_failed(self) -> None:
        """What kept stores from working may be over: a node came back, room was made."""
        with self._lock:
            self._queue.retry_failed(self._clock.monotonic_s())
        self._wake()

    # -- for status, and for the next start

    def rows(self) -> list[Row]:
        """What waits, and why."""
        with self._lock:
            return self._queue.rows(self._clock.monotonic_s())

    def left_out(self) -> list[Row]:
        """What is not stored because it has a temporary name and was forgotten by its writer."""
        with self._lock:
            return self._queue.left_out()

    def counts(self) -> dict[Phase, int]:
        """How many checkpoints are in each phase."""
        with self._lock:
            return self._queue.counts()

    def has_ready(self) -> bool:
        """Whether there is something to `take`."""
        with self._lock:
            return self._queue.has_ready()

    def is_busy(self) -> bool:
        """Whether the machine shall stay awake."""
        with self._lock:
            return self._queue.is_busy(self._clock.monotonic_s())

    def remember(self, key: Key, fingerprint: bytes) -> None:
        """Before the first step: what was stored earlier, from `remembered`."""
        with self._lock:
            self._queue.remember(key, fingerprint)

    def remembered(self) -> list[tuple[Key, bytes]]:
        """What to hand to `remember` after a restart, so that nothing is read again."""
        with self._lock:
            return list(self._queue.remembered())


def _sighting(unit: Unit, content: Members) -> Sighting:
    return Sighting(unit, content.fingerprint(), content.is_done)


def _is_of_the_tree(unit: Unit, path: str) -> bool:
    """Whether an event at `path` may make or end checkpoints, besides changing `unit`."""
    if path == unit.path or path.rpartition("/")[2] == CHECKPOINT_MARKER:
        return True
    below = path[len(unit.path) + 1 :] if unit.path else path
    return unit.splits and any(STEP_NAME.fullmatch(part) for part in below.split("/"))
