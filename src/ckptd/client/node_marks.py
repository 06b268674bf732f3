"""Draining, maintaining and forgetting nodes: what an admin decides about them.

Each is a signed document; nodes act on it by themselves as soon as they know it.
"""

from __future__ import annotations

import difflib

from msgspec import Struct

from ckptd.client.cluster import Cluster
from ckptd.client.cluster_status import Forecast, forecast_from, node_rows
from ckptd.client.documents import manifests, stamp, write
from ckptd.client.survey import Survey, survey_versions
from ckptd.core import limits
from ckptd.core.availability import State
from ckptd.core.catalogue import Catalogue
from ckptd.core.documents import Drain, Forget, Maintenance, Undrain
from ckptd.core.draining import needed_here
from ckptd.core.quantities import format_duration
from ckptd.errors import NotEnoughNodes, NotFound, Refused, UsageError


class Marked(Struct, frozen=True):
    """A node after a mark. `copies_left` counts the shards that would have too few copies without
    it (None where nobody asked); `state` is that of `ckptd nodes`; `changed` is False when
    everything was so already."""

    node: str
    state: str
    changed: bool
    copies_left: int | None = None


class Farewell(Struct, frozen=True):
    """What forgetting a node costs. `unreadable` lists NAME@VERSION that cannot be read now, which
    the node may hold the only copies of."""

    node: str
    copies_left: int
    what_if: Forecast
    unreadable: tuple[str, ...]
    serials: tuple[str, ...]

    @property
    def is_safe(self) -> bool:
        """Whether nothing is lost by it."""
        return self.what_if.survives and not self.unreadable


async def drain(cluster: Cluster, node: str) -> Marked:
    """Asks a node to give all its copies to others; asked again, tells how far that is.

    Raises NotFound for an unknown node, Refused for one that keeps no copies, NotAuthorized
    without an admin's certificate, NotEnoughNodes when nobody keeps the document.
    """
    catalogue = await _members(cluster, node)
    member = catalogue.members().get(node)
    if member is not None and "worker" not in member.roles:
        raise Refused(f"{node} is no worker: it keeps no copies", next="ckptd nodes")
    draining = catalogue.roster.is_draining(node)
    if not draining:
        mark = Drain(**await stamp(cluster, catalogue), node=node)
        await write(cluster, catalogue, mark)
    found = await survey_versions(cluster, catalogue, catalogue.live_versions())
    left = await _copies_left(cluster, catalogue, found, node)
    return await _marked(cluster, node, changed=not draining, copies_left=left)


async def undrain(cluster: Cluster, node: str) -> Marked:
    """Takes back all drains of a node. Raises as `drain`."""
    catalogue = await _members(cluster, node)
    drains = catalogue.roster.drains(node)
    if drains:
        mark = Undrain(**await stamp(cluster, catalogue), drains=drains[: limits.MARKS_MAX])
        await write(cluster, catalogue, mark)
    return await _marked(cluster, node, changed=bool(drains))


async def maintain(cluster: Cluster, node: str, seconds: float) -> Marked:
    """Somebody works on a node for so long: its copies are not replaced meanwhile. 0 ends it.

    Raises as `drain`, and UsageError for more than limits.MAINTENANCE_MAX_S.
    """
    if not 0 <= seconds <= limits.MAINTENANCE_MAX_S:
        most = format_duration(limits.MAINTENANCE_MAX_S)
        raise UsageError(
            f"maintenance lasts at most {most}, as missing copies are not replaced meanwhile",
            next=f"ckptd maintenance {node} --for {most}",
        )
    catalogue = await _members(cluster, node)
    mark = Maintenance(
        **await stamp(cluster, catalogue),
        node=node,
        seconds=round(seconds),
    )
    await write(cluster, catalogue, mark)
    return await _marked(cluster, node, changed=True)


async def consider_forgetting(cluster: Cluster, node: str) -> Farewell:
    """What it would cost to forget a node. Raises NotFound for an unknown node."""
    serials = _serials(cluster, node)
    catalogue = await _members(cluster, node)
    found = await survey_versions(cluster, catalogue, catalogue.live_versions())
    unreadable = [
        version.reference
        for version in found.versions.values()
        if version.state is State.UNAVAILABLE
    ]
    return Farewell(
        node=node,
        copies_left=await _copies_left(cluster, catalogue, found, node),
        what_if=forecast_from(found, [node]),
        unreadable=tuple(sorted(unreadable)),
        serials=tuple(sorted({*serials, *catalogue.roster.serials(node)})),
    )


async def forget(cluster: Cluster, farewell: Farewell) -> Marked:
    """Declares that a node will not come back: its certificates are refused from now on.

    Raises as `drain`, and NotEnoughNodes when no other worker answers.
    """
    node = farewell.node
    catalogue = await _members(cluster, node)
    roster = catalogue.roster
    known = catalogue.members().get(node) is None and not farewell.serials
    if known and node in roster.forgotten():
        return Marked(node, "forgotten", changed=False, copies_left=farewell.copies_left)
    if not any(other.id != node for other in cluster.workers):
        raise NotEnoughNodes(
            f"no worker besides {node} answers: nobody would keep in mind that it was forgotten",
            next="ckptd nodes",
        )
    mark = Forget(
        **await stamp(cluster, catalogue),
        node=node,
        serials=farewell.serials[: limits.MARKS_MAX],
        drains=roster.drains(node)[: limits.MARKS_MAX],
    )
    await write(cluster, catalogue, mark)
    return Marked(node, "forgotten", changed=True, copies_left=farewell.copies_left)


def _serials(cluster: Cluster, node: str) -> tuple[str, ...]:
    """The certificate with which a node answers now, if it does."""
    found = cluster.nodes.get(node)
    return () if found is None else (found.control.identity.serial,)


async def _members(cluster: Cluster, node: str) -> Catalogue:
    """The catalogue; raises NotFound unless it knows `node`."""
    catalogue = await cluster.catalogue()
    if catalogue.roster.last_said(node) is None and node not in cluster.nodes:
        known = sorted(catalogue.members())
        near = difflib.get_close_matches(node, known) or known
        raise NotFound(f"there is no node {node}; there are {', '.join(near)}", next="ckptd nodes")
    return catalogue


async def _copies_left(cluster: Cluster, catalogue: Catalogue, found: Survey, node: str) -> int:
    """How many distinct shards would have too few copies without `node`."""
    answers = node in {worker.id for worker in cluster.workers}
    needed = {
        version_id: needed_here(
            node,
            version.holdings,
            found.machines,
            leaving=catalogue.roster.draining(),
            answers=answers,
        )
        for version_id, version in found.versions.items()
    }
    wanted = [found.versions[v].header for v, shards in needed.items() if any(shards)]
    left: set[str] = set()
    async for admitted, manifest in manifests(cluster, wanted):
        shards = zip(manifest.shards, needed[admitted.id], strict=False)
        left.update(reference.shard for reference, is_needed in shards if is_needed)
    return len(left)


async def _marked(
    cluster: Cluster, node: str, *, changed: bool, copies_left: int | None = None
) -> Marked:
    """The node as it is once everybody knows of the mark."""
    await cluster.rejoin()
    states = [row.state for row in node_rows(cluster) if row.id == node]
    return Marked(node, states[0] if states else "down", changed, copies_left)
