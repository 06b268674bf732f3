"""The control side of a node: one handler for each kind of request."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import Any, Final, TypeVar

import msgspec
import structlog

from ckptd.core import bitmaps, limits
from ckptd.core.catalogue import DocumentHeader, VersionHeader
from ckptd.core.identity import Identity
from ckptd.core.permissions import Action, may
from ckptd.errors import CkptdError, NotAuthorized, Refused
from ckptd.net.control_connection import Answer, Payload, Progress
from ckptd.node.records import Records
from ckptd.observe.metrics import Metrics
from ckptd.store.copy_reader import VerifyResult
from ckptd.store.shards import ShardStore
from ckptd.wire import messages
from ckptd.wire.messages import Message

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

_ACTIONS: Final[dict[type[Message], Action]] = {
    messages.Ping: Action.PING,
    messages.GetStatus: Action.STATUS,
    messages.Have: Action.HAVE,
    messages.Inventory: Action.INVENTORY,
    messages.ListDocuments: Action.LIST_HEADERS,
    messages.GetDocuments: Action.GET_DOCUMENTS,
    messages.PutDocuments: Action.PUT_DOCUMENTS,
    messages.Sync: Action.SYNC,
    messages.Verify: Action.VERIFY,
    messages.ReportCorrupt: Action.REPORT_CORRUPT,
    messages.CopyShards: Action.COPY_SHARDS,
    messages.Promise: Action.PROMISE,
    messages.Surplus: Action.SURPLUS,
    messages.GetWatched: Action.WATCHED,
    messages.Prune: Action.PRUNE,
    messages.SetJob: Action.SET_JOB,
}

Answerer = Callable[[Any, Payload, Progress], Awaitable[Answer]]
NodeAnswerer = Callable[[str, Any, Progress], Awaitable[Answer]]
"""Of what nodes ask each other: gets the id of the one who asks, too."""
"""(request, payload, tell progress) -> (answer, payload), once the peer is known to be allowed."""


def wire_header(header: DocumentHeader) -> messages.DocumentHeader:
    """A catalogue's header as it travels."""
    if isinstance(header, VersionHeader):
        return messages.DocumentHeader(
            bytes.fromhex(header.id),
            header.kind,
            header.order,
            name=header.name,
            created=header.created,
            content_id=bytes.fromhex(header.content_id),
            size=header.size,
            files=header.files,
            shards=header.shards,
            copies=header.copies,
            step=header.step,
            metrics=header.metrics,
        )
    return messages.DocumentHeader(
        bytes.fromhex(header.id), header.kind, header.order, created=header.created
    )


