"""`ckptd store` against real daemons: what is sent, what is not, what happens without nodes."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.cluster.kill_fixtures import (
    SHARD_SIZE,
    BreakableCluster,
    breakable_cluster,
    make_checkpoint,
    wait_until,
    write_safetensors,
)

from ckptd.client import commit
from ckptd.client import store as store_module
from ckptd.client.cluster import Cluster
from ckptd.client.connect import connect
from ckptd.client.documents import publish
from ckptd.client.hashing import SourceHasher
from ckptd.client.progress import Progress
from ckptd.client.source import Fingerprint
from ckptd.client.store import StoreResult
from ckptd.client.store import store as store_checkpoint
from ckptd.config import load
from ckptd.core.documents import Manifest
from ckptd.errors import NoRoom, SourceChanged
from ckptd.net.loop import run as run_on_loop

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BreakableCluster]:
    with breakable_cluster(tmp_path_factory.mktemp("store") / "cluster") as cluster:
        # What a test takes away, the next store shall bring back, and nobody before it.
        for job in ("repair", "trim"):
            assert cluster.command("jobs", "pause", job).code == 0
        yield cluster


@pytest.fixture
def cluster(shared: BreakableCluster) -> BreakableCluster:
    """Four nodes that run, whatever the test before did to them."""
    shared.up()
    return shared


def _copies(cluster: BreakableCluster, node: str, version: str) -> list[int]:
    """On how many disks each shard of a version lies, whole."""
    found = cluster.all_shards()
    manifest = cluster.manifest(node, version)
    counts = []
    for shard, size in manifest["shards"]:
        holders = found.get(shard, set())
        for holder in holders:
            assert cluster.shard_file(holder, shard).stat().st_size == size
        counts.append(len(holders))
    return counts


# -- what is sent


def test_json_has_exactly_the_promised_shape(cluster: BreakableCluster, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "ck", "json")
    done = cluster.command("store", path, "--name", "run/json")
    assert done.code == 0
    document = done.document
    shape = {
        "name": str,
        "version": str,
        "state": str,
        "bytes": int,
        "bytes_sent": int,
        "bytes_written": int,
        "shards": int,
        "shards_deduplicated": int,
        "copies": int,
        "seconds": float,
    }
    assert {key: type(document[key]) for key in shape} == shape
    assert document["name"] == "run/json" and document["state"] == "protected"
    assert re.fullmatch("[0-9a-f]{64}", document["version"])
    assert document["bytes"] == sum(file.stat().st_size for file in path.iterdir())
    assert document["copies"] == 2 and document["shards_deduplicated"] == 0
    assert 0 < document["seconds"] < 60


def test_each_byte_leaves_once_and_lands_twice(cluster: BreakableCluster, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "ck", "figures")
    before = cluster.all_shards()
    stored = cluster.store(path, "figures")
    new = {shard: nodes for shard, nodes in cluster.all_shards().items() if shard not in before}
    on_disk = {
        shard: cluster.shard_file(min(nodes), shard).stat().st_size for shard, nodes in new.items()
    }
    assert stored.bytes_sent == sum(on_disk.values())
    assert stored.bytes_written == sum(on_disk[shard] * len(nodes) for shard, nodes in new.items())
    assert stored.bytes_written == 2 * stored.bytes_sent
    assert len(new) == stored.shards and {len(nodes) for nodes in new.values()} == {2}
    # What is beyond the checkpoint itself is the index of its tensors.
    assert 0 < stored.bytes_sent - stored.bytes < 4096


def test_the_same_directory_again_sends_nothing_and_makes_no_version(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "ck", "again")
    first = cluster.store(path, "again")
    second = cluster.store(path, "again")
    assert second.version == first.version and second.state == "protected"
    assert (second.bytes_sent, second.bytes_written) == (0, 0)
    assert second.shards_deduplicated == second.shards == first.shards
    assert second.copies == 2
    # Under another name it is another version of the same shards.
    other = cluster.store(path, "again-elsewhere")
    assert other.version != first.version and other.bytes_sent == 0


def test_equal_content_is_the_same_version_also_when_it_would_be_cut_otherwise_now(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "ck", "recut")
    first = fresh_cluster.store(path, "recut")
    config = load(fresh_cluster.config)
    larger = msgspec.structs.replace(config.replication, shard_size_bytes=4 * SHARD_SIZE)
    # One copy of a shard is gone: the store has to complete the version as it was cut.
    shard, holders = next(iter(fresh_cluster.all_shards().items()))
    fresh_cluster.kill(min(holders))
    fresh_cluster.shard_file(min(holders), shard).unlink()
    fresh_cluster.up()

    async def work() -> StoreResult:
        async with connect(msgspec.structs.replace(config, replication=larger)) as cluster:
            return await store_checkpoint(cluster, path, name="recut")

    second = run_on_loop(work())
    assert (second.version, second.state, second.copies) == (first.version, "protected", 2)
    assert len(fresh_cluster.all_shards()[shard]) == 2


def test_one_changed_byte_costs_the_shards_of_its_tensor(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "ck", "byte", size=16 * MIB, tensors=4)
    first = cluster.store(path, "byte")
    tensor_bytes = 2 * MIB  # 8 shards of their own
    with open(path / "model.safetensors", "r+b") as file:
        file.seek(-tensor_bytes - 1000, os.SEEK_END)  # in the last but one tensor
        (old,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old ^ 1]))
    second = cluster.store(path, "byte")
    assert second.version != first.version and second.state == "protected"
    assert 0 < second.bytes_sent <= SHARD_SIZE
    assert second.bytes_sent <= tensor_bytes


def test_renamed_and_regrouped_tensors_keep_their_shards(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    tensors = {f"t{n}": os.urandom(SHARD_SIZE) for n in range(4)}
    (tmp_path / "ck").mkdir()
    write_safetensors(tmp_path / "ck" / "model.safetensors", tensors)
    cluster.store(tmp_path / "ck", "regrouped")
    write_safetensors(
        tmp_path / "ck" / "model.safetensors",
        {"new.head": os.urandom(1000), **{f"renamed.{key}": t for key, t in tensors.items()}},
    )
    assert cluster.store(tmp_path / "ck", "regrouped").bytes_sent < 8192


def test_twenty_json_files_cost_one_shard(cluster: BreakableCluster, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"config{number}.json").write_text(json.dumps({"n": number}))
    stored = cluster.store(tmp_path, "json-files")
    assert stored.shards == 1 and stored.copies == 2


def test_equal_bytes_within_a_checkpoint_are_sent_once(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    block = os.urandom(SHARD_SIZE)
    (tmp_path / "repeats.bin").write_bytes(block * 10)
    stored = cluster.store(tmp_path / "repeats.bin", "repeats")
    assert stored.bytes_sent == SHARD_SIZE and stored.shards_deduplicated == 9
    manifest = cluster.manifest(sorted(cluster.running())[0], stored.version)
    assert len(manifest["shards"]) == 1 and len(manifest["entries"][0]["parts"]) == 10


def test_an_empty_directory_is_a_checkpoint(cluster: BreakableCluster, tmp_path: Path) -> None:
    stored = cluster.store(tmp_path, "empty")
    assert (stored.state, stored.bytes, stored.shards, stored.bytes_sent) == ("protected", 0, 0, 0)
    assert stored.copies >= 2
    assert cluster.store(tmp_path, "empty").version == stored.version


def test_a_single_file_is_a_checkpoint(cluster: BreakableCluster, tmp_path: Path) -> None:
    (tmp_path / "adapter.bin").write_bytes(os.urandom(SHARD_SIZE + 1))
    done = cluster.command("store", tmp_path / "adapter.bin")
    assert done.code == 0 and done.document["name"] == "adapter.bin"
    manifest = cluster.manifest("node1", done.document["version"])
    assert manifest["unit"] == "file"
    assert [entry["path"] for entry in manifest["entries"]] == ["adapter.bin"]


def test_three_copies_when_asked(cluster: BreakableCluster, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "ck", "three")
    stored = cluster.store(path, "three", copies=3)
    assert stored.copies == 3 and stored.bytes_sent * 3 == stored.bytes_written
    assert set(_copies(cluster, "node1", stored.version)) == {3}
    # Stored again without a word about copies, this version still wants three.
    shard, _ = cluster.manifest("node1", stored.version)["shards"][0]
    holder = min(cluster.all_shards()[shard])
    cluster.shard_file(holder, shard).unlink()
    cluster.command("verify", "three")
    again = cluster.store(path, "three")
    assert (again.version, again.state, again.copies) == (stored.version, "protected", 3)
    assert set(_copies(cluster, "node1", stored.version)) == {3}
    # Asked for more copies later, only those that are missing are made.
    more = cluster.store(path, "three", copies=4)
    assert (more.version, more.copies) == (stored.version, 4)
    assert more.bytes_written == stored.bytes_sent


# -- what is refused


def test_invalid_safetensors_are_refused_with_file_and_fault(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "ck", "invalid")
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(MIB)
    before = cluster.all_shards()
    refused = cluster.command("store", path, "--name", "invalid")
    assert refused.code == 1
    error = refused.document["error"]
    assert error["code"] == 1 and error["kind"] == "source_refused"
    assert "model.safetensors" in error["message"] and "--as-is" in error["next"]
    assert cluster.all_shards() == before
    done = cluster.command("store", path, "--name", "invalid", "--as-is")
    assert done.code == 0 and done.document["state"] == "protected"


def test_a_fifo_is_refused_by_name_before_anything_is_stored(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "ck", "fifo")
    os.mkfifo(path / "pipe")
    before = cluster.all_shards()
    refused = cluster.command("store", path, "--name", "fifo")
    assert refused.code == 1 and "pipe" in refused.document["error"]["message"]
    assert cluster.all_shards() == before


@pytest.mark.parametrize("name", ["../escape", "a//b", "~home", "a@b", "x" * 256, "a\nb", ""])
def test_forbidden_names_are_a_usage_error(
    cluster: BreakableCluster, tmp_path: Path, name: str
) -> None:
    refused = cluster.command("store", tmp_path, "--name", name)
    assert refused.code == 2 and refused.document["error"]["code"] == 2


# -- a source that does not hold still


class _Interfere(Progress):
    """Does something to the source once the first shard has gone to a node."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self._act = act
        self._lock = threading.Lock()
        self.done = False
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def node(self, node: str, size: int) -> None:
        with self._lock:
            if not self.done:
                self.done = True
                self._act()


