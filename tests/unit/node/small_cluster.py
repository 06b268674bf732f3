"""A few workers and a coordinator without sockets or daemons: real stores, real documents, real
request handlers, on a clock that a test moves.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import hashlib
import random
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry
from tests.unit.node.running_nodes import CLUSTER, make_pki
from tests.unit.node.test_records import signer_of

from ckptd.client.pki import issue
from ckptd.core import documents
from ckptd.core.collection import Fate
from ckptd.core.documents import FileEntry, Manifest, Part, Pin, ShardReference, Tombstone
from ckptd.core.headers import VersionHeader
from ckptd.core.identity import Identity, Role, load_ca
from ckptd.core.retention import RetentionRule
from ckptd.core.steward import Standing, Standings
from ckptd.errors import PeerUnreachable
from ckptd.node.collector import Collector
from ckptd.node.confirmation import Confirmation
from ckptd.node.inventories import Inventories
from ckptd.node.records import Records
from ckptd.node.requests import Requests
from ckptd.node.retention import Retention
from ckptd.observe.metrics import Metrics
from ckptd.store.documents import DocumentFiles
from ckptd.store.filesystem import OperatingSystem
from ckptd.store.marker import StoreDirectory, init_store, open_store
from ckptd.store.shards import ShardStore
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport, Message

_A = TypeVar("_A", bound=Message)
_T = TypeVar("_T")

TIME = "2026-01-02T03:04:05Z"
GRACE_S = 60.0
WORKERS = ("pi1", "pi2", "pi3")


class _Unflushed(OperatingSystem):
    """What is flushed when is tested elsewhere, and takes time."""

    def fsync(self, descriptor: int) -> None:
        pass

    def fsync_directory(self, path: str) -> None:
        pass


@functools.cache
def _pki() -> Path:
    """The certificates of all small clusters: making them takes longer than most tests."""
    pki = make_pki(Path(tempfile.mkdtemp(prefix="ckptd-pki-")) / "pki", *WORKERS)
    atexit.register(shutil.rmtree, pki.parent)
    issue(pki, [Role.COORDINATOR], "mac")
    return pki


class ManualClock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.wall = 1_800_000_000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.wall

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        self.wall += seconds


class Place:
    """One node. `heard` is when it last exchanged all documents with each other node."""

    def __init__(self, cluster: SmallCluster, node: str, *, keeps_shards: bool) -> None:
        self.node = node
        self._cluster = cluster
        path = str(cluster.path / node)
        init_store(path, store_id="0" * 32)
        self._directory: StoreDirectory = open_store(path, filesystem=_Unflushed())
        self._keeps_shards = keeps_shards
        self.heard: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        clock = self._cluster.clock
        self.shards = ShardStore(self._directory, reserve=0, clock=clock.monotonic_s)
        self.records = Records(
            DocumentFiles(self._directory),
            cluster=CLUSTER,
            ca=self._cluster.ca,
            shards=self.shards if self._keeps_shards else None,
        )
        self.records.load()
        self.requests = Requests(
            records=self.records,
            shards=self.shards if self._keeps_shards else None,
            metrics=Metrics(CollectorRegistry(), version="0"),
            status=self._status,
        )
        self.collector = Collector(
            records=self.records,
            shards=self.shards if self._keeps_shards else None,
            confirmation=self.confirmation(),
            others=lambda: set(WORKERS) - {self.node},
            heard_s=self.heard.get,
            grace_s=GRACE_S,
            clock=clock,
            on_disk=on_disk,
            rng=random.Random(1),
        )

    def restart(self) -> None:
        """A new process on the same disk."""
        self.close()
        self._directory = open_store(self._directory.path, filesystem=_Unflushed())
        self.heard.clear()
        self.start()

    def confirmation(self, *, copies: int = 2) -> Confirmation:
        inventories = Inventories(
            node_id=self.node,
            network=self._cluster,
            records=self.records,
            shards=self.shards if self._keeps_shards else None,
            copies=copies,
            on_disk=on_disk,
            clock=self._cluster.clock,
        )
        return Confirmation(inventories, self._cluster.standings, on_disk)

    def _status(self) -> messages.NodeStatus:
        skew_s = self._cluster.skew_s.get(self.node, 0.0)
        return messages.NodeStatus(
            node=self.node,
            state="up",
            bytes_total=0,
            bytes_used=0,
            bytes_free=0,
            write_bytes_per_s=0.0,
            queued_bytes=0,
            shards=len(self.shards),
            quarantined=0,
            documents=len(self.records.catalogue),
            unknown_documents=0,
            documents_digest=self.records.digest(),
            highest_order=self.records.catalogue.highest_order,
            software="0",
            clock_ms=int((self._cluster.clock.wall + skew_s) * 1000),
            uptime_s=0.0,
        )

    def put(self, data: bytes) -> None:
        incoming = self.shards.begin(hashlib.sha256(data).digest(), len(data))
        incoming.write(memoryview(data))
        incoming.commit()

    def has(self, data: bytes) -> bool:
        return self.shards.has(hashlib.sha256(data).digest())

    def collect(self) -> str:
        """One slice of garbage collection; what it waits for."""
        self._cluster.run(self.collector.step())
        return self.collector.progress().last_error

    def hear(self, *others: str) -> None:
        """An exchange of all documents with these nodes, begun now."""
        for other in others or set(WORKERS) - {self.node}:
            self.heard[other] = self._cluster.clock.now_s

    def close(self) -> None:
        self.requests.close()
        self._directory.close()


def on_disk(work: Callable[[], _T]) -> Awaitable[_T]:
    async def done() -> _T:
        return work()

    return done()


class SmallCluster:
    """The nodes, and the network between them. `down` are nodes that do not answer, `silent` those
    of which nobody has noticed it yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = ManualClock()
        self.skew_s: dict[str, float] = {}
        self.down: set[str] = set()
        self.draining: set[str] = set()
        self.silent: set[str] = set()
        self.asked: list[tuple[str, Message]] = []
        pki = _pki()
        self.ca = load_ca((pki / "ca.pem").read_bytes())
        self.client = signer_of(pki, "client")
        self.coordinator = signer_of(pki, "mac")
        self._order = 0
        self.places: dict[str, Place] = {}
        for node in WORKERS:
            self.places[node] = Place(self, node, keeps_shards=True)
        self.mac = self.places["mac"] = Place(self, "mac", keeps_shards=False)

    def __getitem__(self, node: str) -> Place:
        return self.places[node]

    def up(self) -> list[str]:
        return [node for node in WORKERS if node not in self.down]

    def standings(self) -> Standings:
        return {
            node: Standing(
                node=node,
                roles=frozenset({"worker" if node in WORKERS else "coordinator"}),
                absent_s=1.0 if node in self.down else None,
                draining=node in self.draining,
            )
            for node in self.places
        }

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run(work)

    async def request(
        self,
        node: str,
        message: Message,
        answer: type[_A],
        *,
        payload: bytes = b"",
        timeout_s: float,
    ) -> tuple[_A, bytes]:
        self.asked.append((node, message))
        if node in self.down | self.silent:
            raise PeerUnreachable(node, "does not answer")
        identity = Identity(CLUSTER, frozenset({Role.COORDINATOR}), "mac", "00" * 20)
        told, out = await self.places[node].requests.answer(
            identity, message, memoryview(payload), lambda _: None
        )
        assert isinstance(told, answer)
        return told, bytes(out)

    async def push(
        self, shard: bytes, size: int, target: str, *, rate_bytes_per_s: float | None = None
    ) -> CopyReport:
        raise AssertionError("nothing is pushed")

    # -- documents

    def next_order(self) -> int:
        self._order = 1 + max(
            [
                self._order,
                *(place.records.catalogue.highest_order for place in self.places.values()),
            ]
        )
        return self._order

    def write(self, raw: bytes, nodes: Sequence[str] = (*WORKERS, "mac")) -> str:
        signature = self.client.sign(raw)
        for node in nodes:
            self.places[node].records.put(raw, signature)
        return documents.document_id(raw)

    def store(
        self,
        name: str,
        *pieces: bytes,
        on: Sequence[str] = ("pi1", "pi2"),
        manifest_on: Sequence[str] = (*WORKERS, "mac"),
        created: str = TIME,
        metrics: dict[str, float] | None = None,
        copies: int = 2,
    ) -> str:
        """Stores shards with these bytes on the nodes `on`, and then the manifest."""
        for node in on:
            for piece in pieces:
                self.places[node].put(piece)
        raw = self.manifest(name, *pieces, created=created, metrics=metrics, copies=copies)
        return self.write(raw, manifest_on)

    def manifest(
        self,
        name: str,
        *pieces: bytes,
        created: str = TIME,
        metrics: dict[str, float] | None = None,
        copies: int = 2,
    ) -> bytes:
        distinct = list(dict.fromkeys(pieces))
        whole = b"".join(pieces)
        entry = FileEntry(
            path="model.safetensors",
            mode=0o644,
            size=len(whole),
            sha256=hashlib.sha256(whole).hexdigest(),
            parts=tuple(Part(distinct.index(piece), 0, len(piece)) for piece in pieces),
        )
        return documents.encode(
            Manifest(
                format=1,
                cluster=CLUSTER,
                name=name,
                order=self.next_order(),
                created=created,
                host="mac",
                nonce=f"{self._order:032x}",
                unit="directory",
                content_id=documents.content_id((entry,)),
                copies=copies,
                redundancy="copies",
                mode=0o755,
                entries=(entry,),
                shards=tuple(
                    ShardReference(hashlib.sha256(piece).hexdigest(), len(piece))
                    for piece in distinct
                ),
                metrics=metrics or {},
            )
        )

    def remove(self, *versions: str, nodes: Sequence[str] = (*WORKERS, "mac")) -> str:
        return self.write(self._tombstone(versions), nodes)

    def drop(self, *versions: str, by: str, nodes: Sequence[str] = (*WORKERS, "mac")) -> None:
        """A tombstone of a coordinator's policy."""
        raw = self._tombstone(versions, by)
        signature = self.coordinator.sign(raw)
        for node in nodes:
            self.places[node].records.put(raw, signature)

    def _tombstone(self, versions: Sequence[str], by: str | None = None) -> bytes:
        return documents.encode(
            Tombstone(
                format=1,
                cluster=CLUSTER,
                order=self.next_order(),
                created=TIME,
                nonce=f"{self._order:032x}",
                reason="rm" if by is None else "retention",
                versions=tuple(versions),
                justified_by=by,
            )
        )

    def pin(self, version: str) -> str:
        return self.write(
            documents.encode(
                Pin(
                    format=1,
                    cluster=CLUSTER,
                    order=self.next_order(),
                    created=TIME,
                    nonce=f"{self._order:032x}",
                    version=version,
                )
            )
        )

    def retention(
        self, *rules: RetentionRule, is_steward: Callable[[], bool] = lambda: True
    ) -> Retention:
        """The job of the coordinator."""
        return Retention(
            cluster=CLUSTER,
            rules=rules,
            records=self.mac.records,
            signer=self.coordinator,
            network=self,
            confirmation=self.mac.confirmation(),
            workers=self.up,
            is_steward=is_steward,
            clock=self.clock,
            on_disk=on_disk,
            rng=random.Random(2),
        )

    def live(self, node: str = "pi1") -> list[VersionHeader]:
        """Live versions as a node knows them, oldest first."""
        return self.places[node].records.catalogue.live_versions()[::-1]

    def fate(self, version: str, node: str = "pi1") -> Fate | None:
        return self.places[node].records.census(self.clock.monotonic_s).dead.get(version)

    def close(self) -> None:
        for place in self.places.values():
            place.close()


@contextlib.contextmanager
def small_cluster(path: Path) -> Iterator[SmallCluster]:
    """A cluster that is closed at the end."""
    cluster = SmallCluster(path)
    try:
        yield cluster
    finally:
        cluster.close()
