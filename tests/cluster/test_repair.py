"""Repair by real daemons, with the settings of `ckptd local up`."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.kill_fixtures import (
    SHARD_SIZE,
    BreakableCluster,
    breakable_cluster,
    make_checkpoint,
    wait_until,
)

from ckptd.core.repair import REFILL_BELOW

WITHIN_S = 60.0  # what is promised of local clusters


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint", "repair")


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BreakableCluster]:
    """A cluster that waits for an hour before it replaces what a dead node had."""
    settings = ("replication.shard_size=256KiB", "repair.after=1h")
    directory = tmp_path_factory.mktemp("patient") / "local"
    with breakable_cluster(directory, settings=settings) as running:
        yield running


def status(cluster: BreakableCluster) -> dict[str, Any]:
    return cluster.command("status").document


def is_safe(cluster: BreakableCluster) -> bool:
    """Whether nothing is missing, and that is no hope but what nodes confirm."""
    found = cluster.command("ls", "--all-versions").document["checkpoints"]
    return all(each["state"] == "protected" and each["min_copies"] >= 2 for each in found)


def log(cluster: BreakableCluster, node: str, event: str) -> list[dict[str, Any]]:
    lines = (cluster.directory / node / "node.log").read_text().splitlines()
    return [found for line in lines if (found := json.loads(line)).get("event") == event]


def stored_a_while_ago(cluster: BreakableCluster, checkpoint: Path, name: str) -> None:
    """Stores, and waits for some heartbeats: what is stored within the last one before a node dies
    is not presumed to be on it."""
    cluster.store(checkpoint, name)
    stored_s = time.monotonic()
    wait_until(lambda: time.monotonic() > stored_s + 3.0, "some heartbeats")


def bytes_on(cluster: BreakableCluster, node: str) -> int:
    size = 0
    for path in (cluster.store_path(node) / "shards").glob("*/*"):
        with suppress(FileNotFoundError):  # dropped since it was listed
            size += path.stat().st_size
    return size


def copies(cluster: BreakableCluster, count: int) -> Callable[[], bool]:
    return lambda: all(len(nodes) == count for nodes in cluster.all_shards().values())


def test_a_worker_dies_for_good_and_then_another_one(
    fresh_cluster: BreakableCluster, checkpoint: Path
) -> None:
    fresh_cluster.store(checkpoint, "run/step-1")
    fresh_cluster.store(make_checkpoint(checkpoint.with_name("other"), "other"), "run/step-9")
    began_s = time.monotonic()
    fresh_cluster.kill("node1")  # the steward, as there is no coordinator
    wait_until(lambda: is_safe(fresh_cluster), "repair", timeout_s=WITHIN_S)
    assert time.monotonic() - began_s < WITHIN_S

    def is_done() -> bool:
        told = status(fresh_cluster)["repair"]
        return (told["queued_shards"], told["queued_bytes"]) == (0, 0)

    wait_until(is_done, "the steward to know it")
    fresh_cluster.kill("node3")
    assert fresh_cluster.comes_back("run/step-9", checkpoint.with_name("other"))
    assert fresh_cluster.comes_back("run/step-1", checkpoint)


@pytest.mark.long
def test_who_returns_late_gets_nothing_and_what_is_too_much_goes(
    fresh_cluster: BreakableCluster, checkpoint: Path
) -> None:
    fresh_cluster.store(checkpoint, "run/late")
    had = fresh_cluster.shards("node2")
    fresh_cluster.kill("node2")
    wait_until(lambda: is_safe(fresh_cluster), "repair", timeout_s=WITHIN_S)
    fresh_cluster.up()
    wait_until(copies(fresh_cluster, 2), "trimming", timeout_s=90)
    assert fresh_cluster.shards("node2") <= had
    assert is_safe(fresh_cluster)


def test_a_short_absence_moves_nothing(patient: BreakableCluster, checkpoint: Path) -> None:
    stored_a_while_ago(patient, checkpoint, "run/short")
    before = patient.all_shards()
    patient.kill("node2")
    wait_until(lambda: "node2 may come back" in status(patient)["repair"]["waiting"], "the steward")
    assert status(patient)["state"] == "protected"
    patient.up()
    wait_until(lambda: status(patient)["repair"]["waiting"] == "", "node2")
    assert patient.all_shards() == before
    assert not any(log(patient, f"node{n}", "repair_begins") for n in range(1, 5))


def test_a_wiped_disk_under_its_old_identity_is_refilled(
    patient: BreakableCluster, checkpoint: Path
) -> None:
    stored_a_while_ago(patient, checkpoint, "run/wiped")
    had = bytes_on(patient, "node3")
    assert had
    patient.kill("node3")
    shutil.rmtree(patient.store_path("node3"))
    patient.up()  # makes a new store, as `ckptd serve --init` does
    wait_until(lambda: is_safe(patient), "repair", timeout_s=WITHIN_S)
    # As long as it uses less than this it is given copies before all others. What it had beyond
    # that, by chance, goes to who is quickest, as ever.
    others = [bytes_on(patient, node) for node in patient.running() if node != "node3"]
    share = REFILL_BELOW * statistics.fmean(others)
    assert bytes_on(patient, "node3") >= min(had, share) - SHARD_SIZE
    assert copies(patient, 2)()


def test_a_copy_in_quarantine_is_made_anew(patient: BreakableCluster, checkpoint: Path) -> None:
    patient.store(checkpoint, "run/rotten")
    shard = min(patient.shards("node4"))
    with patient.shard_file("node4", shard).open("r+b") as file:
        file.write(b"rotten")
    assert patient.command("verify", "--all").code == 3
    wait_until(lambda: len(patient.all_shards().get(shard, ())) == 2, "repair", timeout_s=WITHIN_S)
    assert patient.command("verify", "--all").code == 0


def test_repair_can_be_paused(fresh_cluster: BreakableCluster, checkpoint: Path) -> None:
    fresh_cluster.store(checkpoint, "run/paused")
    assert fresh_cluster.command("jobs", "pause", "repair").code == 0
    fresh_cluster.kill("node2")
    wait_until(lambda: status(fresh_cluster)["state"] == "degraded", "repair.after")
    assert not is_safe(fresh_cluster)
    assert fresh_cluster.command("jobs", "resume", "repair").code == 5  # node2 gives no answer
    wait_until(lambda: is_safe(fresh_cluster), "repair", timeout_s=WITHIN_S)

    def is_counted() -> bool:
        jobs = fresh_cluster.command("jobs").document["jobs"]
        (done,) = [j for j in jobs if j["name"] == "repair" and j["node"] == "node1"]
        return bool(done["done_bytes"] == done["total_bytes"] > 0)

    wait_until(is_counted, "the steward to count its copies")


def test_a_drained_node_is_emptied(fresh_cluster: BreakableCluster, checkpoint: Path) -> None:
    fresh_cluster.store(checkpoint, "run/drained")
    assert fresh_cluster.shards("node2")
    fresh_cluster.command("drain", "node2")
    wait_until(lambda: not fresh_cluster.shards("node2"), "the drain", timeout_s=WITHIN_S)
    assert is_safe(fresh_cluster)
    assert fresh_cluster.command("drain", "node2").document["copies_left"] == 0
