"""A daemon that hangs without dying (SIGSTOP): its connections stay open and nothing moves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.root.clusters import (
    MIB,
    DaemonCluster,
    assert_protected,
    make_checkpoint,
    send_chain,
)
from tests.root.devices import slow_disk
from tests.root.processes import wait_until

from ckptd.client.cluster import Cluster
from ckptd.core import limits
from ckptd.errors import PeerStalled
from ckptd.wire.messages import CopyReport

pytestmark = [pytest.mark.root]

MakeCluster = Callable[..., DaemonCluster]


def stop(cluster: DaemonCluster, node: str) -> None:
    os.kill(cluster.pid(node), signal.SIGSTOP)


def test_the_error_names_the_node_of_the_chain_that_hangs(
    place: Path, keep: Callable[..., None], make_cluster: MakeCluster
) -> None:
    """The second of three: the first one has its copy, the last one is not to blame."""
    cluster = make_cluster(3)
    disk = slow_disk(place / "disk", 128, 2_000_000)  # so that the middle is in mid-chain for long
    keep(disk)
    disk.mount(cluster.store_of("node2"))
    cluster.up()
    reports: dict[str, CopyReport] = {}
    moving = threading.Event()

    def note(report: CopyReport) -> None:
        reports[report.node] = report
        if report.node == "node2" and report.state == "receiving" and report.received_bytes:
            moving.set()

    async def work(connected: Cluster) -> None:
        sending = asyncio.create_task(
            asyncio.to_thread(
                send_chain, connected, ["node1", "node2", "node3"], os.urandom(32 * MIB), note
            )
        )
        assert await asyncio.to_thread(moving.wait, 30), "node2 receives nothing"
        stop(cluster, "node2")
        try:
            _, result = await sending
        except PeerStalled as error:
            assert error.node == "node2", error.message
        else:
            reports.update({report.node: report for report in result})

    started_s = time.monotonic()
    cluster.ask(work)

    assert time.monotonic() - started_s < limits.STALL_TIMEOUT_S + 15
    assert reports["node1"].state == "durable"
    assert reports["node2"].state == "failed"
    assert "node2" in reports["node2"].message


def test_a_store_goes_on_elsewhere_when_a_node_hangs(
    place: Path, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(4, "replication.shard_size=1MiB")
    cluster.up()
    source = make_checkpoint(place / "source", 384 * MIB)
    storing = subprocess.Popen(
        cluster.command("store", source), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    nodes = [f"node{number}" for number in (1, 2, 3, 4)]

    def busy() -> list[str]:
        """Which nodes take shards: not all of them need to be given any."""
        return [n for n in nodes if len(list(cluster.store_of(n).glob("shards/*/*"))) > 5]

    wait_until(lambda: bool(busy()), "no node receives anything")
    hung = busy()[0]
    stop(cluster, hung)
    assert storing.poll() is None, "the node shall hang in mid-store"

    output, log = storing.communicate(timeout=110)

    assert storing.returncode == 0, output + log
    others = [cluster.store_of(node) for node in nodes if node != hung]
    assert_protected(json.loads(output)["version"], others)
