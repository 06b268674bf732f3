"""`ckptd prune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptd.cli.session import on_cluster, session, shared_options
from ckptd.cli.tables import count, printable, table
from ckptd.errors import UsageError

if TYPE_CHECKING:
    from ckptd.client.prune import Pruned

_KEPT_SHOWN = 20
_DIGITS = 12


@click.command("prune")
@click.option("--dry-run", is_flag=True, help="Only tell what would be dropped and kept, and why.")
@click.option("--confirm", is_flag=True, help="Drop also more than half of the live versions.")
@shared_options
def prune_command(dry_run: bool, confirm: bool) -> None:
    """Apply the retention rules of the coordinator's config now.

    It applies them by itself whenever something was stored. This command does so at once, shows
    what they do (--dry-run), and confirms what waits for a person: rules that drop more than half
    of the live versions are applied only with --confirm. What was dropped comes back with `ckptd
    undelete` until the config's gc.grace is over.
    """
    from msgspec import to_builtins

    from ckptd.client.prune import prune

    if dry_run and confirm:
        raise UsageError("--dry-run and --confirm exclude each other", next="ckptd prune --dry-run")
    found = on_cluster(lambda cluster: prune(cluster, dry_run=dry_run, confirmed=confirm))
    session().emit(to_builtins(found), lambda: _text(found))


def _text(found: Pruned) -> str:
    what = "would be dropped" if found.dry_run else "dropped"
    lines = [f"{what}: {count(found.delete_count, 'version')}"]
    if found.delete:
        lines.append(_table(found, found.delete_count))
    lines.append(f"kept: {count(found.keep_count, 'version')}")
    if found.dry_run and found.keep:
        lines.append(
            table(
                ("NAME", "VERSION", "WHY"),
                [(row.name, row.version[:_DIGITS], row.reason) for row in found.keep[:_KEPT_SHOWN]],
            )
        )
        if found.keep_count > _KEPT_SHOWN:
            lines.append(f"… and {found.keep_count - _KEPT_SHOWN} more (all with --json)")
    if found.waits:
        lines.append("more than half of the live versions: needs ckptd prune --confirm")
    elif found.delete and not found.dry_run:
        first = found.delete[0]
        label = f"{first.name}@{first.version[:_DIGITS]}"
        lines.append(f"To take one back: ckptd undelete {printable(label)}")
    return "\n".join(lines)


def _table(found: Pruned, total: int) -> str:
    rows = [(row.name, row.version[:_DIGITS], row.reason) for row in found.delete]
    text = table(("NAME", "VERSION", "WHY"), rows)
    return text if total <= len(rows) else f"{text}\n… and {total - len(rows)} more"
