"""One seed: a cluster, what people do with it, what happens to it, and what must hold all along."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from tests.simulation.cluster import Pki, Settings, SimulatedNode
from tests.simulation.commands import Commands
from tests.simulation.faults import TEN_YEARS_S, Faults
from tests.simulation.rest import Rest
from tests.simulation.world import World

_COMMANDS_AT_ONCE: Final = 3
_COMMANDS_SHARE: Final = 0.55
_REST_MAX_S: Final = 2 * 3600.0


_RULES: Final[tuple[tuple[dict[str, object], ...], ...]] = (
    (),
    ({"runs": "*", "keep_last": 1},),
    ({"runs": "a", "keep_last": 2}, {"runs": "*", "keep_last": 1}),
    ({"runs": "*", "keep_every": "1m", "keep_within": "10m"},),
)


@dataclass
class Outcome:
    """What came of a seed. No failures: all guarantees held."""

    seed: int
    failures: list[str]
    virtual_s: float
    protected: int
    counts: Counter[str]


def settings_of(rng: random.Random) -> Settings:
    """A cluster of this seed."""
    return Settings(
        workers=rng.choice((3, 4, 4, 5)),
        copies=rng.choice((2, 2, 2, 3)),
        capacity_bytes=rng.choice((6, 24, 64)) * 1024 * 1024,
        coordinators=rng.choice((0, 0, 1, 2)),
        retention=(rng.choice(_RULES), rng.choice(_RULES)),
        # Rare ones cost less, and leave more time for two nodes to know different things.
        heartbeat_s=rng.choice((15.0, 28.0, 32.0)),
    )


class Scenario:
    """Drives one cluster through commands and faults, then lets it come to rest."""

    def __init__(self, seed: int, pki: Pki, write: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.world = World(seed, settings_of(random.Random(seed)), pki, write)
        self.cluster = self.world.cluster
        self.guarantees = self.world.guarantees
        self.faults = Faults(self.world)
        self.commands = Commands(self.world, self.faults)
        self.rest = Rest(self.world)

    def run(self, steps: int) -> Outcome:
        """Everything that happens in this seed."""
        cluster = self.cluster
        with cluster:
            self._start()
            for _ in range(steps):
                if not cluster.failures:
                    self.step()
            if not cluster.failures:
                self.come_to_rest()
            return Outcome(
                self.seed,
                list(cluster.failures),
                self.world.now_s,
                len(self.world.ledger.protected),
                self.world.counts,
            )

    def _start(self) -> None:
        rng = self.world.rng
        for node in self.cluster.nodes.values():
            if rng.random() < 0.3:
                node.host.wall_offset_s = rng.uniform(-TEN_YEARS_S, TEN_YEARS_S)
            node.disk.slowness = rng.choice((0.3, 1.0, 5.0))
            node.disk.on_removed = partial(self.guarantees.check_removed, node)
            node.start()
            self.cluster.run(rng.uniform(0.0, 5.0))
        if rng.random() < 0.3:
            self.cluster.laptop.wall_offset_s = rng.uniform(-TEN_YEARS_S, TEN_YEARS_S)
        self.cluster.run(20.0)

    def step(self) -> None:
        """One thing happens, and some time passes."""
        rng = self.world.rng
        commanded = len(self.world.running) < _COMMANDS_AT_ONCE and rng.random() < _COMMANDS_SHARE
        act = rng.choice(self.commands.choices() if commanded else self.faults.choices())
        self.world.counts[act.__name__] += 1
        act()
        self.guarantees.note_topology()
        self.cluster.run(rng.choice((0.05, 0.3, 1.0, 3.0, 10.0, 30.0, 90.0)))
        self.world.reap()
        self.guarantees.check()

    # -- the end

    def come_to_rest(self) -> None:
        """Faults stop; everything must come together again."""
        cluster = self.cluster
        cluster.note("faults stop")
        self.faults.wake_all()
        self.faults.heal()
        for node in cluster.living:
            node.disk.capacity_bytes = cluster.settings.capacity_bytes * 4
            node.disk.bad_reads = 0
            failed = node.disk.fault or self._has_failed(node)
            node.disk.fault = 0
            if failed:
                node.crash(power_cut=False)
            node.start()
        self.guarantees.note_topology()
        end_s = self.world.now_s + _REST_MAX_S
        left = "everything"
        while left and self.world.now_s < end_s and not cluster.failures:
            cluster.run(60.0)
            self.world.reap()
            self.guarantees.check()
            left = self.rest.left_to_do()
        if left and not cluster.failures:
            self._tell_jobs()
            cluster.fail(f"does not come to rest: {left}")
        if not cluster.failures:
            self._final_restores()

    def _tell_jobs(self) -> None:
        """For whoever reads the trace."""
        for node in self.cluster.living:
            if node.node is not None and node.node.background is not None:
                for view in node.node.background.jobs.views():
                    self.world.note(f"{node.name} {view.name}: {view.state} {view.last_error}")

    def _has_failed(self, node: SimulatedNode) -> bool:
        return node.running and node.node is not None and node.node.state() == "failed"

    def _final_restores(self) -> None:
        """Everything that is protected and live is there, byte for byte."""
        live = self.guarantees.live_protected()
        for version in sorted(live, key=lambda version: version.id):
            self.commands.restore_version(f"{version.name}@{version.id}", version.id)
            while self.world.running and not self.cluster.failures:
                self.cluster.run(5.0)
                self.world.reap()


def run_seed(
    seed: int, pki: Pki, *, steps: int = 32, write: Callable[[str], None] | None = None
) -> Outcome:
    """One seed from its start to its rest."""
    return Scenario(seed, pki, write).run(steps)
