"""The threads that fetch shards: a few for each place, each with a stream of its own.

A thread receives, writes and hashes a piece of 512 KiB after the other, so that memory is bounded
by the count of threads. A shard counts once its SHA-256 is the recorded one. What they do next is
decided by the `Schedule`, under one lock.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import structlog

from ckptd.client.progress import Progress
from ckptd.client.pull_schedule import Attempt, Schedule
from ckptd.client.shard_sources import ShardSources, ShardStream
from ckptd.core import limits
from ckptd.core.layout import Write
from ckptd.errors import CkptdError, NotFound, PeerBusy, ShardCorrupt

_log = structlog.get_logger(__name__)

THREADS_PER_PLACE: Final = 2
_THREADS_MAX: Final = 32  # with more places than half of this, each gets one thread
_BREAKS_MAX: Final = 4  # at one shard of one place: then its copy counts as unreadable
_PLACE_GIVE_UP_S: Final = 10.0  # of failures without a success in between
_LOOK_AGAIN_S: Final = 0.1  # how often idle threads look for something to take over
_JOIN_S: Final = 2.0


class Range(Protocol):
    """A range of an output that is written from its start to its end."""

    def write(self, view: memoryview) -> None:
        """Takes the next bytes. When all have been given, all are written."""


class Outputs(Protocol):
    """What is written to, from several threads, never at the same place at once."""

    def range_writer(self, output: int, offset: int, length: int) -> Range:
        """Begins to write `length` bytes at `offset` of an output, for one thread."""


class WantedShard(NamedTuple):
    """A shard to fetch, and where its bytes go, in ascending order of `shard_offset`."""

    digest: bytes
    size: int
    writes: Sequence[Write]


class _Superseded(Exception):
    """Another place has taken the shard over, or the pull has ended."""


@dataclass(eq=False)
class _Fetch:
    """An attempt under way. No byte is written without `guard`, and none once it is cancelled."""

    attempt: Attempt
    stream: ShardStream
    guard: threading.Lock = field(default_factory=threading.Lock)

    def stop(self) -> None:
        """Returns when nothing more will be written."""
        self.attempt.cancelled = True
        self.stream.interrupt()
        with self.guard:
            pass


@dataclass
class _Trouble:
    """A place that fails: since when, and how often in a row."""

    since_s: float
    count: int = 0


class PullThreads:
    """Fetches `shards`, as `schedule` says, until all are done or one has no place left.

    `on_done` is called with the index of each shard that has arrived, from any of the threads.
    `unreadable` are the shards of which some copy could be neither read nor found bad.
    """

    def __init__(
        self,
        sources: ShardSources,
        shards: Sequence[WantedShard],
        schedule: Schedule,
        outputs: Outputs,
        *,
        progress: Progress,
        on_done: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        self._sources = sources
        self._shards = shards
        self._schedule = schedule
        self._outputs = outputs
        self._progress = progress
        self._on_done = on_done
        self._stop = stop
        self._random = random.Random()
        self._changed = threading.Condition()
        self._fetches: dict[Attempt, _Fetch] = {}
        self._failing: dict[str, _Trouble] = {}
        self._busy: dict[str, _Trouble] = {}
        self._breaks: Counter[tuple[int, str]] = Counter()
        self._error: BaseException | None = None
        self._ended = False
        self.unreadable: set[int] = set()

    def run(self) -> None:
        """Returns when all shards are done, one is hopeless, or `stop` is set; afterwards nothing
        is written any more. Raises what `outputs` and `on_done` raise."""
        places = self._schedule.everywhere
        each = THREADS_PER_PLACE if len(places) * THREADS_PER_PLACE <= _THREADS_MAX else 1
        threads = [
            # Daemons: one that hangs in a connection attempt does not keep the process alive.
            threading.Thread(target=self._serve, args=(place,), name=f"pull {place}", daemon=True)
            for place in places
            for _ in range(each)
        ]
        try:
            for thread in threads:
                thread.start()
            with self._changed:
                while not (self._over or self._stop.is_set()):
                    self._changed.wait(_LOOK_AGAIN_S)
        finally:
            self._end(threads)
        if self._error is not None:
            raise self._error

    @property
    def _over(self) -> bool:
        return bool(
            self._ended or self._error or self._schedule.finished or self._schedule.hopeless
        )

    def _end(self, threads: list[threading.Thread]) -> None:
        with self._changed:
            self._ended = True
            fetches = list(self._fetches.values())
            self._changed.notify_all()
        for fetch in fetches:
            fetch.stop()
        deadline_s = time.monotonic() + _JOIN_S
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    # -- one thread

    def _serve(self, place: str) -> None:
        stream: ShardStream | None = None
        try:
            while self._needed(place):
                if stream is not None and stream.broken:
                    stream.close()
                    stream = None
                if stream is None:
                    stream = self._open(place)
                    continue  # things may have changed while the connection was made
                attempt = self._take(place)
                if attempt is not None:
                    self._fetch(place, stream, attempt)
        except BaseException as error:  # the edge of this thread: whoever runs the pull raises it
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
        finally:
            if stream is not None:
                stream.close()

    def _needed(self, place: str) -> bool:
        with self._changed:
            return not self._over and self._schedule.needed(place)

    def _open(self, place: str) -> ShardStream | None:
        try:
            return self._sources.open(place)
        except PeerBusy as error:
            self._wait_for_busy(place, error)
        except CkptdError as error:
            with self._changed:
                self._schedule.unreachable(place)
            self._note_failure(place, error)
        return None

    def _take(self, place: str) -> Attempt | None:
        """What to fetch next; None after a short wait when there is nothing now."""
        with self._changed:
            if self._over:
                return None
            attempt = self._schedule.take(place, time.monotonic())
            if attempt is None:
                self._changed.wait(_LOOK_AGAIN_S)
            return attempt

    def _fetch(self, place: str, stream: ShardStream, attempt: Attempt) -> None:
        shard = self._shards[attempt.shard]
        try:
            self._receive(self._begin(attempt, stream), shard)
        except _Superseded:
            pass
        except PeerBusy as error:
            with self._changed:
                self._schedule.put_back(attempt)
                self._changed.notify_all()
            self._wait_for_busy(place, error)
        except (NotFound, ShardCorrupt) as error:
            self._note_bad_copy(attempt, shard, error)
        except CkptdError as error:
            self._note_break(attempt, error)

    def _begin(self, attempt: Attempt, stream: ShardStream) -> _Fetch:
        """Registers a fetch, and stops those that had the shard before: from here on nobody else
        writes its bytes."""
        fetch = _Fetch(attempt, stream)
        with self._changed:
            attempt.cancelled = attempt.cancelled or self._ended
            former = [f for f in self._fetches.values() if f.attempt.shard == attempt.shard]
            self._fetches[attempt] = fetch
        for other in former:
            _log.info("shard_taken_over", by=attempt.place, slow=other.attempt.place)
            other.stop()
        return fetch

    def _receive(self, fetch: _Fetch, shard: WantedShard) -> None:
        """Raises _Superseded, ShardCorrupt, and what the stream and the outputs raise."""
        try:
            self._receive_all(fetch, shard)
        finally:
            with self._changed:
                self._fetches.pop(fetch.attempt, None)

    def _receive_all(self, fetch: _Fetch, shard: WantedShard) -> None:
        attempt = fetch.attempt
        digest = hashlib.sha256()
        writer = _ShardWriter(shard.writes, self._outputs)

        def take(view: memoryview) -> None:
            with fetch.guard:
                if attempt.cancelled:
                    raise _Superseded
                writer.write(view)
            digest.update(view)
            attempt.moved(len(view), time.monotonic())
            self._progress.node(attempt.place, len(view))

        fetch.stream.fetch(shard.digest, shard.size, take)
        if digest.digest() != shard.digest:
            raise ShardCorrupt(shard.digest.hex(), node=attempt.place)
        with self._changed:
            counted = self._schedule.finish(attempt, time.monotonic())
            self._failing.pop(attempt.place, None)
            self._busy.pop(attempt.place, None)
            if not counted:
                return
            # Under the lock: when `run` has returned, everything that is done has been told.
            self._on_done(attempt.shard)
            self._changed.notify_all()
        self._progress.advance(shard.size)

    # -- what goes wrong

    def _note_bad_copy(self, attempt: Attempt, shard: WantedShard, error: CkptdError) -> None:
        _log.warning("copy_not_used", place=attempt.place, reason=error.message)
        if isinstance(error, ShardCorrupt):
            self._progress.note(f"{error.message}; another copy is used")
            self._sources.report_corrupt(attempt.place, shard.digest)
        with self._changed:
            self._schedule.fail(attempt, copy_is_bad=True)
            self._changed.notify_all()

    def _note_break(self, attempt: Attempt, error: CkptdError) -> None:
        with self._changed:
            if attempt.cancelled:  # it was cut off on purpose
                return
            key = (attempt.shard, attempt.place)
            self._breaks[key] += 1
            unreadable = self._breaks[key] >= _BREAKS_MAX
            if unreadable:
                self.unreadable.add(attempt.shard)
            self._schedule.fail(attempt, copy_is_bad=unreadable)
            self._changed.notify_all()
        self._note_failure(attempt.place, error)

    def _note_failure(self, place: str, error: CkptdError) -> None:
        """Waits before `place` is asked again, longer each time; gives it up in the end."""
        with self._changed:
            trouble = self._failing.setdefault(place, _Trouble(time.monotonic()))
            trouble.count += 1
            count = trouble.count
            over = time.monotonic() - trouble.since_s > _PLACE_GIVE_UP_S
        _log.info("place_failed", place=place, count=count, reason=error.message)
        if over:
            self._give_up(place, error)
        else:
            pause_s = limits.RETRY_PAUSE_MIN_S * 2 ** min(count - 1, 10)
            self._pause(min(pause_s, limits.RETRY_PAUSE_MAX_S))

    def _wait_for_busy(self, place: str, error: PeerBusy) -> None:
        with self._changed:
            trouble = self._busy.setdefault(place, _Trouble(time.monotonic()))
            over = time.monotonic() - trouble.since_s > limits.BUSY_GIVE_UP_S
        if over:
            self._give_up(place, error)
        else:
            self._pause(limits.BUSY_RETRY_S)

    def _give_up(self, place: str, error: CkptdError) -> None:
        with self._changed:
            self._schedule.lose(place)
            self._changed.notify_all()
            if self._ended:
                return
        self._sources.lose(place, error)
        self._progress.note(f"{place} is left out: {error.message}")

    def _pause(self, longest_s: float) -> None:
        """Waits between half of `longest_s` and all of it, or until the pull is over."""
        until_s = time.monotonic() + longest_s * self._random.uniform(0.5, 1.0)
        with self._changed:
            while not self._over and (left_s := until_s - time.monotonic()) > 0:
                self._changed.wait(left_s)


class _ShardWriter:
    """Writes a shard that arrives from its start to its end to all places that want parts of it.

    Ranges may overlap: one shard may serve several places.
    """

    def __init__(self, writes: Sequence[Write], outputs: Outputs) -> None:
        self._writes = writes
        self._outputs = outputs
        self._next = 0
        self._open: list[tuple[Write, Range]] = []
        self._position = 0

    def write(self, view: memoryview) -> None:
        """Takes the next bytes of the shard."""
        begin, end = self._position, self._position + len(view)
        while self._next < len(self._writes) and self._writes[self._next].shard_offset < end:
            write = self._writes[self._next]
            target = self._outputs.range_writer(
                write.output_index, write.output_offset, write.length
            )
            self._open.append((write, target))
            self._next += 1
        for write, target in self._open:
            first = max(begin, write.shard_offset)
            last = min(end, write.shard_offset + write.length)
            target.write(view[first - begin : last - begin])
        self._open = [each for each in self._open if each[0].shard_offset + each[0].length > end]
        self._position = end
