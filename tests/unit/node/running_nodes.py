"""Real nodes inside the test's process: real sockets, TLS, stores, on the loop that a test wants.

In the same process, so that a test can shorten deadlines and look at what a node holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import yaml
from tests.cluster.hostile import Place, RawPeer, files_of

from ckptd.client.pki import IssuedFiles, init_cluster, issue
from ckptd.config import check
from ckptd.core.identity import Role
from ckptd.net.loop import event_loop_factory
from ckptd.node.daemon import Node
from ckptd.node.worker import Worker
from ckptd.store.marker import init_store

LOOPS = ("uvloop", "asyncio")
CLUSTER = "home"


class RunningNode:
    """One node in a thread of its own."""

    def __init__(self, directory: Path, pki: Path, node_id: str) -> None:
        self.node_id = node_id
        self.pki = pki
        self.store = directory / node_id
        init_store(str(self.store), store_id="0" * 32)
        with contextlib.ExitStack() as held:
            ports = [_free_port(held) for _ in range(3)]
        text = yaml.safe_dump(
            {
                "cluster": CLUSTER,
                "node": {
                    "id": node_id,
                    "roles": ["worker"],
                    "listen": f"127.0.0.1:{ports[0]}",
                    "bulk_port": ports[1],
                },
                "store": {"path": str(self.store), "reserve": "1MiB"},
                "tls": {
                    "ca": str(pki / "ca.pem"),
                    "cert": str(pki / f"{node_id}.pem"),
                    "key": str(pki / f"{node_id}.key"),
                },
                "discovery": {"mdns": False, "peers": []},
                "observe": {"listen": f"127.0.0.1:{ports[2]}", "tls": False},
            }
        )
        config, errors = check(text)
        assert config is not None, errors
        self.config = config
        self.place = Place(node_id, "127.0.0.1", ports[0], ports[1])
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"node {node_id}")
        self._thread.start()
        assert self._started.wait(20)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
                self.loop = runner.get_loop()
                self.node = Node(self.config)
                runner.run(self.node.run(self._started.set))
        except BaseException as error:
            self._error = error
        finally:
            self._started.set()

    @property
    def worker(self) -> Worker:
        """The part of it that keeps shards."""
        assert self.node.worker is not None
        return self.node.worker

    def connect(self, name: str, port: str = "control") -> RawPeer:
        """A raw connection with the certificate of `name`."""
        where = self.place.control if port == "control" else self.place.bulk
        return RawPeer(self.place.host, where, files_of(self.pki, name))

    def request_stop(self) -> None:
        self.loop.call_soon_threadsafe(self.node.request_stop)

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive(), f"{self.node_id} does not stop"
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        if self._thread.is_alive():
            self.request_stop()
        self.join()


def make_pki(directory: Path, *workers: str) -> Path:
    """A CA with a client, an admin, a monitor, and these workers."""
    init_cluster(directory, CLUSTER)
    issue(directory, [Role.MONITOR], "monitor")
    for worker in workers:
        issue(directory, [Role.WORKER], worker)
    return directory


def identity(pki: Path, name: str) -> IssuedFiles:
    return files_of(pki, name)


@contextlib.contextmanager
def running_nodes(directory: Path, *node_ids: str) -> Iterator[list[RunningNode]]:
    """Nodes with these ids; "mallory" has a worker's certificate and no node."""
    pki = make_pki(directory / "pki", "mallory", *node_ids)
    nodes: list[RunningNode] = []
    try:
        for node_id in node_ids:
            nodes.append(RunningNode(directory, pki, node_id))
        yield nodes
    finally:
        for node in nodes:
            node.stop()


def _free_port(held: contextlib.ExitStack) -> int:
    probe = held.enter_context(socket.socket())
    probe.bind(("127.0.0.1", 0))
    return int(probe.getsockname()[1])
