"""Daemons on the hosts of a network of namespaces, and a client on a host of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import yaml
from tests.root.namespaces import Network
from tests.root.processes import end, wait_until

from ckptd.client import pki
from ckptd.core.identity import Role

WORKERS: Final = ("one", "two", "three", "four")
CLIENT: Final = "client"
_PORT: Final = 7701


class NetworkCluster:
    """A worker on each host of WORKERS, in `directory`."""

    def __init__(self, directory: Path, network: Network) -> None:
        self._directory = directory
        self.network = network
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        directory.mkdir()
        self._pki = directory / "pki"
        pki.init_cluster(self._pki, "lab")
        for host in WORKERS:
            pki.issue(self._pki, [Role.WORKER], host)
            self._write(host, self._node(host))
        self._write(CLIENT, {})

    def store_of(self, host: str) -> Path:
        return self._directory / f"{host}-store"

    def log(self, host: str) -> str:
        return (self._directory / f"{host}.log").read_text(encoding="utf-8")

    def up(self) -> None:
        """Starts all daemons, and waits until each says that it serves."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            path = self._directory / "ready"
            ready.bind(str(path))
            ready.settimeout(40)
            for host in WORKERS:
                config = self._directory / f"{host}.yml"
                command = [sys.executable, "-m", "ckptd", "serve", "--init"]
                with (self._directory / f"{host}.log").open("ab") as log:
                    self._daemons[host] = subprocess.Popen(
                        self.network.inside(host, *command, "--config", config),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env={**os.environ, "NOTIFY_SOCKET": str(path)},
                    )
            for _ in WORKERS:
                assert ready.recv(100).startswith(b"READY=1")
            path.unlink()

    def down(self) -> None:
        """Stops all daemons."""
        for daemon in self._daemons.values():
            end(daemon, 20)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Starts `ckptd …` on the client's host."""
        config = self._directory / f"{CLIENT}.yml"
        command = [sys.executable, "-m", "ckptd", "--config", config, "--json", *arguments]
        return subprocess.Popen(
            self.network.inside(CLIENT, *command),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str], timeout_s: float) -> dict[str, Any]:
        """The JSON of a command, which must end with 0 within `timeout_s`."""
        try:
            output, log = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, log = process.communicate()
            raise AssertionError(f"not done after {timeout_s:.0f} s: {output}{log}") from None
        assert process.returncode == 0, f"exit {process.returncode}: {output}{log}"
        document = json.loads(output)
        assert isinstance(document, dict)
        return document

    def ckptd(self, *arguments: str | Path) -> dict[str, Any]:
        """The JSON of one command on the client's host."""
        return self.finish(self.start(*arguments), 60)

    def wait_state(self, host: str, states: tuple[str, ...], timeout_s: float = 30) -> None:
        """Until `ckptd nodes` gives `host` one of these states."""

        def reached() -> bool:
            nodes = self.ckptd("nodes")["nodes"]
            return any(node["id"] == host and node["state"] in states for node in nodes)

        wait_until(reached, f"{host} is not {' or '.join(states)}", timeout_s)

    def _node(self, host: str) -> dict[str, Any]:
        return {
            "node": {
                "id": host,
                "roles": ["worker"],
                "listen": f"{self.network.address(host)}:{_PORT}",
                "zone": host,  # one kernel plays all machines
            },
            "store": {"path": str(self.store_of(host))},
            # Loopback is each namespace's own.
            "observe": {"listen": "127.0.0.1:9701", "tls": False},
        }

    def _write(self, host: str, own: dict[str, Any]) -> None:
        document = {
            "cluster": "lab",
            "tls": {
                "ca": str(self._pki / "ca.pem"),
                "cert": str(self._pki / f"{host}.pem"),
                "key": str(self._pki / f"{host}.key"),
            },
            "discovery": {
                "mdns": False,
                "peers": [f"{self.network.address(w)}:{_PORT}" for w in WORKERS if w != host],
            },
            "membership": {"heartbeat": "500ms", "suspect": "2s", "down": "5s"},
            "replication": {"shard_size": "2MiB"},
            **own,
        }
        text = yaml.safe_dump(document, sort_keys=False)
        (self._directory / f"{host}.yml").write_text(text, encoding="utf-8")
