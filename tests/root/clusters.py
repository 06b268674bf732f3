"""A cluster of real daemons whose stores may lie on disks that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import psutil
from tests.root.processes import wait_until

from ckptd.client.cluster import Cluster
from ckptd.client.connect import connect
from ckptd.client.local_cluster import LocalCluster
from ckptd.client.local_node import LocalNode
from ckptd.config import load
from ckptd.net.bulk import BulkConnector, ShardSender, refusal
from ckptd.net.loop import run as run_on_loop
from ckptd.net.tls import client_context
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport

T = TypeVar("T")
A = TypeVar("A", bound=messages.Message)
MIB: Final = 1024 * 1024
_STOP_S: Final = 15.0


class DaemonCluster:
    """An embedded cluster in `directory`. A store that shall lie on a disk of its own is mounted
    at `store_of(node)` before the first `up`."""

    def __init__(self, directory: Path, count: int, *settings: str) -> None:
        self.local = LocalCluster(directory)
        self._count = count
        self._settings = settings

    @property
    def config(self) -> Path:
        """The client's config."""
        return self.local.client_config

    def store_of(self, node: str) -> Path:
        return self.local.directory / node / "store"

    def up(self) -> None:
        """Starts whatever is not running. CkptdError with the end of a node's log when one does
        not start."""
        self.local.up(self._count, self._settings, coordinator=False)

    def down(self) -> None:
        """Stops all daemons; those that a test has stopped by SIGSTOP are woken for it."""
        for node in self.local.nodes():
            if node.pid:
                os.kill(node.pid, signal.SIGCONT)
        if self.local.client_config.exists():
            self.local.down()

    def node(self, node: str) -> LocalNode:
        return next(found for found in self.local.nodes() if found.id == node)

    def pid(self, node: str) -> int:
        pid = self.node(node).pid
        assert pid, f"{node} does not run: {self.log(node)[-500:]}"
        return pid

    def stop(self, node: str, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends one daemon and waits for it."""
        pid = self.pid(node)
        os.kill(pid, number)
        try:
            os.waitpid(pid, 0)  # our own child
        except ChildProcessError:
            wait_until(lambda: not psutil.pid_exists(pid), f"{node} does not end", _STOP_S)

    def log(self, node: str) -> str:
        """What the daemon has logged, from all its lives."""
        return (self.local.directory / node / "node.log").read_text(encoding="utf-8")

    def peak_bytes(self, node: str) -> int:
        """The largest resident size that the running daemon ever had."""
        status = Path(f"/proc/{self.pid(node)}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def healthz(self, node: str) -> tuple[int, Any]:
        """Status and document of the node's health page."""
        url = self.node(node).describe()["metrics_url"].replace("/metrics", "/healthz")
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    # -- as a user

    def command(self, *arguments: str | Path) -> list[str]:
        """`ckptd …` with this cluster's config and --json, as a list for subprocess."""
        shown = [str(argument) for argument in arguments]
        return [sys.executable, "-m", "ckptd", "--config", str(self.config), "--json", *shown]

    def ckptd(self, *arguments: str | Path, exit_code: int = 0) -> dict[str, Any]:
        """The JSON of one command, which must end with `exit_code`."""
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=110, check=False
        )
        shown = " ".join(map(str, arguments))
        assert done.returncode == exit_code, (
            f"{shown}: {done.returncode} {done.stdout}{done.stderr}"
        )
        document = json.loads(done.stdout)
        assert isinstance(document, dict)
        return document

    def ask(self, work: Callable[[Cluster], Awaitable[T]]) -> T:
        """Runs `work` with a client's connections to all nodes that answer."""

        async def connected() -> T:
            async with connect(load(self.config)) as cluster:
                return await work(cluster)

        return run_on_loop(connected())

    def send(self, node: str, content: bytes) -> tuple[bool, CopyReport]:
        """Sends one shard to one node; whether the node wanted the bytes, and what it reported."""

        async def work(cluster: Cluster) -> tuple[bool, CopyReport]:
            wanted, (report,) = await asyncio.to_thread(send_chain, cluster, [node], content)
            return wanted, report

        return self.ask(work)

    def read(self, node: str, shard: str) -> bytes:
        """A shard's bytes from one node. Raises PeerError when it does not deliver them."""

        async def work(cluster: Cluster) -> bytes:
            return await asyncio.to_thread(read_shard, cluster, node, shard)

        return self.ask(work)

    def request(self, node: str, message: messages.Message, answer: type[A]) -> A:
        """One control request to one node. Raises PeerRefused with the node's error."""

        async def work(cluster: Cluster) -> A:
            reply, _ = await cluster.nodes[node].control.request(message, answer)
            return reply

        return self.ask(work)

    def states(self) -> dict[str, str]:
        """State of each node that answers."""

        async def look(cluster: Cluster) -> dict[str, str]:
            return {node.id: node.status.state for node in cluster.nodes.values()}

        return self.ask(look)

    def wait_state(self, node: str, state: str, timeout_s: float = 20.0) -> None:
        wait_until(lambda: self.states().get(node) == state, f"{node} is not {state}", timeout_s)


