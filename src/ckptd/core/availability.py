"""How safe versions are: from who holds what to one word, and to what further deaths would cost.

Copies are counted per machine (`ckptd.core.machines`), and for `protected` only where the manifest
is too: shards without their manifest are of no use to whoever finds only them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum
from typing import Final

from msgspec import Struct

from ckptd.core.bitmaps import unpack
from ckptd.core.machines import MachineKey, machine_key


class State(StrEnum):
    """The state of a version, or of the whole cluster. The better ones stand first.

    protected      every shard has the wanted copies
    storing        being stored
    pending        seen, not stored yet
    degraded       readable, but a copy is missing
    unavailable    a shard or the manifest is on no node that answers; one that does not may have it
    unrecoverable  the same, and all nodes have answered
    unreachable    no node answers, so nothing is known
    """

    PROTECTED = "protected"
    STORING = "storing"
    PENDING = "pending"
    DEGRADED = "degraded"
    UNAVAILABLE = "unavailable"
    UNRECOVERABLE = "unrecoverable"
    UNREACHABLE = "unreachable"


EXIT_CODES: Final[Mapping[State, int]] = {
    State.PROTECTED: 0,
    State.STORING: 0,
    State.PENDING: 0,
    State.DEGRADED: 3,
    State.UNAVAILABLE: 5,
    State.UNRECOVERABLE: 4,
    State.UNREACHABLE: 5,
}
"""What `ckptd status` exits with."""

_BADNESS: Final = {state: badness for badness, state in enumerate(State)}
MANIFEST_COPIES_MIN: Final = 2
"""A manifest on one machine only protects nothing, unless one copy is all that is wanted."""


class Holdings(Struct, frozen=True):
    """Who holds a version.

    `copies` is the wanted number; `manifest` are the ids of the nodes with the manifest, and
    `shards` those of the nodes with each of its shards, in the manifest's order. Only good, durable
    copies count here, on nodes that answered or are still presumed to keep theirs.
    """

    copies: int
    manifest: frozenset[str]
    shards: tuple[frozenset[str], ...]

    def without(self, dead: Collection[str]) -> Holdings:
        """What is left when these nodes die."""
        left: dict[frozenset[str], frozenset[str]] = {}
        return Holdings(
            copies=self.copies,
            manifest=self.manifest.difference(dead),
            shards=tuple(
                left.setdefault(holders, holders.difference(dead)) for holders in self.shards
            ),
        )


class Assessment(Struct, frozen=True):
    """How safe one version is.

    `min_copies` is the number of machines that hold the rarest shard (or the manifest, if it is on
    fewer or there are no shards). `under_replicated` and `lost` count its shards with too few, and
    with no copies; a lost shard is not under-replicated.
    """

    state: State
    min_copies: int
    under_replicated: int
    lost: int


class Outlook(Struct, frozen=True):
    """What is left after some nodes died: the ids of versions that then cannot be read any more,
    and of those that then have too few copies."""

    lost: tuple[str, ...]
    degraded: tuple[str, ...]

    @property
    def survives(self) -> bool:
        """Whether everything that can be read now could still be."""
        return not self.lost


def holders_from_bitmaps(
    bitmaps: Mapping[str, bytes], shard_count: int
) -> tuple[frozenset[str], ...]:
    """Who holds each of a manifest's shards, from one bitmap per node.

    Bits that a bitmap lacks count as unset, those past the last shard are ignored
    (`ckptd.core.bitmaps`).
    """
    nodes = sorted(bitmaps)
    columns = [unpack(bitmaps[node], shard_count) for node in nodes]
    known: dict[tuple[bool, ...], frozenset[str]] = {}  # 100,000 shards are on few different sets
    rows = []
    for bits in zip(*columns, strict=True) if columns else ((),) * shard_count:
        if bits not in known:
            known[bits] = frozenset(node for node, bit in zip(nodes, bits, strict=True) if bit)
        rows.append(known[bits])
    return tuple(rows)


def assess(
    holdings: Holdings, machines: Mapping[str, MachineKey], *, all_answered: bool
) -> Assessment:
    """How safe a version is.

    `machines` tells nodes on one machine apart from others; a node that is not in it counts as a
    machine of its own. `all_answered` is whether every remembered, not forgotten node that could
    hold copies was asked and answered: only then is something that nobody has really lost.
    """
    manifest_copies = _machine_count(holdings.manifest, machines)
    anywhere: dict[frozenset[str], int] = {}
    counted: dict[frozenset[str], int] = {}
    for holders in set(holdings.shards):
        anywhere[holders] = _machine_count(holders, machines)
        counted[holders] = _machine_count(holders & holdings.manifest, machines)
    lost = sum(not anywhere[holders] for holders in holdings.shards)
    short = sum(counted[holders] < holdings.copies for holders in holdings.shards)
    if lost or not manifest_copies:
        state = State.UNRECOVERABLE if all_answered else State.UNAVAILABLE
    elif short or manifest_copies < min(MANIFEST_COPIES_MIN, holdings.copies):
        state = State.DEGRADED
    else:
        state = State.PROTECTED
    return Assessment(
        state=state,
        min_copies=min(manifest_copies, *anywhere.values()) if anywhere else manifest_copies,
        under_replicated=short - lost,
        lost=lost,
    )


def what_if(
    versions: Mapping[str, Holdings],
    machines: Mapping[str, MachineKey],
    dead: Collection[str],
) -> Outlook:
    """What the death of the nodes `dead` would cost, by version id.

    Only versions that can be read now and have something on these nodes are listed: what is lost or
    degraded already, and not made worse, is no consequence.
    """
    lost: list[str] = []
    degraded: list[str] = []
    for version_id, holdings in versions.items():
        rest = holdings.without(dead)
        if rest == holdings or not _readable(holdings):
            continue
        after = assess(rest, machines, all_answered=True)
        if after.state is State.UNRECOVERABLE:
            lost.append(version_id)
        elif after.state is State.DEGRADED:
            degraded.append(version_id)
    return Outlook(lost=tuple(lost), degraded=tuple(degraded))


def worst(states: Iterable[State]) -> State:
    """The state of a cluster whose versions are in these states; `protected` if there are none.

    A version that is being stored is pending as far as the cluster is concerned.
    """
    found = max(states, key=lambda state: _BADNESS[state], default=State.PROTECTED)
    return State.PENDING if found is State.STORING else found


def _readable(holdings: Holdings) -> bool:
    return bool(holdings.manifest) and all(holdings.shards)


def _machine_count(nodes: Collection[str], machines: Mapping[str, MachineKey]) -> int:
    return len({machines.get(node) or machine_key(node, "", "") for node in nodes})
