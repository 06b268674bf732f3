"""Applying retention rules now, or asking what that would do. The rules are those of the
coordinator's config, and it does the work: nobody else may drop versions by a policy.
"""

from __future__ import annotations

from msgspec import Struct

from ckptd.client.cluster import Cluster
from ckptd.core.catalogue import Catalogue
from ckptd.errors import NotEnoughNodes, PeerError, Refused
from ckptd.wire import messages


class PrunedRow(Struct, frozen=True):
    """A version, and why it goes or stays."""

    name: str
    version: str
    reason: str


class Pruned(Struct, frozen=True):
    """What the rules drop and keep, newest first. The lists are cut after
    `limits.PRUNE_ROWS_MAX`; the counts tell all. `waits`: it needs `--confirm`."""

    delete: tuple[PrunedRow, ...]
    keep: tuple[PrunedRow, ...]
    delete_count: int
    keep_count: int
    dry_run: bool
    waits: bool
    coordinator: str


async def prune(cluster: Cluster, *, dry_run: bool, confirmed: bool) -> Pruned:
    """Lets the coordinator apply its rules. Raises NotEnoughNodes when none answers, Refused when
    they drop more than half of the live versions and that is neither confirmed nor a dry run."""
    coordinator, reply = await _ask(cluster, messages.Prune(dry_run, confirmed))
    if reply.waits and not dry_run:
        raise Refused(
            f"the rules drop {reply.delete_count} of {reply.delete_count + reply.keep_count} live "
            "versions, more than half: nothing was removed",
            next="ckptd prune --dry-run   (then ckptd prune --confirm)",
        )
    catalogue = await cluster.catalogue(with_dead=True)
    return Pruned(
        delete=_rows(catalogue, reply.delete),
        keep=_rows(catalogue, reply.keep),
        delete_count=reply.delete_count,
        keep_count=reply.keep_count,
        dry_run=dry_run,
        waits=reply.waits,
        coordinator=coordinator,
    )


async def _ask(cluster: Cluster, request: messages.Prune) -> tuple[str, messages.PruneReply]:
    """The answer of the coordinator that applies the rules: that with the smallest id."""
    for node in cluster.coordinators:
        try:
            reply, _ = await node.control.request(request, messages.PruneReply)
        except PeerError as error:
            if error.kind == "peer_refused":
                raise
            cluster.lose(node, error)
            continue
        return node.id, reply
    raise NotEnoughNodes(
        "no coordinator answers: its config has the retention rules, and it applies them",
        next="ckptd nodes",
    )


def _rows(catalogue: Catalogue, rows: tuple[messages.PruneRow, ...]) -> tuple[PrunedRow, ...]:
    found = []
    for row in rows:
        version_id = row.version.hex()
        header = catalogue.version(version_id)
        found.append(PrunedRow(header.name if header else "?", version_id, row.reason))
    return tuple(found)
