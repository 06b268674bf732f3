"""Five nodes and a laptop on a switch, and no address in any file: the cluster finds itself, and
finds itself again after a move, a partition and a disappearance in the middle of a transfer."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from tests.root.clusters import assert_equal_trees, make_checkpoint
from tests.root.namespaces import Network
from tests.root.processes import end, run, wait_until

from ckptd.client import pki
from ckptd.core.identity import Role

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

NODES: Final = tuple(f"node{number}" for number in range(1, 6))
MIB: Final = 1024 * 1024


class Home:
    """A home network with a daemon on each of NODES, and a laptop that has only a certificate."""

    def __init__(self, place: Path, undo: ExitStack) -> None:
        self.place = place
        self.network = Network((*NODES, "laptop"))
        undo.callback(self.network.remove)
        self.cluster = f"t{secrets.token_hex(4)}"
        pki.init_cluster(place / "pki", self.cluster)
        self.laptop = self._config("laptop", "client", {})
        self._processes = {}
        for node in NODES:
            pki.issue(place / "pki", [Role.WORKER], node)
            own = {"id": node, "roles": ["worker"], "listen": "0.0.0.0:7701", "zone": node}
            path = self._config(
                node, node, {"node": own, "store": {"path": str(place / node / "store")}}
            )
            with (place / node / "log").open("wb") as log:
                line = [sys.executable, "-m", "ckptd", "serve", "--init", "--config", str(path)]
                self._processes[node] = subprocess.Popen(
                    self.network.inside(node, *line), stdout=log, stderr=log, env=os.environ
                )
            undo.callback(end, self._processes[node])

    def _config(self, host: str, certificate: str, more: dict[str, Any]) -> Path:
        directory = self.place / host
        directory.mkdir()
        files = self.place / "pki"
        tls = {
            "ca": str(files / "ca.pem"),
            "cert": str(files / f"{certificate}.pem"),
            "key": str(files / f"{certificate}.key"),
        }
        document = {
            "cluster": self.cluster,
            "tls": tls,
            "membership": {"heartbeat": "500ms", "suspect": "2s", "down": "5s"},
            "replication": {"shard_size": "1MiB"},
            **more,
        }
        path = directory / "ckptd.yml"
        path.write_text(yaml.safe_dump(document))
        return path

    def line(self, *arguments: str | Path) -> list[str]:
        """A command on the laptop."""
        ckptd = [sys.executable, "-m", "ckptd", "--json", "--config", str(self.laptop)]
        return self.network.inside("laptop", *ckptd, *arguments)

    def ckptd(self, *arguments: str | Path) -> dict[str, Any]:
        document = json.loads(run(*self.line(*arguments)))
        assert isinstance(document, dict)
        return document

    def nodes(self) -> dict[str, tuple[str, str]]:
        """State and address of each node, as the laptop sees them now."""
        done = subprocess.run(self.line("nodes"), capture_output=True, text=True, check=False)
        rows = json.loads(done.stdout).get("nodes", [])
        return {row["id"]: (row["state"], row["address"]) for row in rows}

    def all_up(self) -> bool:
        found = self.nodes()
        return set(found) == set(NODES) and {state for state, _ in found.values()} == {"up"}

    def move(self, node: str, number: int) -> str:
        """Gives a node another address; the old one is gone at once. Returns the new one."""
        old, new = self.network.address(node), f"10.77.0.{number}"
        run(*self.network.inside(node, "ip", "address", "add", f"{new}/24", "dev", "eth0"))
        run(*self.network.inside(node, "ip", "address", "del", f"{old}/24", "dev", "eth0"))
        # The kernel drops further addresses of a network with the first one, unless told not to.
        run(*self.network.inside(node, "ip", "address", "replace", f"{new}/24", "dev", "eth0"))
        return new

    def stored_bytes(self) -> int:
        found = self.place.glob("node*/store/shards/*/*")
        return sum(path.stat().st_size for path in found)


@pytest.fixture
def home(place: Path, undo: ExitStack) -> Iterator[Home]:
    there = Home(place, undo)
    wait_until(there.all_up, "the laptop does not find all five nodes", 40.0)
    yield there


def test_the_laptop_finds_five_nodes_and_a_node_that_moved(home: Home) -> None:
    everywhere = {f"{home.network.address(node)}:7701" for node in NODES}

    def are_where_they_are() -> bool:
        return {address for _, address in home.nodes().values()} == everywhere

    wait_until(are_where_they_are, "the laptop does not find the five where they are", 40.0)
    new = home.move("node3", 103)
    wait_until(
        lambda: home.all_up() and home.nodes().get("node3", ("", ""))[1] == f"{new}:7701",
        "node3 is not found at its new address",
        60.0,
    )


def test_a_partition_heals(home: Home) -> None:
    home.network.silence("node2")

    def is_parted() -> bool:
        states = {node: state for node, (state, _) in home.nodes().items()}
        up = {node for node, state in states.items() if state == "up"}
        return states.get("node2") == "down" and up == {*NODES} - {"node2"}

    wait_until(is_parted, "node2 alone is not down", 60.0)
    home.network.unsilence()
    wait_until(home.all_up, "node2 is not back after the partition", 60.0)


@pytest.mark.parametrize("fate", ["moves", "leaves"])
def test_a_node_that_disappears_in_mid_transfer_is_replaced_or_found_again(
    home: Home, fate: str
) -> None:
    source = make_checkpoint(home.place / "model", 24 * MIB, 24 * MIB)
    home.network.limit("laptop", "80mbit")
    act: dict[str, Callable[[], object]] = {
        "moves": lambda: home.move("node1", 101),
        "leaves": lambda: home.network.unplug("node1"),
    }
    storing = subprocess.Popen(
        home.line("store", source), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_until(lambda: home.stored_bytes() > 8 * MIB, "no shard arrives")
    assert storing.poll() is None
    act[fate]()
    out, err = storing.communicate(timeout=150)
    assert storing.returncode == 0, out + err
    assert json.loads(out)["state"] == "protected"
    back = home.place / "back"
    home.ckptd("restore", "model", "--to", back)
    assert_equal_trees(source, back)
