"""Is everything protected: the state of the cluster, its nodes, and what deaths would cost."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct, structs

from ckptd.client.cluster import AbsentNode, Cluster, Node
from ckptd.client.documents import manifests
from ckptd.client.survey import Survey, Surveyed, survey, timestamp
from ckptd.core.availability import EXIT_CODES, State, assess, what_if, worst
from ckptd.core.documents import Manifest
from ckptd.core.machines import MachineKey
from ckptd.core.membership import peer_state
from ckptd.core.room import storable_bytes
from ckptd.core.steward import Standing, steward
from ckptd.errors import NotFound
from ckptd.wire import messages

_STATES: Final = (
    State.PENDING,
    State.STORING,
    State.DEGRADED,
    State.PROTECTED,
    State.UNAVAILABLE,
    State.UNRECOVERABLE,
)


class NodeRow(Struct, frozen=True):
    """A node. Sizes in bytes and the speed in bytes per second are 0 while it does not answer;
    `bytes_free` leaves the reserve alone. `last_seen_s`: seconds since any node heard of it, None
    for never. `reason` says why it is not up."""

    id: str
    address: str
    roles: tuple[str, ...]
    state: str
    bytes_total: int
    bytes_used: int
    bytes_free: int
    write_bytes_per_s: float
    version: str
    last_seen_s: float | None
    zone: str
    reason: str


class ShardCounts(Struct, frozen=True):
    """Counts of distinct shards of live versions. `corrupt` counts the copies in quarantine."""

    total: int = 0
    under_replicated: int = 0
    corrupt: int = 0
    unrecoverable: int = 0


class Pending(Struct, frozen=True):
    """A checkpoint that is seen and not stored yet. `name` is empty when it cannot have one;
    `state` is pending or storing; `bytes` are those seen so far."""

    path: str
    reason: str
    since: str
    name: str = ""
    state: str = State.PENDING.value
    bytes: int = 0


class RepairQueue(Struct, frozen=True):
    """What the steward has to copy, as it found when it last asked. `waiting` says in words what
    it waits for, "" when for nothing."""

    queued_shards: int = 0
    queued_bytes: int = 0
    waiting: str = ""


class ScrubState(Struct, frozen=True):
    oldest_verified_at: str | None = None


class Room(Struct, frozen=True):
    """`bytes_free` on all nodes together, above the reserve; `bytes_storable` is how large a
    checkpoint may be that gets all its copies, and `checkpoints_fit` how many of the size of the
    newest one fit (None while there is none)."""

    bytes_free: int = 0
    bytes_storable: int = 0
    checkpoints_fit: int | None = None


class ClusterStatus(Struct, frozen=True):
    """As `ckptd status` prints it."""

    state: str
    nodes: tuple[NodeRow, ...]
    checkpoints: dict[str, int]
    shards: ShardCounts
    pending: tuple[Pending, ...]
    repair: RepairQueue
    scrub: ScrubState
    room: Room
    steward: str | None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[State(self.state)]


class Forecast(Struct, frozen=True):
    """What the death of `nodes` would cost: NAME@VERSION of what could not be read any more, and
    of what would have too few copies. `survives`: nothing that can be read now would be lost."""

    nodes: tuple[str, ...]
    lost: tuple[str, ...]
    degraded: tuple[str, ...]
    survives: bool


# -- nodes


def node_rows(cluster: Cluster) -> tuple[NodeRow, ...]:
    """All nodes that are known, by id; those whose id is not known come last."""
    rows = [_present(node) for node in cluster.nodes.values()]
    membership = cluster.config.membership
    rows += [
        _absent(node, suspect_s=membership.suspect_s, down_s=membership.down_s)
        for node in cluster.absent.values()
    ]
    rows += [_forgotten(view) for view in (cluster.search.forgotten if cluster.search else ())]
    return tuple(sorted(rows, key=lambda row: (not row.id, row.id, row.address)))


def _present(node: Node) -> NodeRow:
    status = node.status
    return NodeRow(
        id=node.id,
        address=node.control.address,
        roles=node.hello.roles,
        state=status.state,
        bytes_total=status.bytes_total,
        bytes_used=status.bytes_used,
        bytes_free=status.bytes_free,
        write_bytes_per_s=status.write_bytes_per_s,
        version=status.software,
        last_seen_s=0.0,
        zone=node.hello.zone,
        reason=status.failed_reason,
    )


def _absent(node: AbsentNode, *, suspect_s: float, down_s: float) -> NodeRow:
    # A node that others heard of a moment ago is not up for whoever cannot reach it.
    state = peer_state(node.last_seen_s, suspect_s=suspect_s, down_s=down_s)
    return NodeRow(
        id=node.id,
        address=node.address,
        roles=node.roles,
        state="maintenance" if node.in_maintenance else "suspect" if state == "up" else state,
        bytes_total=0,
        bytes_used=0,
        bytes_free=0,
        write_bytes_per_s=0.0,
        version="",
        last_seen_s=node.last_seen_s,
        zone=node.zone,
        reason=node.reason,
    )


def _forgotten(view: messages.PeerView) -> NodeRow:
    return NodeRow(
        id=view.node,
        address=view.address,
        roles=view.roles,
        state="forgotten",
        bytes_total=0,
        bytes_used=0,
        bytes_free=0,
        write_bytes_per_s=0.0,
        version="",
        last_seen_s=None,
        zone=view.zone,
        reason="",
    )


def steward_of(cluster: Cluster) -> str | None:
    """Who plans, of those that answer."""
    return steward(
        Standing(node.id, frozenset(node.hello.roles), None, failed=node.status.state == "failed")
        for node in cluster.nodes.values()
    )


# -- status


async def cluster_status(cluster: Cluster) -> ClusterStatus:
    """Asks all nodes. That none answers is a state (`unreachable`), not an error."""
    counts = dict.fromkeys((state.value for state in _STATES), 0)
    if not cluster.workers:
        return _unreachable(cluster, counts)
    found = await survey(cluster)
    versions = list(found.versions.values())
    counts.update(Counter(version.state.value for version in versions))
    unstored = await cluster.watched()
    states = [State.STORING if u.state == State.STORING.value else State.PENDING for u in unstored]
    counts.update(Counter(state.value for state in states))
    shards = await _count_shards(cluster, found)
    checks = [v.verified_at for v in versions if v.header.shards]
    known = [at for at in checks if at is not None]
    rows = node_rows(cluster)
    return ClusterStatus(
        state=worst([*states, *(version.state for version in versions)]).value,
        nodes=rows,
        checkpoints=counts,
        shards=shards,
        pending=tuple(
            Pending(u.path, u.reason, u.since, u.name, state.value, u.size)
            for u, state in zip(unstored, states, strict=True)
        ),
        repair=_repair_queue(cluster),
        scrub=ScrubState(timestamp(min(known)) if len(known) == len(checks) and known else None),
        room=room_of(cluster, versions),
        steward=steward_of(cluster),
    )


def _repair_queue(cluster: Cluster) -> RepairQueue:
    told = [node.status.repair for node in cluster.nodes.values()]
    view = next((each for each in told if each is not None), None)
    if view is None:
        return RepairQueue()
    return RepairQueue(view.queued_shards, view.queued_bytes, view.waiting)


def _unreachable(cluster: Cluster, counts: dict[str, int]) -> ClusterStatus:
    return ClusterStatus(
        state=State.UNREACHABLE.value,
        nodes=node_rows(cluster),
        checkpoints=counts,
        shards=ShardCounts(),
        pending=(),
        repair=RepairQueue(),
        scrub=ScrubState(),
        room=Room(),
        steward=None,
    )


def room_of(cluster: Cluster, versions: Sequence[Surveyed]) -> Room:
    """The room on the workers that answer. `versions` are newest first."""
    places = [node.candidate for node in cluster.workers if not node.is_draining]
    storable = storable_bytes(places, cluster.config.replication.copies)
    newest = next((v.header.size for v in versions if v.header.size), None)
    return Room(
        bytes_free=sum(place.room_bytes for place in places),
        bytes_storable=storable,
        checkpoints_fit=None if newest is None else storable // newest,
    )


async def _count_shards(cluster: Cluster, found: Survey) -> ShardCounts:
    """Counts each shard once, however many versions share it: as safe as in the version in which
    it is safest."""
    corrupt = sum(node.status.quarantined for node in cluster.workers)
    standing: dict[str, int] = {}
    async for admitted, manifest in manifests(
        cluster, [version.header for version in found.versions.values() if version.header.shards]
    ):
        _note_standing(standing, manifest, found.versions[admitted.id], found.machines)
    ranks = Counter(standing.values())
    return ShardCounts(
        total=len(standing),
        under_replicated=ranks[_SHORT],
        corrupt=corrupt,
        unrecoverable=ranks[_GONE] if found.all_answered else 0,
    )


_GONE: Final = 0
_SHORT: Final = 1
_SAFE: Final = 2


def _note_standing(
    standing: dict[str, int],
    manifest: Manifest,
    version: Surveyed,
    machines: Mapping[str, MachineKey],
) -> None:
    ranks: dict[frozenset[str], int] = {}
    for holders in set(version.holdings.shards):
        alone = structs.replace(version.holdings, shards=(holders,))
        found = assess(alone, machines, all_answered=True)
        short = found.under_replicated and version.state is not State.PROTECTED
        ranks[holders] = _GONE if found.lost else _SHORT if short else _SAFE
    for reference, holders in zip(manifest.shards, version.holdings.shards, strict=False):
        standing[reference.shard] = max(ranks[holders], standing.get(reference.shard, _GONE))


# -- what if


async def forecast(cluster: Cluster, nodes: Sequence[str]) -> Forecast:
    """What the death of `nodes` together would cost. Raises NotFound for an unknown node."""
    check_known(cluster, nodes)
    return forecast_from(await survey(cluster), nodes)


async def forecast_all(cluster: Cluster) -> list[Forecast]:
    """The same for each worker that answers, and for each pair of them."""
    found = await survey(cluster)
    workers = [node.id for node in cluster.workers]
    groups = [*itertools.combinations(workers, 1), *itertools.combinations(workers, 2)]
    return [forecast_from(found, group) for group in groups]


def forecast_from(found: Survey, nodes: Sequence[str]) -> Forecast:
    """As `forecast`, from what is known already."""
    holdings = {version_id: v.holdings for version_id, v in found.versions.items()}
    outlook = what_if(holdings, found.machines, nodes)

    def references(version_ids: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(found.versions[version_id].reference for version_id in version_ids))

    return Forecast(
        nodes=tuple(dict.fromkeys(nodes)),
        lost=references(outlook.lost),
        degraded=references(outlook.degraded),
        survives=outlook.survives,
    )


def check_known(cluster: Cluster, nodes: Collection[str]) -> None:
    """Raises NotFound for the id of a node that nobody knows, with the nearest ones."""
    known = {*cluster.nodes, *(node.id for node in cluster.absent.values() if node.id)}
    for node in nodes:
        if node not in known:
            near = difflib.get_close_matches(node, sorted(known)) or sorted(known)
            hint = f"; there are {', '.join(near)}" if near else ""
            raise NotFound(f"there is no node {node}{hint}", next="ckptd nodes")
