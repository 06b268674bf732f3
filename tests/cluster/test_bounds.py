"""Promised bounds: memory at any size, files and tensors over 4 GiB, 20,000 shards on a node."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.kill_fixtures import BreakableCluster, breakable_cluster, kill_process

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

MIB = 1024 * 1024
GIB = 1024 * MIB
WORKER_MAX_BYTES = 96 * MIB
CLIENT_MAX_BYTES = 256 * MIB
START_MAX_S = 2.0

CLIENTS = 4
STORES_PER_CLIENT = 4
STORE_BYTES = 8 * GIB // (CLIENTS * STORES_PER_CLIENT)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[BreakableCluster]:
    """Four nodes with the default shard size."""
    with breakable_cluster(tmp_path / "cluster", settings=()) as running:
        yield running
    shutil.rmtree(tmp_path, ignore_errors=True)  # these are gigabytes


@dataclass
class Measured:
    """A command that ended: what it printed, and the most memory that it had resident."""

    code: int
    document: dict[str, Any]
    peak_bytes: int


def _measure(cluster: BreakableCluster, *arguments: object) -> Measured:
    process = cluster.start_command(*arguments)
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr, ThreadPoolExecutor(1) as reader:
        err = reader.submit(process.stderr.read)
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert out.strip(), err.result()
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(process.returncode, json.loads(out), usage.ru_maxrss * unit)


def _peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no VmHWM of process {pid}")


def _show(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}")


def test_memory_is_bounded_while_four_clients_store_eight_gibibytes(
    cluster: BreakableCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started_s = time.monotonic()

    def client(number: int) -> list[Measured]:
        done = []
        for turn in range(STORES_PER_CLIENT):
            source = tmp_path / f"random-{number}-{turn}.bin"
            with open(source, "wb") as file:
                for _ in range(STORE_BYTES // (8 * MIB)):
                    file.write(os.urandom(8 * MIB))
            done.append(_measure(cluster, "store", source, "--name", f"bounds/{number}-{turn}"))
            source.unlink()
        return done

    with ThreadPoolExecutor(CLIENTS) as clients:
        stored = [one for done in clients.map(client, range(CLIENTS)) for one in done]
    seconds = time.monotonic() - started_s
    workers = {node: _peak_bytes(cluster.pid(node)) for node in cluster.running()}
    restored = _measure(cluster, "restore", "bounds/0-0", "--to", tmp_path / "out")
    after = {node: _peak_bytes(cluster.pid(node)) for node in cluster.running()}
    clients_peak = max(one.peak_bytes for one in stored)
    _show(
        capsys,
        f"8 GiB by {CLIENTS} clients in {seconds:.0f} s; peak MiB: workers "
        f"{[peak // MIB for peak in workers.values()]} (after a restore "
        f"{[peak // MIB for peak in after.values()]}), storing {clients_peak // MIB}, "
        f"restoring {restored.peak_bytes // MIB}",
    )
    assert all(one.code == 0 and one.document["state"] == "protected" for one in stored)
    assert sum(one.document["bytes"] for one in stored) == 8 * GIB
    assert sum(one.document["shards_deduplicated"] for one in stored) == 0
    assert len(workers) == 4 and max(after.values()) <= WORKER_MAX_BYTES
    assert clients_peak <= CLIENT_MAX_BYTES
    assert restored.code == 0 and restored.document["bytes"] == STORE_BYTES
    assert restored.peak_bytes <= CLIENT_MAX_BYTES


_EDGES = [0, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1]


def _write_edges(path: Path, start: int, size: int) -> None:
    """Distinct bytes where 32-bit lengths and offsets would go wrong; the rest is a hole."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.truncate(start + size)
        for number, edge in enumerate([*_EDGES, size - 1], start=1):
            file.seek(start + edge)
            file.write(bytes([number]))


def _edges(path: Path, start: int, size: int) -> list[int]:
    with open(path, "rb") as file:
        found = []
        for edge in [*_EDGES, size - 1]:
            file.seek(start + edge)
            found.append(file.read(1)[0])
    return found


def test_files_and_tensors_over_four_gibibytes(
    cluster: BreakableCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = 2**32 + 5 * MIB
    source = tmp_path / "large"
    source.mkdir()
    _write_edges(source / "optimizer.pt", 0, size)
    header = json.dumps(
        {"embedding": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    ).encode()
    start = 8 + len(header)
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    _write_edges(source / "model.safetensors", start, size)

    stored = _measure(cluster, "store", source, "--name", "large")
    assert stored.code == 0 and stored.document["bytes"] == 2 * size + start
    restored = _measure(cluster, "restore", "large", "--to", tmp_path / "out")
    assert restored.code == 0 and restored.document["verified"]
    for name, begin in (("optimizer.pt", 0), ("model.safetensors", start)):
        path = tmp_path / "out" / name
        assert path.stat().st_size == begin + size
        assert _edges(path, begin, size) == list(range(1, len(_EDGES) + 2))
        assert _hash(path) == _hash(source / name)
    _show(
        capsys,
        f"{stored.document['bytes'] / GIB:.1f} GiB in two files: stored in "
        f"{stored.document['seconds']:.0f} s with {stored.peak_bytes // MIB} MiB, restored in "
        f"{restored.document['seconds']:.0f} s with {restored.peak_bytes // MIB} MiB",
    )
    assert stored.peak_bytes <= CLIENT_MAX_BYTES and restored.peak_bytes <= CLIENT_MAX_BYTES
    assert max(_peak_bytes(cluster.pid(node)) for node in cluster.running()) <= WORKER_MAX_BYTES


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_a_node_with_twenty_thousand_shards_serves_within_two_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with breakable_cluster(tmp_path / "cluster", count=1) as cluster:
        cluster.kill("node1")
        for number in range(20_000):
            content = b"shard %d" % number
            file = cluster.shard_file("node1", hashlib.sha256(content).hexdigest())
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
        os.sync()  # what other tests wrote shall not be flushed by this node
        took_s = [_seconds_until_ready(cluster)]
        while min(took_s) >= START_MAX_S and len(took_s) < 5:  # other work on this machine
            took_s.append(_seconds_until_ready(cluster))
        _show(capsys, f"20,000 shards: serves after {took_s[-1]:.2f} s, load {os.getloadavg()[0]}")
        assert min(took_s) < START_MAX_S


def _seconds_until_ready(cluster: BreakableCluster) -> float:
    config = cluster.directory / "node1" / "ckptd.yml"
    place = cluster.directory / "ready"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(str(place))
        ready.settimeout(60)
        started_s = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "ckptd", "serve", "--config", str(config)],
            env={**os.environ, "NOTIFY_SOCKET": str(place)},
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        drain = threading.Thread(target=process.stderr.read, name="log")
        drain.start()
        try:
            assert ready.recv(100).startswith(b"READY=1")
            return time.monotonic() - started_s
        finally:
            kill_process(process.pid)
            process.wait()
            drain.join()
            process.stderr.close()
            place.unlink()
