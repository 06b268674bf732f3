"""A node falls silent on the network: nobody refuses, nobody resets, packets just disappear."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.root.clusters import (
    MIB,
    assert_equal_trees,
    assert_protected,
    documents_in,
    make_checkpoint,
)
from tests.root.namespaces import Network
from tests.root.network_cluster import CLIENT, WORKERS, NetworkCluster
from tests.root.processes import wait_until

from ckptd.core import limits

pytestmark = [pytest.mark.root]

# One deadline for the data, one for questions on control connections, and the work itself.
FINISHED_WITHIN_S = limits.STALL_TIMEOUT_S + limits.REQUEST_TIMEOUT_S + 25


@pytest.fixture
def cluster(place: Path, network: Network, undo: ExitStack) -> NetworkCluster:
    """Four workers behind a switch; the client's cable carries 25 MB/s, so that there is a middle
    of things."""
    network.limit(CLIENT, "200mbit")
    cluster = NetworkCluster(place / "cluster", network)
    undo.callback(cluster.down)
    cluster.up()
    return cluster


def test_a_store_ends_protected_without_a_node_that_falls_silent(
    place: Path, cluster: NetworkCluster
) -> None:
    source = make_checkpoint(place / "source", 160 * MIB)
    silent = WORKERS[0]
    storing = cluster.start("store", source)
    arrived = cluster.store_of(silent) / "shards"
    wait_until(lambda: len(list(arrived.glob("*/*"))) > 3, "the node receives nothing")
    cluster.network.silence(silent)
    assert storing.poll() is None, "the node shall fall silent in mid-store"
    began_s = time.monotonic()

    stored = cluster.finish(storing, FINISHED_WITHIN_S)

    print(f"done {time.monotonic() - began_s:.1f} s after the cut")
    assert stored["state"] == "protected"
    others = [cluster.store_of(host) for host in WORKERS[1:]]
    assert_protected(stored["version"], others)
    assert stored["version"] not in documents_in(cluster.store_of(silent))
    cluster.wait_state(silent, ("down", "suspect"))

    cluster.network.unsilence()

    cluster.wait_state(silent, ("up",))
    catalogue = documents_in(others[0])
    wait_until(
        lambda: catalogue <= documents_in(cluster.store_of(silent)),
        "the node does not learn what happened meanwhile",
        40,
    )


def test_a_restore_falls_back_when_a_cable_is_pulled(place: Path, cluster: NetworkCluster) -> None:
    source = make_checkpoint(place / "source", 160 * MIB)
    assert cluster.ckptd("store", source)["state"] == "protected"
    target = place / "restored"
    # The one with most of it: another one may have given all it had before the cut.
    silent = max(
        WORKERS, key=lambda host: sum(1 for _ in cluster.store_of(host).glob("shards/*/*"))
    )
    before = cluster.network.received_bytes(CLIENT)
    restoring = cluster.start("restore", "source", "--to", target)
    wait_until(
        lambda: cluster.network.received_bytes(CLIENT) > before + 24 * MIB, "nothing arrives"
    )
    cluster.network.unplug(silent)
    assert restoring.poll() is None, "the cable shall be pulled in mid-restore"
    began_s = time.monotonic()

    restored = cluster.finish(restoring, FINISHED_WITHIN_S)

    print(f"done {time.monotonic() - began_s:.1f} s after the cut, {restored['sources']}")
    assert restored["verified"] is True
    assert restored["fallbacks"] > 0
    assert_equal_trees(source, target)
    cluster.network.plug(silent)
    cluster.wait_state(silent, ("up",))
    assert cluster.ckptd("store", make_checkpoint(place / "next", 4 * MIB))["state"] == "protected"
