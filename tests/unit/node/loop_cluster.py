"""Workers with real catalogues, stores, handlers and jobs on one loop of virtual time.

Replaced are sockets, threads and the clock: a request goes straight to the other node's handler, a
push from store to store. So a test sees what the jobs do together, in the order that it wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from prometheus_client import CollectorRegistry

from ckptd.client.pki import init_cluster, issue
from ckptd.config import Config, RepairConfig, ReplicationConfig, ScrubConfig, TlsConfig
from ckptd.core import documents
from ckptd.core.documents import FileEntry, Manifest, Part, ShardReference
from ckptd.core.identity import Role, load_ca
from ckptd.core.permissions import may
from ckptd.core.signing import Signer
from ckptd.core.steward import Standing, Standings
from ckptd.errors import CkptdError, NotAuthorized, PeerRefused, PeerUnreachable
from ckptd.node.inventories import Inventories
from ckptd.node.records import Records
from ckptd.node.requests import _ACTIONS, Requests
from ckptd.node.upkeep import Upkeep
from ckptd.observe.metrics import Metrics
from ckptd.store.documents import DocumentFiles
from ckptd.store.marker import StoreDirectory, init_store, open_store
from ckptd.store.shards import ShardStore
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport, Message

_T = TypeVar("_T")
_A = TypeVar("_A", bound=Message)

CLUSTER = "home"
EPOCH_S = 1_750_000_000.0
SIZE = 64
NODES = ("a", "b", "c", "d")


class LoopClock:
    """The loop's time; `jump_s` sets the wall clock off."""

    def __init__(self) -> None:
        self.jump_s = 0.0

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        return EPOCH_S + self.monotonic_s() + self.jump_s


class _InlineRequests(Requests):
    async def on_disk(self, work: Callable[[], _T]) -> _T:
        return work()


class LoopNode:
    """One worker. `capacity_bytes` is what its disk can take."""

    def __init__(self, world: LoopCluster, node_id: str, directory: Path, zone: str) -> None:
        self.world = world
        self.id = node_id
        self.zone = zone
        self.path = directory / node_id
        self.capacity_bytes = 10**9
        self.up = True
        self.failed = False
        self.draining = False
        self.clock = LoopClock()
        self.metrics = Metrics(CollectorRegistry(), version="0")
        self._directory: StoreDirectory | None = None
        self.wipe()

    def wipe(self) -> None:
        """An empty store, as on a new card."""
        self.path = self.path.with_name(self.path.name + "+")
        init_store(
            str(self.path), store_id=hashlib.sha256(str(self.path).encode()).hexdigest()[:32]
        )
        self.restart()

    def restart(self) -> None:
        """What is in memory is lost."""
        if self._directory is not None:
            self._directory.close()
        self._directory = open_store(str(self.path))
        self.started_s = self.clock.monotonic_s()
        self.shards = ShardStore(self._directory, reserve=0, clock=self.clock.monotonic_s)
        self.records = Records(
            DocumentFiles(self._directory),
            cluster=CLUSTER,
            ca=self.world.pki.ca,
            shards=self.shards,
        )
        self.records.load()
        world = self.world
        self.network = _Network(world, self)
        self.requests = _InlineRequests(
            records=self.records, shards=self.shards, metrics=self.metrics, status=self.status
        )
        upkeep = Upkeep(
            node_id=self.id,
            config=world.whole_config(),
            records=self.records,
            shards=self.shards,
            inventories=Inventories(
                node_id=self.id,
                network=self.network,
                records=self.records,
                shards=self.shards,
                copies=world.copies,
                on_disk=_inline,
                clock=self.clock,
            ),
            standings=lambda: world.standings(self),
            status=self.status,
            suspect=self.requests.suspect,
            network=self.network,
            metrics=self.metrics,
            on_disk=_inline,
            clock=self.clock,
        )
        self.jobs = {job.name: job for job in upkeep.jobs}
        self.repairer, self.trimmer = upkeep.repairer, upkeep.trimmer
        self.of_nodes = upkeep.handlers

    def status(self) -> messages.NodeStatus:
        used = self.shards.room().bytes_used
        return messages.NodeStatus(
            node=self.id,
            state="failed" if self.failed else "up",
            bytes_total=self.capacity_bytes,
            bytes_used=used,
            bytes_free=max(0, self.capacity_bytes - used),
            write_bytes_per_s=1e6,
            queued_bytes=0,
            shards=len(self.shards),
            quarantined=sum(not file.suffix for file in self.shards.quarantined()),
            documents=len(self.records.catalogue),
            unknown_documents=0,
            documents_digest=self.records.digest(),
            highest_order=0,
            software="0",
            clock_ms=0,
            uptime_s=self.clock.monotonic_s() - self.started_s,
        )

    def put(self, data: bytes) -> bytes:
        """Stores a shard; its digest."""
        digest = hashlib.sha256(data).digest()
        incoming = self.shards.begin(digest, len(data))
        incoming.write(memoryview(data))
        incoming.commit()
        return digest

    def rot(self, data: bytes) -> None:
        """Changes a byte of a copy, behind the node's back."""
        name = hashlib.sha256(data).hexdigest()
        (self.path / "shards" / name[:2] / name).write_bytes(b"!" + data[1:])

    async def run_jobs(self) -> None:
        async with asyncio.TaskGroup() as group:
            for name in self.jobs:
                group.create_task(self._run(name))

    async def _run(self, name: str) -> None:
        while True:
            job = self.jobs[name]  # another one after a restart
            await asyncio.sleep(await job.step() if self.up else 1.0)
            await asyncio.sleep(0.01)


