"""`ckptd config check`: is this config valid, and what does it say with all defaults?"""

from __future__ import annotations

import click
import yaml

from ckptd import config as configs
from ckptd.cli.session import session, shared_options


@click.group()
def config() -> None:
    """Validate a config and print what it means."""


@config.command()
@shared_options
def check() -> int:
    """Validate the config and print the effective one, with all defaults filled in.

    Exit 2 when a key is wrong; every error is listed with the path of its key.
    """
    path = session().config_path()
    found, errors = configs.check_file(path)
    if found is not None:
        errors = configs.check_roots(found)
    effective = configs.effective(found) if found is not None else None
    inactive = configs.inactive_keys(found) if found is not None else []
    result = {
        "ok": not errors,
        "config": str(path),
        "effective": effective,
        "errors": [{"key": error.key, "message": error.reason} for error in errors],
        "inactive": inactive,
    }
    lines = []
    if effective is not None:
        lines.append(yaml.safe_dump(effective, sort_keys=False).rstrip())
    lines.extend(f"# not acted on in this version: {key}" for key in inactive)
    lines.extend(f"error: {error.message}" for error in errors)
    lines.append(f"{path}: " + ("ok" if not errors else f"{len(errors)} errors"))
    session().emit(result, "\n".join(lines))
    return 2 if errors else 0
