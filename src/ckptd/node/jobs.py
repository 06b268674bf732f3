"""Background jobs of a node: each runs in slices of its own, is shown, and can be paused.

A job that fails is tried again after a while; what failed stays visible until a slice went well.
Which jobs are paused is kept in the store, so that a restart does not undo what somebody wanted.
"""

from __future__ import annotations

import asyncio
import enum
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import structlog

from ckptd.core import limits
from ckptd.core.backoff import backoff_s
from ckptd.core.job_names import JOB_NAMES
from ckptd.errors import CkptdError, NotFound
from ckptd.node.ports import OnDisk
from ckptd.observe.metrics import Metrics
from ckptd.store.state_file import StateFile
from ckptd.wire import messages

_log = structlog.get_logger(__name__)

_FORMAT: Final = "ckptd-jobs-1"


class JobProgress(NamedTuple):
    """How far a job is in what it knows to be left. `last_error` is "" when all is well; it is for
    what does not end a slice."""

    done_bytes: int = 0
    total_bytes: int = 0
    last_error: str = ""


class Job(Protocol):
    """One background job of one node. Both methods are called on the node's loop."""

    name: str
    """One of JOB_NAMES."""

    def progress(self) -> JobProgress:
        """How far it is."""

    async def step(self) -> float:
        """Does one slice, of a few seconds: a pause waits for its end. Returns the seconds to wait
        before the next one. May raise: then it is called again after a while."""


class JobState(enum.StrEnum):
    """What a job does now."""

    RUNNING = "running"
    WAITING = "waiting"
    PAUSED = "paused"
    FAILED = "failed"  # it is tried again after a while


class PausedJobs:
    """The names of the paused jobs, kept in a file of the store."""

    def __init__(self, file: StateFile) -> None:
        self._file = file

    def load(self) -> frozenset[str]:
        """The names that were saved. A file that cannot be understood pauses nothing: a job that
        runs against somebody's wish is seen, one that silently rests is not."""
        text = self._file.read()
        if text is None:
            return frozenset()
        try:
            kept = json.loads(text)
            if kept["format"] != _FORMAT:
                raise ValueError(kept["format"])
            return frozenset(name for name in kept["paused"] if name in JOB_NAMES)
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("paused_jobs_unreadable", path=self._file.path, reason=str(error))
            return frozenset()

    def save(self, names: frozenset[str]) -> None:
        """Makes `names` durable."""
        text = json.dumps({"format": _FORMAT, "paused": sorted(names)}) + "\n"
        self._file.write(text.encode())


@dataclass(eq=False)
class _Supervised:
    """A job, and what its supervisor knows of it."""

    job: Job
    running: bool = False
    failures: int = 0  # in a row
    error: str = ""
    wanted: asyncio.Event = field(default_factory=asyncio.Event)  # look again before the time

    async def rest(self, seconds: float) -> None:
        """Waits for that long, or until `wanted` is set."""
        try:
            async with asyncio.timeout(seconds):
                await self.wanted.wait()
        except TimeoutError:
            pass
        self.wanted.clear()


class Jobs:
    """Runs the jobs of one node, each in a task of its own.

    `paused` is what `PausedJobs.load` gave; changes go to `save`, which runs by `on_disk`. `rng`
    spreads the pauses after failures.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        paused: frozenset[str],
        save: Callable[[frozenset[str]], None],
        on_disk: OnDisk,
        metrics: Metrics,
        rng: random.Random,
    ) -> None:
        self._jobs: Mapping[str, _Supervised] = {job.name: _Supervised(job) for job in jobs}
        if len(self._jobs) != len(jobs) or not self._jobs.keys() <= set(JOB_NAMES):
            raise ValueError(f"each job needs a name of its own out of {JOB_NAMES}")
        self._paused = paused
        self._save = save
        self._saving = asyncio.Lock()
        self._on_disk = on_disk
        self._metrics = metrics
        self._rng = rng

    @property
    def paused(self) -> frozenset[str]:
        """Names of the jobs that are paused, whether this node has them or not."""
        return self._paused

    def views(self) -> tuple[messages.JobView, ...]:
        """All jobs of this node, as they are told to others."""
        return tuple(self._view(supervised) for supervised in self._jobs.values())

    def wake(self, name: str) -> None:
        """There is something to do: the job's next slice begins without waiting, unless it is
        paused. After a failure, too. Nothing happens when this node has no such job."""
        supervised = self._jobs.get(name)
        if supervised is not None:
            supervised.wanted.set()

    async def set_paused(self, name: str, paused: bool) -> None:
        """Pauses a job (a slice under way goes to its end) or lets it go on. Returns when that
        will survive a restart. Raises NotFound for a name that no job has, and the store's
        errors; then nothing has changed."""
        if name not in JOB_NAMES:
            raise NotFound(f"there is no job {name}: {', '.join(JOB_NAMES)}", next="ckptd jobs")
        async with self._saving:
            wanted = self._paused | {name} if paused else self._paused - {name}
            if wanted != self._paused:
                await self._on_disk(lambda: self._save(wanted))
                self._paused = wanted
                _log.info("job_set", job=name, paused=paused)
        self.wake(name)

    async def run(self) -> None:
        """Runs all jobs until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for name, supervised in self._jobs.items():
                group.create_task(self._run(supervised), name=f"job {name}")

    async def _run(self, supervised: _Supervised) -> None:
        while True:
            while supervised.job.name in self._paused:
                await supervised.wanted.wait()
                supervised.wanted.clear()
            await supervised.rest(await self._step(supervised))

    async def _step(self, supervised: _Supervised) -> float:
        supervised.running = True
        try:
            wait_s = await supervised.job.step()
        except Exception as error:  # the edge of the job's task
            return self._failed(supervised, error)
        finally:
            supervised.running = False
        if supervised.failures:
            _log.info("job_recovered", job=supervised.job.name, failures=supervised.failures)
        supervised.failures = 0
        supervised.error = ""
        return wait_s

    def _failed(self, supervised: _Supervised, error: Exception) -> float:
        name = supervised.job.name
        expected = isinstance(error, CkptdError)
        text = (
            error.message if isinstance(error, CkptdError) else f"{type(error).__name__}: {error}"
        )
        if text != supervised.error:  # the same again and again is one line
            _log.error(
                "job_failed",
                job=name,
                reason=text,
                next=(error.next if isinstance(error, CkptdError) else "") or "ckptd jobs",
                exc_info=None if expected else error,
            )
        supervised.failures += 1
        supervised.error = text
        self._metrics.job_failure(name)
        return backoff_s(
            supervised.failures,
            first_s=limits.JOB_RETRY_MIN_S,
            max_s=limits.JOB_RETRY_MAX_S,
            rng=self._rng,
        )

    def _view(self, supervised: _Supervised) -> messages.JobView:
        try:
            progress = supervised.job.progress()
        except CkptdError as error:  # a node must be able to say that its disk has failed
            progress = JobProgress(last_error=error.message)
        return messages.JobView(
            name=supervised.job.name,
            state=self._state(supervised).value,
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            last_error=(supervised.error or progress.last_error)[: limits.JOB_ERROR_TEXT_MAX],
        )

    def _state(self, supervised: _Supervised) -> JobState:
        if supervised.running:
            return JobState.RUNNING
        if supervised.job.name in self._paused:
            return JobState.PAUSED
        return JobState.FAILED if supervised.failures else JobState.WAITING