class _Network:
    def __init__(self, world: LoopCluster, own: LoopNode) -> None:
        self._world = world
        self._own = own

    async def request(
        self,
        node: str,
        message: Message,
        answer: type[_A],
        *,
        payload: bytes = b"",
        timeout_s: float,
    ) -> tuple[_A, bytes]:
        await asyncio.sleep(self._world.delay_s)
        other = self._world.nodes[node]
        self._world.asked.append((self._own.id, node, message))
        if not other.up or not self._own.up or node in self._world.mute:
            raise PeerUnreachable(node, "is down")
        if not may({Role.WORKER}, _ACTIONS[type(message)]):
            raise NotAuthorized(f"a worker may not ask {message}")
        try:
            if (of_node := other.of_nodes.get(type(message))) is not None:
                reply, _ = await of_node(self._own.id, message, lambda _: None)
            else:
                handler = other.requests._handlers[type(message)]
                reply, _ = await handler(message, payload, lambda _: None)
        except CkptdError as error:
            raise PeerRefused(node, error.kind, error.message) from error
        assert isinstance(reply, answer)
        return reply, b""

    async def push(
        self, shard: bytes, size: int, target: str, *, rate_bytes_per_s: float | None = None
    ) -> CopyReport:
        assert rate_bytes_per_s is not None
        await asyncio.sleep(size / rate_bytes_per_s + self._world.slow_s.get(target, 0.0))
        other = self._world.nodes[target]
        if not other.up or not self._own.up:
            raise PeerUnreachable(target, "is down")
        with self._own.shards.open_read(shard) as source:
            buffer = bytearray(size)
            source.read_into(memoryview(buffer), 0)
        if hashlib.sha256(buffer).digest() != shard:
            return CopyReport(target, "failed", size, "shard_corrupt", "bad bytes")
        if other.shards.has(shard, size):
            return CopyReport(target, "present", size)
        if self._world.refuse_copies_on == target:
            return CopyReport(target, "failed", 0, "no_room", "full")
        other.put(bytes(buffer))
        self._world.moved.append((self._own.id, target, shard))
        return CopyReport(target, "durable", size)


async def _inline(work: Callable[[], _T]) -> _T:
    return work()


class Pki:
    """A CA and one signer that may write manifests."""

    def __init__(self, directory: Path) -> None:
        init_cluster(directory, CLUSTER)
        files = issue(directory, [Role.COORDINATOR], "mac")
        self.ca = load_ca((directory / "ca.pem").read_bytes())
        self.signer = Signer.from_pem(files.cert.read_bytes(), files.key.read_bytes())


