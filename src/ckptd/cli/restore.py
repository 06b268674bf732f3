"""`ckptd restore`: bring a checkpoint back."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ckptd.cli.progress import shown_progress
from ckptd.cli.session import session, shared_options
from ckptd.cli.tables import size
from ckptd.config import Config, find_config
from ckptd.core.names import parse_selector


@click.command()
@click.argument("name")
@click.option(
    "--to",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The directory that becomes the checkpoint. [default: ./LAST_PART of its name]",
)
@click.option(
    "--file",
    "files",
    metavar="GLOB",
    multiple=True,
    help="Only the files whose path matches; * matches / too. May be repeated.",
)
@click.option(
    "--tensor",
    "tensors",
    metavar="GLOB",
    multiple=True,
    help="Only the tensors whose name matches, of all safetensors files, as one safetensors "
    "file: --to FILE.safetensors, else DIR/tensors.safetensors. May be repeated.",
)
@click.option("--force", is_flag=True, help="Replace what is there.")
@click.option(
    "--from",
    "stores",
    metavar="STORE_DIR",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Read this store directory of a mounted disk, without network or daemon. May be repeated.",
)
@shared_options
def restore(
    name: str,
    to: Path | None,
    files: tuple[str, ...],
    tensors: tuple[str, ...],
    force: bool,
    stores: tuple[Path, ...],
) -> None:
    """Restore the checkpoint NAME, byte for byte.

    NAME is a checkpoint (its newest version), NAME@VERSION (the first 8 or more hex digits),
    RUN@latest (the newest complete checkpoint of a run) or RUN@best (the best one by the metric
    that the config's retention names).

    DIR becomes the checkpoint; one of a single file becomes DIR/FILENAME. DIR may be missing or
    empty. With --force, a directory that is there is exchanged in one step and what it was is
    removed; with --file, --tensor, and for checkpoints of a single file, only the files that are
    restored are replaced.

    Shards are pulled from all nodes at once, and each is verified. Bad copies and dead or slow
    nodes are replaced by others. Nothing appears at DIR before every byte is there; a restore
    that was cut off goes on where it stopped.

    \b
    Examples:
      ckptd restore run7/checkpoint-500 --to out
      ckptd restore run7@latest
      ckptd restore llama --file '*.json'
      ckptd restore llama --tensor 'model.layers.0.*' --to layer0.safetensors
      ckptd restore llama --from /mnt/card1/ckptd --from /mnt/card2/ckptd

    Exit 4 when a shard has no good copy and all nodes have answered, 5 when a node that may have
    one does not answer.
    """
    from ckptd.client import restore as engine
    from ckptd.client.cluster import connect

    parse_selector(name)  # before anybody is asked
    config = _config(needed=not stores)

    async def work() -> engine.RestoreResult:
        with shown_progress(f"restore {name}") as progress:
            if stores:
                return await engine.restore_from_stores(
                    stores,
                    name,
                    config=config,
                    to=to,
                    files=files,
                    tensors=tensors,
                    force=force,
                    progress=progress,
                )
            assert config is not None
            async with connect(config) as cluster:
                return await engine.restore(
                    cluster,
                    name,
                    to=to,
                    files=files,
                    tensors=tensors,
                    force=force,
                    progress=progress,
                )

    result = session().run(work())
    places = ", ".join(f"{place} {size(part)}" for place, part in result.sources.items())
    lines = [
        f"{result.name}@{result.version[:12]} is in {result.to}: {size(result.bytes)} in "
        f"{result.seconds:.1f} s, every byte verified"
    ]
    if places:
        lines.append(f"from {places}")
    if result.fallbacks:
        lines.append(f"{result.fallbacks} times another copy was used; next: ckptd status")
    session().emit(result.as_json(), "\n".join(lines))


def _config(*, needed: bool) -> Config | None:
    """The config. Store directories can be read without one: then None when there is none."""
    found = find_config(session().config_flag, os.environ, Path.home())
    return session().config() if needed or found is not None else None