def make_checkpoint(directory: Path, *sizes_bytes: int) -> Path:
    """A checkpoint of one file of random bytes for each size."""
    directory.mkdir(parents=True)
    for number, size_bytes in enumerate(sizes_bytes):
        with (directory / f"part-{number}.bin").open("wb") as file:
            for start in range(0, size_bytes, MIB):
                file.write(os.urandom(min(MIB, size_bytes - start)))
    return directory


def assert_equal_trees(one: Path, other: Path) -> None:
    """As `diff -r`: fails with the difference."""
    done = subprocess.run(["diff", "-r", one, other], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def shards_in(store: Path) -> set[str]:
    """The shards of a store by their ids; fails unless each has the bytes that its name says. The
    node may be at work: what has gone since it was listed is left out."""
    found = set()
    for path in sorted((store / "shards").glob("*/*")):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == path.name, f"torn: {path}"
            found.add(path.name)
    return found


def documents_in(store: Path) -> set[str]:
    """The documents of a store by their ids; fails unless each is whole and has a signature. What
    has gone since it was listed is left out."""
    found = set()
    for path in sorted((store / "catalogue").glob("*.json")):
        raw = signature = b""
        with contextlib.suppress(FileNotFoundError):
            raw = path.read_bytes()
            signature = path.with_suffix(".sig").read_bytes()
        if path.exists():
            assert hashlib.sha256(raw).hexdigest() == path.stem, f"torn: {path}"
            assert signature, f"without a signature: {path}"
            found.add(path.stem)
    return found


def shards_of(store: Path, version: str) -> set[str]:
    """The shards that a version's manifest in this store names."""
    manifest = json.loads((store / "catalogue" / f"{version}.json").read_bytes())
    return {reference[0] for reference in manifest["shards"]}


def assert_protected(version: str, stores: list[Path], copies: int = 2) -> None:
    """Every shard of the version lies whole in `copies` of the stores that have its manifest."""
    holding = [store for store in stores if version in documents_in(store)]
    assert len(holding) >= copies, f"the manifest of {version} is on {len(holding)} nodes"
    held = [shards_in(store) for store in holding]
    for shard in shards_of(holding[0], version):
        assert sum(shard in shards for shards in held) >= copies, f"{shard} of {version}"


def client_hello(cluster: Cluster) -> messages.Hello:
    """The hello of a client that speaks to a node's bulk port by itself."""
    return messages.Hello(
        cluster=cluster.cluster,
        node=cluster.identity.node_id,
        roles=tuple(sorted(role.value for role in cluster.identity.roles)),
        software="test",
        clock_ms=0,
        highest_order=0,
        address=socket.gethostname(),
    )


class ShardBytes:
    """A shard's bytes as a sender reads them."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def piece(self, offset: int, size: int) -> memoryview:
        return memoryview(self.content)[offset : offset + size]


def send_chain(
    cluster: Cluster,
    nodes: list[str],
    content: bytes,
    on_report: Callable[[CopyReport], None] = lambda _: None,
) -> tuple[bool, tuple[CopyReport, ...]]:
    """Sends one shard down a chain of nodes; whether the first one wanted the bytes, and what each
    reported at last. `on_report` gets every report as it comes. Raises PeerError."""
    connector = bulk_connector(cluster)
    head, *rest = [cluster.nodes[node].hop for node in nodes]
    request = messages.PutShard(hashlib.sha256(content).digest(), len(content), tuple(rest))

    def tell() -> None:
        for report in sender.reports.values():
            on_report(report)

    try:
        channel = connector.acquire(head.node, head.host, head.port)
        sender = ShardSender(channel, request, hop=0, on_news=tell)
        wanted = sender.negotiate()
        reports = sender.send(ShardBytes(content))
        connector.release(head.node, head.host, head.port, channel)
        return wanted, reports
    finally:
        connector.close()


def read_shard(cluster: Cluster, node: str, shard: str) -> bytes:
    """A shard's bytes from one node. Raises PeerError when it does not deliver them."""
    connector = bulk_connector(cluster)
    hop = cluster.nodes[node].hop
    try:
        channel = connector.acquire(hop.node, hop.host, hop.port)
        channel.send(messages.GetShard(bytes.fromhex(shard)))
        header, answer = channel.receive()
        if not isinstance(answer, messages.ShardData):
            raise refusal(node, answer)
        content = bytearray(header.payload_bytes)
        view = memoryview(content)
        while view:
            view = view[channel.receive_payload(view) :]
        return bytes(content)
    finally:
        connector.close()


def bulk_connector(cluster: Cluster) -> BulkConnector:
    """Bulk connections of a client that no store or restore uses."""
    tls = cluster.config.tls
    context = client_context(tls.ca, tls.cert, tls.key)
    return BulkConnector(context, cluster.cluster, lambda: client_hello(cluster))
