"""The file system below a store turns read-only: that node is out, and only that node."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.root.clusters import (
    MIB,
    DaemonCluster,
    assert_equal_trees,
    assert_protected,
    make_checkpoint,
    shards_in,
    shards_of,
)
from tests.root.devices import Disk
from tests.root.processes import wait_until

from ckptd.errors import CkptdError, PeerRefused
from ckptd.wire import messages

pytestmark = [pytest.mark.root]


def assert_answers_no(cluster: DaemonCluster, node: str, shard: str) -> None:
    """A node with a failed disk vouches for nothing and takes nothing."""
    digest = bytes.fromhex(shard)
    with pytest.raises(PeerRefused) as have:
        cluster.request(node, messages.Have((digest,), False), messages.HaveReply)
    with pytest.raises(PeerRefused) as read:
        cluster.read(node, shard)
    with pytest.raises(PeerRefused) as write:
        cluster.send(node, os.urandom(MIB))
    assert have.value.code == read.value.code == write.value.code == "medium_failed"
    status, document = cluster.healthz(node)
    assert status == 503
    assert document["ok"] is False


def test_a_disk_that_turns_read_only_takes_its_node_out_until_a_restart(
    place: Path,
    keep: Callable[[Disk], Disk],
    make_cluster: Callable[..., DaemonCluster],
) -> None:
    disk = keep(Disk(place / "disk", 256))
    cluster = make_cluster(3, "replication.shard_size=1MiB")
    disk.mount(cluster.store_of("node1"), "errors=remount-ro")
    cluster.up()
    stores = [cluster.store_of(f"node{number}") for number in (1, 2, 3)]
    first = make_checkpoint(place / "first", 24 * MIB, 100)
    version = cluster.ckptd("store", first)["version"]
    mine = shards_in(stores[0]) & shards_of(stores[1], version)
    assert mine, "the small disk shall hold copies of the first version"

    cluster.stop("node3")  # so that every shard is offered to the disk that fails
    second = make_checkpoint(place / "second", 160 * MIB)
    before = len(list(stores[0].glob("shards/*/*")))
    storing = subprocess.Popen(cluster.command("store", second), stdout=subprocess.PIPE)
    wait_until(
        lambda: len(list(stores[0].glob("shards/*/*"))) > before + 3, "nothing of it arrives"
    )
    disk.turn_read_only()
    assert storing.poll() is None, "the disk shall fail in mid-store"
    output, _ = storing.communicate(timeout=60)

    assert storing.returncode == 3, output
    cluster.up()
    assert cluster.states() == {"node1": "failed", "node2": "up", "node3": "up"}
    assert_answers_no(cluster, "node1", sorted(mine)[0])
    reason = cluster.healthz("node1")[1]["roles"]["worker"]["reasons"][0]
    # An fsync that was under way when the journal was aborted says EIO; what begins later EROFS.
    assert "(EROFS)" in reason or "(EIO)" in reason
    for name, source in (("first", first), ("second", second)):
        cluster.ckptd("restore", name, "--to", place / f"restored-{name}")
        assert_equal_trees(source, place / f"restored-{name}")

    cluster.stop("node1")
    with pytest.raises(CkptdError, match="EROFS"):
        cluster.up()
    disk.unmount()
    disk.check()
    disk.mount(stores[0])
    cluster.up()
    assert cluster.states() == {"node1": "up", "node2": "up", "node3": "up"}
    assert cluster.healthz("node1")[0] == 200
    assert mine <= shards_in(stores[0])
    some = sorted(mine)[0]
    assert hashlib.sha256(cluster.read("node1", some)).hexdigest() == some
    assert_protected(version, stores)
    assert cluster.send("node1", os.urandom(MIB))[1].state == "durable"
