"""A home network inside the kernel: a switch and hosts, each a network namespace of its own.

Nothing of it touches the machine's own network: the cables run from namespace to namespace, and
every address exists inside them alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.root.processes import run

PREFIX: Final = f"ckptd{os.getpid()}-"
_SUBNET: Final = "10.77.0"


def namespaces() -> list[str]:
    """Names of all network namespaces."""
    listed = run("ip", "-json", "netns", "list")
    return [entry["name"] for entry in json.loads(listed or "[]")]


class Network:
    """A switch with a port for each of `hosts`."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._label = PREFIX + secrets.token_hex(2)
        self._switch = f"{self._label}-switch"
        self._numbers = {host: number for number, host in enumerate(hosts, start=1)}
        try:
            self._build()
        except BaseException:
            self.remove()
            raise

    def address(self, host: str) -> str:
        return f"{_SUBNET}.{self._numbers[host]}"

    def inside(self, host: str, *command: str | Path) -> list[str]:
        """`command` as a list that runs it on `host`."""
        return ["ip", "netns", "exec", self._namespace(host), *map(str, command)]

    def limit(self, host: str, rate: str) -> None:
        """The cable of `host` carries at most `rate` (of tc(8), as "200mbit") each way."""
        shaper = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
        run("ip", "netns", "exec", self._switch, "tc", "qdisc", "add", "dev", self._port(host),
            *shaper)  # fmt: skip
        run(*self.inside(host, "tc", "qdisc", "add", "dev", "eth0", *shaper))

    def unplug(self, host: str) -> None:
        """Pulls the cable at the switch."""
        run("ip", "-n", self._switch, "link", "set", self._port(host), "down")

    def plug(self, host: str) -> None:
        """Puts the cable back."""
        run("ip", "-n", self._switch, "link", "set", self._port(host), "up")

    def silence(self, host: str) -> None:
        """The switch drops whatever comes from `host` or goes to it; the link stays up."""
        port = self._port(host)
        rules = f"""
            table bridge silence {{
                chain forward {{
                    type filter hook forward priority 0;
                    iifname "{port}" drop;
                    oifname "{port}" drop;
                }}
            }}
        """
        run("ip", "netns", "exec", self._switch, "nft", "-f", "-", stdin=rules)

    def unsilence(self) -> None:
        """The switch forwards everything again."""
        run("ip", "netns", "exec", self._switch, "nft", "delete", "table", "bridge", "silence")

    def received_bytes(self, host: str) -> int:
        """What has come in over the cable of `host` since it was laid."""
        shown = run("ip", "-n", self._namespace(host), "-s", "-json", "link", "show", "eth0")
        (link,) = json.loads(shown)
        return int(link["stats64"]["rx"]["bytes"])

    def remove(self) -> None:
        """Deletes the namespaces, and with them cables and rules."""
        for name in namespaces():
            if name.startswith(self._label):
                with contextlib.suppress(AssertionError):
                    run("ip", "netns", "delete", name)

    def _build(self) -> None:
        run("ip", "netns", "add", self._switch)
        run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", self._switch, "link", "set", "bridge", "up")
        for host in self._numbers:
            namespace, port = self._namespace(host), self._port(host)
            run("ip", "netns", "add", namespace)
            run("ip", "-n", namespace, "link", "set", "lo", "up")
            # Both ends are made inside namespaces: no name of them ever appears outside.
            run("ip", "-n", self._switch, "link", "add", port, "type", "veth",
                "peer", "name", "eth0", "netns", namespace)  # fmt: skip
            run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
            run("ip", "-n", namespace, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            run("ip", "-n", namespace, "link", "set", "eth0", "up")

    def _namespace(self, host: str) -> str:
        return f"{self._label}-{host}"

    def _port(self, host: str) -> str:
        return f"port{self._numbers[host]}"
