"""Restores from real daemons: what comes back, from whom, and what happens when copies are bad."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import safetensors
from safetensors import safe_open
from tests.cluster.kill_fixtures import (
    SHARD_SIZE,
    BreakableCluster,
    breakable_cluster,
    make_checkpoint,
    tree,
    wait_until,
)
from tests.cluster.odd_checkpoints import TENSOR_TYPES, Recorded, make_odd_checkpoint

from ckptd.client.connect import connect
from ckptd.client.progress import Progress
from ckptd.client.restore import RestoreResult, restore, restore_from_stores
from ckptd.client.tensors import load_tensors
from ckptd.config import load
from ckptd.errors import NoGoodCopy, NotEnoughNodes, NotFound, Refused, TargetExists, UsageError
from ckptd.net.loop import run as run_on_loop

NewName = Callable[[], str]
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "grown": lambda content: content + b"x",
    "zeroed": lambda content: bytes(len(content)),
    "flipped": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


def restored(
    cluster: BreakableCluster, name: str, to: Path | None, **options: Any
) -> RestoreResult:
    """Restores in this process, through the same function as the command."""

    async def work() -> RestoreResult:
        async with connect(load(cluster.config)) as connected:
            return await restore(connected, name, to=to, **options)

    return run_on_loop(work())


def loaded(cluster: BreakableCluster, name: str, globs: Sequence[str]) -> dict[str, Any]:
    async def work() -> dict[str, Any]:
        async with connect(load(cluster.config)) as connected:
            return await load_tensors(connected, name, globs)

    return run_on_loop(work())


def library_tensors(path: Path) -> dict[str, Any]:
    """By name what the safetensors library reads: dtype, shape and bytes."""
    return dict(safetensors.deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]


def left_over(directory: Path) -> list[str]:
    """Hidden files that a restore into `directory` left beside its target."""
    return sorted(name for name in os.listdir(directory) if name.startswith("."))


def damage(path: Path, how: str) -> None:
    """Changes a shard file in place, as a bad disk would."""
    path.write_bytes(DAMAGES[how](path.read_bytes()))


def holders(cluster: BreakableCluster, version: str) -> dict[str, list[str]]:
    """By shard of a version, the nodes on whose disks it lies."""
    everywhere = cluster.all_shards()
    manifest = next(
        cluster.manifest(node.id, version)
        for node in cluster.local.nodes()
        if version in cluster.manifests(node.id)
    )
    return {shard: sorted(everywhere.get(shard, ())) for shard, _ in manifest["shards"]}


# -- what comes back


def test_everything_comes_back_byte_for_byte(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_odd_checkpoint(tmp_path / "source", 1)
    version = cluster.store(source, name).version
    shown = Recorded()
    result = restored(cluster, name, tmp_path / "out", progress=shown)
    assert tree(tmp_path / "out") == tree(source)
    assert (tmp_path / "out").stat().st_mode == source.stat().st_mode
    assert result.version == version
    assert result.to == str(tmp_path / "out")
    assert (result.verified, result.signed, result.fallbacks) == (True, True, 0)
    assert result.bytes == sum(
        p.lstat().st_size for p in source.rglob("*") if p.is_file() and not p.is_symlink()
    )
    assert shown.done == shown.wanted == sum(result.sources.values())
    assert left_over(tmp_path) == []


def test_the_command_restores_into_the_last_part_of_the_name(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_checkpoint(tmp_path / "source", name, size=600_000)
    cluster.store(source, name)
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "ckptd", "restore", name],
        cwd=tmp_path / "here",
        env={**os.environ, "CKPTD_CONFIG": str(cluster.config)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path / "here" / "checkpoint-1") == tree(source)


def test_json_has_the_promised_keys(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    stored = cluster.store(make_checkpoint(tmp_path / "source", name), name)
    done = cluster.command("restore", name, "--to", tmp_path / "out")
    assert done.code == 0
    document = done.document
    assert document["name"] == name
    assert document["version"] == stored.version
    assert document["to"] == str(tmp_path / "out")
    assert document["bytes"] == stored.bytes
    assert document["verified"] is True
    assert document["fallbacks"] == 0
    assert document["seconds"] > 0
    assert set(document["sources"]) <= {"node1", "node2", "node3", "node4"}
    assert sum(document["sources"].values()) >= stored.bytes


def test_a_single_file_becomes_a_file_in_the_directory(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = tmp_path / "weights.bin"
    source.write_bytes(os.urandom(900_000))
    cluster.store(source, name)
    restored(cluster, name, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["weights.bin"]
    assert (tmp_path / "out" / "weights.bin").read_bytes() == source.read_bytes()


def test_the_work_is_shared_by_all_holders(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    stored = cluster.store(make_checkpoint(tmp_path / "source", name, size=16 << 20), name)
    holding = {node for nodes in holders(cluster, stored.version).values() for node in nodes}
    result = restored(cluster, name, tmp_path / "out")
    # Who is slow at that moment gives less, down to nothing: but never one node all of it.
    assert len(result.sources) >= 2
    assert set(result.sources) <= holding
    assert sum(result.sources.values()) == stored.bytes


# -- versions


def test_versions_are_picked_by_prefix_and_latest(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    run = name.rpartition("/")[0]
    first = make_checkpoint(tmp_path / "first", name + "1", size=300_000)
    second = make_checkpoint(tmp_path / "second", name + "2", size=300_000)
    third = make_checkpoint(tmp_path / "third", name + "3", size=300_000)
    old = cluster.store(first, name)
    cluster.store(second, name)
    newest = cluster.store(third, f"{run}/checkpoint-2")
    assert tree_of(cluster, name, tmp_path / "a") == tree(second)
    assert tree_of(cluster, f"{name}@{old.version[:8]}", tmp_path / "b") == tree(first)
    assert restored(cluster, f"{run}@latest", tmp_path / "c").version == newest.version
    with pytest.raises(NotFound, match="which metric decides"):
        restored(cluster, f"{run}@best", tmp_path / "d")
    with pytest.raises(NotFound, match="nearest"):
        restored(cluster, name + "0", tmp_path / "d")


def tree_of(cluster: BreakableCluster, name: str, to: Path) -> dict[str, tuple[str, str]]:
    restored(cluster, name, to)
    return tree(to)


def test_latest_passes_over_what_is_not_complete(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    older = fresh_cluster.store(make_checkpoint(tmp_path / "1", "o", size=1 << 20), "run/step-1")
    newer = fresh_cluster.store(make_checkpoint(tmp_path / "2", "n", size=1 << 20), "run/step-2")
    others = holders(fresh_cluster, older.version)
    shard = next(s for s in holders(fresh_cluster, newer.version) if s not in others)
    nodes = holders(fresh_cluster, newer.version)[shard]
    for node in nodes:
        fresh_cluster.shard_file(node, shard).unlink()
    fresh_cluster.kill(*nodes)
    fresh_cluster.up()  # what is there is known by a scan at the start
    shown = Recorded()
    result = restored(fresh_cluster, "run@latest", tmp_path / "out", progress=shown)
    assert result.version == older.version
    assert any("passed over" in note for note in shown.notes)
    with pytest.raises(NoGoodCopy):
        restored(fresh_cluster, "run/step-2", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


# -- some files, some tensors


def test_files_are_picked_by_glob(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_odd_checkpoint(tmp_path / "source", 3)
    cluster.store(source, name)
    restored(cluster, name, tmp_path / "out", files=["part-1*.json", "*/state.json", "link"])
    found = {path for path, (kind, _) in tree(tmp_path / "out").items() if not kind.startswith("4")}
    parts = {f"part-{number}.json" for number in (1, *range(10, 20))}
    deep = "/".join(f"level{depth}" for depth in range(12))
    assert found == parts | {f"{deep}/state.json", "link"}
    # What a link points to is not there, so the link comes as what it points to.
    assert not (tmp_path / "out" / "link").is_symlink()
    weights = (source / "model-1.safetensors").read_bytes()
    assert (tmp_path / "out" / "link").read_bytes() == weights
    assert (tmp_path / "out" / "level0").stat().st_mode & 0o777 == 0o750
    with pytest.raises(NotFound, match=r"nearest.*optimizer\.pt"):
        restored(cluster, name, tmp_path / "none", files=["optimiser.pt"])
    assert not (tmp_path / "none").exists()


def test_tensors_are_those_that_the_library_reads(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_odd_checkpoint(tmp_path / "source", 4)
    cluster.store(source, name)
    restored(cluster, name, tmp_path / "picked.safetensors", tensors=["layer.1*", "norm.bias"])
    expected = {
        key: found
        for file in ("model-1.safetensors", "model-2.safetensors")
        for key, found in library_tensors(source / file).items()
        if key.startswith("layer.1") or key == "norm.bias"
    }
    assert library_tensors(tmp_path / "picked.safetensors") == expected
    with safe_open(str(tmp_path / "picked.safetensors"), "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
    result = restored(cluster, name, tmp_path / "merged", tensors=["*"])
    assert result.to == str(tmp_path / "merged")
    merged = library_tensors(tmp_path / "merged" / "tensors.safetensors")
    assert len(merged) == 14
    with pytest.raises(NotFound, match=r"nearest: 'layer\.11\.weight'"):
        restored(cluster, name, tmp_path / "none", tensors=["layer.11.weights"])
    with pytest.raises(UsageError):
        restored(cluster, name, tmp_path / "none", tensors=["*"], files=["*"])
    assert not (tmp_path / "none").exists()


def test_one_tensor_name_in_two_files_is_refused(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_odd_checkpoint(tmp_path / "source", 5)
    (source / "again.safetensors").write_bytes((source / "model-2.safetensors").read_bytes())
    cluster.store(source, name)
    with pytest.raises(Refused, match="in two files"):
        restored(cluster, name, tmp_path / "out", tensors=["norm.*"])
    restored(cluster, name, tmp_path / "out", tensors=["layer.*"])


def test_only_the_shards_of_the_tensors_are_read(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    stored = cluster.store(make_checkpoint(tmp_path / "source", name, size=16 << 20), name)
    result = restored(cluster, name, tmp_path / "one.safetensors", tensors=["*.3.weight"])
    assert result.bytes > 1 << 20
    # The tensor's own shards, the header's, the index; nothing of the other 15 MB.
    assert sum(result.sources.values()) <= (1 << 20) + 3 * SHARD_SIZE < stored.bytes / 4


def test_tensors_are_loaded_into_memory(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_odd_checkpoint(tmp_path / "source", 6)
    cluster.store(source, name)
    tensors = loaded(cluster, name, ["*"])
    expected = {
        key: found
        for file in ("model-1.safetensors", "model-2.safetensors")
        for key, found in library_tensors(source / file).items()
    }
    assert set(tensors) == set(expected)
    for key, tensor in tensors.items():
        assert isinstance(tensor, np.ndarray)
        assert tensor.dtype == TENSOR_TYPES[str(expected[key]["dtype"])]
        assert list(tensor.shape) == expected[key]["shape"]
        assert tensor.tobytes() == bytes(expected[key]["data"])
        assert tensor.flags.writeable


# -- targets


def test_a_target_that_is_there_is_refused_before_anything_is_written(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_checkpoint(tmp_path / "source", name, size=400_000)
    cluster.store(source, name)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("keep")
    with pytest.raises(TargetExists, match="not empty"):
        restored(cluster, name, full)
    with pytest.raises(TargetExists):
        restored(cluster, name, full / "mine")
    with pytest.raises(Refused, match="not there"):
        restored(cluster, name, tmp_path / "missing" / "out")
    assert tree(tmp_path)["full/mine"][1] and left_over(tmp_path) == []
    assert cluster.command("restore", name, "--to", full).code == 1
    (tmp_path / "empty").mkdir()
    restored(cluster, name, tmp_path / "empty")
    assert tree(tmp_path / "empty") == tree(source)


def test_force_exchanges_the_whole_directory(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_odd_checkpoint(tmp_path / "source", 7)
    cluster.store(source, name)
    old = make_odd_checkpoint(tmp_path / "out", 8)
    (old / "only-here").write_text("goes")
    restored(cluster, name, old, force=True)
    assert tree(old) == tree(source)
    assert left_over(tmp_path) == []


def test_force_replaces_only_the_files_that_were_asked_for(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_odd_checkpoint(tmp_path / "source", 9)
    cluster.store(source, name)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    (out / "optimizer.pt").write_text("old")
    restored(cluster, name, out, files=["optimizer.pt", "*/state.json"], force=True)
    assert (out / "mine").read_text() == "keep"
    assert (out / "optimizer.pt").read_bytes() == (source / "optimizer.pt").read_bytes()
    assert len(list(out.rglob("state.json"))) == 1
    restored(cluster, name, out, tensors=["norm.bias"], force=True)
    assert (out / "tensors.safetensors").exists() and (out / "mine").exists()
    assert left_over(tmp_path) == []


def test_nothing_is_written_through_a_symlink(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    cluster.store(make_odd_checkpoint(tmp_path / "source", 10), name)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("keep")
    out = tmp_path / "out"
    out.mkdir()
    (out / "level0").symlink_to(elsewhere)
    (out / "optimizer.pt").symlink_to(elsewhere / "precious")
    with pytest.raises(Refused, match="not a directory"):
        restored(cluster, name, out, files=["*/state.json"], force=True)
    restored(cluster, name, out, files=["optimizer.pt"], force=True)
    assert not (out / "optimizer.pt").is_symlink()
    assert tree(elsewhere).keys() == {"precious"}
    assert (elsewhere / "precious").read_text() == "keep"


# -- nodes that die, stop, or are busy


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BreakableCluster]:
    """A cluster whose tests damage copies of their own checkpoints, and start what they stop."""
    with breakable_cluster(tmp_path_factory.mktemp("breakable") / "local") as running:
        yield running


@pytest.mark.parametrize("node", ["node1", "node2", "node3", "node4"])
def test_any_one_node_may_be_dead(
    node: str, breakable: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_odd_checkpoint(tmp_path / "source", 11)
    breakable.store(source, name)
    breakable.kill(node)
    try:
        done = breakable.command("restore", name, "--to", tmp_path / "out")
    finally:
        breakable.up()
    assert done.code == 0
    assert node not in done.document["sources"]
    assert tree(tmp_path / "out") == tree(source)


class _Once(Progress):
    """Does something to `node` when the first bytes come from it; what comes from others meanwhile
    waits, so that `node` has not run out of work by then."""

    def __init__(self, node: str, act: Callable[[str], None]) -> None:
        self._node = node
        self._act = act
        self._lock = threading.Lock()
        self.acted = threading.Event()

    def node(self, node: str, size: int) -> None:
        if node != self._node:
            assert self.acted.wait(60), f"nothing was fetched from {self._node}"
            return
        with self._lock:
            if not self.acted.is_set():
                self._act(node)
                self.acted.set()


def busiest_node(cluster: BreakableCluster) -> str:
    """The node with the most shards."""
    return max(cluster.running(), key=lambda node: len(cluster.shards(node)))


def test_a_node_dies_in_the_middle(fresh_cluster: BreakableCluster, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "dies", size=24 << 20)
    fresh_cluster.store(source, "run/step-1")
    pids = {node.id: node.pid for node in fresh_cluster.local.nodes()}
    killed: list[str] = []

    def kill(node: str) -> None:
        os.kill(pids[node], signal.SIGKILL)
        killed.append(node)

    progress = _Once(busiest_node(fresh_cluster), kill)
    result = restored(fresh_cluster, "run/step-1", tmp_path / "out", progress=progress)
    assert tree(tmp_path / "out") == tree(source)
    assert len(killed) == 1 and result.fallbacks >= 1


def test_a_node_that_stops_in_the_middle_is_passed_by(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", "stops", size=24 << 20)
    fresh_cluster.store(source, "run/step-1")
    pids = {node.id: node.pid for node in fresh_cluster.local.nodes()}
    stopped: list[int] = []

    def stop(node: str) -> None:
        os.kill(pids[node], signal.SIGSTOP)
        stopped.append(pids[node])

    progress = _Once(busiest_node(fresh_cluster), stop)
    started_s = time.monotonic()
    try:
        result = restored(fresh_cluster, "run/step-1", tmp_path / "out", progress=progress)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert tree(tmp_path / "out") == tree(source)
    assert result.fallbacks >= 1
    # Long before any deadline of a socket: others take over what it is stuck with.
    assert time.monotonic() - started_s < 15


def test_too_few_nodes_is_said_and_leaves_nothing_at_the_target(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    stored = fresh_cluster.store(make_checkpoint(tmp_path / "source", "few"), "run/step-1")
    both = next(iter(holders(fresh_cluster, stored.version).values()))
    fresh_cluster.kill(*both)
    done = fresh_cluster.command("restore", "run/step-1", "--to", tmp_path / "out")
    assert done.code == 5
    assert done.document["error"]["kind"] == "not_enough_nodes"
    assert all(node in done.document["error"]["message"] for node in both)
    assert not (tmp_path / "out").exists()
    fresh_cluster.kill(*(node.id for node in fresh_cluster.local.nodes() if node.pid))
    done = fresh_cluster.command("restore", "run/step-1", "--to", tmp_path / "out")
    assert done.code == 5


def test_more_readers_than_slots_wait_for_each_other(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_checkpoint(tmp_path / "source", name, size=4 << 20)
    cluster.store(source, name)
    failures: list[BaseException] = []

    def one(number: int) -> None:
        try:
            restored(cluster, name, tmp_path / f"out{number}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(tree(tmp_path / f"out{number}") == tree(source) for number in range(8))


# -- bad copies


@pytest.mark.parametrize("how", [*DAMAGES, "swapped"])
def test_one_bad_copy_is_never_served(
    how: str, breakable: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_odd_checkpoint(tmp_path / "source", crc32(how.encode()))
    stored = breakable.store(source, name)
    held = holders(breakable, stored.version)
    # All copies of one node, so that a bad one is asked for.
    counts = Counter(node for nodes in held.values() for node in nodes)
    node = counts.most_common(1)[0][0]
    files = [breakable.shard_file(node, shard) for shard in held if node in held[shard]]
    if how == "swapped":
        contents = [file.read_bytes() for file in files]
        for file, content in zip(files, contents[1:] + contents[:1], strict=True):
            file.write_bytes(content)
    else:
        for file in files:
            if file.stat().st_size:  # else a test before has emptied it: it is bad already
                damage(file, how)
    bad = {file.name for file in files if sha256(file.read_bytes()).hexdigest() != file.name}
    assert bad
    # Else a copy that was set aside may be healed in time for the same restore to read it.
    assert breakable.command("jobs", "pause", "repair").code == 0
    # One that answers later than all others is not asked for anything.
    for attempt in range(20):
        result = restored(breakable, name, tmp_path / f"out{attempt}")
        assert tree(tmp_path / f"out{attempt}") == tree(source)
        assert node not in result.sources
        if result.fallbacks:
            break
    assert result.fallbacks >= 1
    assert breakable.command("jobs", "resume", "repair").code == 0
    quarantine = breakable.store_path(node) / "quarantine"

    def moved() -> bool:
        return any(path.name.partition(".")[0] in bad for path in quarantine.iterdir())

    wait_until(moved, "a bad copy to be in quarantine")


@pytest.mark.parametrize("how", DAMAGES)
def test_when_all_copies_are_bad_nothing_is_served(
    how: str, breakable: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    stored = breakable.store(make_checkpoint(tmp_path / "source", name), name)
    shard, nodes = next(iter(holders(breakable, stored.version).items()))
    for node in nodes:
        damage(breakable.shard_file(node, shard), how)
    done = breakable.command("restore", name, "--to", tmp_path / "out")
    assert done.code == 4
    assert done.document["error"]["kind"] == "no_good_copy"
    assert shard in done.document["error"]["message"]
    assert not (tmp_path / "out").exists()


# -- resuming


_RESTORE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from ckptd.client.connect import connect
from ckptd.client.progress import Progress
from ckptd.client.restore import restore
from ckptd.config import load
from ckptd.net.loop import run

class Dies(Progress):
    done = 0
    def advance(self, size):
        self.done += size
        if self.done >= int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)

async def work():
    async with connect(load(Path(sys.argv[1]))) as cluster:
        await restore(cluster, sys.argv[2], to=Path(sys.argv[3]), progress=Dies())

run(work())
"""


