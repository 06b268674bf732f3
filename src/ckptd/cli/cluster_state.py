"""`ckptd status`, `ckptd nodes` and `ckptd what-if`: how the cluster is, and how it would be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptd.cli.session import on_cluster, session, shared_options
from ckptd.cli.tables import count, duration, moment, printable, size, table
from ckptd.errors import UsageError

if TYPE_CHECKING:
    from ckptd.client.cluster_status import ClusterStatus, Forecast, NodeRow

_SHOWN_MAX = 10

_ADVICE = {
    "degraded": "some checkpoints have fewer copies than wanted. See which and where: ckptd ls",
    "unavailable": "nodes that may hold the only copies do not answer. See which: ckptd nodes",
    "unrecoverable": "shards have no good copy left. See which: ckptd verify --all",
    "unreachable": "no node answers. Find out why: ckptd doctor",
}


@click.command("status")
@shared_options
def status_command() -> int:
    """Tell whether everything is protected.

    A node that is down still counts until the config's repair.after has passed since it was last
    seen, for versions that are older than that; a version that cannot be read now is called
    unavailable at once.

    \b
    Exit codes: 0 protected or pending, 3 degraded, 4 unrecoverable,
    5 unavailable or unreachable.
    """
    from msgspec import to_builtins

    from ckptd.client.cluster_status import cluster_status

    found = on_cluster(cluster_status)
    session().emit(to_builtins(found), lambda: _status(found))
    return found.exit_code


def _status(found: ClusterStatus) -> str:
    waiting = ("pending", "storing")
    total = sum(n for state, n in found.checkpoints.items() if state not in waiting)
    states = ", ".join(f"{number} {state}" for state, number in found.checkpoints.items() if number)
    nodes = [row for row in found.nodes if row.state != "forgotten"]
    up = sum(row.state == "up" for row in nodes)
    room = found.room
    fit = "" if room.checkpoints_fit is None else f", {room.checkpoints_fit} more like the newest"
    lines = [
        f"{found.state}: {count(total, 'version')}{f' ({states})' if states else ''}",
        f"nodes: {up} of {len(nodes)} up"
        + "".join(f"; {row.id or row.address} {row.state}" for row in nodes if row.state != "up"),
        f"shards: {found.shards.total}, {found.shards.under_replicated} with too few copies, "
        f"{found.shards.unrecoverable} lost; {found.shards.corrupt} bad copies in quarantine",
        f"room: {size(room.bytes_storable)} of checkpoints with all copies{fit}",
        f"oldest check of a copy: {moment(found.scrub.oldest_verified_at)}",
    ]
    if found.repair.queued_shards:
        copies = size(found.repair.queued_bytes)
        lines.append(f"repair: {count(found.repair.queued_shards, 'shard')}, {copies} to copy")
    if found.repair.waiting:
        lines.append(f"repair waits: {printable(found.repair.waiting)}")
    for pending in found.pending[:_SHOWN_MAX]:
        lines.append(f"{pending.state}: {printable(pending.path)}: {printable(pending.reason)}")
    if len(found.pending) > _SHOWN_MAX:
        lines.append(f"… and {len(found.pending) - _SHOWN_MAX} more: --json lists all")
    if found.state in _ADVICE:
        lines.append(_ADVICE[found.state])
    return "\n".join(lines)


@click.command("nodes")
@shared_options
def nodes_command() -> None:
    """List the nodes: state, room, speed, and when they were last seen.

    FREE leaves the reserve alone. WRITE is what the node measured while it stored shards.
    """
    from msgspec import to_builtins

    from ckptd.client.cluster import Cluster
    from ckptd.client.cluster_status import node_rows

    async def rows(cluster: Cluster) -> tuple[NodeRow, ...]:
        found = node_rows(cluster)
        if not found:
            cluster.require_nodes()  # says where it was looked for them
        return found

    found = on_cluster(rows)
    session().emit({"nodes": to_builtins(found)}, lambda: _nodes(found))


def _nodes(rows: tuple[NodeRow, ...]) -> str:
    text = table(
        ("NODE", "ADDRESS", "ROLES", "STATE", "USED", "FREE", "TOTAL", "WRITE", "VERSION", "SEEN"),
        [
            (
                row.id or "?",
                row.address,
                ",".join(row.roles),
                row.state,
                *_sizes(row),
                f"{size(row.write_bytes_per_s)}/s" if row.write_bytes_per_s else "-",
                row.version or "-",
                _seen(row),
            )
            for row in rows
        ],
        right=(4, 5, 6, 7),
    )
    reasons = [f"{row.id or row.address}: {printable(row.reason)}" for row in rows if row.reason]
    if reasons:
        reasons.append("Find out more: ckptd doctor")
    return "\n".join([text, *reasons])


def _seen(row: NodeRow) -> str:
    if row.state == "forgotten":
        return "-"
    if row.last_seen_s is None:
        return "never"
    return "now" if row.last_seen_s == 0 else f"{duration(row.last_seen_s)} ago"


def _sizes(row: NodeRow) -> tuple[str, str, str]:
    if not row.bytes_total:
        return ("-", "-", "-")
    return (size(row.bytes_used), size(row.bytes_free), size(row.bytes_total))


@click.command("what-if")
@click.argument("nodes", nargs=-1, metavar="[NODE]...")
@shared_options
def what_if_command(nodes: tuple[str, ...]) -> None:
    """Tell what would be lost or degraded if these nodes died now, all together.

    Without NODE: for every single node, and for every pair. Only copies that nodes confirm now
    are counted. With --json and without NODE, `forecasts` holds one object for each.
    """
    from msgspec import to_builtins

    from ckptd.client.cluster_status import forecast, forecast_all

    if nodes:
        found = on_cluster(lambda cluster: forecast(cluster, nodes))
        session().emit(to_builtins(found), lambda: forecast_text(found))
        return
    forecasts = on_cluster(forecast_all)
    if not forecasts:
        raise UsageError("there is no node to ask about", next="ckptd nodes")
    result = {
        "nodes": [],
        "lost": [],
        "degraded": [],
        "survives": True,
        "forecasts": to_builtins(forecasts),
    }
    session().emit(result, lambda: _forecasts(forecasts))


def forecast_text(found: Forecast) -> str:
    """What the death of nodes would cost, in words."""
    verdict = "nothing would be lost" if found.survives else "checkpoints would be lost"
    lines = [f"If {' and '.join(found.nodes)} died now, {verdict}."]
    for title, references in (("lost", found.lost), ("degraded", found.degraded)):
        if references:
            lines.append(f"{title}: {count(len(references), 'version')}")
            lines += [f"  {_short(reference)}" for reference in references[:_SHOWN_MAX]]
            if len(references) > _SHOWN_MAX:
                lines.append(f"  … and {len(references) - _SHOWN_MAX} more: --json lists all")
    return "\n".join(lines)


def _forecasts(forecasts: list[Forecast]) -> str:
    return table(
        ("IF THESE DIED", "SURVIVES", "LOST", "DEGRADED"),
        [
            (
                " and ".join(found.nodes),
                "yes" if found.survives else "no",
                str(len(found.lost)),
                str(len(found.degraded)),
            )
            for found in forecasts
        ],
        right=(2, 3),
    )


def _short(reference: str) -> str:
    name, _, version = reference.rpartition("@")
    return f"{name}@{version[:12]}"
