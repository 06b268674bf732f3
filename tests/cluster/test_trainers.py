"""Trainers of different habits, while workers die by SIGKILL."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cluster.kill_fixtures import wait_until
from tests.cluster.trainers import HABITS, KEPT, NUMBERS, contents, place
from tests.cluster.watched import SETTINGS, Watched, watched_cluster

ROOT = Path(__file__).parents[2]
WRITTEN_S = 120.0


def held_by(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def numbers_of(cluster: Watched, habit: str, name: str, place: Path) -> list[int]:
    """Which of the trainer's checkpoints the versions of a name are, newest first. Fails when one
    is none of them byte for byte."""
    possible = {number: dict(contents(habit, number)) for number in range(1, NUMBERS + 1)}
    found = []
    for version in cluster.versions(name):
        assert cluster.restore(f"{name}@{version}", place).verified
        restored = held_by(place)
        shutil.rmtree(place)
        same = [number for number, files in possible.items() if files == restored]
        assert same, f"{name}@{version} is nothing that {habit} wrote"
        found += same
    return found


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_every_trainer_leaves_is_protected_although_workers_die(tmp_path: Path) -> None:
    # Whoever overwrites in place must not look finished between two files on a slow machine.
    settings = (*SETTINGS, "watch.settle=3s", "watch.settle_max=60s")
    generator = random.Random(7)
    with watched_cluster(tmp_path / "local", count=4, settings=settings) as cluster:
        trainers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.trainers", habit, str(cluster.root)], cwd=ROOT
            )
            for habit in HABITS
        ]
        deaths = 0
        try:
            while any(trainer.poll() is None for trainer in trainers):
                held = len(cluster.all_shards())
                wait_until(
                    lambda held=held: (  # type: ignore[misc]
                        len(cluster.all_shards()) > held
                        or all(trainer.poll() is not None for trainer in trainers)
                    ),
                    "something to be stored",
                    timeout_s=WRITTEN_S,
                )
                cluster.kill(f"node{generator.randint(1, 4)}")
                deaths += 1
                cluster.up()
        finally:
            for trainer in trainers:
                trainer.kill()
                trainer.wait()
        assert all(trainer.returncode == 0 for trainer in trainers)
        assert deaths >= 5
        wait_until(lambda: not cluster.status()["pending"], "all to be stored", timeout_s=120)
        for habit in HABITS:
            for number in range(1, NUMBERS + 1):
                name = place(habit, number)
                if not (cluster.root / name).exists() and not cluster.versions(name):
                    assert number <= NUMBERS - KEPT
                    continue  # the trainer deleted it before there was a node to take it
                cluster.wait_protected(name, timeout_s=120)
                found = numbers_of(cluster, habit, name, tmp_path / "back")
                if habit == "overwriting":
                    assert found[0] == NUMBERS, "the last one was skipped"
                    assert found == sorted(set(found), reverse=True)
                else:
                    assert found == [number]
        assert cluster.status()["state"] == "protected"
