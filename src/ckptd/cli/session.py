"""What all commands share: --config and --json before or after the command, errors, output.

With --json a command prints one JSON object on stdout and nothing else there. Everything for
people goes to stdout as text, progress and logs go to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptd.config import Config, find_config, load
from ckptd.errors import CkptdError, ConfigError

if TYPE_CHECKING:
    from ckptd.client.cluster import Cluster

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


@dataclass
class Session:
    """One invocation of the command line."""

    config_flag: str | None = None
    as_json: bool = False

    def config_path(self) -> Path:
        """The config file to use. Raises ConfigError when there is none."""
        path = find_config(self.config_flag, os.environ, Path.home())
        if path is None:
            raise ConfigError(
                "",
                "no config: neither --config nor CKPTD_CONFIG is given, and neither "
                "~/.config/ckptd/ckptd.yml nor /etc/ckptd/ckptd.yml is there",
                next="ckptd local up   (to try it out on this machine)",
            )
        return path

    def config(self) -> Config:
        """The config, read and checked. Raises ConfigError."""
        return load(self.config_path())

    def emit(self, result: Mapping[str, Any], text: str | Callable[[], str]) -> None:
        """Prints the result: as JSON if that is wanted, else `text` (made only then)."""
        if self.as_json:
            click.echo(json.dumps(result, ensure_ascii=True))
            return
        text = text if isinstance(text, str) else text()
        if text:
            click.echo(text)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs asynchronous work to its end. Logs go to stderr, errors only unless CKPTD_LOG
        names another level."""
        from ckptd.net.loop import run
        from ckptd.observe import logs

        logs.configure(os.environ.get("CKPTD_LOG", "error"))
        return run(work)


def session() -> Session:
    """The session of the command that runs now."""
    found = click.get_current_context().find_object(Session)
    assert found is not None, "the top group makes it"
    return found


def on_cluster(work: Callable[[Cluster], Coroutine[Any, Any, T]]) -> T:
    """Connects to the cluster of the config, runs `work` on it, and returns its result."""
    from ckptd.client.connect import connect

    config = session().config()

    async def connected() -> T:
        async with connect(config) as cluster:
            return await work(cluster)

    return session().run(connected())


def _set_config(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.ensure_object(Session).config_flag = value


def _set_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Session).as_json = True


def shared_options(command: F) -> F:
    """Adds --config and --json to a command; both are taken before and after it."""
    command = click.option(
        "--config",
        metavar="FILE",
        expose_value=False,
        is_eager=True,
        callback=_set_config,
        help="The config file. [default: $CKPTD_CONFIG, ~/.config/ckptd/ckptd.yml, "
        "/etc/ckptd/ckptd.yml]",
    )(command)
    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_json,
        help="Print one JSON object on stdout.",
    )(command)


def report(error: CkptdError, *, as_json: bool) -> int:
    """Prints an error once, with the next command to type; returns the exit code."""
    if as_json:
        body = {
            "code": error.exit_code,
            "kind": error.kind,
            "message": error.message,
            "next": error.next,
        }
        click.echo(json.dumps({"error": body}, ensure_ascii=True))
    else:
        click.echo(f"ckptd: {error.message}", err=True)
        if error.next:
            click.echo(f"  next: {error.next}", err=True)
    return error.exit_code


def wants_json(arguments: list[str]) -> bool:
    """Whether --json was given, for errors that come before the options are parsed."""
    return "--json" in arguments


def is_terminal() -> bool:
    """Whether progress may redraw lines: stderr is a terminal."""
    return sys.stderr.isatty()
