"""Chains of real daemons: crossing each other under full load, and with nodes that hang."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from tests.cluster.kill_fixtures import BreakableCluster, breakable_cluster, wait_until

from ckptd.config import load
from ckptd.core import limits
from ckptd.errors import PeerBusy, PeerError, PeerStalled
from ckptd.net.bulk import BulkConnector, ShardSender
from ckptd.net.tls import client_context
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport, Hop

NODES = ("node1", "node2", "node3", "node4")
PAIRS = tuple(itertools.permutations(NODES, 2))
SHARD_BYTES = limits.MIB


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BreakableCluster]:
    with breakable_cluster(tmp_path_factory.mktemp("chained") / "local") as cluster:
        yield cluster


@pytest.fixture
def bulk(chained: BreakableCluster) -> Iterator[BulkConnector]:
    tls = load(chained.config).tls
    hello = messages.Hello("local", "client", ("client",), "0", 0, 0)
    connector = BulkConnector(client_context(tls.ca, tls.cert, tls.key), "local", lambda: hello)
    try:
        yield connector
    finally:
        connector.close()


class Source:
    """Random bytes that follow from a seed; `hold`, if set, stops it in the middle."""

    def __init__(self, seed: object, size: int = SHARD_BYTES) -> None:
        self.data = random.Random(repr(seed)).randbytes(size)
        self.digest = hashlib.sha256(self.data).digest()
        self.reached = threading.Event()
        self.hold: threading.Event | None = None

    def piece(self, offset: int, size: int) -> memoryview:
        if self.hold is not None and offset >= len(self.data) // 2:
            self.reached.set()
            assert self.hold.wait(30)
        return memoryview(self.data)[offset : offset + size]


def hop(cluster: BreakableCluster, node_id: str) -> Hop:
    node = cluster.node(node_id).config.node
    assert node is not None
    return Hop(node_id, node.listen.host, node.bulk_port)


def store(
    bulk: BulkConnector, head: Hop, chain: tuple[Hop, ...], source: Source
) -> dict[str, CopyReport]:
    """One try to bring a shard to a chain."""
    channel = bulk.acquire(head.node, head.host, head.port)
    try:
        request = messages.PutShard(source.digest, len(source.data), chain)
        sender = ShardSender(channel, request, hop=0)
        sender.negotiate()
        reports = sender.send(source)
    finally:
        bulk.release(head.node, head.host, head.port, channel)
    return {report.node: report for report in reports}


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that hangs: its connections stay open, and nothing answers."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_chains_that_cross_each_other_under_full_load_finish(
    chained: BreakableCluster, bulk: BulkConnector
) -> None:
    """All ordered pairs of nodes at once, more of them than there are slots. Whoever is told that
    a node is busy comes again; nobody waits for anybody who waits for them."""
    hops = {node: hop(chained, node) for node in NODES}
    everybody_is_here = threading.Barrier(36)
    busy = itertools.count()

    def work(number: int) -> list[tuple[bytes, tuple[str, str]]]:
        generator = random.Random(number)
        head, tail = PAIRS[number % len(PAIRS)]
        done = []
        everybody_is_here.wait(30)
        for turn in range(4):
            source = Source((number, turn))
            while True:
                try:
                    reports = store(bulk, hops[head], (hops[tail],), source)
                except PeerBusy:
                    reports = {}
                states = [getattr(reports.get(node), "state", "busy") for node in (head, tail)]
                if all(state in ("durable", "present") for state in states):
                    break
                assert "failed" not in states, reports
                next(busy)
                time.sleep(generator.uniform(0.01, 0.1))  # as a store does
            done.append((source.digest, (head, tail)))
        return done

    with ThreadPoolExecutor(36) as threads:
        started_s = time.monotonic()
        futures = [threads.submit(work, number) for number in range(36)]
        results = [pair for future in futures for pair in future.result(timeout=90)]
    took_s = time.monotonic() - started_s
    assert len(results) == 144
    for digest, nodes in results:
        for node in nodes:
            path = chained.shard_file(node, digest.hex())
            assert hashlib.sha256(path.read_bytes()).digest() == digest
    print(f"144 shards over 12 chains in {took_s:.1f} s, busy {next(busy)} times")


def test_whoever_hangs_is_named(chained: BreakableCluster, bulk: BulkConnector) -> None:
    """A head and a tail hang with half of a shard, in chains of their own, and the tail is then
    offered another one. What the other nodes have stored counts."""
    hops = {node: hop(chained, node) for node in NODES}
    sources = [Source(("hangs", number), 4 * limits.MIB) for number in range(3)]
    hold = threading.Event()

    def settle(future: Future[dict[str, CopyReport]]) -> dict[str, CopyReport] | PeerError:
        try:
            return future.result(timeout=60)
        except PeerError as error:
            return error

    with ThreadPoolExecutor(4) as threads, contextlib.ExitStack() as hanging:
        for source in sources[:2]:
            source.hold = hold
        half = [
            threads.submit(store, bulk, hops["node1"], (hops["node2"],), sources[0]),
            threads.submit(store, bulk, hops["node4"], (hops["node3"],), sources[1]),
        ]
        for source in sources[:2]:
            assert source.reached.wait(20)
        for node in ("node2", "node4"):
            hanging.enter_context(stopped(chained.pid(node)))
        fresh = threads.submit(store, bulk, hops["node3"], (hops["node2"],), sources[2])
        hold.set()
        tail_hangs, head_hangs = (settle(each) for each in half)
        tail_is_away = settle(fresh)

    assert isinstance(tail_hangs, dict)
    assert tail_hangs["node1"].state == "durable"
    assert tail_hangs["node2"].state == "failed"
    assert "node2" in tail_hangs["node2"].message
    assert isinstance(head_hangs, PeerStalled)
    assert head_hangs.node == "node4"
    assert isinstance(tail_is_away, dict)
    assert tail_is_away["node3"].state == "durable"
    assert tail_is_away["node2"].state == "failed"

    for digest, node in ((sources[0].digest, "node1"), (sources[2].digest, "node3")):
        assert chained.shard_file(node, digest.hex()).exists()


def test_a_node_told_to_stop_finishes_what_it_takes_in(
    chained: BreakableCluster, bulk: BulkConnector
) -> None:
    hops = {node: hop(chained, node) for node in NODES}
    source = Source("graceful", 4 * limits.MIB)
    source.hold = threading.Event()
    pid = chained.pid("node1")
    with ThreadPoolExecutor(1) as threads:
        storing = threads.submit(store, bulk, hops["node1"], (hops["node2"],), source)
        assert source.reached.wait(20)
        os.kill(pid, signal.SIGHUP)  # reads its config again, and goes on
        os.kill(pid, signal.SIGTERM)
        source.hold.set()
        reports = storing.result(timeout=30)
    assert {report.state for report in reports.values()} == {"durable"}
    wait_until(lambda: not chained.pid("node1"), "the node to end")
    log = (chained.directory / "node1" / "node.log").read_text(encoding="utf-8")
    assert "config_reloaded" in log and "node_stopped" in log
    assert "Traceback" not in log
    chained.up()
    for node in ("node1", "node2"):
        path = chained.shard_file(node, source.digest.hex())
        assert hashlib.sha256(path.read_bytes()).digest() == source.digest