class Requests:
    """Answers control requests. What touches the disk runs in a bounded pool of threads."""

    def __init__(
        self,
        *,
        records: Records,
        shards: ShardStore | None,
        metrics: Metrics,
        status: Callable[[], messages.NodeStatus],
        more: Mapping[type[Message], Answerer] = MappingProxyType({}),
        of_nodes: Mapping[type[Message], NodeAnswerer] = MappingProxyType({}),
    ) -> None:
        self._of_nodes = of_nodes
        self._records = records
        self._shards = shards
        self._metrics = metrics
        self._status = status
        self._disk = ThreadPoolExecutor(limits.DISK_THREADS, thread_name_prefix="disk")
        self._documents = asyncio.Semaphore(limits.DOCUMENT_BATCHES_AT_ONCE)
        self._handlers: dict[type[Message], Answerer] = {
            messages.Ping: self._get_status,
            messages.GetStatus: self._get_status,
            messages.Inventory: self._inventory,
            messages.ListDocuments: self._list_documents,
            messages.GetDocuments: self._get_documents,
            messages.PutDocuments: self._put_documents,
            messages.Sync: self._sync,
            **more,
        }
        if shards is not None:
            self._handlers |= {
                messages.Have: partial(self._have, shards),
                messages.Verify: self._verify,
                messages.ReportCorrupt: self._report_corrupt,
            }

    def close(self) -> None:
        """Waits for the disk's threads."""
        self._disk.shutdown(wait=True, cancel_futures=True)

    async def answer(
        self, identity: Identity, message: Message, payload: Payload, progress: Progress
    ) -> Answer:
        """The handler of a ControlServer. Raises NotAuthorized before anything is looked at."""
        action = _ACTIONS.get(type(message))
        if isinstance(message, messages.Have) and message.touch:
            action = Action.TOUCH
        if action is None or not may(identity.roles, action):
            what = action.value.replace("_", " ") if action else type(message).__name__
            _log.warning("request_refused", peer=identity.node_id, request=what)
            raise NotAuthorized(f"{identity} may not {what} here")
        if (of_node := self._of_nodes.get(type(message))) is not None:
            return await of_node(identity.node_id, message, progress)
        return await self._handler(message)(message, payload, progress)

    def _handler(self, message: Message) -> Answerer:
        handler = self._handlers.get(type(message))
        if handler is None:
            raise Refused(f"this node has not the role to answer {type(message).__name__}")
        return handler

    async def on_disk(self, work: Callable[[], _T]) -> _T:
        """Runs `work` in the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)

    async def suspect(self, shard: bytes) -> VerifyResult:
        """Re-reads a copy that somebody found bad, and tells the metrics."""
        assert self._shards is not None, "only a worker is asked"
        result = await self.on_disk(partial(self._shards.verify, shard))
        if result is VerifyResult.CORRUPT:
            self.note_corrupt(shard)
        return result

    def note_corrupt(self, shard: bytes) -> None:
        """Tells that the copy of `shard` here went to quarantine."""
        self._metrics.shard_corrupt()
        _log.error(
            "shard_corrupt", shard=shard.hex(), next="ckptd verify --all shows all bad copies"
        )

    async def _get_status(self, _: Message, __: Payload, ___: Progress) -> Answer:
        return self._status(), b""

    async def _have(
        self, shards: ShardStore, request: messages.Have, _: Payload, __: Progress
    ) -> Answer:
        def look() -> messages.HaveReply:
            now = shards.now()
            held, ages = [], []
            for shard in request.shards:
                here = shards.has(shard)
                if here and request.touch:
                    here = shards.touch(shard)
                held.append(here)
                verified_at = shards.verified_at(shard) if here else None
                ages.append(-1.0 if verified_at is None else max(0.0, now - verified_at))
            return messages.HaveReply(bitmaps.pack(held), tuple(ages))

        return await self.on_disk(look), b""

    async def _inventory(self, request: messages.Inventory, _: Payload, __: Progress) -> Answer:
        wall_s = time.time()

        def look() -> messages.InventoryReply:
            answers: list[tuple[bytes | None, float]] = []
            size = 0
            for version in request.versions:
                answer = self._records.inventory(version.hex(), self._shards, wall_s)
                size += len(answer[0] or b"")
                if answers and size > limits.INVENTORY_PER_REPLY_BYTES:
                    break  # the asker asks again for the rest
                answers.append(answer)
            return messages.InventoryReply(
                tuple(bitmap for bitmap, _ in answers), tuple(age for _, age in answers)
            )

        return await self.on_disk(look), b""

    async def _list_documents(
        self, request: messages.ListDocuments, _: Payload, __: Progress
    ) -> Answer:
        headers, more = self._records.catalogue.headers_after(
            request.after.hex(), limits.HEADERS_PER_PAGE
        )
        page: list[messages.DocumentHeader] = []
        size = 0
        for header in headers:
            told = wire_header(header)
            size += len(msgspec.msgpack.encode(told))
            if page and size > limits.HEADERS_PER_REPLY_BYTES:
                more = True
                break
            page.append(told)
        return messages.DocumentHeaders(tuple(page), more), b""

    async def _get_documents(
        self, request: messages.GetDocuments, _: Payload, __: Progress
    ) -> Answer:
        def read() -> tuple[messages.Documents, bytes]:
            found: list[messages.SignedDocument] = []
            missing: list[bytes] = []
            size = 0
            for document_id in request.ids:
                signed = self._records.get(document_id.hex())
                if signed is None:
                    missing.append(document_id)
                    continue
                size += len(signed[0]) + len(signed[1])
                if found and size > limits.DOCUMENTS_PER_REPLY_BYTES:
                    break
                found.append(messages.SignedDocument(*signed))
            payload = messages.encode_documents(tuple(found))
            return messages.Documents(len(found), tuple(missing)), payload

        async with self._documents:
            return await self.on_disk(read)

    async def _put_documents(
        self, request: messages.PutDocuments, payload: Payload, _: Progress
    ) -> Answer:
        results = []
        async with self._documents:
            views = messages.document_views(payload, request.count, peer="the sender")
            for signed in views:
                results.append(await self.on_disk(partial(self._put_one, signed)))
        return messages.PutDocumentsReply(tuple(results)), b""

    def _put_one(self, signed: messages.DocumentView) -> messages.PutDocumentResult:
        try:
            document_id = self._records.put(signed.document, signed.signature)
        except CkptdError as error:
            self._metrics.store_failure(error.kind)
            _log.warning("document_refused", kind=error.kind, reason=error.message)
            digest = hashlib.sha256(signed.document).digest()
            refused = error.message[: limits.REFUSED_TEXT_MAX]
            return messages.PutDocumentResult(digest, refused=refused)
        bitmap = self._records.confirm(document_id)
        return messages.PutDocumentResult(bytes.fromhex(document_id), bitmap=bitmap)

    async def _sync(self, request: messages.Sync, _: Payload, __: Progress) -> Answer:
        if request.documents_digest == self._records.digest():
            return messages.SyncReply(True, len(self._records.catalogue)), b""
        packed = self._records.packed_ids()
        return messages.SyncReply(False, len(packed) // 32), packed

    async def _verify(self, request: messages.Verify, _: Payload, progress: Progress) -> Answer:
        results = []
        told_s = time.monotonic()
        for shard in request.shards:
            verifying = asyncio.ensure_future(self.suspect(shard))
            while not verifying.done():
                await asyncio.wait([verifying], timeout=limits.PROGRESS_INTERVAL_S)
                if time.monotonic() - told_s >= limits.PROGRESS_INTERVAL_S:
                    told_s = time.monotonic()
                    progress(messages.Progress(()))
            results.append(verifying.result().value)
        return messages.VerifyReply(tuple(results)), b""

    async def _report_corrupt(
        self, request: messages.ReportCorrupt, _: Payload, progress: Progress
    ) -> Answer:
        return await self._verify(messages.Verify((request.shard,)), b"", progress)
