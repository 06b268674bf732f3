"""A node whose disk is full: a small tmpfs of its own, in a user namespace, as its store.

No root is needed: `unshare -Urm` gives the daemon a mount table of its own, and this process looks
into it through /proc/PID/root. Linux only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.cluster.kill_fixtures import (
    DEADLINE_S,
    BreakableCluster,
    breakable_cluster,
    kill_process,
    make_checkpoint,
    wait_until,
)
from tests.cluster.watched import put, watched_cluster

from ckptd.client.progress import Progress

MIB = 1024 * 1024


@dataclass
class SmallNode:
    """node1 of a cluster, whose store lies on a small tmpfs."""

    cluster: BreakableCluster
    pid: int

    @property
    def store(self) -> Path:
        """Its store, as seen from here."""
        inside = self.cluster.store_path("node1")
        return Path(f"/proc/{self.pid}/root{inside}")

    def free_bytes(self) -> int:
        found = os.statvfs(self.store)
        return found.f_bavail * found.f_frsize

    def fill(self, *, leave: int = 0) -> None:
        """Fills the disk with a file of somebody else, up to `leave` bytes."""
        filler = self.store / "filler"
        with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
            while (free := self.free_bytes() - leave) > 0:
                file.write(bytes(min(64 * 1024, free)))

    def release(self) -> None:
        (self.store / "filler").unlink(missing_ok=True)

    def check_whole(self) -> int:
        """Every shard file has its hash and nothing half is left; returns how many there are."""
        files = list((self.store / "shards").glob("*/*"))
        for file in files:
            assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name
        assert not list((self.store / "incoming").iterdir())
        assert not list((self.store / "quarantine").iterdir())
        return len(files)

    def errors(self) -> str:
        return (self.cluster.directory / "small.log").read_text()


@contextlib.contextmanager
def small_node(cluster: BreakableCluster, options: str) -> Iterator[SmallNode]:
    """Runs node1 again, on a tmpfs with these mount options."""
    cluster.kill("node1")
    store = cluster.store_path("node1")
    config = cluster.directory / "node1" / "ckptd.yml"
    place = cluster.directory / "small-ready"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(str(place))
        ready.settimeout(30)
        serve = shlex.join([sys.executable, "-m", "ckptd", "serve", "--init", "--config"])
        script = (
            f"mount -t tmpfs -o {options} small {shlex.quote(str(store))} && "
            f"exec {serve} {shlex.quote(str(config))}"
        )
        with open(cluster.directory / "small.log", "wb") as log:
            process = subprocess.Popen(
                ["unshare", "-Urm", "sh", "-c", script],
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": str(place)},
            )
        try:
            assert ready.recv(100).startswith(b"READY=1")
            yield SmallNode(cluster, process.pid)
        finally:
            place.unlink()
            kill_process(process.pid)
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[BreakableCluster]:
    with breakable_cluster(tmp_path / "c") as running:
        yield running


class _At(Progress):
    """Calls `act` once, when the first shard has gone to a node; keeps the notes."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._lock = threading.Lock()
        self._acted = False
        self.notes: list[str] = []

    def node(self, node: str, size: int) -> None:
        with self._lock:
            if not self._acted:
                self._acted = True
                self._act()

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_small_node_gets_what_fits_above_its_reserve(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    with small_node(cluster, "size=4m") as small:
        path = make_checkpoint(tmp_path / "ck", "small", size=16 * MIB)
        stored = cluster.store(path, "small")
        assert stored.state == "protected" and stored.copies == 2
        assert small.check_whole() > 0, "the small node took its share"
        reserve = 4 * MIB * 5 // 100
        assert small.free_bytes() >= reserve - 128 * 1024, "only documents use the reserve"
        assert (small.store / "catalogue" / f"{stored.version}.json").exists()
        assert cluster.comes_back("small", path)


def test_a_disk_that_fills_up_during_a_store_is_an_error_of_that_node_only(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    first = make_checkpoint(tmp_path / "first", "before", size=2 * MIB)
    second = make_checkpoint(tmp_path / "second", "during", size=16 * MIB)
    with small_node(cluster, "size=32m") as small:
        assert cluster.store(first, "before", copies=4).state == "protected"
        there = small.check_whole()
        progress = _At(small.fill)
        stored = cluster.store(second, "during", progress=progress)
        assert stored.state == "protected" and stored.copies == 2
        assert any("node1 takes no more shards" in note for note in progress.notes)
        assert not any("node2" in note or "node3" in note for note in progress.notes)
        assert small.check_whole() >= there, "what it had is whole"
        assert cluster.comes_back("during", second)
        # It answers for what it has: alone, it gives the first checkpoint back.
        cluster.kill("node2", "node3", "node4")
        assert cluster.comes_back("before", first)
        # With room again it takes shards again, without a restart.
        small.release()
        third = make_checkpoint(tmp_path / "third", "after", size=MIB)
        assert cluster.store(third, "after").copies == 1
        assert small.check_whole() > there


def test_no_room_that_shows_only_after_the_check(cluster: BreakableCluster, tmp_path: Path) -> None:
    """Bytes are free, inodes are not: the check passes, and then a directory cannot be made."""
    path = make_checkpoint(tmp_path / "ck", "inodes", size=24 * MIB)
    with small_node(cluster, "size=64m,nr_inodes=40") as small:
        cluster.kill("node2", "node3")  # so that every shard is offered to the small node
        progress = _At(lambda: None)
        stored = cluster.store(path, "inodes", progress=progress)
        assert stored.state == "degraded" and stored.copies == 1
        assert small.free_bytes() > 32 * MIB
        with pytest.raises(OSError) as full:
            # What was refused has given its few inodes back.
            for number in range(32):
                (small.store / f"one-more-directory-{number}").mkdir()
        assert full.value.errno == errno.ENOSPC
        assert any("node1 takes no more shards" in note for note in progress.notes)
        assert "ENOSPC" in small.errors()
        assert small.check_whole() > 0
        assert cluster.comes_back("inodes", path)


def test_room_that_comes_and_goes_while_shards_stream_in(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    with small_node(cluster, "size=12m") as small:
        over = threading.Event()

        def breathe() -> None:
            while not over.is_set():
                small.fill()
                small.release()

        thread = threading.Thread(target=breathe, name="filler")
        thread.start()
        try:
            for number in range(3):
                path = make_checkpoint(tmp_path / f"ck{number}", number, size=6 * MIB)
                stored = cluster.store(path, f"breathing-{number}")
                assert stored.state == "protected" and stored.copies == 2
        finally:
            over.set()
            thread.join()
        small.check_whole()
        for number in range(3):
            source = tmp_path / f"ck{number}"
            assert cluster.comes_back(f"breathing-{number}", source)


def test_every_node_full_refuses_and_publishes_nothing(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    cluster.kill("node2", "node3", "node4")
    with small_node(cluster, "size=4m") as small:
        before = make_checkpoint(tmp_path / "before", "fits", size=2 * MIB)
        assert cluster.store(before, "fits").copies == 1
        refused = cluster.command(
            "store", make_checkpoint(tmp_path / "ck", "more", size=3 * MIB), "--name", "more"
        )
        assert refused.code == 1 and refused.document["error"]["kind"] == "no_room"
        assert "ckptd" in refused.document["error"]["next"]
        documents = [path.read_text() for path in (small.store / "catalogue").glob("*.json")]
        assert not any('"more"' in text for text in documents)
        small.check_whole()
        # What is there already needs no room: the same content completes on the full node.
        small.fill()
        assert cluster.store(before, "fits").bytes_sent == 0
        assert cluster.comes_back("fits", before)


def test_what_does_not_fit_is_refused_before_a_byte_is_sent(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    with small_node(cluster, "size=16m") as small:
        cluster.kill("node3", "node4")  # node2 has room for everything, the second copies have not
        path = make_checkpoint(tmp_path / "ck", "base", size=8 * MIB)
        before = cluster.command("status").document["room"]
        assert before["checkpoints_fit"] is None
        assert before["bytes_storable"] <= 16 * MIB < before["bytes_free"]
        assert cluster.store(path, "base").state == "protected"
        room = cluster.command("status").document["room"]
        assert room["checkpoints_fit"] == 0 and 0 < room["bytes_storable"] < 8 * MIB
        # With what is there already it is larger than the room, and fits.
        (path / "more.pt").write_bytes(random.Random(1).randbytes(3 * MIB))
        assert cluster.store(path, "base").state == "protected"
        held, other = small.check_whole(), cluster.shards("node2")
        (path / "much.pt").write_bytes(random.Random(2).randbytes(6 * MIB))
        refused = cluster.command("store", path, "--name", "base")
        error = refused.document["error"]
        assert (refused.code, error["kind"]) == (1, "no_room")
        assert "does not fit" in error["message"] and "2 nodes" in error["message"]
        assert "ckptd" in error["next"]
        assert small.check_whole() == held and cluster.shards("node2") == other
        assert len(cluster.command("show", "base").document["versions"]) == 2


def test_a_checkpoint_without_room_waits_and_says_so(tmp_path: Path) -> None:
    with (
        watched_cluster(tmp_path / "local", count=2) as watched,
        small_node(watched, "size=16m") as small,
    ):
        small.fill(leave=4 * MIB)
        target = watched.root / "run" / "step-1"
        put(make_checkpoint(tmp_path / "model", "full", size=6 * MIB), target)
        wait_until(
            lambda: "does not fit" in (watched.pending(target) or {"reason": ""})["reason"],
            "the reason to be told",
        )

        def waits() -> bool:
            """Whether it is listed so; each time that it is tried again it is storing."""
            row = watched.rows("run").get("run/step-1", {})
            return (row.get("state"), row.get("version")) == ("pending", "")

        wait_until(waits, "it to be listed as pending")
        assert small.check_whole() == 0 and not watched.shards("node2")
        # One that fits is stored meanwhile.
        put(make_checkpoint(tmp_path / "small", "s", size=MIB), watched.root / "run" / "step-2")
        watched.wait_protected("run/step-2")
        assert watched.pending(target) is not None
        small.release()
        watched.wait_protected("run/step-1", timeout_s=DEADLINE_S)
        assert watched.comes_back("run/step-1", target)
