"""`ckptd serve`: this machine as a node."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from pathlib import Path

import click

from ckptd.cli.session import session, shared_options
from ckptd.config import Config
from ckptd.errors import ConfigError

RECOVERY_BUNDLE = "recovery.bundle"


@click.command()
@click.option(
    "--init", is_flag=True, help="Make the store directory's marker once, then serve as usual."
)
@shared_options
def serve(init: bool) -> None:
    """Run this node in the roles that its config names, until SIGTERM.

    Without --init a store directory that has no marker is refused: an unmounted disk must never
    become an empty store. A coordinator needs no store and no --init. SIGHUP makes the node read
    its config again.
    """
    from ckptd.coordinator.part import coordinator
    from ckptd.node import daemon
    from ckptd.observe import logs

    _prefer_fast_cipher()
    path = session().config_path()
    config = session().config()
    logs.configure(config.observe.log_level)
    if config.node is None:
        raise ConfigError(
            "node", "missing: this config is a client's", next="ckptd serve --config NODE_CONFIG"
        )
    if init and config.is_worker:
        _init(config)
    daemon.serve(config, path, [coordinator] if config.is_coordinator else [])


def _init(config: Config) -> None:
    """Makes the store, and puts the recovery bundle into it when it lies beside the CA."""
    from ckptd.store.marker import init_store

    assert config.store is not None
    init_store(str(config.store.path), store_id=secrets.token_hex(16))
    bundle = config.tls.ca.with_name(RECOVERY_BUNDLE)
    target = Path(config.store.path) / RECOVERY_BUNDLE
    if bundle.is_file() and not target.exists():
        shutil.copyfile(bundle, target)


def _prefer_fast_cipher() -> None:
    """On a processor without AES instructions, starts this process anew with an OpenSSL config
    that prefers ChaCha20: OpenSSL reads it only once, at its start."""
    from ckptd.net.tls import cipher_environment

    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return  # macOS: every supported processor has the instructions
    environment = cipher_environment(cpuinfo, os.environ)
    if environment is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
