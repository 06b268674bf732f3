"""`ckptd local`: an embedded cluster of real daemons on loopback."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from ckptd.cli.session import session, shared_options
from ckptd.client.local_cluster import DEFAULT_DIRECTORY, LocalCluster

_directory = click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_DIRECTORY,
    show_default=True,
    help="Where the cluster lies.",
)


@click.group()
def local() -> None:
    """An embedded cluster of real daemons on this machine: real TCP, real TLS, its own CA."""


@local.command()
@_directory
@click.option("--nodes", default=4, show_default=True, help="How many workers.")
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="A config key for every node, such as replication.shard_size=4MiB. May be repeated.",
)
@click.option("--print-env", is_flag=True, help="Print only what eval needs.")
@shared_options
def up(directory: Path, nodes: int, settings: tuple[str, ...], print_env: bool) -> None:
    """Start the cluster: whatever is not running, with its data.

    The daemons go on after this command. Use it with: eval "$(ckptd local up --print-env)"

    Things happen sooner than on real machines, unless --set says otherwise: repair.after and
    repair.promise 10s, gc.grace 60s, membership.down 5s, watch.settle_max 5s.
    """
    cluster = LocalCluster(directory)
    running = cluster.up(nodes, settings)
    export = f"export CKPTD_CONFIG={shlex.quote(str(cluster.client_config))}"
    if print_env:
        session().emit(cluster.describe(), export)
        return
    lines = [f"{node.id}  {node.describe()['address']}  pid {node.pid}" for node in running]
    coordinator = cluster.coordinator()
    if coordinator is not None:
        lines.append(f"{coordinator.id}  watches {cluster.watch_root}  pid {coordinator.pid}")
    lines += ["", "To use it in this shell:", f"  {export}", "Then, for example:", "  ckptd status"]
    session().emit(cluster.describe(), "\n".join(lines))


@local.command()
@_directory
@shared_options
def down(directory: Path) -> None:
    """Stop all daemons of the cluster gracefully. Their data stays."""
    stopped = LocalCluster(directory).down()
    session().emit({"stopped": stopped}, f"stopped: {', '.join(stopped) or 'nothing was running'}")
