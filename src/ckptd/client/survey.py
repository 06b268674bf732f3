"""What the cluster holds now: every node that answers is asked who has what, once, for all
questions about versions (`ls`, `show`, `status`, `what-if`).

Nothing is known of what an absent node holds, as that is recorded nowhere. A reboot must raise no
alarm, so copies that are missing are presumed to be on nodes that were seen less than
`repair.after` ago and were there before the version was written. A presumption only ever turns
`degraded` into `protected`: what cannot be read now is called unavailable at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

from msgspec import Struct, structs

from ckptd.client.cluster import AbsentNode, Cluster, Inventoried
from ckptd.core.availability import Assessment, Holdings, State, assess, holders_from_bitmaps
from ckptd.core.catalogue import Catalogue, VersionHeader
from ckptd.core.machines import MachineKey

Select: TypeAlias = Callable[[Catalogue], list[VersionHeader]]


class Surveyed(Struct, frozen=True):
    """A version, who holds it, and how safe that makes it. `verified_at` is the time in seconds
    since the epoch when that copy was hashed from disk whose check is the oldest, None unless all
    copies were since their nodes' start."""

    header: VersionHeader
    holdings: Holdings
    assessment: Assessment
    verified_at: float | None

    @property
    def state(self) -> State:
        return self.assessment.state

    @property
    def reference(self) -> str:
        """NAME@VERSION with all digits."""
        return f"{self.header.name}@{self.header.id}"


@dataclass(frozen=True)
class Survey:
    """The catalogue and the versions that were asked for. `machines` says which nodes die
    together; `all_answered` whether what nobody has is lost."""

    catalogue: Catalogue
    versions: dict[str, Surveyed]
    machines: dict[str, MachineKey]
    all_answered: bool


async def survey(
    cluster: Cluster, select: Select = Catalogue.live_versions, *, now: float | None = None
) -> Survey:
    """Asks all nodes who has what of the versions that `select` picks (default: all live ones).

    `now` is the wall clock in seconds (default: this machine's). Raises NotEnoughNodes when no
    worker answers.
    """
    catalogue = await cluster.catalogue()
    return await survey_versions(cluster, catalogue, select(catalogue), now=now)


async def survey_versions(
    cluster: Cluster,
    catalogue: Catalogue,
    versions: Sequence[VersionHeader],
    *,
    now: float | None = None,
) -> Survey:
    """As `survey`, for a catalogue that is known already."""
    inventory = await cluster.inventory(list(versions))
    cluster.require_nodes()  # some may have gone while they were asked
    now = time.time() if now is None else now
    machines = machines_of(cluster)
    all_answered = not silent_workers(cluster)
    suspicious = {node.id for node in cluster.workers if node.status.quarantined}
    found = {}
    for header in versions:
        answers = inventory[header.id]
        holdings = holdings_of(header, answers, copies=cluster.config.replication.copies)
        presumed: list[str] = []
        if suspicious.isdisjoint(holdings.manifest):
            presumed = presumed_nodes(
                cluster.absent.values(),
                header.order,
                now_ms=int(now * 1000),
                repair_after_s=cluster.config.repair.after_s,
            )
        found[header.id] = Surveyed(
            header=header,
            holdings=holdings,
            assessment=judge(holdings, machines, all_answered=all_answered, presumed=presumed),
            verified_at=verified_at(answers, now),
        )
    return Survey(catalogue, found, machines, all_answered)


def machines_of(cluster: Cluster) -> dict[str, MachineKey]:
    """By node id, what is equal for nodes that die together."""
    return {node.id: node.machine for node in cluster.nodes.values()}


def silent_workers(cluster: Cluster) -> list[str]:
    """Members that may hold copies and did not say so, by id (by address while that is unknown):
    they are absent, or their disk has failed."""
    absent = [
        node.id or node.address
        for node in cluster.absent.values()
        if not node.roles or "worker" in node.roles
    ]
    failed = [
        node.id
        for node in cluster.nodes.values()
        if "worker" in node.hello.roles and node.status.state == "failed"
    ]
    return sorted([*absent, *failed])


def holdings_of(
    header: VersionHeader, answers: Mapping[str, Inventoried | None], *, copies: int
) -> Holdings:
    """Who holds a version according to the nodes' answers. `copies` is the cluster's setting; a
    manifest may want more."""
    present = {node: answer.bitmap for node, answer in answers.items() if answer is not None}
    return Holdings(
        copies=max(copies, header.copies),
        manifest=frozenset(present),
        shards=holders_from_bitmaps(present, header.shards),
    )


def presumed_nodes(
    absent: Collection[AbsentNode], order: int, *, now_ms: int, repair_after_s: float
) -> list[str]:
    """Absent nodes that may be presumed to keep a copy of the version with this `order`.

    Those are the ones seen less than `repair_after_s` ago or in maintenance, and after the version
    was written: what was stored without a node is not on it. Orders are milliseconds of a clock, or
    above it; one that runs ahead presumes nothing.
    """
    return [
        node.id
        for node in absent
        if node.id
        and (not node.roles or "worker" in node.roles)
        and node.last_seen_s is not None
        and (node.in_maintenance or node.last_seen_s < repair_after_s)
        and order < now_ms - node.last_seen_s * 1000
    ]


def judge(
    holdings: Holdings,
    machines: Mapping[str, MachineKey],
    *,
    all_answered: bool,
    presumed: Collection[str] = (),
) -> Assessment:
    """As `ckptd.core.availability.assess`, with missing copies presumed on the nodes `presumed`.

    Each of them stands for one copy of each shard at most. The number of copies that is told stays
    that of the confirmed ones.
    """
    confirmed = assess(holdings, machines, all_answered=all_answered)
    if confirmed.state is not State.DEGRADED or not presumed:
        return confirmed
    known: dict[frozenset[str], frozenset[str]] = {}
    hoped_for = Holdings(
        copies=holdings.copies,
        manifest=holdings.manifest.union(presumed),
        shards=tuple(
            known.setdefault(holders, holders.union(presumed)) for holders in holdings.shards
        ),
    )
    if assess(hoped_for, machines, all_answered=all_answered).state is not State.PROTECTED:
        return confirmed
    return structs.replace(confirmed, state=State.PROTECTED, under_replicated=0)


def verified_at(answers: Mapping[str, Inventoried | None], now: float) -> float | None:
    """When the copy whose check is the oldest was checked; None when one was not, as far as its
    node knows, or there is none."""
    ages = [
        answer.verified_age_s
        for answer in answers.values()
        if answer is not None and any(answer.bitmap)
    ]
    if not ages or min(ages) < 0:
        return None
    return now - max(ages)


def timestamp(seconds: float | None) -> str | None:
    """RFC 3339 in UTC, to the second, of seconds since the epoch."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
