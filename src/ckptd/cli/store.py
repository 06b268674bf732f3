"""`ckptd store`: store a checkpoint now and wait until it is protected."""

from __future__ import annotations

from pathlib import Path

import click

from ckptd.cli.progress import shown_progress
from ckptd.cli.session import session, shared_options
from ckptd.cli.tables import count, size
from ckptd.config import Config
from ckptd.errors import UsageError


def default_name(path: Path, config: Config) -> str:
    """The name of the checkpoint at `path`: relative to its watched root, else its last part."""
    absolute = path.absolute()
    for watched in config.watch:
        if absolute != watched.root and absolute.is_relative_to(watched.root):
            relative = absolute.relative_to(watched.root).as_posix()
            return f"{watched.prefix}/{relative}" if watched.prefix else relative
    name = absolute.resolve().name if path.name in ("", "..") else absolute.name
    if not name:
        raise UsageError(f"{path} has no last part to serve as a name", next="give --name NAME")
    return name


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="Its name. [default: relative to its watched root, else last part]")
@click.option("--copies", type=click.IntRange(1, 8), help="Copies of each shard. [default: config]")
@click.option("--as-is", is_flag=True, help="Take broken safetensors files as plain bytes.")
@shared_options
def store(path: Path, name: str | None, copies: int | None, as_is: bool) -> int:
    """Store the checkpoint at PATH, a directory or a file, and wait until it is protected.

    Nothing is sent twice: shards that the nodes have are only counted, so a store that was cut
    off goes on where it stopped, and equal content makes no new version.

    Exit 3 when it is stored but with fewer copies than wanted (too few nodes answer).
    """
    from ckptd.client.connect import connect
    from ckptd.client.store import StoreResult
    from ckptd.client.store import store as store_checkpoint

    config = session().config()
    wanted_name = default_name(path, config) if name is None else name

    async def work() -> StoreResult:
        async with connect(config) as cluster:
            with shown_progress(f"store {wanted_name}") as progress:
                return await store_checkpoint(
                    cluster, path, name=wanted_name, copies=copies, as_is=as_is, progress=progress
                )

    result = session().run(work())
    lines = [
        f"{result.name}@{result.version[:12]} is {result.state}: "
        f"{size(result.bytes)} in {count(result.shards, 'shard')}, "
        f"{count(result.copies, 'copy', 'copies')}, {result.seconds:.1f} s",
        f"sent {size(result.bytes_sent)}, "
        f"{count(result.shards_deduplicated, 'shard')} there already",
    ]
    if result.state == "degraded":
        lines.append("fewer copies than wanted: too few nodes took one; next: ckptd nodes")
    session().emit(result.as_json(), "\n".join(lines))
    return 0 if result.state == "protected" else 3
