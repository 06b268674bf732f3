"""`ckptd completion`: scripts that complete commands and options in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ckptd.cli.session import shared_options


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@shared_options
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a completion script: eval "$(ckptd completion bash)"."""
    script = get_completion_class(shell)
    assert script is not None
    root = context.find_root().command
    click.echo(script(root, {}, "ckptd", "_CKPTD_COMPLETE").source())
