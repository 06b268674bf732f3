"""The disk below a store disappears or answers with errors: never acknowledged, never served."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.root.clusters import MIB, DaemonCluster, make_checkpoint, shards_in
from tests.root.devices import Disk, FaultyDisk, disk_with_errors, disk_with_volatile_cache
from tests.root.processes import wait_until
from tests.root.test_read_only_disk import assert_answers_no

from ckptd.errors import PeerError, PeerRefused
from ckptd.wire import messages

pytestmark = [pytest.mark.root]

MakeCluster = Callable[..., DaemonCluster]
Keep = Callable[[Disk], Disk]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def drop_cache(path: Path) -> None:
    """The next read of this file comes from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def start_with(
    disk: Disk, make_cluster: MakeCluster, count: int = 1
) -> tuple[DaemonCluster, Path, bytes]:
    """A cluster whose first store is on `disk`, with one shard in it."""
    cluster = make_cluster(count, "replication.shard_size=1MiB")
    store = cluster.store_of("node1")
    disk.mount(store)
    cluster.up()
    content = os.urandom(4 * MIB)
    assert cluster.send("node1", content)[1].state == "durable"
    return cluster, store, content


def test_errors_while_reading_fail_the_node_and_deliver_nothing(
    place: Path, keep: Keep, make_cluster: MakeCluster
) -> None:
    disk = disk_with_errors(place / "disk", 128)
    keep(disk)
    cluster, store, content = start_with(disk, make_cluster)
    shard = sha256(content)
    assert cluster.read("node1", shard) == content
    drop_cache(store / "shards" / shard[:2] / shard)
    (disk.directory / "fail-reads").touch()

    with pytest.raises(PeerError):
        cluster.read("node1", shard)

    assert cluster.states()["node1"] == "failed"
    assert_answers_no(cluster, "node1", shard)
    (disk.directory / "fail-reads").unlink()
    assert_answers_no(cluster, "node1", shard)  # only a restart is a new beginning
    cluster.stop("node1")
    cluster.up()
    assert cluster.states()["node1"] == "up"
    assert cluster.read("node1", shard) == content


def test_errors_while_writing_are_never_acknowledged(
    place: Path, keep: Keep, make_cluster: MakeCluster
) -> None:
    disk = disk_with_errors(place / "disk", 128)
    keep(disk)
    cluster, store, content = start_with(disk, make_cluster)
    (disk.directory / "fail-writes").touch()

    lost = os.urandom(4 * MIB)
    _, report = cluster.send("node1", lost)

    assert (report.state, report.code) == ("failed", "medium_failed")
    assert cluster.states()["node1"] == "failed"
    assert_answers_no(cluster, "node1", sha256(content))
    cluster.stop("node1")
    (disk.directory / "fail-writes").unlink()
    disk.unmount()
    disk.check()
    disk.mount(store)
    cluster.up()
    assert cluster.states()["node1"] == "up"
    assert cluster.read("node1", sha256(content)) == content
    assert shards_in(store) <= {sha256(content), sha256(lost)}
    assert cluster.send("node1", lost)[1].state in ("durable", "present")


def test_a_disk_that_is_pulled_fails_the_node_while_the_cluster_goes_on(
    place: Path, keep: Keep, make_cluster: MakeCluster
) -> None:
    disk = disk_with_volatile_cache(place / "disk", 192)
    keep(disk)
    cluster, store, content = start_with(disk, make_cluster, count=3)
    acknowledged = [content]
    pulled = threading.Event()

    def send_until_failure() -> None:
        for number in range(100):
            sent = os.urandom(MIB)
            if cluster.send("node1", sent)[1].state != "durable":
                return
            acknowledged.append(sent)
            if number == 2:
                pulled.set()

    sending = threading.Thread(target=send_until_failure)
    sending.start()
    assert pulled.wait(30)
    disk.cut_power()
    sending.join()

    assert cluster.states() == {"node1": "failed", "node2": "up", "node3": "up"}
    assert_answers_no(cluster, "node1", sha256(content))
    source = make_checkpoint(place / "source", 8 * MIB)
    assert cluster.ckptd("store", source)["state"] == "protected"
    cluster.stop("node1")
    disk.detach()
    disk.mount(store)
    cluster.up()
    assert cluster.states()["node1"] == "up"
    for sent in acknowledged:
        assert cluster.read("node1", sha256(sent)) == sent


def test_a_store_that_is_unmounted_under_its_daemon_is_not_written_below_the_mount_point(
    place: Path, keep: Keep, make_cluster: MakeCluster
) -> None:
    disk = keep(Disk(place / "disk", 128))
    cluster, store, content = start_with(disk, make_cluster)
    disk.unmount(lazily=True)

    with pytest.raises(PeerRefused) as refused:
        cluster.send("node1", os.urandom(MIB))

    assert refused.value.code == "medium_failed"
    assert cluster.states()["node1"] == "failed"
    assert list(store.iterdir()) == []
    assert_answers_no(cluster, "node1", sha256(content))
    cluster.stop("node1")
    disk.mount(store)
    cluster.up()
    assert cluster.states()["node1"] == "up"
    assert cluster.read("node1", sha256(content)) == content


def test_a_read_after_unmounting_is_no_proof_that_the_shard_is_gone(
    place: Path, keep: Keep, make_cluster: MakeCluster
) -> None:
    """The path leads into an empty directory: to say that the copy does not exist would send the
    asker away for good, and have the copy made anew elsewhere."""
    disk = keep(Disk(place / "disk", 128))
    cluster, _, content = start_with(disk, make_cluster)
    disk.unmount(lazily=True)

    with pytest.raises(PeerRefused) as refused:
        cluster.read("node1", sha256(content))

    assert refused.value.code == "medium_failed"
    assert cluster.states()["node1"] == "failed"


def test_an_idle_node_notices_by_itself_that_its_disk_is_gone(
    place: Path, keep: Keep, make_cluster: MakeCluster
) -> None:
    disk: FaultyDisk = disk_with_errors(place / "disk", 128)
    keep(disk)
    cluster, _, content = start_with(disk, make_cluster)
    (disk.directory / "fail-reads").touch()

    wait_until(lambda: cluster.healthz("node1")[0] == 503, "the node calls itself healthy", 45)

    with pytest.raises(PeerError) as have:
        digest = bytes.fromhex(sha256(content))
        cluster.request("node1", messages.Have((digest,), False), messages.HaveReply)
    assert getattr(have.value, "code", "") == "medium_failed"
