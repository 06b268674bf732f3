"""`ckptd serve` on a store directory whose disk is not mounted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.root.clusters import MIB, DaemonCluster
from tests.root.devices import Disk

pytestmark = [pytest.mark.root]


def test_an_unmounted_store_never_becomes_an_empty_one(
    place: Path,
    keep: Callable[[Disk], Disk],
    make_cluster: Callable[..., DaemonCluster],
) -> None:
    disk = keep(Disk(place / "disk", 64))
    cluster = make_cluster(1)
    store = cluster.store_of("node1")
    disk.mount(store)
    cluster.up()
    assert cluster.send("node1", os.urandom(MIB))[1].state == "durable"
    node = cluster.node("node1")
    cluster.stop("node1")
    disk.unmount()

    refused = subprocess.run(
        [sys.executable, "-m", "ckptd", "serve", "--config", node.config_path],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert f"{store} is not a store: it has no ckptd-store.json" in refused.stderr
    assert f"next: findmnt --target {store}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert list(store.iterdir()) == [], "nothing is written below the mount point"

    disk.mount(store)
    cluster.up()
    assert cluster.states() == {"node1": "up"}
