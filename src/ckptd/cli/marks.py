"""`ckptd rm`, `undelete`, `pin` and `unpin`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from ckptd.cli.session import on_cluster, session, shared_options
from ckptd.cli.tables import count, printable
from ckptd.errors import Refused, UsageError

if TYPE_CHECKING:
    from ckptd.client.cluster import Cluster
    from ckptd.core.catalogue import VersionHeader

_ASKED_ABOUT_MAX = 20


@click.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME[@VERSION]...")
@click.option("--dry-run", is_flag=True, help="Only tell what would be removed.")
@click.option("--yes", is_flag=True, help="Do not ask. Needed where there is no terminal.")
@shared_options
def rm_command(names: tuple[str, ...], dry_run: bool, yes: bool) -> None:
    """Remove checkpoints: all versions of NAME, or one with NAME@VERSION.

    Asks before it does. What was removed comes back with `ckptd undelete` until the config's
    gc.grace is over and its shards are collected. A pin does not stop rm; it is told when it asks.
    With --json, `deleted` lists NAME@VERSION with all digits.
    """
    from ckptd.client.marks import pinned_among, reference, remove, select_for_removal

    async def select(cluster: Cluster) -> tuple[list[VersionHeader], list[VersionHeader]]:
        catalogue = await cluster.catalogue()
        versions = await select_for_removal(cluster, catalogue, names)
        return versions, pinned_among(catalogue, versions)

    versions, pinned = on_cluster(select)
    deleted = [reference(version) for version in versions]
    if not dry_run:
        if not yes:
            _ask(versions, pinned, names)

        async def remove_selected(cluster: Cluster) -> None:
            # Exactly what was shown: a version that was stored meanwhile stays.
            catalogue = await cluster.catalogue()
            await remove(cluster, catalogue, await select_for_removal(cluster, catalogue, deleted))

        on_cluster(remove_selected)
    title = "would be removed" if dry_run else "removed"

    def text() -> str:
        lines = [f"{title}: {count(len(deleted), 'version')}", *(f"  {name}" for name in deleted)]
        if not dry_run:
            lines.append(f"To take it back: ckptd undelete {deleted[0]}")
        return "\n".join(lines)

    session().emit({"deleted": deleted, "dry_run": dry_run}, text)


def _ask(
    versions: list[VersionHeader], pinned: list[VersionHeader], names: tuple[str, ...]
) -> None:
    """Asks on the terminal. Raises UsageError without one, Refused when the answer is no."""
    if session().as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(
            f"rm would remove {count(len(versions), 'version')} and there is no terminal to ask on",
            next=f"ckptd rm --yes {' '.join(names)}",
        )
    pins = {version.id for version in pinned}
    for version in versions[:_ASKED_ABOUT_MAX]:
        mark = "  (pinned)" if version.id in pins else ""
        click.echo(f"  {printable(version.label)}  {version.created}{mark}", err=True)
    if len(versions) > _ASKED_ABOUT_MAX:
        click.echo(f"  … and {len(versions) - _ASKED_ABOUT_MAX} more", err=True)
    if not click.confirm(f"Remove {count(len(versions), 'version')}?", err=True):
        raise Refused("nothing was removed", next="ckptd rm --dry-run NAME   (shows what would be)")


@click.command("undelete")
@click.argument("name", metavar="NAME[@VERSION]")
@shared_options
def undelete_command(name: str) -> int:
    """Bring a removed version back, as a new version with the same content.

    Without @VERSION the newest removed version of NAME. Works as long as its shards are there:
    they are collected some time after the config's gc.grace. Exit 3 when it came back with fewer
    copies than wanted.
    """
    from msgspec import to_builtins

    from ckptd.client.marks import undelete

    found = on_cluster(lambda cluster: undelete(cluster, name))
    text = f"{found.name}@{found.version[:12]} is back and {found.state}"
    session().emit(to_builtins(found), printable(text))
    return 0 if found.state == "protected" else 3


@click.command("pin")
@click.argument("name", metavar="NAME[@VERSION]")
@shared_options
def pin_command(name: str) -> None:
    """Protect a version from retention until it is unpinned: the newest one of NAME, or one with
    NAME@VERSION or RUN@latest."""
    from ckptd.client.marks import pin

    found = on_cluster(lambda cluster: pin(cluster, name))
    version = found.versions[0]
    session().emit(
        {"name": found.name, "version": version, "pinned": True, "changed": found.changed},
        f"{found.name}@{version[:12]} " + ("is pinned" if found.changed else "was pinned already"),
    )


@click.command("unpin")
@click.argument("name", metavar="NAME[@VERSION]")
@shared_options
def unpin_command(name: str) -> None:
    """Take pins back: those of all versions of NAME, or of one with NAME@VERSION."""
    from ckptd.client.marks import unpin

    found = on_cluster(lambda cluster: unpin(cluster, name))
    versions = ", ".join(version[:12] for version in found.versions)
    session().emit(
        {
            "name": found.name,
            "versions": list(found.versions),
            "pinned": False,
            "changed": found.changed,
        },
        f"{found.name}: " + (f"unpinned {versions}" if found.changed else "nothing was pinned"),
    )
