"""The command line: `ckptd COMMAND`. Each command's module is imported when it is called."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from typing import Any, Final

import click

from ckptd import __version__
from ckptd.cli.session import Session, report, shared_options, wants_json
from ckptd.errors import CkptdError, UsageError

COMMANDS: Final = {
    "serve": ("ckptd.cli.serve:serve", "run this node"),
    "demo": ("ckptd.cli.demo:demo", "the whole story in under a minute"),
    "local": ("ckptd.cli.local:local", "an embedded cluster on this machine"),
    "config": ("ckptd.cli.config:config", "validate a config"),
    "store": ("ckptd.cli.store:store", "store a checkpoint"),
    "restore": ("ckptd.cli.restore:restore", "bring a checkpoint back"),
    "ls": ("ckptd.cli.listing:ls_command", "list checkpoints"),
    "show": ("ckptd.cli.listing:show_command", "one checkpoint, and where each copy is"),
    "verify": ("ckptd.cli.verify:verify_command", "read and hash every copy"),
    "status": ("ckptd.cli.cluster_state:status_command", "is everything protected"),
    "nodes": ("ckptd.cli.cluster_state:nodes_command", "one row per node"),
    "jobs": ("ckptd.cli.jobs:jobs_command", "background work"),
    "what-if": ("ckptd.cli.cluster_state:what_if_command", "what the death of nodes would cost"),
    "drain": ("ckptd.cli.node_marks:drain_command", "move all copies off a node"),
    "undrain": ("ckptd.cli.node_marks:undrain_command", "let a node take copies again"),
    "maintenance": ("ckptd.cli.node_marks:maintenance_command", "hold repair back for a while"),
    "forget": ("ckptd.cli.node_marks:forget_command", "a node will not come back"),
    "rm": ("ckptd.cli.marks:rm_command", "remove checkpoints"),
    "undelete": ("ckptd.cli.marks:undelete_command", "bring a removed checkpoint back"),
    "pin": ("ckptd.cli.marks:pin_command", "protect a version from retention"),
    "unpin": ("ckptd.cli.marks:unpin_command", "take pins back"),
    "prune": ("ckptd.cli.prune:prune_command", "apply the retention rules now"),
    "doctor": ("ckptd.cli.doctor:doctor_command", "what is wrong, and what to type next"),
    "pki": ("ckptd.cli.pki:pki_commands", "the cluster's CA and certificates"),
    "completion": ("ckptd.cli.completion:completion", "shell completion"),
}


class _Commands(click.Group):
    """Imports a command's module only when it is needed, so that each starts quickly."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            near = difflib.get_close_matches(cmd_name, COMMANDS, n=1)
            if near:
                ctx.fail(f"there is no command {cmd_name!r}; did you mean {near[0]!r}?")
            return None
        _import_structlog_without_rich()
        module, _, attribute = entry[0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[1]) for name, entry in COMMANDS.items()])


def _import_structlog_without_rich() -> None:
    """structlog imports rich where it is installed, for coloured tracebacks that are not used here:
    a quarter of the time that a short command takes, and 5 MiB in a daemon."""
    if "structlog" in sys.modules or "rich" in sys.modules:
        return
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("structlog")
    finally:
        del sys.modules["rich"]


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckptd")
@shared_options
@click.pass_context
def cli(context: click.Context) -> None:
    """Checkpoint storage for machines at home.

    Every finished checkpoint is kept on two machines, verified, and comes back byte for byte.

    \b
    Exit codes: 0 done, 1 failed, 2 usage, 3 done or readable but degraded,
    4 integrity: no good copy is left, 5 not enough nodes reachable.
    """
    context.ensure_object(Session)


def main(arguments: list[str] | None = None) -> None:
    """The console script. Exits with the codes that `ckptd --help` lists."""
    write_whole_texts()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def write_whole_texts() -> None:
    """Puts a buffer below sys.stdout where PYTHONUNBUFFERED has taken it away.

    Without one, Python drops what does not go into a pipe in one piece (a long list with --json).
    Every command flushes at its end.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and isinstance(sys.stdout.buffer, io.RawIOBase):
        sys.stdout = open(  # noqa: SIM115 (it lives as long as the process)
            sys.stdout.fileno(),
            "w",
            encoding=sys.stdout.encoding,
            errors=sys.stdout.errors,
            closefd=False,
        )


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code."""
    as_json = wants_json(arguments)
    try:
        result: Any = cli.main(arguments, prog_name="ckptd", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except CkptdError as error:
        return report(error, as_json=as_json)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "ckptd"
        message = error.format_message()
        return report(UsageError(message, next=f"{where} --help"), as_json=as_json)
    except (click.Abort, KeyboardInterrupt):
        click.echo("ckptd: interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`ckptd ls | head`): say nothing, as others do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    main()
