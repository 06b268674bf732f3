"""The demo: a checkpoint is written into a watched directory and protected by itself while a
machine dies, restored while another one dies, compared, and given its lost copies back."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.client.connect import connect
from ckptd.client.listing import Checkpoint, list_checkpoints
from ckptd.client.local_cluster import LocalCluster
from ckptd.client.local_node import LocalNode
from ckptd.client.progress import Progress
from ckptd.client.restore import restore
from ckptd.client.sample import make_sample
from ckptd.client.tree_compare import differences
from ckptd.config import load
from ckptd.errors import CkptdError, NotFound, Refused

Say = Callable[[str], None]

_SHARD_SIZE = "4MiB"  # many shards, so that something is always under way when a node dies
_SETTINGS = (
    f"replication.shard_size={_SHARD_SIZE}",
    "watch.settle=1s",
    "watch.retry=1s",
    "membership.suspect=1s",
    "membership.down=2s",
    "repair.after=3s",  # at home it waits for 10 minutes, so that a reboot moves nothing
    "repair.rate=100MB/s",
)
_NAME = "demo/step-1000"
_PROTECTED_TIMEOUT_S = 60.0
_HEALED_TIMEOUT_S = 45.0
_LOOK_S = 0.01  # between two looks at the nodes' disks
_ASK_S = 0.25  # between two questions whether it is protected


@dataclass(frozen=True)
class DemoResult:
    """`killed` are the nodes in the order of their deaths; `healed`: all copies that the last death
    took were made anew by themselves. `fallbacks`: how often the restore took a shard from another
    node."""

    byte_identical: bool
    killed: tuple[str, ...]
    fallbacks: int
    healed: bool
    seconds: float
    bytes: int

    def as_json(self) -> dict[str, Any]:
        """As `ckptd demo --json` prints it."""
        return {field: getattr(self, field) for field in self.__dataclass_fields__}


class _KillAt(Progress):
    """Kills a node, as a power cut would, once a share of the work is done."""

    def __init__(self, share: float, kill: Callable[[], None]) -> None:
        self._share = share
        self._kill = kill
        self._lock = threading.Lock()
        self._total = 0
        self._done = 0
        self._killed = False

    def total(self, size: int) -> None:
        self._total = size

    def node(self, node: str, size: int) -> None:
        with self._lock:
            self._done += size
            if self._killed or not size or self._done < self._share * self._total:
                return
            self._killed = True
        self._kill()

    def finish(self) -> None:
        """Kills it now if the work was too small to be caught in the middle."""
        if not self._killed:
            self._killed = True
            self._kill()


async def run_demo(checkpoint: Path | None, say: Say) -> DemoResult:
    """Plays the whole story in a temporary directory and removes it at the end.

    `checkpoint` is the user's own (read only), None makes one. Raises CkptdError when a step
    fails, after cleaning up.
    """
    started_s = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="ckptd-demo-"))
    cluster = LocalCluster(place / "cluster")
    try:
        if checkpoint is None:
            checkpoint = place / "checkpoint"
            say("Making a checkpoint, like one that a trainer leaves ...")
            make_sample(checkpoint)
        say("Starting a cluster: 4 nodes and a coordinator, real daemons, TLS, a CA of its own ...")
        nodes = cluster.up(4, _SETTINGS)
        say("  " + ", ".join(f"{node.id} on {node.describe()['address']}" for node in nodes))
        return await _Demo(checkpoint, place, cluster, say).run(started_s)
    finally:
        if cluster.nodes():
            cluster.down()
        shutil.rmtree(place, ignore_errors=True)


class _Demo:
    def __init__(
        self,
        checkpoint: Path,
        place: Path,
        cluster: LocalCluster,
        say: Say,
    ) -> None:
        self._checkpoint = checkpoint
        self._place = place
        self._config = load(cluster.client_config)
        self._watch_root = cluster.watch_root
        self._cluster = cluster
        self._nodes = {node.id: node for node in cluster.nodes()}
        self._say = say
        self._killed: list[str] = []

    async def run(self, started_s: float) -> DemoResult:
        stored = await self._watch()
        await self._bring_back()
        target, fallbacks = await self._restore()
        self._say("Comparing every file with the original, byte by byte ...")
        found = differences(self._checkpoint, target)
        for line in found[:10]:
            self._say(f"  DIFFERENT: {line}")
        healed = await self._heals()
        return DemoResult(
            byte_identical=not found,
            killed=tuple(self._killed),
            fallbacks=fallbacks,
            healed=healed,
            seconds=time.monotonic() - started_s,
            bytes=stored.bytes,
        )

    async def _watch(self) -> Checkpoint:
        """Writes the checkpoint into the watched directory and touches nothing any more: what
        happens then, happens by itself."""
        self._say(f"Writing it to {self._watch_root / _NAME}, as a trainer would ...")
        stop = threading.Event()
        size = _size(self._checkpoint)
        killing = asyncio.ensure_future(asyncio.to_thread(self._kill_in_mid_store, size, stop))
        try:
            await asyncio.to_thread(_copy, self._checkpoint, self._watch_root / _NAME)
            written_s = time.monotonic()
            self._say("  written. Nobody stores it: the coordinator finds that it is whole ...")
            found = await self._protected()
        finally:
            stop.set()
            await asyncio.wait([killing])
        if not self._killed:
            self._kill("just after the store")
        self._say(
            f"  {found.state} {time.monotonic() - written_s:.1f} s after the last byte: "
            f"{found.bytes / 1e6:.0f} MB, each shard on two nodes. What the dead node had taken "
            "was sent to others."
        )
        return found

    def _kill_in_mid_store(self, size: int, stop: threading.Event) -> None:
        """Kills a node, as a power cut would, once a third of what comes is on the disks."""
        while sum(_held_bytes(node) for node in self._nodes.values()) <= 2 * size / 3:
            if stop.wait(_LOOK_S):
                return
        self._kill("while the store is running")

    async def _protected(self, timeout_s: float = _PROTECTED_TIMEOUT_S) -> Checkpoint:
        """The checkpoint, once enough living nodes have it. Raises Refused when they do not."""
        deadline_s = time.monotonic() + timeout_s
        reason = "the coordinator has not seen it"
        while time.monotonic() < deadline_s:
            try:
                async with connect(self._config) as cluster:
                    found = await list_checkpoints(cluster, _NAME)
                    reasons = [row.reason for row in await cluster.watched()]
            except NotFound:
                pass
            except CkptdError as error:
                reason = error.message
            else:
                row = found[0] if found else None
                if row is not None and row.state == "protected" and row.min_copies >= 2:
                    return row
                reason = "; ".join(reasons) or (row.state if row else reason)
            await asyncio.sleep(_ASK_S)
        raise Refused(
            f"the demo's checkpoint did not become protected: {reason}", next="ckptd doctor"
        )

    async def _bring_back(self) -> None:
        """The power is back: while half of the nodes were gone, nothing would be repaired."""
        self._say(f"Starting {self._killed[0]} again, as after a power cut ...")
        await asyncio.to_thread(self._cluster.up, len(self._nodes))
        self._nodes = {node.id: node for node in self._cluster.nodes()}

    async def _heals(self) -> bool:
        """Waits until the copies that the last death took are on other nodes."""
        lost = self._killed[-1]
        self._say(f"{lost} will not come back. Nobody does anything about it ...")
        died_s = time.monotonic()
        try:
            await self._protected(_HEALED_TIMEOUT_S)
        except Refused as error:
            self._say(f"  NOT HEALED: {error.message}")
            return False
        self._say(
            f"  healed {time.monotonic() - died_s:.1f} s later: each shard is on two living nodes "
            "again; they copied it among themselves."
        )
        return True

    async def _restore(self) -> tuple[Path, int]:
        self._say("Restoring it ...")
        target = self._place / "restored"
        killer = _KillAt(0.2, lambda: self._kill("while the restore is running"))
        async with connect(self._config) as cluster:
            result = await restore(cluster, _NAME, to=target, progress=killer)
        killer.finish()
        self._say(
            f"  {result.bytes / 1e6:.0f} MB in {result.seconds:.1f} s from "
            f"{', '.join(sorted(result.sources))}; {result.fallbacks} shards came from the other "
            "copy because a node died."
        )
        return target, result.fallbacks

    def _kill(self, when: str) -> None:
        """SIGKILL for the living node that holds the most: nothing warns it."""
        living = [node for node_id, node in self._nodes.items() if node_id not in self._killed]
        victim = max(living, key=_held_bytes)
        os.kill(victim.pid, signal.SIGKILL)
        self._killed.append(victim.id)
        self._say(f"  kill -9 {victim.id} {when}")


def _copy(source: Path, target: Path) -> None:
    """As a trainer leaves it: a directory. Links are followed."""
    try:
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            target.mkdir(parents=True)
            shutil.copy2(source, target)
    except OSError as error:  # shutil.Error is one
        raise Refused(f"{source} cannot be copied: {error}") from error


def _size(source: Path) -> int:
    if source.is_file():
        return source.stat().st_size
    return sum(path.stat().st_size for path in source.rglob("*") if path.is_file())


def _held_bytes(node: LocalNode) -> int:
    assert node.config.store is not None
    shards = node.config.store.path / "shards"
    return sum(path.stat().st_size for path in shards.glob("*/*"))
