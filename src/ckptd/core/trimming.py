"""Dropping copies that are too many: decided by the holder alone, on promises of the others.

A node that was away comes back with copies that were made anew meanwhile. One of each is too much,
but two nodes that both drop theirs because the other has one would lose the shard. So the holder
asks the others to keep theirs, and drops only once the wanted number of them has promised, and
proved that they have the bytes. Three rules make that safe whatever is delayed, repeated or
restarted:

- a node that asks about a shard gives no promise for it meanwhile;
- what is promised is not dropped, and a promise lasts longer than whoever asked may act on it;
- promises are kept in memory, so a restarted node drops nothing for as long as they last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Final

from msgspec import Struct

from ckptd.core import limits
from ckptd.core.machines import MachineKey
from ckptd.core.workers import Worker

ACT_WITHIN: Final = 0.5
"""The part of a promise's time within which whoever asked for it may act on it."""


def proof_of_possession(salted: bytes, node: str) -> bytes:
    """What the node `node` answers to prove that it has a shard: SHA-256 over `salted` and its id.

    `salted` is the SHA-256 over the asker's nonce and the shard's bytes. Who has not the bytes
    cannot know it, and what another node answers proves nothing for this one.
    """
    return hashlib.sha256(salted + node.encode()).digest()


class Promises:
    """What one node has promised, and what it asks about. Times are of one monotonic clock, in
    seconds. `lasts_s` is how long promises last on this node, and how long it drops nothing after
    its start at `started_s`."""

    def __init__(self, *, lasts_s: float, started_s: float) -> None:
        self.lasts_s = lasts_s
        self._drops_from_s = started_s + lasts_s
        self._until_s: dict[bytes, float] = {}  # oldest first, as all last equally long
        self._asking: dict[bytes, float] = {}  # since when

    def give(self, shard: bytes, seconds: float, now_s: float) -> bool:
        """Promises to keep a copy for `seconds`; False: no promise.

        None is given for longer than this node drops nothing after a restart, which would be
        broken by one."""
        if not self.may_give(shard, seconds, now_s):
            return False
        self._until_s.pop(shard, None)
        self._until_s[shard] = now_s + self.lasts_s
        return True

    def may_give(self, shard: bytes, seconds: float, now_s: float) -> bool:
        """Whether `give` would promise that."""
        self._forget_old(now_s)
        if not 0 < seconds <= self.lasts_s or shard in self._asking:
            return False
        return shard in self._until_s or len(self._until_s) < limits.PROMISES_MAX

    def wait_s(self, now_s: float) -> float:
        """Seconds until this node may drop anything; 0 for now."""
        return max(0.0, self._drops_from_s - now_s)

    def begin(self, shard: bytes, now_s: float) -> bool:
        """Begins to ask the others about a shard: from now on nothing is promised for it, until
        `end`. False when that may not be, because it is promised or asked about already, or the
        node was started a moment ago."""
        self._forget_old(now_s)
        if self.wait_s(now_s) or shard in self._until_s or shard in self._asking:
            return False
        self._asking[shard] = now_s
        return True

    def may_drop(self, shard: bytes, now_s: float) -> bool:
        """Whether the promises that were asked for since `begin` may still be acted on."""
        since_s = self._asking.get(shard)
        return since_s is not None and 0 <= now_s - since_s < self.lasts_s * ACT_WITHIN

    def end(self, shard: bytes) -> None:
        """Ends the asking, whatever came of it. May be called twice."""
        self._asking.pop(shard, None)

    def promised(self, shard: bytes, now_s: float) -> bool:
        """Whether somebody may rely on this node's copy."""
        until_s = self._until_s.get(shard)
        return until_s is not None and now_s < until_s

    def __len__(self) -> int:
        return len(self._until_s)

    def _forget_old(self, now_s: float) -> None:
        while self._until_s and next(iter(self._until_s.values())) <= now_s:
            del self._until_s[next(iter(self._until_s))]


class Claim(Struct, frozen=True):
    """One live version that names a shard: how many copies it wants, and which nodes have its
    manifest and promised to keep their copy of the shard."""

    copies: int
    promised_by: frozenset[str]


def is_surplus(
    own: str, claims: Collection[Claim], machines: Mapping[str, MachineKey | None]
) -> bool:
    """Whether the copy on the node `own` may go: each version that names the shard has its wanted
    copies on other machines' promises.

    `machines` are of the nodes that count: known, not draining. Without any claim the shard is
    nobody's, and the collection of garbage decides.
    """
    if not claims:
        return False
    for claim in claims:
        others = {machines[node] for node in claim.promised_by if node in machines and node != own}
        if len(others) < claim.copies:
            return False
    return True


def droppers(
    holders: Collection[str], copies: int, workers: Mapping[str, Worker]
) -> tuple[str, ...]:
    """The holders of a shard of which one should drop its copy; none when none is too many.

    One that is to be emptied, then one that shares its machine with another, then one whose zone
    has another. At most one at a time is asked to, and only that one decides.
    """
    there = [workers[node] for node in sorted(holders) if node in workers and workers[node].up]
    kept = [worker for worker in there if not worker.draining]
    machines = {worker.machine for worker in kept}
    if len(machines) < copies:
        return ()
    drained = [worker for worker in there if worker.draining]
    if drained:
        return _ids(drained)
    doubled = _sharing([worker.machine for worker in kept], kept)
    if doubled:
        return _ids(doubled)
    if len(machines) == copies:
        return ()
    zones = {worker.zone for worker in kept}
    same_zone = _sharing([worker.zone for worker in kept], kept) if len(zones) > 1 else []
    return _ids(same_zone or kept)


def fullest(
    nodes: Collection[str], workers: Mapping[str, Worker], dropping: Mapping[str, int]
) -> str:
    """Of these nodes that which uses most of its room, once it has dropped the bytes `dropping`."""

    def used_fraction(node: str) -> float:
        worker = workers[node]
        usable = worker.bytes_used + worker.bytes_free
        return (worker.bytes_used - dropping.get(node, 0)) / usable if usable else 1.0

    return max(nodes, key=lambda node: (used_fraction(node), node))


def _sharing(keys: list[MachineKey] | list[str], workers: list[Worker]) -> list[Worker]:
    return [
        worker
        for key, worker in zip(keys, workers, strict=True)
        if sum(other == key for other in keys) > 1
    ]


def _ids(workers: Collection[Worker]) -> tuple[str, ...]:
    return tuple(worker.node for worker in workers)
