"""`ckptd demo`: the whole story in under a minute."""

from __future__ import annotations

from pathlib import Path

import click

from ckptd.cli.session import session, shared_options


@click.command()
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, exists=True),
    metavar="PATH",
    help="Use this checkpoint; it is only read. [default: one is made]",
)
@shared_options
def demo(checkpoint: Path | None) -> int:
    """Let an embedded cluster find, store and restore a checkpoint, while machines die.

    Four workers and a coordinator are started on this machine. The checkpoint is copied into the
    watched directory, and stored by itself. One worker is killed with SIGKILL in the middle of
    that, another one in the middle of the restore; then every byte is compared, and the copies that
    the dead node had are made anew by the others. Nothing is left behind.
    """
    from ckptd.client.demo import run_demo

    as_json = session().as_json
    result = session().run(run_demo(checkpoint, lambda line: click.echo(line, err=as_json)))
    if result.byte_identical:
        verdict = (
            f"The restored checkpoint is byte-identical, although {len(result.killed)} of 4 nodes "
            f"were killed\n({result.killed[0]} during the store, {result.killed[1]} during the "
            f"restore). {result.bytes / 1e6:.0f} MB, {result.seconds:.1f} s in all."
        )
    else:
        verdict = "The restored checkpoint is NOT the same: this must not happen, please report it."
    if result.healed:
        verdict += "\nWhat the last one had lies on the living ones again."
    session().emit(result.as_json(), f"\n{verdict}")
    if not result.byte_identical:
        return 4
    return 0 if result.healed else 1
