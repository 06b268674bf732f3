"""`ckptd pki`: the cluster's CA and its certificates by hand, without Ansible."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ckptd.cli.session import session, shared_options
from ckptd.client import pki
from ckptd.client.recovery import read_code
from ckptd.core.identity import Role
from ckptd.errors import NotFound, UsageError

DEFAULT_DIRECTORY = "~/.config/ckptd/pki"

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


@click.group("pki")
def pki_commands() -> None:
    """The cluster's CA and certificates, for people who do not use Ansible."""


@pki_commands.command("init")
@_directory_option
@click.option("--cluster", required=True, metavar="NAME", help="The cluster's name.")
@shared_options
def init_command(directory: Path, cluster: str) -> None:
    """Make the CA of a new cluster, a client, an admin and the recovery bundle.

    Prints the recovery code, once. Nothing that exists is overwritten.
    """
    directory = directory.expanduser()
    code = pki.init_cluster(directory, cluster)
    bundle = directory / pki.BUNDLE_FILE
    session().emit(
        {
            "cluster": cluster,
            "dir": str(directory),
            "recovery_bundle": str(bundle),
            "recovery_code": code,
        },
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
        f"    ckptd pki issue worker NODE --dir {directory} --out NODE",
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
@shared_options
def issue_command(role: str, node_id: str, directory: Path, out: Path | None) -> None:
    """Make a key and a certificate for ID.

    ROLE is worker, coordinator, client, admin or monitor. A machine that is both has the ROLE
    worker,coordinator; a person who stores and decides has client,admin.
    """
    directory = directory.expanduser().absolute()
    target = None if out is None else out.expanduser().absolute()
    issued = pki.issue(directory, _roles(role), node_id, out=target)
    session().emit(
        {
            "id": node_id,
            "roles": sorted(role.split(",")),
            "ca": str(issued.ca),
            "cert": str(issued.cert),
            "key": str(issued.key),
        },
        f"In the config of {node_id}, with the paths that the files get there:\n"
        f"    tls: {{ca: {issued.ca}, cert: {issued.cert}, key: {issued.key}}}",
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
@shared_options
def recover_command(bundle: Path, directory: Path, code_file: Path | None) -> None:
    """Bring the CA and the client back from a recovery bundle and its code."""
    directory = directory.expanduser()
    code = _asked_code() if code_file is None else _code_in(code_file.expanduser())
    written = [str(path) for path in pki.recover(bundle.expanduser(), code, directory)]
    session().emit(
        {"dir": str(directory), "files": written},
        "\n".join(
            [
                "Recovered:",
                *(f"    {path}" for path in written),
                "The code and the bundle stay valid. The admin's key was not in the bundle; a new "
                "one:",
                f"    ckptd pki issue admin ID --dir {directory}",
            ]
        ),
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
