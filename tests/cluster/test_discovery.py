"""Nodes and commands that find each other with no address in any file: mDNS on loopback.

The tests play the other programs on the network themselves: they announce, take back and lie, with
the same library, on the same interface. Each cluster has a name of its own, so that runs side by
side do not meet.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster.kill_fixtures import make_checkpoint

from ckptd.client.cluster import Cluster
from ckptd.client.connect import connect
from ckptd.client.local_cluster import LocalCluster
from ckptd.client.local_node import read_node
from ckptd.config import load
from ckptd.core.quantities import Address
from ckptd.discovery.announcer import announce
from ckptd.discovery.interfaces import LOOPBACK_NAMES, read_interfaces
from ckptd.discovery.multicast import open_multicast
from ckptd.discovery.service import Lookout, look_out
from ckptd.net.loop import run

NODES = ("coordinator", "node1", "node2")
LOOPBACK = next(i.name for i in read_interfaces() if i.name in LOOPBACK_NAMES)
SETTINGS = (
    "discovery.mdns=true",
    "discovery.peers=[]",
    f"discovery.interfaces=[{LOOPBACK}]",
    "watch.settle=500ms",
    "membership.heartbeat=200ms",
)


class AnnouncedCluster(LocalCluster):
    """Daemons of which no config names another one."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, f"t{secrets.token_hex(6)}")

    def start(self) -> None:
        self.up(2, SETTINGS)
        for path in self.directory.rglob("ckptd.yml"):
            assert yaml.safe_load(path.read_text())["discovery"]["peers"] == []

    def address(self, node: str) -> Address:
        config = read_node(self.directory / node).config
        assert config.node is not None
        return config.node.listen

    def log(self, node: str) -> list[dict[str, Any]]:
        lines = (self.directory / node / "node.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def stop(self, node: str) -> None:
        """Gracefully, and waits for the end."""
        pid = next(n.pid for n in self.nodes() if n.id == node)
        os.kill(pid, 15)
        os.waitpid(pid, 0)

    def start_elsewhere(self, node: str) -> None:
        """A stopped node comes back and listens elsewhere, which no other config says."""
        path = self.directory / node / "ckptd.yml"
        document = yaml.safe_load(path.read_text())
        with socket.create_server(("127.0.0.1", 0)) as free:
            document["node"]["listen"] = f"127.0.0.1:{free.getsockname()[1]}"
        path.write_text(yaml.safe_dump(document))
        self.start()

    def command(self, *arguments: object) -> dict[str, Any]:
        """The JSON of a command, which must succeed."""
        line = [sys.executable, "-m", "ckptd", "--config", str(self.client_config), "--json"]
        done = subprocess.run(
            [*line, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        document = json.loads(done.stdout)
        assert isinstance(document, dict)
        return document


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[AnnouncedCluster]:
    running = AnnouncedCluster(tmp_path / "c")
    running.start()
    yield running
    with contextlib.suppress(ChildProcessError):
        running.down()


async def until(condition: Callable[[], Awaitable[object]], what: str) -> None:
    deadline_s = time.monotonic() + 30.0
    while not await condition():
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def announced(cluster: AnnouncedCluster, node: str, port: int) -> AsyncIterator[None]:
    """Somebody on the network who says that he is `node`, listening on `port`."""
    multicast = await open_multicast(["127.0.0.1"])
    try:
        await announce(
            multicast,
            cluster=cluster.cluster,
            node=node,
            software="0",
            roles=["worker"],
            addresses=["127.0.0.1"],
            port=port,
        )
        yield
    finally:
        await multicast.close()


async def found_by_a_client(cluster: AnnouncedCluster) -> dict[str, str]:
    async with connect(load(cluster.client_config)) as client:
        assert not client.absent
        return {node.id: str(node.control.remote) for node in client.nodes.values()}


async def sees_up(client: Cluster, node: str, other: str, address: Address) -> bool:
    if node not in client.nodes:
        return False
    await client.refresh()
    views = {view.node: view for view in client.nodes[node].status.peers}
    view = views.get(other)
    return view is not None and (view.state, view.address) == ("up", str(address))


def everyone(cluster: AnnouncedCluster) -> dict[str, str]:
    return {node: str(cluster.address(node)) for node in NODES}


async def know_each_other(cluster: AnnouncedCluster) -> None:
    """Returns once every node has found every other one."""

    async def found() -> bool:
        async with connect(load(cluster.client_config)) as client:
            for node, other in itertools.permutations(NODES, 2):
                if not await sees_up(client, node, other, cluster.address(other)):
                    return False
            return True

    await until(found, "the nodes do not find each other")


async def heard(lookout: Lookout, node: str) -> list[Address]:
    return lookout.hints.announced(node, time.monotonic())


def test_nodes_and_client_find_each_other_without_any_address(
    cluster: AnnouncedCluster, tmp_path: Path
) -> None:
    async def look() -> None:
        await know_each_other(cluster)
        assert await found_by_a_client(cluster) == everyone(cluster)

    run(look())
    source = tmp_path / "model"
    source.mkdir()
    (source / "weights.bin").write_bytes(os.urandom(300_000))
    assert cluster.command("store", source)["state"] == "protected"
    cluster.command("restore", "model", "--to", tmp_path / "back")
    assert (tmp_path / "back/weights.bin").read_bytes() == (source / "weights.bin").read_bytes()
    findings = cluster.command("doctor")["findings"]
    (mdns,) = (finding for finding in findings if finding["check"] == "mdns")
    assert mdns["state"] == "ok" and "node1, node2" in mdns["message"]


def test_a_node_says_goodbye_and_is_found_again_at_another_address(
    cluster: AnnouncedCluster,
) -> None:
    async def look() -> None:
        async with look_out(cluster.cluster, [LOOPBACK]) as lookout:
            before = cluster.address("node2")
            await until(lambda: heard(lookout, "node2"), "node2 is not announced")
            assert await heard(lookout, "node2") == [before]
            await asyncio.to_thread(cluster.stop, "node2")

            async def gone() -> bool:
                return not await heard(lookout, "node2")

            await until(gone, "the goodbye of node2 was not heard")
            await asyncio.to_thread(cluster.start_elsewhere, "node2")
            after = cluster.address("node2")
            assert after != before
            # It announces itself after it serves: a command that comes at once may be too early.
            await know_each_other(cluster)
            assert await found_by_a_client(cluster) == everyone(cluster)

    run(look())


def test_a_coordinator_stores_on_nodes_that_it_heard_of_and_follows_them(
    cluster: AnnouncedCluster, tmp_path: Path
) -> None:
    async def is_protected(name: str) -> bool:
        try:
            listed = await asyncio.to_thread(cluster.command, "ls", "run")
        except AssertionError:  # the coordinator has not seen the first one yet
            return False
        states = {row["name"]: row["state"] for row in listed["checkpoints"]}
        return states.get(name) == "protected"

    async def look() -> None:
        (cluster.watch_root / "run").mkdir()
        for step in range(3):
            await know_each_other(cluster)
            name = f"run/checkpoint-{step}"
            os.rename(
                make_checkpoint(tmp_path / "made", step, size=300_000), cluster.watch_root / name
            )
            await until(lambda name=name: is_protected(name), f"{name} is not stored")  # type: ignore[misc]
            await asyncio.to_thread(cluster.stop, "node2")
            await asyncio.to_thread(cluster.start_elsewhere, "node2")

    run(look())


def test_liars_flapping_and_double_announcements_change_nothing(
    cluster: AnnouncedCluster,
) -> None:
    """A stranger takes node2's name with a wrong port, with the port of node1, and every moment
    anew; another one invents a node; a third repeats what is true."""

    async def look() -> None:
        await know_each_other(cluster)
        async with connect(load(cluster.client_config)) as client:
            before = len(cluster.log("node1"))
            tried = 0

            async def count(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                nonlocal tried
                tried += 1
                writer.close()

            server = await asyncio.start_server(count, "127.0.0.1", 0)
            trap = server.sockets[0].getsockname()[1]
            async with server:
                async with (
                    announced(cluster, "node9", cluster.address("node1").port),
                    announced(cluster, "node2", cluster.address("node2").port),
                ):
                    for _ in range(5):
                        async with announced(cluster, "node2", trap):
                            assert await found_by_a_client(cluster) == everyone(cluster)
                        async with announced(cluster, "node2", cluster.address("node1").port):
                            assert await found_by_a_client(cluster) == everyone(cluster)

                async def was_tried() -> bool:
                    # Nodes that are connected to node2 try nothing: whoever comes new does.
                    assert await found_by_a_client(cluster) == everyone(cluster)
                    return tried > 0

                async with announced(cluster, "node2", trap):
                    await until(was_tried, "the trap was never tried: the lie was not heard")
            await until(
                lambda: sees_up(client, "node1", "node2", cluster.address("node2")), "lost it"
            )
            assert {view.node for view in client.nodes["node1"].status.peers} <= {*NODES}
            events = [line["event"] for line in cluster.log("node1")[before:]]
            assert not {"peer_lost", "part_failed", "peer_failed"} & set(events)

    run(look())
