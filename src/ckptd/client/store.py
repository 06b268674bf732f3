"""Storing a checkpoint: cut, hash, send what is missing, publish the manifest, count the copies.

Hashing and sending overlap. Shards that enough nodes have are only touched. The version exists once
its manifest is on the nodes, and is protected once their bitmaps show every copy.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import structlog

from ckptd.client.cluster import Cluster
from ckptd.client.documents import next_order, publish
from ckptd.client.hashing import BytesReader, HashedShard, PieceReader, SourceHasher, hash_file
from ckptd.client.progress import Progress
from ckptd.client.source import Source, scan
from ckptd.client.transfers import Shard, Transfers
from ckptd.core import bitmaps, documents, limits, tensor_index
from ckptd.core.catalogue import Catalogue
from ckptd.core.copysets import attainable_room
from ckptd.core.cutting import cut
from ckptd.core.documents import Entry, FileEntry, Manifest, Part, ShardReference
from ckptd.core.names import check_name, path_to_json
from ckptd.errors import (
    CkptdError,
    NoRoom,
    NotEnoughNodes,
    NotFound,
    SourceChanged,
    SourceRefused,
)
from ckptd.wire import messages

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class StoreResult:
    """What a store did. Sizes in bytes; `copies` is the smallest number of any shard."""

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
    return await _Store(cluster, path, name, copies, as_is, progress or Progress()).run()


class _Store:
    def __init__(
        self,
        cluster: Cluster,
        path: Path,
        name: str,
        copies: int | None,
        as_is: bool,
        progress: Progress,
    ) -> None:
        self._cluster = cluster
        self._path = path
        self._name = check_name(name)
        self._copies = copies or cluster.config.replication.copies
        self._as_is = as_is
        self._progress = progress
        self._shards: dict[bytes, Shard] = {}  # in the order of the manifest
        self._placed: list[HashedShard] = []
        self._deduplicated = 0

    async def run(self) -> StoreResult:
        started_s = time.monotonic()
        cluster = self._cluster
        catalogue = await cluster.catalogue()
        source = await asyncio.to_thread(scan, self._path, as_is=self._as_is)
        for warning in source.warnings:
            self._progress.note(warning)
        self._check_room(source.size)
        self._progress.total(source.size)
        self._transfers = Transfers(cluster, self._copies, self._progress)
        try:
            hashes = await self._send_shards(source)
            await asyncio.to_thread(_check_still, source, hashes)
            manifest, raw = await self._manifest(catalogue, source, hashes)
            reached = await self._commit(manifest, raw)
        finally:
            # No thread may wait on a socket any more when an error or Ctrl-C ends the store.
            if self._unfinished:
                cluster.bulk.close()
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
            warnings=tuple(source.warnings),
        )

    _unfinished = True
    _transfers: Transfers

    def _check_room(self, size: int) -> None:
        """Refuses before a byte is sent when the copies cannot fit. What is on the nodes already
        needs no room, which only the hashes will tell: so this looks at the whole size only when
        nothing of this name was stored before."""
        workers = self._cluster.workers
        machines = {node.machine for node in workers}
        copies = min(self._copies, len(machines))
        room = attainable_room([node.status.bytes_free for node in workers], copies)
        if size > room and room == 0:
            raise NoRoom(
                "the nodes have no room for new shards (each is down to its reserve)",
                next="ckptd nodes; then ckptd rm what is not needed, or add a node",
            )

    # -- shards

    async def _send_shards(self, source: Source) -> list[str]:
        """Hashes the source and brings each shard to its nodes; the files' hashes."""
        hasher = SourceHasher(source)
        hashed: asyncio.Queue[list[HashedShard] | None] = asyncio.Queue(limits.SHARDS_AHEAD_MAX)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hash(hasher, source, hashed), name="hash")
            async for batch in _batches(hashed):
                await self._place(source, batch, group)
            index = self._tensor_index(source)
            if index is not None:
                await self._consider([index], group)
        return hasher.file_hashes()

    async def _hash(
        self,
        hasher: SourceHasher,
        source: Source,
        hashed: asyncio.Queue[list[HashedShard] | None],
    ) -> None:
        loop = asyncio.get_running_loop()
        shard_size = self._cluster.config.replication.shard_size_bytes

        def work() -> None:
            plans = cut(source.to_cut(), shard_size)
            for shard in hasher.shards(plans, self._progress.advance):
                # The bounded queue keeps hashing at most so far ahead of sending.
                asyncio.run_coroutine_threadsafe(hashed.put([shard]), loop).result()

        await asyncio.to_thread(work)
        await hashed.put(None)

    async def _place(
        self, source: Source, batch: list[HashedShard], group: asyncio.TaskGroup
    ) -> None:
        self._placed.extend(batch)
        fresh: list[Shard] = []
        for hashed in batch:
            if hashed.digest in self._shards or any(s.digest == hashed.digest for s in fresh):
                self._deduplicated += 1
                continue
            fresh.append(Shard(hashed.digest, hashed.size, partial(PieceReader, source, hashed)))
        await self._consider(fresh, group)

    def _tensor_index(self, source: Source) -> Shard | None:
        if not source.tensors:
            return None
        content = tensor_index.encode(source.tensors)
        if len(content) > limits.SHARD_SIZE_MAX_BYTES:
            raise SourceRefused(f"{self._path}: the index of its tensors is too large")
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
            else:
                group.create_task(self._transfers.protect(shard), name=shard.digest.hex())

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
        entries, references = self._entries(source, hashes)
        content_id = documents.content_id(entries)
        newest = catalogue.newest(self._name)
        if newest is not None and newest.content_id == content_id:
            same = await self._same_version(newest.id, references)
            if same is not None:
                return same
        now = datetime.now(UTC)
        manifest = Manifest(
            format=1,
            cluster=self._cluster.cluster,
            name=self._name,
            order=await next_order(self._cluster, catalogue, int(now.timestamp() * 1000)),
            created=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            host=socket.gethostname()[:255],
            nonce=secrets.token_hex(16),
            unit="file" if source.unit == "file" else "directory",
            content_id=content_id,
            copies=self._copies,
            redundancy="copies",
            mode=source.mode,
            entries=entries,
            shards=references,
            tensor_index=self._index_of(references),
        )
        raw = documents.encode(manifest)
        if len(raw) > limits.DOCUMENT_MAX_BYTES:
            raise SourceRefused(
                f"{self._path} has too many files for one checkpoint: its manifest would have "
                f"{len(raw)} bytes",
                next="store its sub-directories one by one",
            )
        return manifest, raw

    async def _same_version(
        self, version: str, references: tuple[ShardReference, ...]
    ) -> tuple[Manifest, bytes] | None:
        """The newest version again, when it has this content in these shards."""
        try:
            signed = await self._cluster.signed(version)
        except NotFound:
            return None
        manifest = self._cluster.admit(signed)[1]
        if not isinstance(manifest, Manifest) or set(manifest.shards) != set(references):
            return None
        return manifest, signed.document

    def _index_of(self, references: tuple[ShardReference, ...]) -> int | None:
        if self._index_digest is None:
            return None
        wanted = self._index_digest.hex()
        return next(i for i, reference in enumerate(references) if reference.shard == wanted)

    def _entries(
        self, source: Source, hashes: list[str]
    ) -> tuple[tuple[Entry, ...], tuple[ShardReference, ...]]:
        index_of = {digest: index for index, digest in enumerate(self._shards)}
        parts: list[list[tuple[int, Part]]] = [[] for _ in source.files]
        for hashed in self._placed:
            start = 0
            for piece in hashed.pieces:
                part = Part(index_of[hashed.digest], start, piece.length)
                parts[piece.file_index].append((piece.offset, part))
                start += piece.length
        files = [
            FileEntry(
                path=path_to_json(file.path),
                mode=file.mode,
                size=file.size,
                sha256=hashes[index],
                parts=tuple(part for _, part in sorted(parts[index], key=lambda item: item[0])),
            )
            for index, file in enumerate(source.files)
        ]
        entries: list[Entry] = [*files, *source.directories, *source.symlinks]
        entries.sort(key=lambda entry: entry.path)
        references = tuple(
            ShardReference(shard.digest.hex(), shard.size) for shard in self._shards.values()
        )
        return tuple(entries), references

    # -- commit

    async def _commit(self, manifest: Manifest, raw: bytes) -> int:
        """Publishes the manifest until every shard has its copies or no node is left to take one;
        the smallest number of copies."""
        self._require_a_copy_of_each()
        reached = 0
        for _ in range(limits.COMMIT_ROUNDS_MAX):
            results = await publish(self._cluster, raw)
            accepted = {node: r for node, r in results.items() if not r.refused}
            if not accepted:
                reasons = "; ".join(f"{node}: {r.refused}" for node, r in results.items())
                raise NotEnoughNodes(
                    f"no node took the manifest of {self._name} ({reasons or 'none answers'})",
                    next="ckptd status",
                )
            lacking, reached = self._count(manifest, accepted)
            if not lacking:
                break
            before = [set(shard.holders) for shard in lacking]
            async with asyncio.TaskGroup() as group:
                for shard in lacking:
                    group.create_task(self._transfers.protect(shard), name=shard.digest.hex())
            if before == [shard.holders for shard in lacking]:
                break  # nobody is left to take more
        self._unfinished = False
        if reached == 0 and manifest.shards:
            raise self._lost_copies()
        return reached

    def _count(
        self, manifest: Manifest, results: dict[str, messages.PutDocumentResult]
    ) -> tuple[list[Shard], int]:
        """Shards without all their copies according to the nodes' bitmaps, and the smallest
        number of copies. Only nodes that hold the manifest durably count."""
        counted = {
            node: list(bitmaps.unpack(result.bitmap or b"", len(manifest.shards)))
            for node, result in results.items()
        }
        reached = self._transfers.distinct(counted)
        lacking = []
        for index, reference in enumerate(manifest.shards):
            shard = self._shards[bytes.fromhex(reference.shard)]
            shard.holders = {node for node, held in counted.items() if held[index]}
            copies = self._transfers.distinct(shard.holders)
            reached = min(reached, copies)
            if copies < self._copies:
                lacking.append(shard)
        return lacking, reached

    def _require_a_copy_of_each(self) -> None:
        if any(not shard.holders for shard in self._shards.values()):
            raise self._lost_copies()

    def _lost_copies(self) -> CkptdError:
        error = self._transfers.last_error
        why = f": {error.message}" if error else ""
        room = [node.status.bytes_free for node in self._cluster.workers]
        if error is not None and "room" in error.message:
            return NoRoom(
                f"{self._name} does not fit on the nodes{why}",
                next="ckptd nodes; then ckptd rm what is not needed, or add a node",
            )
        return NotEnoughNodes(
            f"{self._name} could not be stored: some shards are on no node{why} "
            f"({len(room)} nodes answer)",
            next="ckptd nodes",
        )


async def _batches(
    hashed: asyncio.Queue[list[HashedShard] | None],
) -> AsyncIterator[list[HashedShard]]:
    """What has been hashed meanwhile, all at once: one question to the nodes for many shards."""
    while (batch := await hashed.get()) is not None:
        while not hashed.empty():
            more = hashed.get_nowait()
            if more is None:
                yield batch
                return
            batch += more
        yield batch


def _check_still(source: Source, hashes: list[str]) -> None:
    """Raises SourceChanged unless the source is what was hashed."""
    for index, file in enumerate(source.files):
        if source.is_racy(file) and hash_file(file) != hashes[index]:
            raise SourceChanged(f"{file.location} changed while it was being stored")
    source.check()
