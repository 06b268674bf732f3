"""Which nodes get a shard: distinct machines, never over the room, done soonest, on few sets.

Rules in order of weight (docs/decisions/placement.md has the reasons and figures):

1. A shard has at most one copy on a machine, and none on a node without room for it.
2. The attainable room is not thrown away: a machine that is needed to reach it is used.
3. Distinct zones, as far as there are any.
4. Few sets of nodes, as few as need at most 1.25 times the best time (`ckptd.core.copysets`).
5. Of these, the set that is done soonest, by measured speed and queue.

Pure: the planner has no clock. It counts what it assigned, and is told what was finished.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from msgspec import Struct

from ckptd.core.copysets import Copyset, attainable_room, fewest_copysets, soonest
from ckptd.core.machines import MachineKey, machine_key

SPEED_UNKNOWN_BYTES_PER_S: Final = 20e6  # a common microSD card, while no node was measured
SPEED_MIN_BYTES_PER_S: Final = 1e3  # a stuck card: keeps every division finite
_NEW_MEASUREMENT_WEIGHT: Final = 0.3
_REPLAN_RATIO: Final = 1.25
_PLANS_CACHED_MAX: Final = 64


class Candidate(Struct, frozen=True):
    """A node that could take copies.

    `machine` is its kernel boot id ("": not known), `room_bytes` what is free above its reserve,
    `write_bytes_per_s` its measured speed (0: not measured), `queued_bytes` what it was asked to
    store and has not yet.
    """

    node_id: str
    machine: str
    zone: str = ""
    room_bytes: int = 0
    write_bytes_per_s: float = 0.0
    queued_bytes: int = 0


class Placement:
    """Plans where the shards of one store or repair go."""

    def __init__(
        self,
        candidates: Iterable[Candidate],
        copies: int,
        *,
        used_sets: Iterable[Collection[str]] = (),
    ) -> None:
        """`copies` is at least 1; `used_sets` are sets of nodes that hold shards already, the most
        important first: they are used again where that is fast enough."""
        nodes = sorted(candidates, key=lambda candidate: candidate.node_id)
        self._copies = copies
        self._zone = {c.node_id: c.zone for c in nodes}
        self._machine: dict[str, MachineKey] = {
            c.node_id: machine_key(c.node_id, c.machine, c.zone) for c in nodes
        }
        self._room = {c.node_id: c.room_bytes for c in nodes}
        self._queued = {c.node_id: c.queued_bytes for c in nodes}
        self._foreign = dict(self._queued)  # the part of the queue that others asked for
        self._measured = {c.node_id: c.write_bytes_per_s > 0 for c in nodes}
        fastest = max((c.write_bytes_per_s for c in nodes), default=0.0)
        # Optimism makes a node that was never measured take part at once, and be measured.
        unknown = fastest or SPEED_UNKNOWN_BYTES_PER_S
        self._speed = {
            c.node_id: max(c.write_bytes_per_s or unknown, SPEED_MIN_BYTES_PER_S) for c in nodes
        }
        self._planned_speed = dict(self._speed)
        self._dead: set[str] = set()
        self._sets: dict[Copyset, None] = dict.fromkeys(frozenset(s) for s in used_sets)
        self._plans: dict[frozenset[str], list[Copyset]] = {}

    # -- what happened

    def want(self, copies: int) -> None:
        """From now on `copies` are wanted of each shard."""
        self._copies = copies
        self._plans.clear()

    def finished(self, node_id: str, size_bytes: int, seconds: float) -> None:
        """`node_id` stored `size_bytes` that `choose` gave it, and was busy `seconds` with them:
        the time since it began, or since it finished what came before, whichever is shorter."""
        self._queued[node_id] -= self._foreign[node_id]  # came first, so it is done as well
        self._foreign[node_id] = 0
        self._queued[node_id] = max(0, self._queued[node_id] - size_bytes)
        if seconds <= 0:
            return
        measured = max(size_bytes / seconds, SPEED_MIN_BYTES_PER_S)
        if self._measured[node_id]:
            old = self._speed[node_id]
            measured = old + _NEW_MEASUREMENT_WEIGHT * (measured - old)
        self._measured[node_id] = True
        self._speed[node_id] = measured
        planned = self._planned_speed[node_id]
        if not planned / _REPLAN_RATIO <= measured <= planned * _REPLAN_RATIO:
            self._planned_speed = dict(self._speed)
            self._plans.clear()

    def released(self, node_id: str, size_bytes: int) -> None:
        """`node_id` did not store `size_bytes` that `choose` gave it: it failed, was busy, or had
        the shard already."""
        self._queued[node_id] = max(0, self._queued[node_id] - size_bytes)
        self._room[node_id] += size_bytes

    def remove(self, node_id: str) -> None:
        """`node_id` died or takes no more copies: it is never chosen again."""
        self._dead.add(node_id)
        self._plans.clear()

    # -- what is known

    def speed_bytes_per_s(self, node_id: str) -> float:
        """The estimated write speed of a node."""
        return self._speed[node_id]

    def room_bytes(self, node_id: str) -> int:
        """What is left of a node's room after everything that was assigned to it."""
        return self._room[node_id]

    @property
    def used_sets(self) -> tuple[Copyset, ...]:
        """The sets given at the start, and those chosen since."""
        return tuple(self._sets)

    # -- the choice

    def choose(
        self, size_bytes: int, *, exclude: Collection[str] = (), already: Collection[str] = ()
    ) -> tuple[str, ...]:
        """The nodes that shall get a shard of `size_bytes`, in the order of the chain: fastest
        first. What is chosen is accounted to their room and queue.

        `already` hold the shard or are about to: only the copies that are missing beside them are
        placed. `exclude` are never chosen. Fewer nodes than wanted, down to none, come back when
        there are not enough machines with room: the shard is then degraded.
        """
        taken = {self._machine[node] for node in already if node in self._machine}
        strangers = sum(node not in self._machine for node in already)
        wanted = self._copies - len(taken) - strangers
        barred = self._dead.union(exclude)
        pool = [
            node
            for node, room in self._room.items()
            if room >= size_bytes and node not in barred and self._machine[node] not in taken
        ]
        copies = min(wanted, len({self._machine[node] for node in pool}))
        if copies <= 0:
            return ()
        chosen = self._from_sets(pool, copies, size_bytes, frozenset(already))
        if chosen is None:
            chosen = self._soonest_nodes(pool, copies, size_bytes, already)
        self._sets.setdefault(chosen.union(already))
        for node in chosen:
            self._room[node] -= size_bytes
            self._queued[node] += size_bytes
        return tuple(sorted(chosen, key=lambda node: (-self._speed[node], node)))

    def _from_sets(
        self, pool: list[str], copies: int, size_bytes: int, already: frozenset[str]
    ) -> Copyset | None:
        """The set that is done soonest out of the few planned ones, if one keeps the room."""
        if already:
            members = already.union(pool)
            sets = [*self._sets, *self._plan_with(members)]
            sets = [s - already for s in sets if already < s <= members]
            sets = [s for s in sets if len({self._machine[node] for node in s}) == copies]
        else:
            sets = self._plan(pool, copies)
        ranked = sorted(sets, key=lambda s: soonest(s, self._speed, self._queued, size_bytes))
        return next((s for s in ranked if self._keeps_room(s, pool, copies, size_bytes)), None)

    def _plan_with(self, members: Copyset) -> list[Copyset]:
        """The planned sets of these nodes, none if some are unknown or too few."""
        if not members <= self._room.keys():
            return []
        enough = len({self._machine[node] for node in members}) >= self._copies
        return self._plan(sorted(members), self._copies) if enough else []

    def _plan(self, pool: list[str], copies: int) -> list[Copyset]:
        key = frozenset(pool)
        plan = self._plans.get(key)
        if plan is None:
            speeds = {node: self._speed[node] for node in pool}
            zones = {self._zone[node] for node in pool}
            by_zone = len(zones) >= copies > 1
            preferred = [s for s in self._sets if len(s) == copies]
            plan = fewest_copysets(
                speeds, self._zone if by_zone else self._machine, copies, preferred
            )
            plan = list(dict.fromkeys(self._spread(copyset, speeds) for copyset in plan))
            if len(self._plans) >= _PLANS_CACHED_MAX:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _spread(self, copyset: Copyset, speeds: Mapping[str, float]) -> Copyset:
        """The set with its slower nodes replaced, until it has as many zones as it can."""
        missing = {self._zone[node] for node in speeds} - {self._zone[node] for node in copyset}
        for zone in sorted(missing):
            zones = [self._zone[node] for node in copyset]
            doubled = [node for node in copyset if zones.count(self._zone[node]) > 1]
            if not doubled:
                break
            slowest = min(doubled, key=lambda node: (speeds[node], node))
            fastest = max(
                (node for node in speeds if self._zone[node] == zone),
                key=lambda node: (speeds[node], node),
            )
            copyset = copyset - {slowest} | {fastest}
        return copyset

    def _soonest_nodes(
        self, pool: list[str], copies: int, size_bytes: int, already: Collection[str]
    ) -> Copyset:
        """Nodes picked one by one, new zones first, then exchanged until the room is kept."""
        zones = {self._zone[node] for node in already if node in self._zone}
        chosen: dict[MachineKey, str] = {}
        while len(chosen) < copies:
            best = min(
                (node for node in pool if self._machine[node] not in chosen),
                key=lambda node: (
                    self._zone[node] in zones,
                    (self._queued[node] + size_bytes) / self._speed[node],
                    node,
                ),
            )
            chosen[self._machine[best]] = best
            zones.add(self._zone[best])
        units = self._units(pool, size_bytes)
        # The machines with most room always keep it, so this ends at the latest with them.
        largest = iter(sorted(units, key=lambda machine: -units[machine]))
        while not self._keeps_room(frozenset(chosen.values()), pool, copies, size_bytes):
            machine = next(largest)
            if machine not in chosen:
                del chosen[min(chosen, key=lambda machine: units[machine])]
                chosen[machine] = max(
                    (node for node in pool if self._machine[node] == machine),
                    key=lambda node: (self._room[node], node),
                )
        return frozenset(chosen.values())

    # -- room

    def _units(self, pool: list[str], size_bytes: int) -> dict[MachineKey, int]:
        """How many more shards of this size each machine can take."""
        units: dict[MachineKey, int] = {}
        for node in pool:
            machine = self._machine[node]
            units[machine] = units.get(machine, 0) + self._room[node] // size_bytes
        return units

    def _keeps_room(self, copyset: Copyset, pool: list[str], copies: int, size_bytes: int) -> bool:
        """Whether all but one of the shards that can still be placed now, can be after this."""
        units = self._units(pool, size_bytes)
        attainable = attainable_room(list(units.values()), copies)
        for node in copyset:
            units[self._machine[node]] -= 1
        rest = attainable - 1
        return sum(min(unit, rest) for unit in units.values()) >= copies * rest
