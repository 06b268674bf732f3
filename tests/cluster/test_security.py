"""Hostile peers against real daemons: what is refused, what it costs, who is served meanwhile.

One cluster for the whole module, with every attack against the same four processes; at the end
their peak memory is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.cluster.hostile import (
    Place,
    RawPeer,
    files_of,
    half_open,
    is_refused,
    peak_memory_bytes,
    without_certificate,
)
from tests.cluster.kill_fixtures import BreakableCluster, breakable_cluster, make_checkpoint, tree

from ckptd.client.pki import init_cluster, issue
from ckptd.core import documents, limits
from ckptd.core.identity import Role
from ckptd.core.signing import Signer
from ckptd.wire import frames, messages

NODES = ("node1", "node2", "node3", "node4")
MEMORY_MAX_BYTES = 96 * limits.MIB
CLUSTER = "local"


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BreakableCluster]:
    """A cluster that holds a checkpoint, and a stolen worker's certificate called "mallory"."""
    with breakable_cluster(tmp_path_factory.mktemp("attacked") / "local") as cluster:
        issue(cluster.directory / "pki", [Role.WORKER], "mallory")
        issue(cluster.directory / "pki", [Role.MONITOR], "monitor")
        source = make_checkpoint(cluster.directory / "source", "kept")
        result = cluster.command("store", source, "--name", "kept/checkpoint-1")
        assert result.code == 0, result.stderr
        cluster.meet()  # what nodes write of themselves is not taken for an attack
        yield cluster
        # Whatever was done to them, the daemons live and their memory stayed in bounds.
        for node in NODES:
            peak = peak_memory_bytes(cluster.pid(node))
            assert peak <= MEMORY_MAX_BYTES, f"{node} took {peak / limits.MIB:.1f} MiB"


def place(cluster: BreakableCluster, node_id: str = "node1") -> Place:
    config = cluster.node(node_id).config
    assert config.node is not None
    return Place(node_id, config.node.listen.host, config.node.listen.port, config.node.bulk_port)


def connected(
    cluster: BreakableCluster,
    name: str,
    port: str = "control",
    *,
    hop: int = 0,
    node: str = "node1",
) -> RawPeer:
    where = place(cluster, node)
    number = where.control if port == "control" else where.bulk
    peer = RawPeer(where.host, number, files_of(cluster.directory / "pki", name))
    assert isinstance(peer.greet(cluster=CLUSTER, hop=hop), messages.Hello)
    return peer


def signer(pki: Path, name: str) -> Signer:
    files = files_of(pki, name)
    return Signer.from_pem(files.cert.read_bytes(), files.key.read_bytes())


def documents_on(cluster: BreakableCluster, node: str = "node1") -> set[str]:
    return {path.name for path in (cluster.store_path(node) / "catalogue").iterdir()}


def assert_service(cluster: BreakableCluster, work: Path) -> None:
    """A store and a restore by somebody else work at this moment."""
    name = f"work{random.random()}/checkpoint-1"
    source = make_checkpoint(work / "in", name, size=1024 * 1024)
    stored = cluster.command("store", source, "--name", name)
    assert (stored.code, stored.document.get("state")) == (0, "protected"), stored
    restored = cluster.command("restore", name, "--to", work / "out")
    assert restored.code == 0, restored
    assert tree(work / "out") == tree(source)
    shutil.rmtree(work)


# Who gets in


@pytest.mark.parametrize("port", ["control", "bulk"])
def test_without_a_certificate_of_this_cluster_nobody_gets_in(
    attacked: BreakableCluster, tmp_path: Path, port: str
) -> None:
    init_cluster(tmp_path / "other", CLUSTER)  # the same name, another CA
    where = place(attacked)
    number = where.control if port == "control" else where.bulk
    assert is_refused(where.host, number, without_certificate())
    stranger = without_certificate()
    stranger.load_cert_chain(tmp_path / "other" / "client.pem", tmp_path / "other" / "client.key")
    assert is_refused(where.host, number, stranger)


