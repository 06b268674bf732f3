"""The remembered workers as the steward sees them, and what the absence of some means.

Nothing records what an absent node holds. As long as it may come back with its data, it is presumed
to keep one copy of each shard that was stored before it left; after that its copies count as
missing. One that is there and does not tell what it holds is presumed to hold everything, as long.
Repair for absent nodes costs room and wear on those that are left, so it waits while a
machine only reboots, while somebody works on it, and while so many are away that it is rather the
network or the power (`docs/decisions/repair.md`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct

from ckptd.core.headers import VersionHeader
from ckptd.core.machines import MachineKey, machine_key

GIVEN_UP_AFTER_S: Final = 86_400.0
"""Workers that are absent longer than this do not count when the majority is looked for."""


class Worker(Struct, frozen=True):
    """A remembered, not forgotten worker.

    `absent_s`: for how many seconds it has been down, or its disk failed; None while it is well.
    `silent_s`: for how many seconds it has left questions for what it holds unanswered, although it
    is up; 0 while it answers. `maintenance`: somebody works on it, and said so. Sizes in bytes;
    `bytes_free` is above the reserve; `write_bytes_per_s` is 0 when it was not measured.
    """

    node: str
    boot_id: str = ""
    zone: str = ""
    absent_s: float | None = None
    silent_s: float = 0.0
    draining: bool = False
    maintenance: bool = False
    bytes_used: int = 0
    bytes_free: int = 0
    write_bytes_per_s: float = 0.0
    queued_bytes: int = 0

    @property
    def up(self) -> bool:
        return self.absent_s is None

    @property
    def takes_copies(self) -> bool:
        """Whether it may be given copies."""
        return self.up and not self.draining

    @property
    def machine(self) -> MachineKey:
        """Equal for nodes that die together."""
        return machine_key(self.node, self.boot_id, self.zone)

    @property
    def used_fraction(self) -> float:
        """The part of what the store may use that it uses; 1 when there is no room at all."""
        usable = self.bytes_used + self.bytes_free
        return self.bytes_used / usable if usable else 1.0


class Absences(Struct, frozen=True):
    """What the absent and the silent workers mean now.

    `presumed` are taken to keep their copies; the copies of all others that are absent are
    missing. `unheard` are up, and have been silent for so long that their copies are missing, too.
    `waiting` says in words why something is waited for, or has gone on without somebody; "" when
    nothing is.
    """

    presumed: tuple[Worker, ...] = ()
    unheard: frozenset[str] = frozenset()
    waiting: str = ""


def judge_absences(workers: Sequence[Worker], *, after_s: float) -> Absences:
    """`after_s` is the config's `repair.after`. `workers` are all that are not forgotten."""
    absent = [worker for worker in workers if not worker.up]
    silent = [worker for worker in workers if worker.up and worker.silent_s]
    unheard = [worker for worker in silent if worker.silent_s >= after_s]
    if not absent and not silent:
        return Absences()
    up = len(workers) - len(absent)
    remembered = up + sum(_absence_s(worker) < GIVEN_UP_AFTER_S for worker in absent)
    if absent and up * 2 <= remembered:
        return Absences(
            presumed=tuple(absent),
            waiting=f"only {up} of {len(workers)} workers are up: no copies are made for "
            f"{_names(absent)} until more are back, or for 24 h",
        )
    if len(unheard) * 2 >= up:  # it is rather this node that does not understand them
        unheard = []
    short = [w for w in absent if not w.maintenance and _absence_s(w) < after_s]
    worked_on = [w for w in absent if w.maintenance]
    reasons = []
    if short:
        reasons.append(f"{_names(short)} may come back within {after_s:g} s of leaving")
    if worked_on:
        reasons.append(f"{_names(worked_on)} is in maintenance")
    if hoped := [worker for worker in silent if worker not in unheard]:
        reasons.append(f"{_names(hoped)} does not tell what it holds, and has {after_s:g} s for it")
    if unheard:
        reasons.append(f"{_names(unheard)} does not tell what it holds: others get its copies")
    return Absences(
        presumed=tuple(sorted(short + worked_on, key=lambda worker: worker.node)),
        unheard=frozenset(worker.node for worker in unheard),
        waiting="; ".join(reasons),
    )


def presumed_holders(presumed: Iterable[Worker], order: int, *, now_ms: int) -> frozenset[str]:
    """Those that may keep a copy of the version with this `order`: what was stored without a node
    is not on it. Orders are milliseconds of a clock, or above it; one that runs ahead presumes
    nothing."""
    return frozenset(w.node for w in presumed if order < now_ms - _absence_s(w) * 1000)


def recent_bytes(versions: Iterable[VersionHeader]) -> int:
    """The size in bytes of the newest checkpoint, as room that repair leaves for the next one.
    `versions` are newest first."""
    return next((version.size for version in versions if version.size), 0)


def _absence_s(worker: Worker) -> float:
    assert worker.absent_s is not None
    return worker.absent_s


def _names(workers: Iterable[Worker]) -> str:
    return ", ".join(sorted(worker.node for worker in workers))
