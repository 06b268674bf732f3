"""A store on a small ext4: what does not fit is that node's error alone, and leaves no trace."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.root.clusters import (
    MIB,
    DaemonCluster,
    assert_protected,
    make_checkpoint,
    shards_in,
)
from tests.root.devices import Disk

pytestmark = [pytest.mark.root]

MakeCluster = Callable[..., DaemonCluster]
Keep = Callable[[Disk], Disk]


def test_a_shard_that_does_not_fit_is_refused_before_a_byte_is_written(
    place: Path, keep: Keep, make_cluster: MakeCluster
) -> None:
    disk = keep(Disk(place / "disk", 64))
    cluster = make_cluster(1)
    store = cluster.store_of("node1")
    disk.mount(store)
    cluster.up()
    small = os.urandom(4 * MIB)
    assert cluster.send("node1", small)[1].state == "durable"
    free_before = os.statvfs(store).f_bfree

    wanted, report = cluster.send("node1", os.urandom(50 * MIB))

    assert not wanted
    assert (report.state, report.code) == ("failed", "no_room")
    assert "df -h" in cluster.log("node1") or "needs" in report.message
    assert os.statvfs(store).f_bfree == free_before
    assert list((store / "incoming").iterdir()) == []
    assert shards_in(store) == {hashlib.sha256(small).hexdigest()}
    assert cluster.healthz("node1")[0] == 200, "a full disk is no failed disk"


def test_a_file_system_out_of_inodes_refuses_although_it_has_free_blocks(
    place: Path, keep: Keep, make_cluster: MakeCluster
) -> None:
    """The check of the room passes here, and then the kernel says ENOSPC."""
    disk = keep(Disk(place / "disk", 64, mkfs=("-N", "64")))
    cluster = make_cluster(1)
    store = cluster.store_of("node1")
    disk.mount(store)
    cluster.up()
    kept = os.urandom(MIB)
    assert cluster.send("node1", kept)[1].state == "durable"
    (store / "filler").mkdir()
    with contextlib.suppress(OSError):
        for number in range(100):
            (store / "filler" / str(number)).touch()
    assert os.statvfs(store).f_ffree == 0
    assert os.statvfs(store).f_bavail * os.statvfs(store).f_frsize > 16 * MIB

    refused = os.urandom(MIB)
    wanted, report = cluster.send("node1", refused)

    assert not wanted
    assert (report.state, report.code) == ("failed", "no_room")
    assert cluster.healthz("node1")[0] == 200
    for path in (store / "filler").iterdir():
        path.unlink()
    assert cluster.send("node1", refused)[1].state == "durable", "the node needs no restart"
    assert shards_in(store) == {hashlib.sha256(data).hexdigest() for data in (kept, refused)}


def test_somebody_else_fills_the_disk_while_checkpoints_are_stored(
    place: Path, keep: Keep, make_cluster: MakeCluster
) -> None:
    """Two of three nodes suffice; what the third had taken stays whole, what it could not is not
    claimed. Whether a shard met the full disk is chance here; tests/cluster/test_full_disk.py
    makes sure of it."""
    disk = keep(Disk(place / "disk", 96))
    cluster = make_cluster(3, "replication.shard_size=1MiB")
    disk.mount(cluster.store_of("node1"))
    cluster.up()
    stopped = threading.Event()
    filled = threading.Event()

    def fill_and_free() -> None:
        """Takes all blocks, gives them back, and so on: the node's check races with it."""
        filler = cluster.store_of("node1") / "filler"
        while not stopped.is_set():
            with filler.open("wb") as file, contextlib.suppress(OSError):
                for _ in range(4096):
                    os.write(file.fileno(), bytes(MIB // 4))
                filled.set()
            filled.set()
            filler.unlink()

    thread = threading.Thread(target=fill_and_free)
    thread.start()
    try:
        assert filled.wait(20)
        versions = []
        for number in range(4):
            source = make_checkpoint(place / f"source{number}", 12 * MIB)
            versions.append(cluster.ckptd("store", source)["version"])
    finally:
        stopped.set()
        thread.join()
    stores = [cluster.store_of(f"node{number}") for number in (1, 2, 3)]
    for version in versions:
        assert_protected(version, stores)
    assert cluster.healthz("node1")[0] == 200
    assert list((stores[0] / "incoming").iterdir()) == []
    assert cluster.send("node1", os.urandom(MIB))[1].state == "durable"
    assert shards_in(stores[0])
