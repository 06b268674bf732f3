"""Storing a checkpoint: cut, hash, send what is missing, publish the manifest, count the copies.

Hashing and sending overlap. Shards that enough nodes have are only touched. The version exists once
its manifest is on the nodes, and is protected once their bitmaps show every copy.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import structlog

from ckptd.client.cluster import Cluster
from ckptd.client.commit import Commit
from ckptd.client.documents import check_claims, stamp
from ckptd.client.hashing import BytesReader, HashedShard, PieceReader, SourceHasher
from ckptd.client.manifest_entries import entries_of, shards_of
from ckptd.client.progress import Progress
from ckptd.client.room import check_room
from ckptd.client.source import Source, scan
from ckptd.client.transfers import Shard, Transfers
from ckptd.core import documents, limits, tensor_index
from ckptd.core.catalogue import Catalogue, VersionHeader
from ckptd.core.cutting import cut
from ckptd.core.documents import Manifest, ShardReference
from ckptd.core.names import check_name
from ckptd.errors import (
    CkptdError,
    NotFound,
    SourceChanged,
    SourceRefused,
)
from ckptd.wire import messages

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class StoreResult:
    """What a store did. Sizes in bytes; `copies` is the smallest number of any shard, `content_id`
    says what was stored whatever it is called."""

    name: str
    version: str
    state: Literal["protected", "degraded"]
    bytes: int
    bytes_sent: int
    bytes_written: int
    shards: int
    shards_deduplicated: int
    copies: int
    seconds: float
    content_id: str
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """As `ckptd store --json` prints it."""
        return {field: getattr(self, field) for field in self.__dataclass_fields__}


async def store(
    cluster: Cluster,
    path: Path,
    *,
    name: str,
    copies: int | None = None,
    as_is: bool = False,
    progress: Progress | None = None,
) -> StoreResult:
    """Stores what lies at `path` as the newest version of `name`, and waits for its copies.

    `copies` (default: the cluster's setting) are wanted of each shard. The state is `degraded`
    when there are not enough nodes for them. Content equal to the newest version completes that
    version and returns it. Raises SourceRefused, SourceChanged, NoRoom, NotEnoughNodes.
    """
    check_name(name)
    source = await asyncio.to_thread(scan, path, as_is=as_is)
    return await store_source(cluster, source, name=name, copies=copies, progress=progress)


async def store_source(
    cluster: Cluster,
    source: Source,
    *,
    name: str,
    copies: int | None = None,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> StoreResult:
    """As `store`, of a source that was scanned before. `step` and `metrics` (finite numbers) are
    what the training says of it; they make no new version of equal content."""
    told = Told(step, dict(metrics or {}))
    return await _Store(cluster, source, name, copies, told, progress or Progress()).run()


class Told(NamedTuple):
    """What a training says of a checkpoint."""

    step: int | None
    metrics: dict[str, float]


class _Store:
    def __init__(
        self,
        cluster: Cluster,
        source: Source,
        name: str,
        copies: int | None,
        told: Told,
        progress: Progress,
    ) -> None:
        self._cluster = cluster
        self._source = source
        self._name = check_name(name)
        # Fewer than the cluster's setting are never enough: its states count by the larger one.
        self._copies = max(copies or 0, cluster.config.replication.copies)
        self._told = told
        self._progress = progress
        self._shards: dict[bytes, Shard] = {}  # in the order of the manifest
        self._placed: list[HashedShard] = []
        self._deduplicated = 0
        self._ahead = threading.Semaphore(limits.SHARDS_AHEAD_MAX)
        self._over = threading.Event()

    async def run(self) -> StoreResult:
        started_s = time.monotonic()
        cluster = self._cluster
        catalogue = await cluster.catalogue()
        await check_claims(cluster, catalogue, time.time_ns() // 1_000_000)
        source = self._source
        for warning in source.warnings:
            self._progress.note(warning)
        await check_room(cluster, source, self._copies, self._progress)
        self._progress.total(source.size)
        self._transfers = Transfers(cluster, self._copies, self._progress)
        touching = asyncio.create_task(self._touch(), name="touch")
        try:
            hashes = await self._send_shards(source)
            await asyncio.to_thread(source.check)
            manifest, raw = await self._manifest(catalogue, source, hashes)
            reached = await Commit(
                cluster, self._transfers, self._shards, name=self._name, copies=self._copies
            ).run(manifest, raw)
        except BaseExceptionGroup as group:
            raise _cause(group) from group
        finally:
            touching.cancel()
            await asyncio.gather(touching, return_exceptions=True)
            # No thread may wait any more when an error or Ctrl-C ends the store.
            await asyncio.to_thread(self._transfers.close)
        return StoreResult(
            name=self._name,
            version=documents.document_id(raw),
            state="protected" if reached >= self._copies else "degraded",
            bytes=source.size,
            bytes_sent=self._transfers.bytes_sent,
            bytes_written=self._transfers.bytes_written,
            shards=len(manifest.shards),
            shards_deduplicated=self._deduplicated,
            copies=reached,
            seconds=time.monotonic() - started_s,
            content_id=manifest.content_id,
            warnings=tuple(source.warnings),
        )

    _transfers: Transfers

    async def _touch(self) -> None:
        """Tells the nodes again and again that the shards of this store are wanted: it may take
        longer than their grace, and no manifest names them before its end."""
        while True:
            await asyncio.sleep(self._cluster.config.gc.grace_s / limits.TOUCHES_PER_GRACE)
            if shards := list(self._shards):
                await self._cluster.holders(shards, touch=True)

    # -- shards

    async def _send_shards(self, source: Source) -> list[str]:
        """Hashes the source and brings each shard to its nodes; the files' hashes."""
        hasher = SourceHasher(source)
        hashed: asyncio.Queue[HashedShard | None] = asyncio.Queue()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hash(hasher, source, hashed), name="hash")
            async for batch in _batches(hashed):
                await self._place(source, batch, group)
            index = self._tensor_index(source)
            if index is not None:
                await self._consider([index], group)
        return hasher.file_hashes()

    async def _hash(
        self, hasher: SourceHasher, source: Source, hashed: asyncio.Queue[HashedShard | None]
    ) -> None:
        """Hashes in a thread, at most so far ahead of sending that the bytes are still cached; and
        looks at fresh files once more while the last shards are on their way."""
        loop = asyncio.get_running_loop()
        plans = cut(source.to_cut(), self._cluster.config.replication.shard_size_bytes)

        def work() -> None:
            for shard in hasher.shards(plans):
                self._ahead.acquire()
                if self._over.is_set():
                    return
                loop.call_soon_threadsafe(hashed.put_nowait, shard)
            for _ in range(limits.SHARDS_AHEAD_MAX - limits.SHARDS_LEFT_AT_LAST_LOOK):
                self._ahead.acquire()
                if self._over.is_set():
                    return
            try:
                hasher.check_fresh(self._over)
            except SourceChanged:
                if not self._over.is_set():
                    raise

        thread = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            await asyncio.shield(thread)
        finally:
            # Cancelled or not, the thread ends before the source is let go.
            self._over.set()
            self._ahead.release()
            await asyncio.wait([thread])
        hashed.put_nowait(None)

    async def _place(
        self, source: Source, batch: list[HashedShard], group: asyncio.TaskGroup
    ) -> None:
        self._placed.extend(batch)
        fresh: dict[bytes, Shard] = {}
        for hashed in batch:
            if hashed.digest in self._shards or hashed.digest in fresh:
                self._deduplicated += 1
                self._settled(hashed.size)
                continue
            content = partial(PieceReader, source, hashed)
            fresh[hashed.digest] = Shard(hashed.digest, hashed.size, content)
        await self._consider(list(fresh.values()), group)

    def _settled(self, size: int) -> None:
        """A shard of `size` bytes needs no more work: hashing may go on, and progress shows."""
        self._ahead.release()
        self._progress.advance(size)

    def _tensor_index(self, source: Source) -> Shard | None:
        if not source.tensors:
            return None
        content = tensor_index.encode(source.tensors)
        if len(content) > limits.SHARD_SIZE_MAX_BYTES:
            raise SourceRefused(f"{source.root}: the index of its tensors is too large")
        digest = hashlib.sha256(content).digest()
        self._index_digest = digest
        return Shard(digest, len(content), partial(BytesReader, content))

    _index_digest: bytes | None = None

    async def _consider(self, shards: list[Shard], group: asyncio.TaskGroup) -> None:
        """Asks who has these shards, and starts to send those that lack copies."""
        if not shards:
            return
        for shard in shards:
            self._shards.setdefault(shard.digest, shard)
        holders = await self._cluster.holders([shard.digest for shard in shards], touch=True)
        await self._trust(shards, holders)
        for shard in shards:
            if self._transfers.distinct(shard.holders) >= self._copies:
                self._deduplicated += 1
                self._settled(shard.size)
            else:
                group.create_task(self._protect(shard), name=shard.digest.hex())

    async def _protect(self, shard: Shard) -> None:
        try:
            await self._transfers.protect(shard)
        finally:
            self._settled(shard.size)
        if not shard.holders:
            raise self._transfers.why_nowhere(shard)

    async def _trust(self, shards: list[Shard], holders: list[dict[str, float]]) -> None:
        """Counts the copies that were hashed lately; the others are hashed on their nodes now."""
        oldest_s = self._cluster.config.scrub.interval_s
        doubtful: dict[str, list[Shard]] = {}
        for shard, ages in zip(shards, holders, strict=True):
            for node, age_s in ages.items():
                if 0 <= age_s <= oldest_s:
                    shard.holders.add(node)
                else:
                    doubtful.setdefault(node, []).append(shard)
        if doubtful:
            await asyncio.gather(*(self._verify(node, list_) for node, list_ in doubtful.items()))

    async def _verify(self, node_id: str, shards: list[Shard]) -> None:
        node = self._cluster.nodes.get(node_id)
        if node is None:
            return
        try:
            for start in range(0, len(shards), limits.SHARDS_PER_VERIFY):
                batch = shards[start : start + limits.SHARDS_PER_VERIFY]
                reply, _ = await node.control.request(
                    messages.Verify(tuple(shard.digest for shard in batch)), messages.VerifyReply
                )
                for shard, result in zip(batch, reply.results, strict=False):
                    if result == "ok":
                        shard.holders.add(node_id)
        except CkptdError as error:
            self._cluster.lose(node, error)

    # -- the manifest

    async def _manifest(
        self, catalogue: Catalogue, source: Source, hashes: list[str]
    ) -> tuple[Manifest, bytes]:
        """The manifest of this content, and its canonical bytes: that of the newest version when
        its content is the same."""
        references = tuple(
            ShardReference(shard.digest.hex(), shard.size) for shard in self._shards.values()
        )
        entries = entries_of(source, hashes, self._placed, list(self._shards))
        content_id = documents.content_id(entries)
        newest = catalogue.newest(self._name)
        if newest is not None and newest.content_id == content_id:
            same = await self._same_version(newest, source)
            if same is not None:
                return same
        manifest = Manifest(
            **await stamp(self._cluster, catalogue),
            name=self._name,
            host=socket.gethostname()[:255],
            unit="file" if source.unit == "file" else "directory",
            content_id=content_id,
            copies=self._copies,
            redundancy="copies",
            mode=source.mode,
            entries=entries,
            shards=references,
            tensor_index=self._index_of(references),
            step=self._told.step,
            metrics=self._told.metrics,
        )
        raw = documents.encode(manifest)
        if len(raw) > limits.DOCUMENT_MAX_BYTES:
            raise SourceRefused(
                f"{source.root} has too many files for one checkpoint: its manifest would have "
                f"{len(raw)} bytes",
                next="store its sub-directories one by one",
            )
        return manifest, raw

    async def _same_version(
        self, newest: VersionHeader, source: Source
    ) -> tuple[Manifest, bytes] | None:
        """The newest version again, if it is what was told of it. It may be cut in another way
        (with another shard size): then its own shards are completed."""
        try:
            signed = await self._cluster.signed(newest.id)
        except NotFound:
            return None
        manifest = self._cluster.admit(signed)[1]
        # Only what its document says counts: one that is old, or of another name or content, could
        # be told of as the newest, and nothing would be stored.
        if not isinstance(manifest, Manifest):
            return None
        told = (newest.name, newest.order, newest.content_id)
        if told != (manifest.name, manifest.order, manifest.content_id):
            return None
        if manifest.copies > self._copies:  # it was stored with more: they stay wanted
            self._copies = manifest.copies
            self._transfers.want(manifest.copies)
        digests = [bytes.fromhex(reference.shard) for reference in manifest.shards]
        if set(digests) == self._shards.keys():
            return manifest, signed.document
        shards: dict[bytes, Shard] = {}
        for digest, hashed in zip(digests, shards_of(manifest, source), strict=True):
            if hashed is not None:
                shards[digest] = Shard(digest, hashed.size, partial(PieceReader, source, hashed))
            elif digest == self._index_digest:
                shards[digest] = self._shards[digest]
            else:
                return None
        self._shards = shards
        async with asyncio.TaskGroup() as group:
            await self._consider(list(shards.values()), group)
        return manifest, signed.document

    def _index_of(self, references: tuple[ShardReference, ...]) -> int | None:
        if self._index_digest is None:
            return None
        wanted = self._index_digest.hex()
        return next(i for i, reference in enumerate(references) if reference.shard == wanted)


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error to show of those that ended tasks together: what we did not expect first,
    then what is wrong with the source, because that explains the others."""
    errors: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            errors.append(error)
    expected = (SourceChanged, SourceRefused, CkptdError)

    def weight(error: BaseException) -> int:
        return next((n for n, kind in enumerate(expected) if isinstance(error, kind)), -1)

    return min(errors, key=weight)


async def _batches(
    hashed: asyncio.Queue[HashedShard | None],
) -> AsyncIterator[list[HashedShard]]:
    """What has been hashed meanwhile, all at once: one question to the nodes for many shards."""
    while (shard := await hashed.get()) is not None:
        batch = [shard]
        while not hashed.empty():
            if (shard := hashed.get_nowait()) is None:
                yield batch
                return
            batch.append(shard)
        yield batch
