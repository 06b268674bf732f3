"""`ckptd pki`: the cluster's CA and its certificates by hand, without Ansible."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import click
import msgspec

from ckptd.client import pki
from ckptd.client.recovery import read_code
from ckptd.core.identity import Role
from ckptd.errors import CkptdError, NotFound, UsageError

DEFAULT_DIRECTORY = "~/.config/ckptd/pki"

Result = TypeVar("Result")

_CODE_FILE_MAX_BYTES = 4096
_ATTEMPTS_AT_THE_CODE = 3

_directory_option = click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_DIRECTORY,
    show_default=True,
    help="Where the CA lies.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group("pki")
def pki_commands() -> None:
    """The cluster's CA and certificates, for people who do not use Ansible."""


@pki_commands.command("init")
@_directory_option
@click.option("--cluster", required=True, metavar="NAME", help="The cluster's name.")
@_json_option
def init_command(directory: Path, cluster: str, as_json: bool) -> None:
    """Make the CA of a new cluster, a client, an admin and the recovery bundle.

    Prints the recovery code, once. Nothing that exists is overwritten.
    """
    directory = directory.expanduser()
    code = _reported(as_json, lambda: pki.init_cluster(directory, cluster))
    bundle = directory / pki.BUNDLE_FILE
    if as_json:
        _print_object(
            {
                "cluster": cluster,
                "dir": str(directory),
                "recovery_bundle": str(bundle),
                "recovery_code": code,
            }
        )
        return
    click.echo(
        f"Cluster {cluster}: CA, client and admin are in {directory}\n"
        "\n"
        f"    Recovery code:  {code}\n"
        "\n"
        "Write it on paper now. It is shown this once and kept nowhere. If this machine is lost,\n"
        f"the code and the file {bundle}\n"
        "together bring the CA and the client back; one without the other is worth nothing.\n"
        f"Copy the bundle to every worker, as {pki.BUNDLE_FILE} in its store directory.\n"
        "\n"
        "Next: make a certificate for each node, and carry it there:\n"
        f"    ckptd pki issue worker NODE --dir {directory} --out NODE"
    )


@pki_commands.command("issue")
@click.argument("role")
@click.argument("node_id", metavar="ID")
@_directory_option
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the new files go. [default: the CA's directory]",
)
@_json_option
def issue_command(
    role: str, node_id: str, directory: Path, out: Path | None, as_json: bool
) -> None:
    """Make a key and a certificate for ID.

    ROLE is worker, coordinator, client, admin or monitor. A machine that is both has the ROLE
    worker,coordinator; a person who stores and decides has client,admin.
    """
    directory = directory.expanduser()
    target = None if out is None else out.expanduser()
    issued = _reported(as_json, lambda: pki.issue(directory, _roles(role), node_id, out=target))
    if as_json:
        _print_object(
            {
                "id": node_id,
                "roles": sorted(role.split(",")),
                "ca": str(issued.ca),
                "cert": str(issued.cert),
                "key": str(issued.key),
            }
        )
        return
    click.echo(
        "In the config of this node:\n"
        f"    tls: {{ca: {issued.ca}, cert: {issued.cert}, key: {issued.key}}}"
    )


@pki_commands.command("recover")
@click.option(
    "--bundle",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A copy of recovery.bundle, for instance from a worker's store directory.",
)
@_directory_option
@click.option(
    "--code-file",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Read the recovery code from this file instead of asking for it.",
)
@_json_option
def recover_command(bundle: Path, directory: Path, code_file: Path | None, as_json: bool) -> None:
    """Bring the CA and the client back from a recovery bundle and its code."""
    directory = directory.expanduser()

    def recovered() -> list[Path]:
        code = _asked_code() if code_file is None else _code_in(code_file.expanduser())
        return pki.recover(bundle.expanduser(), code, directory)

    written = [str(path) for path in _reported(as_json, recovered)]
    if as_json:
        _print_object({"dir": str(directory), "files": written})
        return
    click.echo("Recovered:")
    for path in written:
        click.echo(f"    {path}")
    click.echo(
        "The code and the bundle stay valid. The admin's key was not in the bundle; a new one:\n"
        f"    ckptd pki issue admin ID --dir {directory}"
    )


def _roles(text: str) -> set[Role]:
    words = text.split(",")
    if len(set(words)) != len(words):
        raise UsageError(f"{text!r} names a role twice")
    unknown = [word for word in words if word not in Role.__members__.values()]
    if unknown:
        known = ", ".join(role.value for role in Role)
        raise UsageError(f"{unknown[0]!r} is not a role: {known}")
    return {Role(word) for word in words}


def _asked_code() -> str:
    if not sys.stdin.isatty():
        raise UsageError(
            "the recovery code is needed, and there is no terminal to ask on",
            next="ckptd pki recover --bundle FILE --code-file FILE",
        )
    for _ in range(_ATTEMPTS_AT_THE_CODE - 1):
        try:
            return read_code(_typed_code())
        except UsageError as error:
            click.echo(error.message, err=True)
    return read_code(_typed_code())


def _typed_code() -> str:
    # Not hidden: it is long, typed from paper, and whoever sees it lacks the bundle.
    typed: str = click.prompt("Recovery code", err=True)
    return typed


def _code_in(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_CODE_FILE_MAX_BYTES + 1)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from error
    try:
        return read_code(content.decode("ascii"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} holds no recovery code") from error


def _reported(as_json: bool, action: Callable[[], Result]) -> Result:
    try:
        return action()
    except CkptdError as error:
        _fail(error, as_json)


def _fail(error: CkptdError, as_json: bool) -> NoReturn:
    if as_json:
        _print_object(
            {
                "error": {
                    "code": error.exit_code,
                    "kind": error.kind,
                    "message": error.message,
                    "next": error.next,
                }
            }
        )
    else:
        click.echo(f"ckptd: {error.message}", err=True)
        if error.next:
            click.echo(f"next: {error.next}", err=True)
    sys.exit(error.exit_code)


def _print_object(content: dict[str, object]) -> None:
    click.echo(msgspec.json.encode(content).decode())