def _shrink(path: Path) -> None:
    os.truncate(path, 100)


def _grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def _replace(path: Path) -> None:
    path.with_name("other").write_bytes(os.urandom(path.stat().st_size))
    os.replace(path.with_name("other"), path)


def _overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        size = path.stat().st_size
        for offset in range(0, size, 4096):
            os.pwrite(file.fileno(), b"changed", offset)


def _overwrite_and_date_back(path: Path) -> None:
    before = path.stat()
    _overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "change", [_shrink, _grow, _replace, _overwrite, _overwrite_and_date_back, _fifo]
)
def test_a_source_that_changes_while_it_is_stored_gives_no_version(
    cluster: BreakableCluster, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(24 * MIB))
    before = {node: cluster.manifests(node) for node in cluster.running()}
    interference = _Interfere(lambda: change(path))
    with pytest.raises(SourceChanged, match=r"weights\.bin|checkpoint changed"):
        cluster.store(path, "moving", progress=interference)
    assert interference.done
    assert {node: cluster.manifests(node) for node in cluster.running()} == before
    assert not [note for note in interference.notes if "node" in note], "no node is to blame"
    # Once it holds still, it is stored.
    if path.is_fifo():
        path.unlink()
        path.write_bytes(b"again")
    assert cluster.store(path, "moving").state == "protected"