def test_a_killed_restore_goes_on_where_it_was(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_checkpoint(tmp_path / "source", name, size=16 << 20)
    stored = cluster.store(source, name)
    arguments = [str(cluster.config), name, str(tmp_path / "out"), str(12 << 20)]
    died = subprocess.run(
        [sys.executable, "-c", _RESTORE_AND_DIE, *arguments], check=False, timeout=60
    )
    assert died.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert left_over(tmp_path) == [f".out.ckptd-restore-{stored.version[:8]}"]
    staging = tmp_path / left_over(tmp_path)[0]
    # Whatever lies there is believed only by its hash, and nothing foreign stays or is followed.
    (staging / "foreign").write_text("foreign")
    (tmp_path / "victim").write_text("keep")
    (staging / "trainer_state.json").unlink()
    (staging / "trainer_state.json").symlink_to(tmp_path / "victim")
    result = restored(cluster, name, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(source)
    assert (tmp_path / "victim").read_text() == "keep"
    assert sum(result.sources.values()) <= stored.bytes - (12 << 20) + 2 * SHARD_SIZE
    assert left_over(tmp_path) == []


def test_what_was_verified_is_kept_when_a_shard_cannot_be_had(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", "kept", size=8 << 20)
    stored = fresh_cluster.store(source, "run/step-1")
    # One in the middle of the large file: its nodes have others to send before.
    found = list(holders(fresh_cluster, stored.version).items())
    shard, nodes = found[len(found) // 2]
    good = fresh_cluster.shard_file(nodes[0], shard).read_bytes()
    for node in nodes:
        damage(fresh_cluster.shard_file(node, shard), "flipped")
    shown = Recorded()
    with pytest.raises(NoGoodCopy):
        restored(fresh_cluster, "run/step-1", tmp_path / "out", progress=shown)
    assert not (tmp_path / "out").exists()
    assert any(str(tmp_path / left_over(tmp_path)[0]) in note for note in shown.notes)
    fresh_cluster.kill(nodes[0])
    fresh_cluster.shard_file(nodes[0], shard).write_bytes(good)
    fresh_cluster.up()
    result = restored(fresh_cluster, "run/step-1", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(source)
    assert sum(result.sources.values()) < stored.bytes


# -- from store directories


def test_store_directories_are_enough(fresh_cluster: BreakableCluster, tmp_path: Path) -> None:
    source = make_odd_checkpoint(tmp_path / "source", 13)
    fresh_cluster.store(source, "run/step-1")
    stores = [fresh_cluster.store_path(node.id) for node in fresh_cluster.local.nodes()]
    fresh_cluster.kill(*(node.id for node in fresh_cluster.local.nodes()))
    before = [tree(store) for store in stores]

    def from_stores(some: Sequence[Path], to: Path, **options: Any) -> RestoreResult:
        return run_on_loop(restore_from_stores(some, "run@latest", to=to, **options))

    without = from_stores(stores, tmp_path / "without")
    assert tree(tmp_path / "without") == tree(source)
    assert (without.signed, without.verified) == (False, True)
    assert set(without.sources) <= {str(store) for store in stores}
    config = load(fresh_cluster.config)
    assert from_stores(stores, tmp_path / "with", config=config).signed
    assert tree(tmp_path / "with") == tree(source)
    assert [tree(store) for store in stores] == before  # nothing was written
    with pytest.raises((NotEnoughNodes, NotFound)):
        from_stores(stores[:1], tmp_path / "one")
    with pytest.raises(Refused, match="no store"):
        from_stores([tmp_path / "source"], tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_a_manifest_that_nobody_signed_is_not_believed(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    stored = fresh_cluster.store(make_checkpoint(tmp_path / "source", "signed"), "run/step-1")
    stores = [fresh_cluster.store_path(node.id) for node in fresh_cluster.local.nodes()]
    for store in stores:
        (store / "catalogue" / f"{stored.version}.sig").unlink(missing_ok=True)
    config = load(fresh_cluster.config)
    with pytest.raises(NotFound):
        run_on_loop(restore_from_stores(stores, "run/step-1", to=tmp_path / "out", config=config))


def test_bad_copies_in_store_directories_are_passed_by(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source", "cards")
    stored = fresh_cluster.store(source, "run/step-1")
    stores = [fresh_cluster.store_path(node.id) for node in fresh_cluster.local.nodes()]
    held = holders(fresh_cluster, stored.version)
    for shard, nodes in held.items():
        damage(fresh_cluster.shard_file(nodes[0], shard), "flipped")
    run_on_loop(restore_from_stores(stores, "run/step-1", to=tmp_path / "out"))
    assert tree(tmp_path / "out") == tree(source)
    shard, nodes = next(iter(held.items()))
    fresh_cluster.shard_file(nodes[1], shard).write_bytes(b"short")
    with pytest.raises(NoGoodCopy):
        run_on_loop(restore_from_stores(stores, "run/step-1", to=tmp_path / "out2"))
    assert not (tmp_path / "out2").exists()
