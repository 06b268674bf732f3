"""Where systems of this kind have broken before, one test for each way, against real daemons."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.cluster.kill_fixtures import (
    SHARD_SIZE,
    BreakableCluster,
    breakable_cluster,
    make_checkpoint,
    tree,
    wait_until,
    write_safetensors,
)

import ckptd
from ckptd.client.connect import connect
from ckptd.client.progress import Progress
from ckptd.config import load
from ckptd.core.cutting import SourceFile, cut
from ckptd.core.documents import FileEntry, Part
from ckptd.errors import LimitExceeded, SourceChanged
from ckptd.net.loop import run as run_on_loop
from ckptd.wire import frames, messages

MIB = 1024 * 1024


# 1. Bytes from an unauthenticated port were unpickled, and paths from the wire were joined.


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self._path), "w")


def test_break_01_a_pickle_to_any_port_is_not_executed(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    payload = pickle.dumps(_Touch(tmp_path / "executed"))
    for node in cluster.local.nodes():
        assert node.config.node is not None
        host, port = node.config.node.listen
        for where in (port, node.config.node.bulk_port, node.config.observe.listen.port):
            with socket.create_connection((host, where), timeout=20) as sock:
                answer = b""
                try:
                    sock.sendall(len(payload).to_bytes(4, "big") + payload)
                    sock.shutdown(socket.SHUT_WR)
                    while piece := sock.recv(4096):
                        answer += piece
                except OSError as error:
                    assert not isinstance(error, TimeoutError), "to hang up is the right answer"
                assert len(answer) < 1024
    assert not (tmp_path / "executed").exists()
    assert pickle.loads(payload) is not None and (tmp_path / "executed").exists()


def test_break_01_no_module_can_unpickle() -> None:
    forbidden = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    for path in Path(ckptd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            else:
                continue
            assert not names & forbidden, path


def test_break_01_paths_from_the_wire_cannot_leave_the_checkpoint(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    (tmp_path / "aa-weights.bin").write_bytes(b"bytes")
    stored = cluster.store(tmp_path / "aa-weights.bin", "wire-paths")
    path = cluster.store_path("node1") / "catalogue" / f"{stored.version}.json"
    good = path.read_bytes()

    async def put(raw: bytes) -> list[str]:
        async with connect(load(cluster.config)) as connection:
            signed = messages.SignedDocument(raw, connection.signer.sign(raw))
            refused = []
            for node in connection.workers:
                reply, _ = await node.control.request(
                    messages.PutDocuments(1),
                    messages.PutDocumentsReply,
                    payload=messages.encode_documents((signed,)),
                )
                refused.append(reply.results[0].refused)
            return refused

    assert run_on_loop(put(good)) == [""] * 4
    for evil in (b"../../../../ab", b"/etc/cron.d/ab", b"a/../../../b-a", b"./a//b/./aab/c"):
        raw = good.replace(b"aa-weights.bin", evil)
        assert raw != good
        assert all(run_on_loop(put(raw))), f"a manifest with {evil!r} was taken"


# 2. The restore command could not work, and no test ran it.


def test_break_02_the_commands_as_a_user_types_them(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "ck", "as typed")
    assert cluster.command("store", source, "--name", "typed").code == 0
    assert cluster.command("restore", "typed", "--to", tmp_path / "out").code == 0
    assert subprocess.run(["diff", "-r", source, tmp_path / "out"], check=False).returncode == 0


# 4. Two safetensors files in one directory overwrote each other.


def test_break_04_two_safetensors_in_one_directory(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    source = tmp_path / "ck"
    source.mkdir()
    for number in (1, 2):
        write_safetensors(
            source / f"model-0000{number}-of-00002.safetensors",
            {"same.name": os.urandom(MIB), f"own.{number}": os.urandom(1000)},
        )
    cluster.store(source, "two-files")
    assert cluster.comes_back("two-files", source)


# 5. A sender that died left a full-size file of zeros over the good copy, and it was called good.


def test_break_05_a_sender_that_dies_leaves_no_torn_copy(tmp_path: Path) -> None:
    source = tmp_path / "weights.bin"
    source.write_bytes(os.urandom(96 * MIB))
    settings = ["replication.shard_size=32MiB"]
    with breakable_cluster(tmp_path / "c", settings=settings) as cluster:
        first = cluster.store(source, "weights")
        before = cluster.all_shards()
        kept = tmp_path / "first"
        kept.mkdir()
        shutil.copyfile(source, kept / "weights.bin")
        shutil.copymode(source, kept / "weights.bin")
        source.write_bytes(os.urandom(96 * MIB))
        process = cluster.start_command("store", source, "--name", "weights")

        def receiving() -> int:
            sizes = []
            for node in cluster.running():
                for file in (cluster.store_path(node) / "incoming").iterdir():
                    try:
                        sizes.append(file.stat().st_size)
                    except FileNotFoundError:
                        pass  # complete meanwhile
            return max(sizes, default=0)

        wait_until(lambda: receiving() > 4 * MIB or process.poll() is not None, "a shard to come")
        process.kill()
        out, err = process.communicate()
        assert not out, err
        wait_until(lambda: receiving() == 0, "what came in half to be discarded")
        for shard, nodes in cluster.all_shards().items():
            for node in nodes:
                with open(cluster.shard_file(node, shard), "rb") as file:
                    assert hashlib.file_digest(file, "sha256").hexdigest() == shard
        assert before.items() <= cluster.all_shards().items()
        assert cluster.comes_back(f"weights@{first.version}", kept)
        assert cluster.comes_back("weights", kept), "the newest version is still the first one"


# 6. A source that shrank left sender and receiver waiting for each other for ever.


class _WhenSending(Progress):
    def __init__(self, act: Callable[[], object]) -> None:
        self._acts = [act]

    def node(self, node: str, size: int) -> None:
        if self._acts:
            self._acts.pop()()


def test_break_06_a_source_that_shrinks_ends_in_an_error(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    source = tmp_path / "shrinks.bin"
    source.write_bytes(os.urandom(16 * MIB))
    started_s = time.monotonic()
    with pytest.raises(SourceChanged, match=r"shrinks\.bin"):
        cluster.store(
            source, "shrinks", progress=_WhenSending(lambda: os.truncate(source, 4 * MIB + 1))
        )
    assert time.monotonic() - started_s < 15, "nobody waited for bytes that never come"
    assert cluster.store(source, "shrinks").state == "protected"


# 7. Lengths of four bytes: shards of 4 GiB failed.


def test_break_07_lengths_and_offsets_have_sixty_four_bits() -> None:
    size = 2**32 + 2**31 + 1
    plans = list(cut([SourceFile("large", size)], 2**28))
    assert sum(plan.size for plan in plans) == size
    last = plans[-1].pieces[-1]
    assert last.offset + last.length == size
    entry = FileEntry("large", 0o644, size, "0" * 64, (Part(0, 2**32 + 1, 2**33),))
    assert entry.parts[0].length == 2**33
    # What is over the limit is refused as what it is, and not taken for what is left of it.
    header = frames.encode_header(1, 2, 3, 2**32 + 5)
    with pytest.raises(LimitExceeded, match=str(2**32 + 5)):
        frames.parse_header(header, peer="x")


# 8. One dead worker blocked every store, and without it in the config nothing old came back.


def test_break_08_a_dead_worker_blocks_nothing_in_the_config_or_out_of_it(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    old = make_checkpoint(tmp_path / "old", "old")
    fresh_cluster.store(old, "old")
    fresh_cluster.kill("node2")
    new = make_checkpoint(tmp_path / "new", "new")
    assert fresh_cluster.store(new, "new").state == "protected"
    config = yaml.safe_load(fresh_cluster.config.read_text())
    dead = fresh_cluster.node("node2").config.node
    assert dead is not None
    config["discovery"]["peers"].remove(str(dead.listen))
    fresh_cluster.config.write_text(yaml.safe_dump(config))
    assert fresh_cluster.comes_back("old", old)
    assert fresh_cluster.comes_back("new", new)


# 10. What a restore needs lived in one file of the coordinator, updated before the data.


def test_break_10_a_client_keeps_no_state(cluster: BreakableCluster, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    source = make_checkpoint(tmp_path / "ck", "stateless")
    before = tree(cluster.directory / "pki")
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "TMPDIR": str(home)}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    for arguments in (
        ["store", str(source), "--name", "stateless"],
        ["restore", "stateless", "--to", str(tmp_path / "out")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ckptd", "--config", str(cluster.config), *arguments],
            env=environment,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == tree(source)
    assert not list(home.iterdir()), "nothing to lose with this machine"
    assert tree(cluster.directory / "pki") == before


def test_break_10_a_version_is_published_only_when_its_shards_are_there(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "ck", "order of events", size=8 * MIB)
    early: list[str] = []

    class Watch(Progress):
        def node(self, node: str, size: int) -> None:
            early.extend(
                document_id
                for number in range(1, 5)
                for document_id, raw in cluster.documents(f"node{number}")
                if b'"data-before-documents"' in raw
            )

    stored = cluster.store(source, "data-before-documents", progress=Watch())
    assert stored.state == "protected" and not early


# 11. The restored file was not identical, was renamed before it was verified, and lay in the way.


def test_break_11_restored_is_identical_and_appears_only_when_verified(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "ck", "identical")
    (source / "empty").mkdir(mode=0o700)
    (source / "nothing.bin").write_bytes(b"")
    (source / "run.sh").write_bytes(b"#!/bin/sh\n")
    (source / "run.sh").chmod(0o750)
    (source / "latest").symlink_to("model.safetensors")
    target = tmp_path / "out"
    seen: list[bool] = []

    class Watch(Progress):
        def advance(self, size: int) -> None:
            seen.append(target.exists())

    cluster.store(source, "identical")
    cluster.restore("identical", target, progress=Watch())
    assert seen and not any(seen), "nothing is at the target while bytes are missing"
    assert tree(target) == tree(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "out"], "nothing is left over"


# 12. Identity was the order of joining, and a restart reshuffled who owned what.


def test_break_12_nodes_keep_their_identity_in_any_order_of_starts(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "ck", "identity")
    stored = fresh_cluster.store(source, "identity")
    before = fresh_cluster.all_shards()
    for order in (["node3", "node1"], ["node4", "node2"], ["node1", "node2", "node3", "node4"]):
        fresh_cluster.kill(*order)
        fresh_cluster.up()
        assert fresh_cluster.all_shards() == before

        async def owners() -> dict[str, set[str]]:
            async with connect(load(fresh_cluster.config)) as connection:
                digests = [bytes.fromhex(shard) for shard in before]
                found = await connection.holders(digests)
                return {d.hex(): set(nodes) for d, nodes in zip(digests, found, strict=True)}

        assert asyncio.run(owners()) == before
        again = fresh_cluster.store(source, "identity")
        assert (again.version, again.bytes_sent) == (stored.version, 0)


# 13. Placement was a ring: four of six pairs lost data. One big tensor skewed everything.


def test_break_13_few_pairs_of_nodes_are_fatal_and_big_tensors_skew_nothing(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    generator = random.Random(13)
    tensors = {"embedding": generator.randbytes(12 * MIB)}
    tensors |= {f"norm.{number}": generator.randbytes(4096) for number in range(60)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    stored = fresh_cluster.store(tmp_path / "model.safetensors", "skewed")
    found = fresh_cluster.all_shards()
    manifest = fresh_cluster.manifest("node1", stored.version)
    fatal = {
        pair
        for pair in itertools.combinations(fresh_cluster.running(), 2)
        if any(found[shard] <= set(pair) for shard, _ in manifest["shards"])
    }
    assert 1 <= len(fatal) <= 3, f"a ring has 4 of 6: {fatal}"
    assert all(size <= SHARD_SIZE for _, size in manifest["shards"])
    assert len(manifest["shards"]) >= 12 * MIB // SHARD_SIZE
    by_node = {
        node: sum(size for shard, size in manifest["shards"] if node in found[shard])
        for node in fresh_cluster.running()
    }
    assert min(by_node.values()) > 0 and max(by_node.values()) <= stored.bytes


# 15. torch and the newest Python on every Pi, to move bytes.


def test_break_15_a_worker_has_neither_numpy_nor_torch(
    cluster: BreakableCluster, tmp_path: Path
) -> None:
    cluster.store(make_checkpoint(tmp_path / "ck", "imports"), "imports")
    for node in cluster.running():
        maps = Path(f"/proc/{cluster.pid(node)}/maps").read_text()
        assert "libssl" in maps or "_ssl" in maps, "this reads the right process"
        for heavy in ("numpy", "torch", "ml_dtypes", "safetensors", "mlx"):
            assert f"/{heavy}/" not in maps
    # Modules without compiled parts do not show there; so the same imports once more, by name.
    listed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, json, ckptd.node.daemon; print(json.dumps(sorted(sys.modules)))",
        ],
        capture_output=True,
        check=True,
    )
    assert not {"numpy", "torch", "safetensors", "ml_dtypes"} & set(json.loads(listed.stdout))


def test_break_15_python_3_11_is_enough() -> None:
    assert sys.version_info >= (3, 11)
    for path in Path(ckptd.__file__).parent.rglob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 11))
