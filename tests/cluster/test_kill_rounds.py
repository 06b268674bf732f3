"""Workers and clients die by SIGKILL at random moments of stores and restores.

Whatever was reported protected must come back byte for byte from what is left. A round counts only
if shard bytes had moved and some were outstanding at the kill; the others are repeated.
"""

from __future__ import annotations

import collections
import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.kill_fixtures import (
    BreakableCluster,
    bitmaps_now,
    breakable_cluster,
    kill_process,
    make_checkpoint,
    wait_until,
)

from ckptd.client.progress import Progress

MIB = 1024 * 1024
CHECKPOINT_BYTES = 6 * MIB
DELAY_MAX_S = 0.006  # about what a shard of 256 KiB takes, so that kills fall into all its phases
ATTEMPTS_PER_ROUND = 4


class _KillWhile(Progress):
    """Kills processes one after the other, each once a given share of the bytes has moved.

    `moved` is what was sent or received so far, `finished` what needs no more work; `counted` says
    for each kill whether bytes had moved and some were outstanding.
    """

    def __init__(self, kills: list[tuple[float, float, int]]) -> None:
        self._kills = kills  # share of the bytes, delay in seconds, pid
        self._lock = threading.Condition()
        self._over = False
        self.size = 0
        self.moved = 0
        self.finished = 0
        self.counted: list[bool] = []
        self.notes: list[str] = []
        self._thread = threading.Thread(target=self._run, name="killer")

    def __enter__(self) -> _KillWhile:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._over = True
            self._lock.notify_all()
        self._thread.join()

    def total(self, size: int) -> None:
        self.size = size

    def node(self, node: str, size: int) -> None:
        with self._lock:
            self.moved += size
            self._lock.notify_all()

    def advance(self, size: int) -> None:
        with self._lock:
            self.finished += size
            self._lock.notify_all()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def _run(self) -> None:
        for share, delay_s, pid in self._kills:
            with self._lock:
                while not self._over and self.moved <= share * self.size:
                    self._lock.wait()
                if self._over:
                    return
            time.sleep(delay_s)  # not to wait for something: the moment shall be random
            kill_process(pid)
            with self._lock:
                self.counted.append(self.moved > 0 and self.finished < self.size)


class _Rounds:
    """Kill rounds on one cluster."""

    def __init__(self, cluster: BreakableCluster, place: Path, seed: int) -> None:
        self.cluster = cluster
        self.place = place
        self.random = random.Random(seed)
        self.phases: collections.Counter[str] = collections.Counter()
        self.protected: dict[str, Path] = {}  # by version
        self.names: dict[str, str] = {}
        self.attempts = 0

    def new_checkpoint(self) -> tuple[str, Path]:
        self.attempts += 1
        name = f"round-{self.attempts}"
        seed = self.random.getrandbits(64)
        return name, make_checkpoint(self.place / name, seed, size=CHECKPOINT_BYTES)

    def store_round(self, *, copies: int = 2, victims: int = 1) -> bool:
        """A store during which workers die; whether the round counts."""
        name, path = self.new_checkpoint()
        killed = self.random.sample(self.cluster.running(), victims)
        before = {node: self.cluster.shards(node) for node in killed}
        with _KillWhile(self._moments(killed)) as kill:
            stored = self.cluster.store(path, name, copies=copies, progress=kill)
        left = self.cluster.count - len(kill.counted)
        assert stored.state == ("protected" if left >= copies else "degraded"), (stored, kill.notes)
        assert stored.copies == min(left, copies), kill.notes
        self.protected[stored.version] = path
        self.names[stored.version] = name
        phase = self._phase(killed[0], before[killed[0]])
        self._check_what_is_left(stored.version)
        self.cluster.up()
        if len(kill.counted) == victims and all(kill.counted) and phase:
            self.phases[phase] += 1
            return True
        return False

    def restore_round(self) -> bool:
        """A restore during which a worker dies; whether the round counts."""
        version = self.random.choice(sorted(self.protected))
        killed = self.random.choice(self.cluster.running())
        with _KillWhile(self._moments([killed])) as kill:
            self.restore(version, progress=kill)
        if kill.counted:
            self._check_what_is_left(version)
        self.cluster.up()
        if kill.counted and all(kill.counted):
            self.phases["restoring"] += 1
            return True
        return False

    def client_round(self) -> bool:
        """A store whose client dies, and is started again; whether the round counts."""
        name, path = self.new_checkpoint()
        before = set(self.cluster.all_shards())
        wanted = self.random.randint(1, 20)
        delay_s = self.random.uniform(0, DELAY_MAX_S)
        process = self.cluster.start_command("store", path, "--name", name)
        wait_until(
            lambda: (
                len(self.cluster.all_shards().keys() - before) >= wanted
                or process.poll() is not None
            ),
            "shards to arrive",
        )
        time.sleep(delay_s)  # as above
        process.kill()
        out, _ = process.communicate()
        twice = [nodes for s, nodes in self.cluster.all_shards().items() if s not in before]
        there = sum(len(nodes) >= 2 for nodes in twice)
        stored = self.cluster.store(path, name)
        assert stored.state == "protected"
        # What has both its copies is not sent again, and what has one is passed on by its node.
        assert stored.shards_deduplicated >= there
        self.protected[stored.version] = path
        self.names[stored.version] = name
        self._check_what_is_left(stored.version)
        if not out and 0 < there < stored.shards:
            self.phases["client killed"] += 1
            return True
        return False

    def restore(self, version: str, *, progress: Progress | None = None) -> None:
        """Restores a version and compares it."""
        selector = f"{self.names[version]}@{version}"
        assert self.cluster.comes_back(selector, self.protected[version], progress=progress)

    def _moments(self, killed: list[str]) -> list[tuple[float, float, int]]:
        shares = sorted(self.random.uniform(0.0, 0.9) for _ in killed)
        return [
            (share, self.random.uniform(0, DELAY_MAX_S), self.cluster.pid(node))
            for share, node in zip(shares, killed, strict=True)
        ]

    def _phase(self, node: str, before: set[str]) -> str:
        """What a killed node was doing, from what it left behind; "" when it took no part."""
        incoming = list((self.cluster.store_path(node) / "incoming").iterdir())
        half = whole = 0
        for path in incoming:
            named = path.name.partition(".")[0]
            if hashlib.sha256(path.read_bytes()).hexdigest() == named:
                whole += 1
            else:
                half += 1
        if half:
            return "transferring"
        if whole:
            return "committing"
        return "negotiating" if self.cluster.shards(node) - before else ""

    def _check_what_is_left(self, version: str) -> None:
        """With the killed nodes still down: this version and another one come back whole, and of
        every version each shard is somewhere."""
        self.restore(version)
        self.restore(self.random.choice(sorted(self.protected)))
        for known, by_node in bitmaps_now(self.cluster.config, sorted(self.protected)).items():
            union = 0
            for found in by_node.values():
                union |= int.from_bytes(found or b"", "big")
            shards = self._manifest(known)["shards"]
            assert union.bit_count() == len(shards), f"{self.names[known]} lost shards"

    def _manifest(self, version: str) -> dict[str, list[object]]:
        node = next(n for n in self.cluster.running() if version in self.cluster.manifests(n))
        return self.cluster.manifest(node, version)


