"""The role coordinator of a node: watches directories, and stores what is finished, one checkpoint
at a time.

Four tasks: one watches and looks closely at what may be complete, one stores what is, one keeps the
machine awake as long as something is to be protected, one counts the versions of the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from ckptd.client.cluster import Cluster
from ckptd.client.connect import connect
from ckptd.client.progress import Progress
from ckptd.client.store import StoreResult
from ckptd.config import Role
from ckptd.coordinator import inhibitor
from ckptd.coordinator.content_memory import FILE, ContentMemory
from ckptd.coordinator.inhibitor import SleepInhibitor
from ckptd.coordinator.link import Link
from ckptd.coordinator.storing import Candidate, Outcome, store_candidate
from ckptd.coordinator.survey import VersionCounts, unprotected_steps
from ckptd.core import limits
from ckptd.core.checkpoint_units import step_of
from ckptd.core.file_examination import amounts
from ckptd.core.pending import Row
from ckptd.errors import CkptdError, SourceChanged
from ckptd.net.control_connection import Answer, Payload
from ckptd.net.control_connection import Progress as TellProgress
from ckptd.node.daemon import Node
from ckptd.node.requests import Answerer
from ckptd.watch.watcher import Taken, Watcher
from ckptd.wire import messages
from ckptd.wire.messages import Message

_log = structlog.get_logger(__name__)

_AWAKE_CHECK_S: Final = 1.0


class Coordinator:
    """The part that a node adds for its role coordinator (`ckptd.node.part`)."""

    role: Role = "coordinator"

    def __init__(self, node: Node) -> None:
        config = node.config
        assert config.node is not None and config.node.state is not None, "it is a coordinator"
        self._node = node
        self._started_ns = time.time_ns()
        state: Path = config.node.state
        with contextlib.suppress(OSError):  # what cannot be remembered is read again
            state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._memory = ContentMemory(state / FILE)
        self._link = Link(self._connect)
        self._ready = asyncio.Event()
        self._due = asyncio.Event()
        self._looked = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher = Watcher(config.watch, wake=self._wake)
        self._inhibitor = SleepInhibitor(inhibitor.command())
        self._storing: _Stored | None = None
        self._fault = ""
        self.handlers: Mapping[type[Message], Answerer] = {messages.GetWatched: self._watched}
        node.metrics.expect_protection()

    def work(self) -> Mapping[str, Callable[[], Coroutine[None, None, None]]]:
        """As `Part.work`."""
        counts = VersionCounts(
            self._connect, self._node.members.is_steward, self._node.metrics.checkpoints
        )
        return {
            "watch": self._watch,
            "store": self._store_ready,
            "stay awake": self._stay_awake,
            "count versions": counts.run,
        }

    def faults(self) -> Sequence[str]:
        """Roots that cannot be read; nodes that do not answer although something waits."""
        roots = [
            row.reason for row in self._watcher.rows() if row.phase == "failed" and not row.name
        ]
        return [*roots, *([self._fault] if self._fault else [])]

    def sample(self) -> None:
        """Brings the gauges of what waits up to date."""
        rows = [row for row in self._watcher.rows() if row.path or row.name]
        waiting = [(row.name, step_of(row.name)) for row in rows if row.name]
        self._node.metrics.sample_pending(
            self._waiting(),
            max((row.age_s for row in rows), default=0.0),
            unprotected_steps(self._node.records.catalogue, waiting),
        )

    async def stop(self) -> None:
        """Lets the machine sleep, and closes the connections."""
        await self._inhibitor.release()
        await asyncio.to_thread(self._watcher.close)
        await self._link.close()

    def _connect(self) -> AbstractAsyncContextManager[Cluster]:
        return connect(self._node.config, self._node.hello)

    # -- watching

    async def _watch(self) -> None:
        """Lets the watcher do what is due, in a thread, as often as it asks for."""
        self._loop = asyncio.get_running_loop()
        while True:
            self._due.clear()
            again_s = await asyncio.to_thread(self._watcher.step)
            self._looked = True
            self._ready.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, again_s - time.monotonic())):
                    await self._due.wait()

    def _wake(self) -> None:
        """From any thread: something is due now."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._due.set)

    def _waiting(self) -> int:
        at_rest = ("stored", "left out")
        return sum(n for phase, n in self._watcher.counts().items() if phase not in at_rest)

    # -- storing

    async def _store_ready(self) -> None:
        while True:
            await self._ready.wait()
            self._ready.clear()
            while self._watcher.has_ready():
                if not await self._reach_workers():
                    await asyncio.sleep(limits.RECONNECT_NODES_S)
                elif (taken := await asyncio.to_thread(self._watcher.take)) is not None:
                    await self._store(taken)

    async def _reach_workers(self) -> bool:
        """Whether there is a node to store on; why not stands in `ckptd status` meanwhile."""
        try:
            await self._link.cluster()
        except CkptdError as error:
            if not self._fault:
                _log.warning("no_node_to_store_on", reason=error.message, next=error.next)
            self._fault = error.message
            return False
        self._fault = ""
        return True

    async def _store(self, taken: Taken) -> None:
        """Stores one checkpoint, and tells the queue how that went."""
        watcher = self._watcher
        progress = _Stored()
        self._storing = progress
        candidate = Candidate(
            name=taken.name,
            path=taken.location,
            excluded=taken.excluded,
            training=taken.state,
            is_unchanged=lambda: watcher.is_unchanged(taken),
        )
        for warning in taken.warnings:
            _log.warning("checkpoint_warning", name=taken.name, reason=warning)
        try:
            outcome = await store_candidate(
                candidate, link=self._link, memory=self._memory, progress=progress
            )
        except SourceChanged as error:
            _log.info("checkpoint_changed", name=taken.name, reason=error.message)
            watcher.source_changed(taken.key)
        except CkptdError as error:
            _log.warning(
                "checkpoint_not_stored",
                name=taken.name,
                kind=error.kind,
                reason=error.message,
                next=error.next,
            )
            watcher.failed(taken.key, error.message)
        except Exception:  # the edge of this task: one checkpoint must not hold up the others
            _log.exception("checkpoint_failed", name=taken.name)
            watcher.failed(taken.key, "an internal error: see the node's log")
        else:
            watcher.stored(taken.key)
            self._note(outcome)
        finally:
            self._storing = None

    def _note(self, outcome: Outcome) -> None:
        result: StoreResult | None = outcome.result
        if result is None:
            return
        since_ns = max(outcome.changed_ns, self._started_ns)
        waited_s = (time.time_ns() - since_ns) / 1e9
        if result.state == "protected":
            self._node.metrics.protected(waited_s)
        _log.info(
            "checkpoint_stored",
            name=result.name,
            version=result.version,
            state=result.state,
            bytes=result.bytes,
            bytes_sent=result.bytes_sent,
            seconds=round(result.seconds, 3),
            since_change_s=round(waited_s, 3),
        )

    # -- telling

    async def _watched(self, _: Message, __: Payload, ___: TellProgress) -> Answer:
        now = time.time()
        told = [self._unstored(row, now) for row in self._watcher.rows()]
        listed = tuple(told[: limits.UNSTORED_PER_MESSAGE_MAX])
        count = max(len(told), self._waiting())
        return messages.Watched(listed, count, self._looked), b""

    def _unstored(self, row: Row, now: float) -> messages.Unstored:
        path = str(Path(row.root, row.path))
        reason = row.reason
        if row.phase == "storing" and self._storing is not None:
            reason = self._storing.describe()
        elif row.phase == "ready" and self._fault:
            reason = self._fault
        since = datetime.fromtimestamp(now - row.age_s, UTC)
        return messages.Unstored(
            name=row.name,
            path=_text(path),
            state="storing" if row.phase == "storing" else "pending",
            reason=_text(reason),
            since=since.strftime("%Y-%m-%dT%H:%M:%SZ"),
            size=0,
            step=step_of(row.name),
        )

    # -- staying awake

    async def _stay_awake(self) -> None:
        while True:
            if self._watcher.is_busy():
                await self._inhibitor.hold()
            else:
                await self._inhibitor.release()
            await asyncio.sleep(_AWAKE_CHECK_S)


class _Stored(Progress):
    """How far the store of one checkpoint is."""

    def __init__(self) -> None:
        self._total = 0
        self._done = 0

    def total(self, size: int) -> None:
        self._total = size

    def advance(self, size: int) -> None:
        self._done += size

    def describe(self) -> str:
        if not self._total:
            return "is being read"
        if self._done >= self._total:
            return "is being stored: the nodes confirm their copies"
        return f"is being stored: {amounts(self._done, self._total)}"


def _text(text: str) -> str:
    """As it may stand in a message: file names need not be UTF-8, and may be long."""
    return text.encode("utf-8", "replace").decode()[:8000]


def coordinator(node: Node) -> Coordinator:
    """Makes the part, for `ckptd.node.daemon.serve`."""
    return Coordinator(node)
