"""`ckptd drain`, `undrain`, `maintenance` and `forget`: what an admin decides about a node."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ckptd.cli.cluster_state import forecast_text
from ckptd.cli.session import on_cluster, session, shared_options
from ckptd.cli.tables import count, printable
from ckptd.core.quantities import parse_duration
from ckptd.errors import Refused, UsageError

if TYPE_CHECKING:
    from ckptd.client.cluster import Cluster
    from ckptd.client.node_marks import Farewell, Marked

_SHOWN_MAX = 10


@click.command("drain")
@click.argument("node", metavar="NODE")
@shared_options
def drain_command(node: str) -> None:
    """Move all copies off a node, so that it can be taken out.

    It takes no new copies from now on, and the others get those that it has. Type it again to see
    how many are left; with none left, the node can be switched off and forgotten. `ckptd undrain`
    takes it back. Needs an admin's certificate.
    """
    from ckptd.client.node_marks import drain

    found = on_cluster(lambda cluster: drain(cluster, node))
    left = found.copies_left or 0
    if left:
        text = f"{node} is draining: {count(left, 'shard')} still need its copies\n"
        text += f"To see how many are left: ckptd drain {node}"
    else:
        text = f"{node} is draining, and nothing needs its copies any more\n"
        text += f"It may go: ckptd forget {node}"
    session().emit(_told(found), text)


@click.command("undrain")
@click.argument("node", metavar="NODE")
@shared_options
def undrain_command(node: str) -> None:
    """Take a drain back: the node takes copies again. Needs an admin's certificate."""
    from ckptd.client.node_marks import undrain

    found = on_cluster(lambda cluster: undrain(cluster, node))
    word = "takes copies again" if found.changed else "was not draining"
    session().emit(_told(found), f"{node} {word}; it is {found.state}")


@click.command("maintenance")
@click.argument("node", metavar="NODE")
@click.option(
    "--for",
    "duration",
    required=True,
    metavar="DURATION",
    help="How long, at most 24h: 30m, 2h. 0s ends it.",
)
@shared_options
def maintenance_command(node: str, duration: str) -> None:
    """Hold repair back while somebody works on a node.

    What it holds still counts while it is away, and is not copied anew. It ends by itself, or with
    `--for 0s`. Needs an admin's certificate.
    """
    from ckptd.client.node_marks import maintain

    try:
        seconds = parse_duration(duration)
    except ValueError as error:
        raise UsageError(f"--for {duration}: {error}", next="ckptd maintenance --help") from error
    found = on_cluster(lambda cluster: maintain(cluster, node, seconds))
    if not seconds:
        text = f"maintenance of {node} is over; it is {found.state}"
    else:
        text = f"{node} is in maintenance for {duration}: its copies are not replaced meanwhile"
    session().emit({**_told(found), "seconds": seconds}, text)


@click.command("forget")
@click.argument("node", metavar="NODE")
@click.option("--dry-run", is_flag=True, help="Only tell what it would cost.")
@click.option("--yes", is_flag=True, help="Also if something is lost by it. Do not ask.")
@shared_options
def forget_command(node: str, dry_run: bool, yes: bool) -> None:
    """Declare that a node will not come back.

    Prints first what would be lost, as `ckptd what-if`. Its certificates are refused by every node
    from then on, for ever: it cannot come back, but a new machine may bear its id. Copies that only
    it may hold count as lost. When something is lost by it, it asks, and needs --yes where there is
    no terminal. Needs an admin's certificate.
    """
    from msgspec import to_builtins

    from ckptd.client.node_marks import consider_forgetting, forget

    cost = on_cluster(lambda cluster: consider_forgetting(cluster, node))
    if not session().as_json:
        click.echo(_cost(cost))
    result: dict[str, Any] = {
        "node": node,
        "copies_left": cost.copies_left,
        "what_if": to_builtins(cost.what_if),
        "unreadable": list(cost.unreadable),
        "dry_run": dry_run,
    }
    if dry_run:
        state = on_cluster(lambda cluster: _state(cluster, node))
        session().emit({**result, "state": state}, "")
        return
    if not cost.is_safe and not yes:
        _ask(cost)
    found = on_cluster(lambda cluster: forget(cluster, cost))
    word = "is forgotten: its certificates are refused" if found.changed else "was so already"
    session().emit({**result, "state": found.state}, f"{node} {word}")


def _told(found: Marked) -> dict[str, Any]:
    told = {"node": found.node, "state": found.state, "changed": found.changed}
    return told if found.copies_left is None else {**told, "copies_left": found.copies_left}


async def _state(cluster: Cluster, node: str) -> str:
    from ckptd.client.cluster_status import node_rows

    return next((row.state for row in node_rows(cluster) if row.id == node), "down")


def _cost(cost: Farewell) -> str:
    lines = [forecast_text(cost.what_if)]
    if cost.unreadable:
        lines.append(f"cannot be read now, {cost.node} may have the only copies:")
        lines += [f"  {printable(each)}" for each in cost.unreadable[:_SHOWN_MAX]]
        if len(cost.unreadable) > _SHOWN_MAX:
            lines.append(f"  … and {len(cost.unreadable) - _SHOWN_MAX} more: --json lists all")
    if cost.copies_left:
        lines.append(f"{count(cost.copies_left, 'shard')} would have too few copies")
    return "\n".join(lines)


def _ask(cost: Farewell) -> None:
    """Asks on the terminal. Raises Refused when the answer is no, or without a terminal."""
    node = cost.node
    if session().as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise Refused(
            f"forgetting {node} would lose checkpoints: drain it first if it still runs",
            next=f"ckptd drain {node}   (or, if it is gone for good: ckptd forget --yes {node})",
        )
    if not click.confirm(f"Forget {node} and lose these?", err=True):
        raise Refused("nothing was changed", next=f"ckptd drain {node}")
