"""Retention and garbage collection with real daemons: what goes, what stays, and the disks."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.cluster.kill_fixtures import (
    DEADLINE_S,
    kept_up,
    make_checkpoint,
    wait_until,
    write_safetensors,
)
from tests.cluster.watched import Watched

from ckptd.client.source import Source
from ckptd.core.documents import document_id
from ckptd.errors import SourceChanged

GRACE_S = 10.0  # so long that a stalled machine does not use it up
SETTINGS = (
    "replication.shard_size=256KiB",
    "watch.settle=200ms",
    "watch.settle_max=1s",
    "watch.retry=500ms",
    f"gc.grace={int(GRACE_S)}s",
    "retention=[{runs: unruled, keep_last: 1000}, {runs: '*', keep_last: 3}]",
)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Three workers and a coordinator with rules; who kills, brings back."""
    directory = tmp_path_factory.mktemp("retention") / "local"
    cluster = Watched(directory, count=3, settings=SETTINGS, coordinator=True)
    with kept_up(cluster):
        yield cluster


def shard_bytes(cluster: Watched, name: str) -> dict[str, int]:
    """All shards that the live versions of a name are made of, and their sizes."""
    found = cluster.command("show", name).document["versions"]
    return {shard["shard"]: shard["bytes"] for version in found for shard in version["shards"]}


def shards_of(cluster: Watched, name: str) -> set[str]:
    return set(shard_bytes(cluster, name))


def on_disks(cluster: Watched) -> set[str]:
    return set(cluster.all_shards())


def newest_is(cluster: Watched, name: str, content: bytes) -> bool:
    found = cluster.command("show", name).document
    if not found.get("versions") or found["versions"][0]["state"] != "protected":
        return False
    return any(file["sha256"] == document_id(content) for file in found["files"])


def overwrite(latest: Path, content: bytes) -> None:
    """As trainers do that know what they do."""
    new = latest / "weights.bin.tmp"
    new.write_bytes(content)
    os.replace(new, latest / "weights.bin")


def test_overwritten_again_and_again_the_newest_three_stay_and_the_room_comes_back(
    watched: Watched, tmp_path: Path
) -> None:
    name = "overwritten/latest"
    latest = watched.root / name
    latest.mkdir(parents=True)
    contents = [f"{number} ".encode() * 40_000 for number in range(201)]
    for number, content in enumerate(contents[:200], 1):
        overwrite(latest, content)
        if number % 40 == 0:  # those between are faster than anybody could store them
            stored = partial(newest_is, watched, name, content)
            wait_until(stored, f"overwrite {number} to be protected")
    overwrite(latest, contents[200])
    wait_until(lambda: newest_is(watched, name, contents[200]), "one more to be protected")
    wait_until(lambda: len(watched.versions(name)) == 3, "three versions")
    written = {document_id(content): content for content in contents}
    for version in watched.versions(name):
        watched.restore(f"{name}@{version}", tmp_path / version)
        found = (tmp_path / version / "weights.bin").read_bytes()
        assert document_id(found) in written, "it restores, as something that was written"
    wait_until(lambda: on_disks(watched) == shards_of(watched, name), "the room to come back")
    for version in watched.versions(name):
        assert watched.restore(f"{name}@{version}", tmp_path / f"again-{version}").verified
    jobs = watched.command("jobs").document["jobs"]
    assert {job["last_error"] for job in jobs} == {""}
    assert sum(job["done_bytes"] for job in jobs if job["name"] == "gc") > 0


def weights(number: int) -> dict[str, bytes]:
    """Tensors of which one never changes, as of a base model that is not trained."""
    generator = random.Random(number)
    return {
        "base": random.Random("base").randbytes(300_000),
        "head": generator.randbytes(200_000 + number),
    }


def copies_on_disks(cluster: Watched) -> dict[str, int]:
    """By shard, in how many files it is."""
    return {shard: len(nodes) for shard, nodes in cluster.all_shards().items()}


