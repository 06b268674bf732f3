"""Real clusters for tests that break things: daemons to kill, checkpoints to store, disks to read.

Nothing here is a model: the daemons are those of `ckptd local up`, and what a test asserts about a
node it reads from the node's own files or asks it over the wire.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ckptd.client.connect import connect
from ckptd.client.local_cluster import LocalCluster
from ckptd.client.local_node import LocalNode
from ckptd.client.progress import Progress
from ckptd.client.restore import RestoreResult
from ckptd.client.restore import restore as restore_checkpoint
from ckptd.client.store import StoreResult
from ckptd.client.store import store as store_checkpoint
from ckptd.config import load
from ckptd.net.loop import run as run_on_loop

SHARD_SIZE = 256 * 1024
DEADLINE_S = 30.0
_Cluster = TypeVar("_Cluster", bound="BreakableCluster")


@dataclass
class Finished:
    """A command that ended: `document` is what it printed as JSON."""

    code: int
    document: dict[str, Any]
    stderr: str


@dataclass
class BreakableCluster:
    """An embedded cluster whose daemons can be killed one by one. It watches nothing unless it has
    a coordinator."""

    directory: Path
    count: int = 4
    settings: Sequence[str] = (f"replication.shard_size={SHARD_SIZE // 1024}KiB",)
    environment: Mapping[str, str] = field(default_factory=dict)
    coordinator: bool = False

    def __post_init__(self) -> None:
        self.local = LocalCluster(self.directory)

    @property
    def config(self) -> Path:
        return self.local.client_config

    def up(self) -> None:
        """Starts what is not running, and waits until it serves."""
        before = {key: os.environ.get(key) for key in self.environment}
        os.environ.update(self.environment)
        try:
            self.local.up(self.count, self.settings, coordinator=self.coordinator)
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value

    def meet(self) -> None:
        """Waits until all nodes hear each other, and the workers know the same documents."""

        async def have_met() -> bool:
            async with connect(load(self.config)) as cluster:
                nodes = cluster.nodes
                heard = [
                    {view.node for view in node.status.peers if view.last_seen_s >= 0}
                    for node in nodes.values()
                ]
                return (
                    len(nodes) == self.count + self.coordinator
                    and all(len(others) == len(nodes) - 1 for others in heard)
                    and len({node.status.documents_digest for node in cluster.workers}) == 1
                )

        wait_until(lambda: run_on_loop(have_met()), "all nodes to meet")

    def node(self, node_id: str) -> LocalNode:
        return next(node for node in self.local.nodes() if node.id == node_id)

    def pid(self, node_id: str) -> int:
        """The process of a node, 0 when it does not run."""
        try:
            pid = int((self.directory / node_id / "pid").read_text())
        except FileNotFoundError:
            return 0
        return pid if _runs(pid) else 0

    def running(self) -> list[str]:
        """The nodes that run, by id."""
        ids = [f"node{number}" for number in range(1, self.count + 1)]
        return [node_id for node_id in ids if self.pid(node_id)]

    def kill(self, *node_ids: str) -> None:
        """SIGKILL, and waits until the processes are gone."""
        for node_id in node_ids:
            if pid := self.pid(node_id):
                kill_process(pid)

    def store_path(self, node_id: str) -> Path:
        return self.directory / node_id / "store"

    def shard_file(self, node_id: str, shard: str) -> Path:
        return self.store_path(node_id) / "shards" / shard[:2] / shard

    def shards(self, node_id: str) -> set[str]:
        """The shards on a node's disk."""
        return {path.name for path in (self.store_path(node_id) / "shards").glob("*/*")}

    def all_shards(self) -> dict[str, set[str]]:
        """By shard the nodes on whose disks it lies."""
        found: dict[str, set[str]] = {}
        for number in range(1, self.count + 1):
            for shard in self.shards(f"node{number}"):
                found.setdefault(shard, set()).add(f"node{number}")
        return found

    def manifests(self, node_id: str) -> set[str]:
        """The versions whose manifest lies on a node's disk."""
        return {
            document_id
            for document_id, raw in self.documents(node_id)
            if json.loads(raw)["kind"] == "manifest"
        }

    def documents(self, node_id: str) -> Iterator[tuple[str, bytes]]:
        """The documents on a node's disk, by their ids. The node is at work: one that has gone
        since it was listed is left out."""
        for path in (self.store_path(node_id) / "catalogue").glob("*.json"):
            with suppress(FileNotFoundError):
                yield path.stem, path.read_bytes()

    def manifest(self, node_id: str, version: str) -> dict[str, Any]:
        path = self.store_path(node_id) / "catalogue" / f"{version}.json"
        document: dict[str, Any] = json.loads(path.read_bytes())
        return document

    # -- commands

    def start_command(self, *arguments: object) -> subprocess.Popen[str]:
        environment = {**os.environ, **self.environment, "CKPTD_CONFIG": str(self.config)}
        return subprocess.Popen(
            [sys.executable, "-m", "ckptd", "--json", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def command(self, *arguments: object, timeout_s: float = 90) -> Finished:
        """Runs `ckptd --json ARGUMENTS` to its end."""
        process = self.start_command(*arguments)
        out, err = process.communicate(timeout=timeout_s)
        assert out.strip(), f"ckptd {arguments} printed nothing (exit {process.returncode}): {err}"
        return Finished(process.returncode, json.loads(out), err)

    def store(
        self, path: Path, name: str, *, progress: Progress | None = None, **options: Any
    ) -> StoreResult:
        """Stores in this process, through the same function as the command."""

        async def work() -> StoreResult:
            async with connect(load(self.config)) as cluster:
                return await store_checkpoint(
                    cluster, path, name=name, progress=progress, **options
                )

        return run_on_loop(work())

    def restore(
        self, selector: str, to: Path, *, progress: Progress | None = None, **options: Any
    ) -> RestoreResult:
        """Restores in this process, through the same function as the command."""

        async def work() -> RestoreResult:
            async with connect(load(self.config)) as cluster:
                return await restore_checkpoint(
                    cluster, selector, to=to, progress=progress, **options
                )

        return run_on_loop(work())

    def comes_back(self, selector: str, source: Path, *, progress: Progress | None = None) -> bool:
        """Restores a version to a place of its own, and compares it with the directory that was
        stored."""
        target = self.directory / "comes-back"
        try:
            assert self.restore(selector, target, progress=progress).verified
            return tree(target) == tree(source)
        finally:
            shutil.rmtree(target, ignore_errors=True)


@contextmanager
def kept_up(cluster: _Cluster) -> Iterator[_Cluster]:
    """Starts the cluster; it is killed and removed at the end."""
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.kill("coordinator", *cluster.running())
        shutil.rmtree(cluster.directory, ignore_errors=True)


@contextmanager
def breakable_cluster(directory: Path, **options: Any) -> Iterator[BreakableCluster]:
    """A running cluster, killed and removed at the end."""
    with kept_up(BreakableCluster(directory, **options)) as cluster:
        yield cluster


def kill_process(pid: int) -> None:
    """SIGKILL, and waits until the process is gone (a zombie is)."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not _runs(pid), f"process {pid} to die")


def _runs(pid: int) -> bool:
    try:
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return False
    except ChildProcessError:
        pass
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = DEADLINE_S) -> None:
    """Polls until `condition` holds; fails the test when it never does."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s in vain for {what}"
        time.sleep(0.01)


# -- checkpoints


def write_safetensors(path: Path, tensors: Mapping[str, bytes]) -> None:
    """A valid safetensors file of one-dimensional U8 tensors, in this order."""
    header: dict[str, Any] = {}
    offset = 0
    for name, content in tensors.items():
        header[name] = {
            "dtype": "U8",
            "shape": [len(content)],
            "data_offsets": [offset, offset + len(content)],
        }
        offset += len(content)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for content in tensors.values():
            file.write(content)


def make_checkpoint(
    directory: Path, seed: int | str, *, size: int = 4 * 1024 * 1024, tensors: int = 8
) -> Path:
    """A checkpoint like a trainer's: weights, optimizer, json. All bytes follow from `seed`."""
    generator = random.Random(seed)
    directory.mkdir(parents=True)
    each = size // (2 * tensors)
    write_safetensors(
        directory / "model.safetensors",
        {f"{seed}.{number}.weight": generator.randbytes(each) for number in range(tensors)},
    )
    (directory / "optimizer.pt").write_bytes(generator.randbytes(size // 2))
    (directory / "trainer_state.json").write_text(json.dumps({"seed": str(seed)}))
    age_s = time.time() - 60  # as if it had been lying there: nothing is hashed twice
    for path in directory.iterdir():
        os.utime(path, (age_s, age_s))
    return directory


def tree(root: Path) -> dict[str, tuple[str, str]]:
    """What lies below `root`: by path its kind with mode, and the hash or target."""
    found: dict[str, tuple[str, str]] = {}
    for directory, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = Path(directory, name)
            relative = str(path.relative_to(root))
            mode = f"{path.lstat().st_mode:o}"
            if path.is_symlink():
                found[relative] = ("link", os.readlink(path))
            elif path.is_dir():
                found[relative] = (mode, "")
            else:
                found[relative] = (mode, hashlib.sha256(path.read_bytes()).hexdigest())
    return found


async def ask_bitmaps(config: Path, versions: Sequence[str]) -> dict[str, dict[str, bytes | None]]:
    """Which shards of the versions the nodes that answer have, by version and node."""
    async with connect(load(config)) as cluster:
        catalogue = await cluster.catalogue()
        headers = [header for v in versions if (header := catalogue.version(v)) is not None]
        assert len(headers) == len(versions)
        return await cluster.bitmaps(headers)


def bitmaps_now(config: Path, versions: Sequence[str]) -> dict[str, dict[str, bytes | None]]:
    """As `ask_bitmaps`, from a test that has no loop."""
    return asyncio.run(ask_bitmaps(config, versions))
