"""The two sides of the comparison: ckptd with four workers, and rsync with two daemons.

Both keep everything below one directory, run their daemons all the time, and make new files only.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from bench.processes import Command, MeasurementFailed
from ckptd.client.local_cluster import LocalCluster

WORKERS: Final = 4
COPIES: Final = 2
CHECKPOINT: Final = "bench"
_READY_TIMEOUT_S: Final = 10.0
_MODULE: Final = "data"
_RSYNC: Final = ("rsync", "-W", "--fsync")


class Side(Protocol):
    """One side. Between `start` and `stop`, turns of store, restore and `clear`."""

    name: str

    def start(self) -> None:
        """Starts the daemons, with nothing stored."""

    def stop(self) -> None:
        """Stops the daemons and deletes everything."""

    def clear(self) -> None:
        """Deletes what was stored and restored; the daemons run afterwards."""

    def daemons(self) -> dict[str, int]:
        """The pids of the daemons by label."""

    def store(self, source: Path) -> list[Command]:
        """The commands that store `source`, to be run at once."""

    def restore(self, source: Path) -> list[Command]:
        """The commands that restore what `store` stored of `source`."""

    def check_stored(self, source: Path, output_directory: Path) -> None:
        """Raises MeasurementFailed unless the timed store did all of the work."""

    def restored(self, source: Path) -> Path:
        """Where the restored file is."""


class CkptdSide:
    """An embedded cluster, a fresh one for each turn; the commands are fresh processes."""

    name = "ckptd"

    def __init__(self, directory: Path, settings: Sequence[str] = ()) -> None:
        self._directory = directory
        self._settings = list(settings)
        self.cluster = LocalCluster(directory / "cluster")

    def start(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        settings = [f"replication.copies={COPIES}", *self._settings]
        self.cluster.up(WORKERS, settings, coordinator=False)

    def stop(self) -> None:
        if self.cluster.directory.exists():
            self.cluster.down()
        shutil.rmtree(self._directory, ignore_errors=True)

    def clear(self) -> None:
        # Shards go when their checkpoints are long deleted; a new cluster has none at once.
        self.stop()
        self.start()

    def daemons(self) -> dict[str, int]:
        return {node.id: node.pid for node in self.cluster.nodes()}

    def store(self, source: Path) -> list[Command]:
        return [self._command("store", str(source), "--name", CHECKPOINT)]

    def restore(self, source: Path) -> list[Command]:
        return [self._command("restore", CHECKPOINT, "--to", str(self._directory / "back"))]

    def check_stored(self, source: Path, output_directory: Path) -> None:
        result = json.loads((output_directory / "ckptd store.out").read_text())
        wanted = {"state": "protected", "copies": COPIES, "shards_deduplicated": 0}
        found = {key: result[key] for key in wanted}
        if found != wanted:
            raise MeasurementFailed(f"ckptd store says {found} instead of {wanted}")

    def restored(self, source: Path) -> Path:
        return self._directory / "back" / source.name

    def _command(self, verb: str, *arguments: str) -> Command:
        environment = {**os.environ, "CKPTD_CONFIG": str(self.cluster.client_config)}
        command = [sys.executable, "-m", "ckptd", verb, "--json", *arguments]
        return Command(f"ckptd {verb}", command, environment)


class RsyncSide:
    """Two rsync daemons; stored to both at once, restored from the first."""

    name = "rsync"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._daemons: list[tuple[subprocess.Popen[bytes], int]] = []

    def start(self) -> None:
        for number in range(1, COPIES + 1):
            home = self._home(number)
            (home / "data").mkdir(parents=True)
            (home / "rsyncd.conf").write_text(daemon_config(home))
            port = _free_port()
            address = ["--address=127.0.0.1", f"--port={port}"]
            process = subprocess.Popen(
                ["rsync", "--daemon", "--no-detach", f"--config={home / 'rsyncd.conf'}", *address],
                stdin=subprocess.DEVNULL,  # a socket there would mean inetd to it
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self._daemons.append((process, port))
        for process, port in self._daemons:
            _wait_for_greeting(process, port)

    def stop(self) -> None:
        for process, _ in self._daemons:
            process.terminate()
        for process, _ in self._daemons:
            process.wait()
        self._daemons.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def clear(self) -> None:
        for number in range(1, COPIES + 1):
            for path in (self._home(number) / "data").iterdir():
                path.unlink()
        shutil.rmtree(self._directory / "back", ignore_errors=True)

    def daemons(self) -> dict[str, int]:
        return {
            f"daemon{number}": process.pid for number, (process, _) in enumerate(self._daemons, 1)
        }

    def store(self, source: Path) -> list[Command]:
        return [
            Command(f"rsync to {number}", [*_RSYNC, str(source), self._url(number)], os.environ)
            for number in range(1, COPIES + 1)
        ]

    def restore(self, source: Path) -> list[Command]:
        target = self._directory / "back"
        target.mkdir()
        arguments = [*_RSYNC, self._url(1) + source.name, f"{target}/"]
        return [Command("rsync from 1", arguments, os.environ)]

    def check_stored(self, source: Path, output_directory: Path) -> None:
        for number in range(1, COPIES + 1):
            copy = self._home(number) / "data" / source.name
            if not copy.exists() or copy.stat().st_size != source.stat().st_size:
                raise MeasurementFailed(f"{copy} is not a whole copy")

    def restored(self, source: Path) -> Path:
        return self._directory / "back" / source.name

    def _home(self, number: int) -> Path:
        return self._directory / f"daemon{number}"

    def _url(self, number: int) -> str:
        return f"rsync://127.0.0.1:{self._daemons[number - 1][1]}/{_MODULE}/"


def daemon_config(home: Path) -> str:
    """The rsyncd.conf of a daemon with one writable module, HOME/data, for any user."""
    lines = ["use chroot = no", f"log file = {home / 'log'}", "reverse lookup = no"]
    if os.geteuid() == 0:  # a daemon of root would else write as nobody
        lines += ["uid = 0", "gid = 0"]
    return "\n".join([*lines, f"[{_MODULE}]", f"path = {home / 'data'}", "read only = no", ""])


def rsync_complaint() -> str | None:
    """Why rsync cannot be measured here, with the command that helps; None when it can."""
    if shutil.which("rsync") is None:
        return f"rsync is missing; install it with: {_install_command()}"
    usage = subprocess.run(["rsync", "--help"], capture_output=True, text=True, check=False)
    if "--fsync" not in usage.stdout:
        return f"this rsync has no --fsync (3.2.4 and newer have); try: {_install_command()}"
    return None


def _install_command() -> str:
    for manager, command in (
        ("apt-get", "sudo apt-get install -y rsync"),
        ("dnf", "sudo dnf install -y rsync"),
        ("pacman", "sudo pacman -S rsync"),
        ("apk", "sudo apk add rsync"),
        ("brew", "brew install rsync"),
    ):
        if shutil.which(manager):
            return command
    return "your package manager (package rsync)"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_greeting(process: subprocess.Popen[bytes], port: int) -> None:
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0) as probe:
                if probe.recv(8) == b"@RSYNCD:":
                    return
        except OSError:
            time.sleep(0.02)
    raise MeasurementFailed(f"the rsync daemon on port {port} does not start")
