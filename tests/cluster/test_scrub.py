"""Background reading by real daemons: bad copies are found without anybody looking."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from datetime import datetime
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

from ckptd.store import check_record


def flip_byte(path: Path, offset: int = 1000) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    with open(path, "r+b") as file:
        file.write(content)


def metric(cluster: BreakableCluster, node_id: str, name: str) -> float:
    url = cluster.node(node_id).describe()["metrics_url"]
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found is not None, f"{name} is missing"
    return float(found[1])


@pytest.fixture
def scrubbed(tmp_path: Path) -> Iterator[BreakableCluster]:
    """Four nodes that read every copy within ten seconds."""
    settings = (f"replication.shard_size={SHARD_SIZE // 1024}KiB", "scrub.interval=10s")
    with breakable_cluster(tmp_path / "local", settings=settings) as running:
        yield running


def holder_of_a_large_shard(cluster: BreakableCluster) -> tuple[str, str]:
    """(shard, one of its nodes)."""
    for shard, nodes in sorted(cluster.all_shards().items()):
        node = min(nodes)
        if cluster.shard_file(node, shard).stat().st_size > 2000:
            return shard, node
    raise AssertionError("no shard is large enough")


def status(cluster: BreakableCluster) -> dict[str, Any]:
    return cluster.command("status").document


def test_a_flipped_byte_is_found_quarantined_and_counted(
    scrubbed: BreakableCluster, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", "rot", size=1024 * 1024)
    scrubbed.store(source, "run/step-1")
    shard, node = holder_of_a_large_shard(scrubbed)
    flip_byte(scrubbed.shard_file(node, shard))
    quarantine = scrubbed.store_path(node) / "quarantine"
    wait_until(lambda: any(quarantine.iterdir()), "the bad copy to be found")
    assert [path.name for path in quarantine.iterdir()] == [f"{shard}.0"]
    assert status(scrubbed)["shards"]["corrupt"] == 1
    assert metric(scrubbed, node, "ckptd_shards_corrupt_total") == 1
    assert metric(scrubbed, node, "ckptd_scrub_bytes_total") > 0
    assert metric(scrubbed, node, "ckptd_scrub_oldest_verified_timestamp_seconds") > 1.7e9
    assert scrubbed.comes_back("run/step-1", source)


def test_background_jobs_are_shown_paused_and_resumed_on_all_nodes(
    scrubbed: BreakableCluster, tmp_path: Path
) -> None:
    def states() -> dict[str, str]:
        rows = scrubbed.command("jobs").document["jobs"]
        assert all(
            row.keys() >= {"name", "state", "done_bytes", "total_bytes", "last_error"}
            for row in rows
        )
        return {row["node"]: row["state"] for row in rows if row["name"] == "scrub"}

    assert states().keys() == {"node1", "node2", "node3", "node4"}
    paused = scrubbed.command("jobs", "pause", "scrub")
    assert (paused.code, paused.document["unanswered"]) == (0, {})
    wait_until(lambda: set(states().values()) == {"paused"}, "slices to end")
    scrubbed.store(make_checkpoint(tmp_path / "source", "rest", size=512 * 1024), "run/step-1")
    shard, node = holder_of_a_large_shard(scrubbed)
    flip_byte(scrubbed.shard_file(node, shard))
    scrubbed.kill(node)
    assert scrubbed.command("jobs", "resume", "scrub").code == 5, "one did not hear of it"
    scrubbed.up()
    assert states()[node] == "paused", "what it was told last, restart or not"
    assert scrubbed.shard_file(node, shard).exists()
    assert metric(scrubbed, node, "ckptd_scrub_bytes_total") == 0
    assert scrubbed.command("jobs", "resume", "scrub").code == 0
    wait_until(lambda: not scrubbed.shard_file(node, shard).exists(), "the bad copy to be found")
    assert scrubbed.command("jobs", "pause", "scrap").code == 2


def test_a_stop_keeps_when_copies_were_checked_and_a_restart_shows_it(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    fresh_cluster.store(make_checkpoint(tmp_path / "source", "kept", size=512 * 1024), "run/step-1")
    before = status(fresh_cluster)["scrub"]["oldest_verified_at"]
    assert before is not None
    fresh_cluster.local.down()
    checked: list[int] = []
    for node in {node for nodes in fresh_cluster.all_shards().values() for node in nodes}:
        record = check_record.decode((fresh_cluster.store_path(node) / "checks").read_bytes())
        assert record is not None
        times = [at_s for _, at_s in record]
        assert len(times) == len(fresh_cluster.shards(node))
        checked += times
    fresh_cluster.up()

    def shown() -> float | None:
        at = status(fresh_cluster)["scrub"]["oldest_verified_at"]
        return None if at is None else datetime.fromisoformat(at).timestamp()

    # It is told as an age, and is of a later second when the node that tells it is slow.
    wait_until(lambda: shown() == min(checked), "the time from before the stop")