@pytest.mark.parametrize(
    "request_",
    [
        messages.Verify((b"\0" * 32,)),
        messages.ReportCorrupt(b"\0" * 32),
        messages.Have((b"\0" * 32,), touch=True),  # which would keep it from being collected
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_workers_certificate_does_no_clients_work_on_control(
    attacked: BreakableCluster, request_: messages.Message
) -> None:
    with connected(attacked, "mallory") as peer:
        answer = peer.ask(request_)
    assert isinstance(answer, messages.Error)
    assert answer.code == "not_authorized"


def test_a_workers_certificate_reads_no_shard(attacked: BreakableCluster) -> None:
    shard, nodes = next(iter(attacked.all_shards().items()))
    node = min(nodes)
    target = place(attacked, "node2").hop
    size = attacked.shard_file(node, shard).stat().st_size
    for request_ in (
        messages.GetShard(bytes.fromhex(shard)),
        messages.PushShard(bytes.fromhex(shard), size, (target,)),
    ):
        with connected(attacked, "mallory", "bulk", hop=1, node=node) as peer:
            answer = peer.ask(request_, hop=1)
        assert isinstance(answer, messages.Error)
        assert answer.code == "not_authorized"


def test_a_worker_is_sent_no_shard_by_a_chain_that_comes_back_to_it(
    attacked: BreakableCluster,
) -> None:
    shard, nodes = next(iter(attacked.all_shards().items()))
    node, other = sorted(nodes)[:2]
    size = attacked.shard_file(node, shard).stat().st_size
    itself = messages.Hop("mallory", "127.0.0.1", 1)
    for chain in ((itself,), (place(attacked, other).hop, itself)):
        with connected(attacked, "mallory", "bulk", hop=1, node=node) as peer:
            answer = peer.ask(messages.PutShard(bytes.fromhex(shard), size, chain), hop=1)
        assert isinstance(answer, messages.Error)
        assert answer.code == "refused" and "mallory twice" in answer.message


# Forged documents


def forgeries(cluster: BreakableCluster, other: Path) -> dict[str, messages.SignedDocument]:
    """Documents that would delete, replace or invent a checkpoint."""
    pki = cluster.directory / "pki"
    version = min(cluster.manifests("node1"))
    manifest = (cluster.store_path("node1") / "catalogue" / f"{version}.json").read_bytes()
    envelope = (cluster.store_path("node1") / "catalogue" / f"{version}.sig").read_bytes()
    changed = manifest.replace(b'"kept/checkpoint-1"', b'"kept/checkpoint-2"')
    assert changed != manifest
    tombstone = documents.encode(
        documents.Tombstone(
            format=1,
            cluster=CLUSTER,
            order=2**50,
            created="2026-01-01T00:00:00Z",
            nonce="0" * 32,
            reason="rm",
            versions=(version,),
        )
    )
    foreign = manifest.replace(b'"local"', b'"other"')

    def signed(raw: bytes, directory: Path, name: str) -> messages.SignedDocument:
        return messages.SignedDocument(raw, signer(directory, name).sign(raw))

    return {
        "manifest signed by a worker": signed(changed, pki, "mallory"),
        "tombstone signed by a worker": signed(tombstone, pki, "mallory"),
        "tombstone signed in another cluster": signed(tombstone, other, "client"),
        "manifest of another cluster, well signed there": signed(foreign, other, "client"),
        "manifest of another cluster, signed here": signed(foreign, pki, "client"),
        "changed manifest with the true signature": messages.SignedDocument(changed, envelope),
        "unsigned": messages.SignedDocument(tombstone, b""),
        "a pickle": messages.SignedDocument(b"cos\nsystem\n(S'true'\ntR.", envelope),
    }


@pytest.mark.parametrize("carrier", ["mallory", "client"])
def test_forged_documents_are_refused_whoever_brings_them(
    attacked: BreakableCluster, tmp_path: Path, carrier: str
) -> None:
    init_cluster(tmp_path / "other", "other")
    before = documents_on(attacked)
    for what, forged in forgeries(attacked, tmp_path / "other").items():
        with connected(attacked, carrier) as peer:
            answer = peer.ask(
                messages.PutDocuments(1), payload=messages.encode_documents((forged,))
            )
        assert isinstance(answer, messages.PutDocumentsReply), what
        (result,) = answer.results
        assert result.refused, what
        assert result.id == hashlib.sha256(forged.document).digest()
    assert documents_on(attacked) == before
    listed = attacked.command("ls")
    assert "kept/checkpoint-1" in str(listed.document)
    assert "kept/checkpoint-2" not in str(listed.document)


def test_a_large_document_of_a_worker_is_not_even_parsed(attacked: BreakableCluster) -> None:
    version = min(attacked.manifests("node1"))
    raw = (attacked.store_path("node1") / "catalogue" / f"{version}.json").read_bytes()
    entry = b'["' + b"ab" * 32 + b'",1],'
    at = raw.index(b'"shards":[') + len(b'"shards":[')
    many = (limits.DOCUMENT_MAX_BYTES - len(raw)) // len(entry)
    large = raw[:at] + entry * many + raw[at:]
    signed = messages.SignedDocument(
        large, signer(attacked.directory / "pki", "mallory").sign(large)
    )
    with connected(attacked, "mallory") as peer:
        answer = peer.ask(messages.PutDocuments(1), payload=messages.encode_documents((signed,)))
    assert isinstance(answer, messages.PutDocumentsReply)
    assert "over the limit" in answer.results[0].refused


# One worker as another


def test_a_worker_that_answers_as_another_gets_nothing_from_a_forwarding_node(
    attacked: BreakableCluster,
) -> None:
    data = random.Random(1).randbytes(100_000)
    digest = hashlib.sha256(data).digest()
    elsewhere = place(attacked, "node3")
    pretended = messages.Hop("node2", elsewhere.host, elsewhere.bulk)
    with connected(attacked, "client", "bulk") as peer:
        ready = peer.ask(messages.PutShard(digest, len(data), (pretended,)))
        assert isinstance(ready, messages.Ready)
        result = peer.ask(messages.ShardData(digest), payload=data)
    assert isinstance(result, messages.PutResult)
    by_node = {report.node: report for report in result.reports}
    assert by_node["node1"].state == "durable"
    assert (by_node["node2"].state, by_node["node2"].code) == ("failed", "not_authorized")
    assert not attacked.shard_file("node3", digest.hex()).exists()


# Rubbish and exhaustion


def test_frames_that_claim_2_63_bytes(attacked: BreakableCluster, tmp_path: Path) -> None:
    lengths = [(2**63, 0), (10, 2**63), (2**63, 2**63)]
    for index, number in enumerate(messages.TYPES):
        with connected(attacked, "mallory") as peer:
            peer.announce(number, *lengths[index % 3])
            assert peer.is_given_up()
    for index, number in enumerate((32, 36, 37, 38, 32, 37)):
        with connected(attacked, "mallory", "bulk", hop=1) as peer:
            peer.announce(number, *lengths[index % 3])
            assert peer.is_given_up()
    assert_service(attacked, tmp_path / "work")


def test_rubbish_on_both_ports(attacked: BreakableCluster, tmp_path: Path) -> None:
    noise = random.Random(7)
    for port in ("control", "bulk"):
        for _ in range(8):
            with connected(attacked, "mallory", port, hop=1) as peer:
                with contextlib.suppress(OSError):
                    peer.sock.sendall(noise.randbytes(4096))
                assert peer.is_given_up()
    assert_service(attacked, tmp_path / "work")


def test_500_half_open_connections_on_both_ports_of_every_node(
    attacked: BreakableCluster, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as held:
        for node in NODES:
            where = place(attacked, node)
            held.enter_context(half_open(where.host, where.ports, 125))
        where = place(attacked)
        held.enter_context(half_open(where.host, where.ports, 375))
        assert_service(attacked, tmp_path / "work")


def test_500_connections_with_a_valid_certificate_that_do_nothing(
    attacked: BreakableCluster, tmp_path: Path
) -> None:
    files = files_of(attacked.directory / "pki", "mallory")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(files.ca)
    context.load_cert_chain(files.cert, files.key)
    where = place(attacked)
    with contextlib.ExitStack() as held:
        for number in range(250):
            for port in where.ports:
                with contextlib.suppress(OSError):
                    peer = held.enter_context(RawPeer(where.host, port, context))
                    if number % 2:
                        hello = messages.Hello(CLUSTER, "m", (), "0", 0, 0)
                        peer.sock.sendall(frames.encode_frame(hello, 0, hop=1))
        assert_service(attacked, tmp_path / "work")


def test_many_large_requests_and_greedy_questions_at_once(
    attacked: BreakableCluster, tmp_path: Path
) -> None:
    """All that one stolen certificate can open: payloads that are sent to the end, payloads that
    stop before it, and questions whose answers nobody takes."""
    large = messages.encode_documents(
        (messages.SignedDocument(os.urandom(limits.DOCUMENT_MAX_BYTES), b"{}"),)
    )
    stop = threading.Event()

    def send_all(peer: RawPeer) -> None:
        while not stop.is_set():
            peer.ask(messages.PutDocuments(1), payload=large)

    def stop_half_way(peer: RawPeer) -> None:
        peer.promise(messages.PutDocuments(1), len(large))
        peer.sock.sendall(large[: len(large) // 2])

    def take_nothing(peer: RawPeer) -> None:
        for request_id in range(1, limits.CONTROL_REQUESTS_MAX + 1):
            peer.send(messages.ListDocuments(), request_id=request_id)

    with contextlib.ExitStack() as opened, ThreadPoolExecutor(18) as attackers:
        # Each has said hello before the next one comes: handshakes at once are limited for each
        # address, and here everybody has the same.
        client = opened.enter_context(connected(attacked, "client"))
        attacks = [send_all, stop_half_way, take_nothing] * 6
        peers = [opened.enter_context(connected(attacked, "mallory")) for _ in attacks]
        begun = [
            attackers.submit(attack, peer) for attack, peer in zip(attacks, peers, strict=True)
        ]
        try:
            for request_id in range(1, 10):
                started_s = time.monotonic()
                answer = client.ask(messages.GetStatus(), request_id=request_id)
                assert isinstance(answer, messages.NodeStatus)
                assert time.monotonic() - started_s < 10
        finally:
            stop.set()
            # What is refused in the middle is meant to be; that an attack never began is not.
            unexpected = [
                error for attack in begun if not isinstance(error := attack.exception(), OSError)
            ]
        assert not any(unexpected), unexpected
    assert_service(attacked, tmp_path / "work")


def test_slow_senders_of_shards_leave_slots_to_others(
    attacked: BreakableCluster, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as held:
        for node in NODES:
            for hop in range(1, limits.CHAIN_HOPS_MAX + 1):
                for number in range(limits.BULK_SLOTS_PER_PEER_MAX - 2):
                    peer = held.enter_context(
                        connected(attacked, "mallory", "bulk", hop=hop, node=node)
                    )
                    digest = hashlib.sha256(f"{node}{hop}{number}".encode()).digest()
                    ready = peer.ask(messages.PutShard(digest, limits.MIB), hop=hop)
                    assert isinstance(ready, messages.Ready)
                    peer.promise(messages.ShardData(digest), limits.MIB, hop=hop)
                    peer.sock.sendall(b"x")
        assert_service(attacked, tmp_path / "work")


def test_what_was_kept_is_still_there(attacked: BreakableCluster, tmp_path: Path) -> None:
    restored = attacked.command("restore", "kept/checkpoint-1", "--to", tmp_path / "out")
    assert restored.code == 0, restored
    assert tree(tmp_path / "out") == tree(attacked.directory / "source")
    for node in NODES:
        log = (attacked.directory / node / "node.log").read_text(encoding="utf-8")
        assert "Traceback" not in log
