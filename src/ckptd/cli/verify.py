"""`ckptd verify`: is every copy still what it was?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptd.cli.session import on_cluster, session, shared_options
from ckptd.cli.tables import count
from ckptd.errors import UsageError

if TYPE_CHECKING:
    from ckptd.client.cluster import Cluster
    from ckptd.client.verification import BadCopy, Verification

_SHOWN_MAX = 20


@click.command("verify")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="All live versions of all checkpoints.")
@shared_options
def verify_command(names: tuple[str, ...], everything: bool) -> int:
    """Read every copy of every shard from its disk, on its node, and hash it there.

    NAME means its newest version, NAME@VERSION and RUN@latest that one. A copy that is bad goes to
    quarantine on its node: it is never served again. A missing copy without a node is one that
    should exist and that no node claims to have.

    \b
    Exit codes: 0 every copy is there and good, 3 a copy is bad or missing while every shard has a
    good one, 4 a shard has no good copy and all nodes answered, 5 a shard has no good copy on the
    nodes that answer, and one that may have it does not.
    """
    if everything == bool(names):
        raise UsageError("verify takes names, or --all", next="ckptd verify --all")
    from msgspec import to_builtins

    from ckptd.cli.progress import shown_progress
    from ckptd.client.verification import verify

    async def work(cluster: Cluster) -> Verification:
        with shown_progress("verify") as progress:
            return await verify(cluster, names, progress=progress)

    found = on_cluster(work)
    session().emit(to_builtins(found), lambda: _text(found))
    return found.exit_code


def _text(found: Verification) -> str:
    lines = [
        f"{count(found.copies_checked, 'copy', 'copies')} of {count(found.shards, 'shard')} read: "
        + ("all are good" if found.ok else "not all is well")
    ]
    lines += _copies("corrupt, now in quarantine", found.corrupt)
    lines += _copies("missing", found.missing)
    if found.silent:
        lines.append(f"did not answer: {', '.join(found.silent)}; next: ckptd nodes")
    for title, references in (
        ("lost, no good copy is left", found.unrecoverable),
        ("unavailable, no good copy on the nodes that answer", found.unavailable),
    ):
        if references:
            lines.append(f"{title}:")
            lines += [f"  {reference}" for reference in references[:_SHOWN_MAX]]
            lines += _rest(len(references))
    if found.exit_code == 3:
        lines.append("Every shard has a good copy: restore delivers the right bytes.")
    return "\n".join(lines)


def _copies(title: str, copies: tuple[BadCopy, ...]) -> list[str]:
    if not copies:
        return []
    rows = [f"  shard {copy.shard} on {copy.node or 'no node'}" for copy in copies[:_SHOWN_MAX]]
    return [f"{title}:", *rows, *_rest(len(copies))]


def _rest(number: int) -> list[str]:
    return [f"  … and {number - _SHOWN_MAX} more: --json lists all"] if number > _SHOWN_MAX else []
