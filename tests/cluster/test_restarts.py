"""Two workers and the coordinator are restarted in random order while checkpoints are stored."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
from tests.cluster.kill_fixtures import make_checkpoint, tree, wait_until
from tests.cluster.watched import put, watched_cluster

ROUNDS = 20
RESTARTED = ("node1", "node2", "coordinator")
SHARDS = 32  # of 256 KiB, in one checkpoint


@pytest.mark.long
@pytest.mark.timeout(900)
def test_restarts_in_random_order_during_stores_lose_nothing(tmp_path: Path) -> None:
    generator = random.Random(20)
    in_mid_store = 0
    with watched_cluster(tmp_path / "local", count=4) as cluster:
        expected = {}
        for number in range(ROUNDS):
            name = f"run/step-{number}"
            source = make_checkpoint(tmp_path / "fresh", f"restart-{number}", size=SHARDS * 2**18)
            expected[name] = tree(source)
            before = len(cluster.all_shards())
            moment = before + generator.randrange(1, SHARDS)
            put(source, cluster.root / name)
            with contextlib.suppress(AssertionError):  # a slow machine is no reason to fail
                wait_until(lambda least=moment: len(cluster.all_shards()) >= least, "shards")  # type: ignore[misc]
            in_mid_store += len(cluster.all_shards()) < before + SHARDS
            cluster.kill(generator.choice(RESTARTED))
            cluster.up()
        wait_until(lambda: not cluster.status()["pending"], "all to be stored", timeout_s=120)
        for name, content in expected.items():
            cluster.wait_protected(name, timeout_s=120)
            assert cluster.rows("run")[name]["min_copies"] >= 2
            assert len(cluster.versions(name)) == 1
            target = tmp_path / "back"
            assert cluster.restore(name, target, force=True).verified
            assert tree(target) == content
    assert in_mid_store >= ROUNDS // 2, "the restarts came when nothing was stored"
