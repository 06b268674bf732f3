"""Power is cut while a node stores: what was acknowledged is there afterwards, and nothing torn.

The disk's cache keeps everything that was not flushed in the memory of one process, and that
process is killed together with the daemon. Ten rounds at random moments.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.root.clusters import (
    MIB,
    DaemonCluster,
    assert_protected,
    documents_in,
    make_checkpoint,
    send_chain,
    shards_in,
)
from tests.root.devices import Disk, FaultyDisk, disk_with_volatile_cache
from tests.root.processes import wait_until

from ckptd.client.cluster import Cluster
from ckptd.client.store import store
from ckptd.errors import CkptdError

pytestmark = [pytest.mark.root]

ROUNDS = 10


def test_the_disk_of_these_tests_forgets_what_was_not_flushed(
    place: Path, keep: Callable[[Disk], Disk]
) -> None:
    """Without this the others would prove nothing."""
    disk = disk_with_volatile_cache(place / "disk", 64)
    keep(disk)
    mount_point = place / "mounted"
    disk.mount(mount_point, "commit=300")
    flushed, lost = mount_point / "flushed", mount_point / "lost"
    for path in (flushed, lost):
        path.write_bytes(bytes(4096))
    with flushed.open("rb") as file:
        os.fsync(file.fileno())
    lost.rename(mount_point / "renamed")

    disk.cut_power()
    disk.detach()
    disk.mount(mount_point)

    assert flushed.read_bytes() == bytes(4096)
    assert not (mount_point / "renamed").exists()


class Writer:
    """Stores until the node is gone, and remembers what it was told is safe."""

    def __init__(self, cluster: DaemonCluster, place: Path, number: int) -> None:
        self._cluster = cluster
        self._place = place
        self._number = number
        self.durable: list[str] = []
        self.protected: list[str] = []
        self._began = threading.Event()
        self._threads = [
            threading.Thread(target=cluster.ask, args=(work,))
            for work in (self._send_shards, self._store_versions)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client waits for a node that is dead"

    async def _send_shards(self, cluster: Cluster) -> None:
        """Single shards to node1 alone."""
        chooser = random.Random(self._number)
        while True:
            content = os.urandom(chooser.randrange(1, 2 * MIB))
            try:
                _, (report,) = await asyncio.to_thread(send_chain, cluster, ["node1"], content)
            except CkptdError:
                return
            if report.state != "durable":
                return
            self.durable.append(hashlib.sha256(content).hexdigest())

    async def _store_versions(self, cluster: Cluster) -> None:
        """Whole versions to both nodes."""
        for number in range(1000):
            name = f"round{self._number}-{number}"
            source = make_checkpoint(self._place / name, 300_000, 70_000)
            try:
                result = await store(cluster, source, name=name)
            except CkptdError:
                return
            if result.state != "protected":
                return
            self.protected.append(result.version)


def test_what_was_acknowledged_survives_power_cuts(
    place: Path, keep: Callable[[Disk], Disk], make_cluster: Callable[..., DaemonCluster]
) -> None:
    disk: FaultyDisk = disk_with_volatile_cache(place / "disk", 1536)
    keep(disk)
    cluster = make_cluster(2, "replication.shard_size=64KiB")
    stores = [cluster.store_of("node1"), cluster.store_of("node2")]
    disk.mount(stores[0], "commit=300")
    cluster.up()
    durable: set[str] = set()
    protected: set[str] = set()
    cut_in_mid_write = 0
    seed = random.SystemRandom().randrange(2**32)
    chooser = random.Random(seed)
    print(f"seed {seed}")

    for number in range(ROUNDS):
        writer = Writer(cluster, place, number)
        writer.start()
        wait_until(lambda: writer.durable and writer.protected, "nothing is acknowledged")  # noqa: B023
        moment = threading.Event()
        moment.wait(chooser.uniform(0.0, 0.6))  # the random moment
        pid = cluster.pid("node1")
        if chooser.random() < 0.5:  # as if both had died at once; either may be first by a hair
            os.kill(pid, signal.SIGKILL)
            disk.cut_power()
        else:
            disk.cut_power()
            os.kill(pid, signal.SIGKILL)
        cut_in_mid_write += any((stores[0] / "incoming").iterdir())
        os.waitpid(pid, 0)
        writer.join()
        disk.detach()
        disk.mount(stores[0], "commit=300")
        cluster.up()
        durable.update(writer.durable)
        protected.update(writer.protected)

        assert cluster.states() == {"node1": "up", "node2": "up"}
        assert durable <= shards_in(stores[0]), f"round {number}: acknowledged and gone"
        assert protected <= documents_in(stores[0])
        assert list((stores[0] / "incoming").iterdir()) == []

    for version in protected:
        assert_protected(version, stores)
    print(f"{len(durable)} shards, {len(protected)} versions, {cut_in_mid_write} cuts in mid-write")
    assert cut_in_mid_write >= ROUNDS // 3