class LoopCluster:
    """All nodes, and what is between them. `moved` are the copies that were made, as (from, to,
    shard); `asked` all requests."""

    def __init__(
        self,
        pki: Pki,
        directory: Path,
        *,
        nodes: Iterable[str] = NODES,
        zones: str = "",
        config: RepairConfig | None = None,
        copies: int = 2,
    ) -> None:
        self.pki = pki
        self.copies = copies
        self.config = config or RepairConfig(after_s=60.0, rate_bytes_per_s=10_000, promise_s=30.0)
        self.moved: list[tuple[str, str, bytes]] = []
        self.asked: list[tuple[str, str, Message]] = []
        self.mute: set[str] = set()
        self.slow_s: dict[str, float] = {}  # by node, for each copy that it gets
        self.refuse_copies_on = ""
        self.boot_ids: dict[str, str] = {}
        self.delay_s = 0.001
        self.maintenance_s: dict[str, float] = {}
        self._left_s: dict[str, float] = {}
        self._orders = 0
        self.nodes: dict[str, LoopNode] = {}
        names = list(nodes)
        for index, name in enumerate(names):
            self.nodes[name] = LoopNode(self, name, directory, zones[index] if zones else "")

    def whole_config(self) -> Config:
        return Config(
            cluster=CLUSTER,
            tls=TlsConfig(ca=Path("ca"), cert=Path("cert"), key=Path("key")),
            replication=ReplicationConfig(copies=self.copies),
            repair=self.config,
            scrub=ScrubConfig(interval_s=86_400.0),
        )

    # -- what happens

    def kill(self, node: str) -> None:
        self.nodes[node].up = False
        self._left_s[node] = self.now_s

    def start(self, node: str) -> None:
        """Comes back with what is on its disk, and gets the documents that it missed."""
        self.nodes[node].restart()
        self.nodes[node].up = True
        del self._left_s[node]
        self.share_documents()

    def share_documents(self) -> None:
        """What anti-entropy does."""
        for one in self.nodes.values():
            for document_id in one.records.catalogue.ids():
                signed = one.records.get(document_id)
                assert signed is not None
                for other in self.nodes.values():
                    if other.up and other is not one:
                        other.records.put(*signed)

    def store(
        self, holders: Iterable[str], *, name: str = "run/x", copies: int = 2, age_s: float = 3600.0
    ) -> tuple[str, list[bytes]]:
        """A version with one shard for each text of `holders`, which names the nodes that get it;
        its id and the shards' bytes. All nodes that are up get the manifest."""
        self._orders += 1
        datas = []
        for index, on in enumerate(holders):
            data = f"{name} {self._orders} {index}".encode().ljust(SIZE, b".")
            datas.append(data)
            for node in on:
                self.nodes[node].put(data)
        return self.manifest(datas, name=name, copies=copies, age_s=age_s), datas

    def manifest(
        self, datas: list[bytes], *, name: str = "run/x", copies: int = 2, age_s: float = 3600.0
    ) -> str:
        """A version of these shards, known to all nodes that are up."""
        self._orders += 1
        raw = documents.encode(self._manifest(datas, name, copies, age_s))
        signature = self.pki.signer.sign(raw)
        for node in self.nodes.values():
            if node.up:
                node.records.put(raw, signature)
        return documents.document_id(raw)

    def _manifest(self, datas: list[bytes], name: str, copies: int, age_s: float) -> Manifest:
        whole = b"".join(datas)
        entry = FileEntry(
            path="w.bin",
            mode=0o644,
            size=len(whole),
            sha256=hashlib.sha256(whole).hexdigest(),
            parts=tuple(Part(index, 0, len(data)) for index, data in enumerate(datas)),
        )
        return Manifest(
            format=1,
            cluster=CLUSTER,
            name=name,
            order=int((EPOCH_S + self.now_s - age_s) * 1000) + self._orders,
            created="2026-01-02T03:04:05Z",
            host="mac",
            nonce=f"{self._orders:032x}",
            unit="directory",
            content_id=documents.content_id((entry,)),
            copies=copies,
            redundancy="copies",
            mode=0o755,
            entries=(entry,),
            shards=tuple(
                ShardReference(hashlib.sha256(data).hexdigest(), len(data)) for data in datas
            ),
        )

    def remove(self, version: str) -> None:
        """What `ckptd rm` writes."""
        raw = documents.encode(
            documents.Tombstone(
                format=1,
                cluster=CLUSTER,
                order=int((EPOCH_S + self.now_s) * 1000),
                created="2026-01-02T03:04:05Z",
                nonce="0" * 32,
                reason="retention",
                versions=(version,),
                justified_by="f" * 64,
            )
        )
        signature = self.pki.signer.sign(raw)
        for node in self.nodes.values():
            if node.up:
                node.records.put(raw, signature)

    # -- what is seen

    @property
    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def standings(self, _: LoopNode) -> Standings:
        return {
            name: Standing(
                node=name,
                roles=frozenset({"worker"}),
                absent_s=self.now_s - self._left_s[name] if name in self._left_s else None,
                draining=node.draining,
                maintenance_s=self.maintenance_s.get(name, 0.0),
                zone=node.zone,
                boot_id=self.boot_ids.get(name, ""),
            )
            for name, node in self.nodes.items()
        }

    def holders(self, data: bytes) -> str:
        """The nodes that have a copy, those that are down included."""
        digest = hashlib.sha256(data).digest()
        return "".join(name for name, node in self.nodes.items() if node.shards.has(digest))

    async def run(self, seconds: float) -> None:
        """Lets all jobs of all nodes run for some time."""
        async with self._running():
            await asyncio.sleep(seconds)

    async def until(self, what: Callable[[], bool], within_s: float) -> float:
        """Lets all run until `what` holds; after how many seconds that was."""
        began_s = self.now_s
        async with self._running():
            while not what():
                assert self.now_s - began_s < within_s, "not within the time"
                await asyncio.sleep(0.5)
        return self.now_s - began_s

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(node.run_jobs()) for node in self.nodes.values()]
        try:
            yield
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class RunInCluster(Protocol):
    """Runs a test's body with a new cluster of these settings on virtual time."""

    def __call__(self, body: Callable[[LoopCluster], Awaitable[None]], **settings: Any) -> None: ...
