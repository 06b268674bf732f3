"""`ckptd ls` and `ckptd show`: which checkpoints there are, and where each copy is."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from ckptd.cli.session import on_cluster, session, shared_options
from ckptd.cli.tables import count, moment, printable, size, table

if TYPE_CHECKING:
    from ckptd.client.listing import Checkpoint, CheckpointDetails, VersionDetails

_TENSORS_SHOWN_MAX = 20
_METRICS_SHOWN_MAX = 2


@click.command("ls")
@click.argument("run", required=False)
@click.option("--all-versions", is_flag=True, help="Also the older versions of each name.")
@shared_options
def ls_command(run: str | None, all_versions: bool) -> None:
    """List the checkpoints: one row for each name, with its newest version.

    With RUN only the checkpoints below it. COPIES is the number of machines that confirmed the
    rarest shard now; VERIFIED tells when the copy whose check is the oldest was last read from its
    disk and hashed. Times are UTC.

    \b
    States: pending       a coordinator sees it, but it is not complete or at rest: ckptd status
            storing       it is being stored
            protected     every shard has the wanted copies
            degraded      readable, but a copy is missing
            unavailable   a node that may hold a shard does not answer
            unrecoverable a shard is on no node, and all have answered
    """
    from msgspec import to_builtins

    from ckptd.client.listing import list_checkpoints

    rows = on_cluster(lambda cluster: list_checkpoints(cluster, run, all_versions=all_versions))
    session().emit({"checkpoints": to_builtins(rows)}, lambda: _listing(rows, all_versions))


def _listing(rows: list[Checkpoint], all_versions: bool) -> str:
    if not rows:
        return "No checkpoints yet. Store one with: ckptd store PATH"
    return table(
        ("NAME", "VERSION", "CREATED", "SIZE", "FILES", "STATE", "COPIES", "VERIFIED", ""),
        [
            (
                row.name,
                row.version[:12] or "-",
                moment(row.created),
                size(row.bytes),
                str(row.files),
                row.state,
                str(row.min_copies),
                moment(row.verified_at),
                ", ".join(_remarks(row)),
            )
            for row in rows
        ],
        right=(3, 4, 6),
    )


def _remarks(row: Checkpoint) -> list[str]:
    evaluated = sorted(row.metrics, key=lambda name: (not name.startswith("eval"), name))
    shown = [f"{printable(name)}={row.metrics[name]:g}" for name in evaluated[:_METRICS_SHOWN_MAX]]
    return [
        *(["pinned"] if row.pinned else []),
        *([] if row.finite else ["loss is not finite: never @best or @latest"]),
        *([] if row.step is None else [f"step {row.step}"]),
        *shown,
    ]


@click.command("show")
@click.argument("name")
@shared_options
def show_command(name: str) -> None:
    """Show one checkpoint: versions, files, tensors, and where each copy is.

    NAME shows all versions, with the files and tensors of the newest; NAME@VERSION (8 or more hex
    digits) and RUN@latest show one. With --json each shard is listed with the nodes that have it.
    """
    from msgspec import to_builtins

    from ckptd.client.listing import show_checkpoint

    found = on_cluster(lambda cluster: show_checkpoint(cluster, name))
    session().emit(to_builtins(found), lambda: _details(found))


def _details(found: CheckpointDetails) -> str:
    blocks = [printable(found.name)]
    blocks += [_version(version) for version in found.versions]
    blocks.append(
        table(
            ("FILE", "SIZE", "MODE", "SHA-256"),
            [
                (file.path, size(file.bytes), f"{file.mode:04o}", file.sha256)
                for file in found.files
            ],
            right=(1,),
        )
    )
    if found.tensors_error:
        blocks.append(f"The list of tensors cannot be read: {printable(found.tensors_error)}")
    elif found.tensors:
        shown = found.tensors[:_TENSORS_SHOWN_MAX]
        text = table(
            ("TENSOR", "DTYPE", "SHAPE", "FILE"),
            [(t.name, t.dtype, "×".join(map(str, t.shape)) or "scalar", t.file) for t in shown],
        )
        more = len(found.tensors) - len(shown)
        blocks.append(text + (f"\n… and {more} more: ckptd show NAME --json" if more else ""))
    return "\n\n".join(blocks)


def _version(version: VersionDetails) -> str:
    sets = Counter(shard.nodes for shard in version.shards)
    sizes: Counter[tuple[str, ...]] = Counter()
    for shard in version.shards:
        sizes[shard.nodes] += shard.bytes
    facts = [
        f"version {version.version}{'  (pinned)' if version.pinned else ''}",
        f"  {version.state}, {count(version.min_copies, 'copy', 'copies')}, {size(version.bytes)}, "
        f"created {moment(version.created)} UTC on {printable(version.host)}",
    ]
    if version.step is not None:
        facts.append(f"  step {version.step}")
    facts += [f"  {printable(name)} = {value:g}" for name, value in sorted(version.metrics.items())]
    facts.append(f"  manifest on {', '.join(version.manifest_nodes) or 'no node that answers'}")
    facts += [
        f"  {count(number, 'shard')} ({size(sizes[nodes])}) on "
        f"{', '.join(nodes) or 'no node that answers'}"
        for nodes, number in sorted(sets.items())
    ]
    return "\n".join(facts)
