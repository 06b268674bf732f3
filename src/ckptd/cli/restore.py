"""`ckptd restore`: bring a checkpoint back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from ckptd.cli.progress import shown_progress
from ckptd.cli.session import session, shared_options
from ckptd.cli.tables import size
from ckptd.config import Config, find_config
from ckptd.core.names import parse_selector

if TYPE_CHECKING:
    from ckptd.client.restore import RestoreResult


class _Wanted(TypedDict):
    """What is to be restored, and where to: the options of both ways to do it."""

    to: Path | None
    files: tuple[str, ...]
    tensors: tuple[str, ...]
    force: bool


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
def restore(name: str, stores: tuple[Path, ...], **wanted: Unpack[_Wanted]) -> None:
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
    parse_selector(name)  # before anybody is asked
    if stores:
        restoring = _from_stores(name, stores, _config_if_any(), wanted)
    else:
        restoring = _from_nodes(name, session().config(), wanted)
    result = session().run(restoring)
    session().emit(result.as_json(), _text(result))


async def _from_nodes(name: str, config: Config, wanted: _Wanted) -> RestoreResult:
    from ckptd.client.connect import connect
    from ckptd.client.restore import restore

    with shown_progress(f"restore {name}") as progress:
        async with connect(config) as cluster:
            return await restore(cluster, name, **wanted, progress=progress)


async def _from_stores(
    name: str, stores: tuple[Path, ...], config: Config | None, wanted: _Wanted
) -> RestoreResult:
    from ckptd.client.restore import restore_from_stores

    with shown_progress(f"restore {name}") as progress:
        return await restore_from_stores(stores, name, config=config, **wanted, progress=progress)


def _config_if_any() -> Config | None:
    found = find_config(session().config_flag, os.environ, Path.home())
    return None if found is None else session().config()


def _text(result: RestoreResult) -> str:
    lines = [
        f"{result.name}@{result.version[:12]} is in {result.to}: {size(result.bytes)} in "
        f"{result.seconds:.1f} s, every byte verified"
    ]
    if result.sources:
        places = (f"{place} {size(part)}" for place, part in result.sources.items())
        lines.append(f"from {', '.join(places)}")
    if result.fallbacks:
        lines.append(f"{result.fallbacks} times another copy was used; next: ckptd status")
    return "\n".join(lines)