@pytest.fixture
def seed() -> int:
    """Another one each time; CKPTD_KILL_SEED repeats a run."""
    return int(os.environ.get("CKPTD_KILL_SEED") or random.SystemRandom().getrandbits(32))


@pytest.fixture
def rounds(
    request: pytest.FixtureRequest, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> Iterator[_Rounds]:
    options = getattr(request, "param", {})
    with breakable_cluster(tmp_path / "cluster", **options) as cluster:
        made = _Rounds(cluster, tmp_path, seed)
        try:
            yield made
        finally:
            total = max(1, made.phases.total())
            shares = ", ".join(f"{k} {n} ({100 * n // total} %)" for k, n in made.phases.items())
            with capsys.disabled():
                print(f"\nkill rounds, seed {seed}: {shares}; {made.attempts} checkpoints")


def _run_rounds(rounds: _Rounds, count: int, *, restores_every: int = 2) -> None:
    """`count` rounds that count: stores and restores in turns."""
    attempts = done = 0
    while done < count:
        attempts += 1
        assert attempts <= count * ATTEMPTS_PER_ROUND, f"only {done} of {attempts} rounds counted"
        restore = rounds.protected and done % restores_every == 1
        done += rounds.restore_round() if restore else rounds.store_round()
    for version in rounds.protected:
        rounds.restore(version)


@pytest.mark.timeout(240)
def test_fifteen_workers_die_during_stores_and_restores(rounds: _Rounds) -> None:
    _run_rounds(rounds, 15)


@pytest.mark.parametrize("rounds", [{"count": 5}], indirect=True)
def test_two_workers_die_during_one_store_with_three_copies(rounds: _Rounds) -> None:
    done = attempts = 0
    while done < 2:
        attempts += 1
        assert attempts <= 8
        done += rounds.store_round(copies=3, victims=2)


def test_the_client_dies_during_stores(rounds: _Rounds) -> None:
    done = attempts = 0
    while done < 3:
        attempts += 1
        assert attempts <= 12
        done += rounds.client_round()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_fifty_rounds_on_each_loop(
    tmp_path: Path,
    seed: int,
    loop: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CKPTD_LOOP", loop)  # the daemons inherit it
    with breakable_cluster(tmp_path / "cluster") as cluster:
        rounds = _Rounds(cluster, tmp_path, seed)
        try:
            _run_rounds(rounds, 45)
            for _ in range(20):
                if rounds.phases["client killed"] == 5:
                    break
                rounds.client_round()
            assert rounds.phases.total() == 50
        finally:
            with capsys.disabled():
                print(f"\n{loop}, seed {seed}: {dict(rounds.phases)}")