def test_a_mapped_file_that_changes_and_keeps_its_times_gives_no_version(
    cluster: BreakableCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(8 * MIB))
    check_fresh = SourceHasher.check_fresh
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[0] ^= 0xFF  # the page is dirty now: what comes later sets no new time

        def change_first(hasher: SourceHasher, stop: threading.Event) -> None:
            before = Fingerprint.of(path.stat())
            mapping[0] ^= 0xFF
            assert Fingerprint.of(path.stat()) == before
            check_fresh(hasher, stop)

        monkeypatch.setattr(SourceHasher, "check_fresh", change_first)
        with pytest.raises(SourceChanged, match=r"weights\.bin|checkpoint changed"):
            cluster.store(path, "mapped")
    monkeypatch.undo()
    assert cluster.store(path, "mapped").state == "protected"


def test_a_failed_store_leaves_connections_that_work(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    moving, still = tmp_path / "moving.bin", tmp_path / "still.bin"
    moving.write_bytes(os.urandom(8 * MIB))
    still.write_bytes(os.urandom(MIB))
    threads = threading.active_count()

    async def work() -> str:
        async with connect(load(cluster.config)) as connection:
            with pytest.raises(SourceChanged):
                await store_checkpoint(
                    connection,
                    moving,
                    name="moving",
                    progress=_Interfere(lambda: _shrink(moving)),
                )
            assert not [t for t in threading.enumerate() if t.name.startswith("transfer")]
            return (await store_checkpoint(connection, still, name="still")).state

    assert run_on_loop(work()) == "protected"
    assert threading.active_count() <= threads


def test_a_store_that_is_cancelled_ends_its_threads(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        for _ in range(12):
            file.write(os.urandom(8 * MIB))  # 384 shards: far more than may be hashed ahead

    async def work() -> None:
        async with connect(load(cluster.config)) as connection:
            begun = asyncio.Event()
            loop = asyncio.get_running_loop()
            progress = _Interfere(lambda: loop.call_soon_threadsafe(begun.set))
            task = asyncio.create_task(
                store_checkpoint(connection, path, name="cancelled", progress=progress)
            )
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 20)
            assert not [t for t in threading.enumerate() if t.name.startswith("transfer")]

    run_on_loop(work())
    wait_until(
        lambda: (
            not any(
                list((cluster.store_path(node) / "incoming").iterdir())
                for node in cluster.running()
            )
        ),
        "the nodes to discard what came in half",
    )


# -- versions


def test_latest_overwritten_ten_times_is_one_name_with_ten_versions(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    versions = []
    for step in range(10):
        path = make_checkpoint(tmp_path / f"step{step}", f"latest{step}", size=MIB)
        os.rename(path, tmp_path / "latest")
        versions.append(cluster.store(tmp_path / "latest", "run/latest").version)
        os.rename(tmp_path / "latest", path)
    assert len(set(versions)) == 10
    orders = [cluster.manifest("node1", version)["order"] for version in versions]
    assert orders == sorted(set(orders))
    assert {cluster.manifest("node1", version)["name"] for version in versions} == {"run/latest"}
    # An older content again is a newer version, not the old one.
    assert cluster.store(tmp_path / "step0", "run/latest").version not in versions


# -- dead nodes


def test_a_dead_worker_never_blocks_a_store(cluster: BreakableCluster, tmp_path: Path) -> None:
    cluster.kill("node2")
    done = cluster.command("store", make_checkpoint(tmp_path / "ck", "dead"), "--name", "dead")
    assert done.code == 0 and done.document["state"] == "protected"
    holders = cluster.all_shards()
    manifest = cluster.manifest("node1", done.document["version"])
    assert all("node2" not in holders[shard] for shard, _ in manifest["shards"])


def test_one_of_four_left_is_degraded_and_completed_later(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "ck", "degraded")
    cluster.kill("node1", "node2", "node3")
    done = cluster.command("store", path, "--name", "degraded")
    assert done.code == 3 and done.document["state"] == "degraded"
    assert done.document["copies"] == 1
    (tmp_path / "empty").mkdir()  # no shards: the manifests alone are its copies
    empty = cluster.command("store", tmp_path / "empty", "--name", "empty")
    assert (empty.code, empty.document["state"], empty.document["copies"]) == (3, "degraded", 1)
    cluster.up()
    again = cluster.command("store", path, "--name", "degraded")
    assert again.code == 0 and again.document["state"] == "protected"
    assert again.document["version"] == done.document["version"]
    # The copy that is there is passed on by its node: nothing leaves this one.
    assert again.document["bytes_sent"] == 0
    assert again.document["bytes_written"] == done.document["bytes_written"]
    assert min(_copies(cluster, "node4", done.document["version"])) == 2


def test_no_node_left_is_exit_5_with_the_next_command(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "ck", "alone")
    cluster.kill("node1", "node2", "node3", "node4")
    failed = cluster.command("store", path, "--name", "alone")
    assert failed.code == 5
    error = failed.document["error"]
    assert error["code"] == 5 and error["kind"] == "not_enough_nodes" and error["next"]


def test_a_node_that_was_away_gets_the_manifest_from_the_others(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    cluster.kill("node3")
    stored = cluster.store(make_checkpoint(tmp_path / "ck", "away"), "away")
    assert stored.version not in cluster.manifests("node3")
    cluster.up()
    wait_until(lambda: stored.version in cluster.manifests("node3"), "the manifest on node3")


def test_a_node_restarted_in_mid_store_costs_no_copy(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(32 * MIB))

    def restart() -> None:
        cluster.kill("node1")
        cluster.up()

    stored = cluster.store(path, "restarted", progress=_Interfere(restart))
    assert stored.state == "protected" and stored.copies == 2
    assert min(_copies(cluster, "node2", stored.version)) >= 2


def test_a_killed_client_leaves_what_it_had_sent(cluster: BreakableCluster, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(64 * MIB))
    before = set(cluster.all_shards())
    process = cluster.start_command("store", path, "--name", "interrupted")
    wait_until(
        lambda: len(cluster.all_shards().keys() - before) > 20 or process.poll() is not None,
        "some shards to arrive",
    )
    process.kill()
    out, err = process.communicate()
    assert not out, f"it had ended before it was killed: {out} {err}"
    arrived = {shard for shard, nodes in cluster.all_shards().items() if len(nodes) >= 2} - before
    assert 0 < len(arrived) < 256
    stored = cluster.store(path, "interrupted")
    assert stored.state == "protected" and stored.shards == 256
    assert stored.bytes_sent <= stored.bytes - len(arrived) * SHARD_SIZE
    assert stored.shards_deduplicated >= len(arrived)


def test_nothing_is_published_before_its_shards_are_on_nodes_that_live(
    cluster: BreakableCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(SHARD_SIZE))
    make = store_module._Store._manifest
    alive: list[set[str]] = []

    async def make_and_kill(*arguments: Any) -> tuple[Manifest, bytes]:
        manifest, raw = await make(*arguments)
        cluster.kill(*cluster.all_shards()[manifest.shards[0].shard])
        return manifest, raw

    async def note_and_publish(connected: Cluster, raw: bytes) -> Any:
        shard, _ = json.loads(raw)["shards"][0]
        alive.append(cluster.all_shards()[shard] & set(cluster.running()))
        return await publish(connected, raw)

    monkeypatch.setattr(store_module._Store, "_manifest", make_and_kill)
    monkeypatch.setattr(commit, "publish", note_and_publish)
    assert cluster.store(path, "unpublished").state == "protected"
    assert all(len(nodes) == 2 for nodes in alive) and alive


# -- copies that are not what they seem


def test_a_copy_that_rotted_while_its_node_was_off_does_not_count(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(SHARD_SIZE))
    first = cluster.store(path, "off")
    ((shard, _),) = cluster.manifest("node1", first.version)["shards"]
    holder = min(cluster.all_shards()[shard])
    cluster.kill(holder)
    cluster.shard_file(holder, shard).write_bytes(bytes(SHARD_SIZE))
    cluster.up()
    again = cluster.store(path, "off")
    assert (again.version, again.state) == (first.version, "protected")
    files = [cluster.shard_file(node, shard) for node in cluster.all_shards()[shard]]
    assert len(files) >= 2 and all(file.read_bytes() == path.read_bytes() for file in files)


def test_a_bad_copy_is_not_passed_on_and_nobody_else_is_blamed(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(MIB))
    first = cluster.store(path, "rotten")
    shard = cluster.manifest("node1", first.version)["shards"][0][0]
    holder, other = sorted(cluster.all_shards()[shard])
    cluster.kill(other)
    cluster.shard_file(other, shard).unlink()
    cluster.up()
    file = cluster.shard_file(holder, shard)
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    progress = _Interfere()
    second = cluster.store(path, "rotten", progress=progress)
    assert second.state == "protected" and second.copies == 2
    assert any(holder in note and shard in note for note in progress.notes)
    assert not [note for note in progress.notes if "left out" in note]
    good = [
        node
        for node in cluster.all_shards()[shard]
        if cluster.shard_file(node, shard).read_bytes() == path.read_bytes()[:SHARD_SIZE]
    ]
    assert len(good) >= 2
    quarantined = list((cluster.store_path(holder) / "quarantine").iterdir())
    assert any(entry.name.startswith(shard) for entry in quarantined)


# -- room


def _free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def test_all_nodes_full_is_no_room_and_nothing_is_published(tmp_path: Path) -> None:
    reserve = _free_bytes(tmp_path) + 10**12
    settings = [f"replication.shard_size={SHARD_SIZE // 1024}KiB", f"store.reserve={reserve}B"]
    path = make_checkpoint(tmp_path / "ck", "full")
    with breakable_cluster(tmp_path / "cluster", count=2, settings=settings) as cluster:
        refused = cluster.command("store", path, "--name", "full")
        assert refused.code == 1 and refused.document["error"]["kind"] == "no_room"
        assert refused.document["error"]["next"]
        assert not cluster.all_shards()
        assert not cluster.manifests("node1") and not cluster.manifests("node2")
        with pytest.raises(NoRoom):
            cluster.store(path, "full")
