"""What commands, faults and checks of one seed share."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from tests.simulation.cluster import Command, Pki, Settings, SimulatedCluster, SimulatedNode
from tests.simulation.guarantees import Guarantees, Ledger

from ckptd.client.cluster import Cluster
from ckptd.errors import CkptdError

_COMMAND_LIMIT_S: Final = 1800.0


class World:
    """One cluster, its chance, and what is known of it from outside."""

    def __init__(
        self, seed: int, settings: Settings, pki: Pki, write: Callable[[str], None] | None
    ) -> None:
        self.rng = random.Random(seed)
        self.cluster = SimulatedCluster(seed, settings, pki)
        self.cluster.write = write
        self.ledger = Ledger()
        self.guarantees = Guarantees(self.cluster, self.ledger)
        self.running: list[Command[Any]] = []
        self.counts: Counter[str] = Counter()
        self._directories = 0

    @property
    def now_s(self) -> float:
        return self.cluster.kernel.now_s

    @property
    def workers(self) -> list[SimulatedNode]:
        return self.cluster.workers

    def note(self, text: str) -> None:
        self.cluster.note(text)

    def fail(self, text: str) -> None:
        self.cluster.fail(text)

    def new_directory(self) -> Path:
        """A path that nothing else has."""
        self._directories += 1
        return self.cluster.directory / f"directory{self._directories}"

    # -- commands under way

    def begin(
        self,
        what: str,
        work: Callable[[Cluster], Awaitable[Any]],
        done: Callable[[Any], None] = lambda _: None,
        failed: Callable[[CkptdError], None] = lambda _: None,
    ) -> Command[Any]:
        """Starts a command; `done` gets its result, `failed` its error."""
        self.note(f"begin {what}")

        def conclude(command: Command[Any]) -> None:
            error = command.task.exception()
            if error is None:
                self.note(f"done {what}")
                self.counts["succeeded"] += 1
                done(command.task.result())
            elif isinstance(error, CkptdError):
                self.note(f"failed {what}: {error.kind}: {error.message[:200]}")
                self.counts["refused"] += 1
                failed(error)
            else:
                self.fail(f"{what} ended with {error!r}")

        command = self.cluster.command(what.split()[0], work)
        command.started["at_s"] = self.now_s
        # At once, so that what was announced is compared with the media of that very moment.
        command.task.add_done_callback(lambda _: self._concluded(command, conclude))
        self.running.append(command)
        return command

    def _concluded(self, command: Command[Any], conclude: Callable[[Command[Any]], None]) -> None:
        if not command.process.alive or command.task.cancelled():
            return
        conclude(command)
        command.started["concluded"] = True

    def reap(self) -> None:
        """Forgets commands that have ended, and gives up on those that never do."""
        left = []
        for command in self.running:
            if command.task.done() or not command.process.alive:
                self.cluster.end(command.process, silent=False)
                continue
            if self.now_s - command.started["at_s"] > _COMMAND_LIMIT_S:
                self.fail(f"{command.process.name} has not ended for half an hour")
                self.cluster.end(command.process, silent=False)
                continue
            left.append(command)
        self.running = left