def left_behind(cluster: Watched) -> list[Path]:
    """Files of workers' stores in which nothing should be for long."""
    stores = [cluster.store_path(f"node{number}") for number in range(1, cluster.count + 1)]
    return [
        path
        for store in stores
        for directory in ("incoming", "quarantine")
        for path in (store / directory).rglob("*")
        if path.is_file()
    ]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_hundred_overwrites_in_place_end_with_three_versions_and_the_room_of_three(
    tmp_path: Path,
) -> None:
    """With the watcher's own patience, and a grace that is over again and again meanwhile."""
    settings = (
        "replication.shard_size=256KiB",
        "gc.grace=5s",
        "retention=[{runs: '*', keep_last: 3}]",
    )
    cluster = Watched(tmp_path / "local", count=4, settings=settings, coordinator=True)
    name = "run/latest"
    file = cluster.root / name / "model.safetensors"
    numbers: dict[str, int] = {}

    def overwrite_in_place(number: int) -> bytes:
        write_safetensors(file, weights(number))
        content = file.read_bytes()
        numbers[document_id(content)] = number
        return content

    try:
        cluster.up()
        file.parent.mkdir(parents=True)
        for number in range(1, 201):
            content = overwrite_in_place(number)
            if number % 10 == 0:
                stored = partial(newest_is, cluster, name, content)
                wait_until(stored, f"overwrite {number} to be protected", timeout_s=60)
        last = overwrite_in_place(201)
        wait_until(lambda: newest_is(cluster, name, last), "the last one", timeout_s=60)
        wait_until(lambda: len(cluster.versions(name)) == 3, "three versions")

        versions = cluster.versions(name)

        def restored(where: str) -> list[int]:
            found = []
            for version in versions:
                target = tmp_path / f"{where}-{version}"
                assert cluster.restore(f"{name}@{version}", target).verified
                found.append(numbers[document_id((target / file.name).read_bytes())])
            return found

        before = restored("at-once")
        assert before[0] == 201 and before == sorted(set(before), reverse=True)
        needed = dict.fromkeys(shards_of(cluster, name), 2)
        wait_until(lambda: copies_on_disks(cluster) == needed, "the room", timeout_s=60)
        for number in range(1, cluster.count + 1):
            wait_until(
                lambda node=f"node{number}": cluster.manifests(node) == set(versions),  # type: ignore[misc]
                "the manifests",
            )
        assert left_behind(cluster) == []
        assert cluster.versions(name) == versions
        assert restored("at-the-end") == before
        assert cluster.command("verify", "--all").code == 0
        assert len(cluster.stored_events(name)) >= 20, "each that stayed for long was stored"
    finally:
        cluster.kill("coordinator", *cluster.running())


def test_a_store_that_takes_longer_than_the_grace_keeps_its_shards(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = make_checkpoint(tmp_path / "slow", "slow", size=1_000_000)
    broken_off = make_checkpoint(tmp_path / "broken-off", "broken off", size=500_000)
    before = on_disks(watched)
    sent: set[str] = set()

    def meanwhile(source: Source) -> None:
        """All shards are sent, and no manifest names them yet."""
        if source.root == broken_off:
            raise SourceChanged("it was broken off")
        sent.update(on_disks(watched) - before)
        with pytest.raises(SourceChanged):
            watched.store(broken_off, "unruled/broken-off")
        unwanted = on_disks(watched) - before - sent
        assert sent and unwanted
        # Younger than those of the slow store, and nobody wants them any more.
        wait_until(lambda: not unwanted & on_disks(watched), "the grace to be over")

    monkeypatch.setattr(Source, "check", meanwhile)
    result = watched.store(slow, "unruled/slow")
    assert sent <= on_disks(watched)
    assert result.state == "protected"
    assert result.bytes_sent == sum(shard_bytes(watched, "unruled/slow").values()), "sent once"
    assert watched.comes_back("unruled/slow", slow)


def test_what_was_removed_comes_back_within_the_grace_and_its_room_after_it(
    watched: Watched, tmp_path: Path
) -> None:
    name = "unruled/removed"
    source = make_checkpoint(tmp_path / "model", name, size=1_000_000)
    watched.store(source, name)
    wait_until(lambda: len(watched.versions(name)) == 1, "the version")
    shards = shards_of(watched, name)
    time.sleep(GRACE_S)  # long stored: only what happens from now on may keep it
    assert watched.command("rm", name, "--yes").code == 0
    found = watched.command("undelete", name)
    assert (found.code, found.document["state"]) == (0, "protected")
    assert watched.comes_back(name, source)
    assert watched.command("rm", name, "--yes").code == 0
    wait_until(lambda: not shards & on_disks(watched), "the room to come back")
    wait_until(
        lambda: all(
            not watched.manifests(f"node{number}") & {found.document["version"]}
            for number in (1, 2, 3)
        ),
        "the manifests to go",
    )
    assert watched.command("undelete", name).code != 0


def test_a_rule_that_drops_most_waits_for_a_confirmation(watched: Watched, tmp_path: Path) -> None:
    name = "most/latest"
    assert watched.command("jobs", "pause", "retention").code == 0
    for number in range(12):
        watched.store(make_checkpoint(tmp_path / str(number), number, size=50_000), name)
    watched.kill("coordinator")
    watched.up()
    up = [f'ckptd_node_up{{node="node{number}"}}' for number in (1, 2, 3)]
    wait_until(lambda: all(watched.metrics().get(each) == 1 for each in up), "all to be heard")
    assert watched.command("jobs", "resume", "retention").code == 0

    def waiting() -> bool:
        jobs = watched.command("jobs").document["jobs"]
        return any("more than half" in job["last_error"] for job in jobs)

    wait_until(waiting, "the rules to wait")
    shown = watched.command("prune", "--dry-run").document
    assert shown["dry_run"] and shown["waits"]
    assert {row["name"] for row in shown["delete"]} == {name}
    assert {row["reason"] for row in shown["delete"]} == {"not among the newest 3"}
    refused = watched.command("prune")
    assert (refused.code, refused.document["error"]["kind"]) == (1, "refused")
    assert len(watched.versions(name)) == 12
    done = watched.command("prune", "--confirm").document
    assert len(done["delete"]) == 9 and not done["waits"] and not done["dry_run"]
    assert len(watched.versions(name)) == 3
    wait_until(lambda: not waiting(), "nothing to wait", timeout_s=DEADLINE_S)
