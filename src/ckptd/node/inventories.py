"""Who holds what, asked version by version: nothing of it is recorded, and little is in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from functools import partial

import structlog

from ckptd.core import limits
from ckptd.core.headers import VersionHeader
from ckptd.core.repair import VersionCopies
from ckptd.errors import PeerError
from ckptd.node.ports import Clock, Network, OnDisk
from ckptd.node.records import Records
from ckptd.store.shards import ShardStore
from ckptd.wire import messages

_log = structlog.get_logger(__name__)


def batches(headers: Sequence[VersionHeader]) -> Iterator[list[VersionHeader]]:
    """The versions in the groups that are asked about together, so that the answers are bounded
    however many shards they have."""
    batch: list[VersionHeader] = []
    shards = 0
    for header in headers:
        full = len(batch) >= limits.VERSIONS_PER_QUESTION
        if batch and (full or shards + header.shards > limits.SHARDS_PER_SURVEY):
            yield batch
            batch, shards = [], 0
        batch.append(header)
        shards += header.shards
    if batch:
        yield batch


class Inventories:
    """Asks workers which shards of which versions they hold. `shards` is this node's own store,
    None when it is no worker; `copies` is the cluster's setting, which a manifest may exceed."""

    def __init__(
        self,
        *,
        node_id: str,
        network: Network,
        records: Records,
        shards: ShardStore | None,
        copies: int,
        on_disk: OnDisk,
        clock: Clock,
    ) -> None:
        self._node_id = node_id
        self._network = network
        self._records = records
        self._shards = shards
        self._copies = copies
        self._on_disk = on_disk
        self._clock = clock

    async def ask(
        self, headers: Sequence[VersionHeader], workers: Collection[str]
    ) -> AsyncIterator[VersionCopies]:
        """What the workers say of each of these versions (one of `batches`). A worker that gives
        no answer is missing in the result; a version whose manifest cannot be read here is left
        out."""
        ids = [bytes.fromhex(header.id) for header in headers]
        asked = sorted(workers)
        answers = await asyncio.gather(*(self._bitmaps(node, ids) for node in asked))
        told = {
            node: bitmaps
            for node, bitmaps in zip(asked, answers, strict=True)
            if bitmaps is not None
        }
        for index, header in enumerate(headers):
            references = await self._on_disk(partial(self._records.references, header.id))
            if references is None:
                _log.warning("manifest_missing", version=header.id, next="ckptd doctor")
                continue
            yield VersionCopies(
                version=header.id,
                order=header.order,
                copies=max(self._copies, header.copies),
                shards=references,
                bitmaps={node: bitmaps[index] for node, bitmaps in told.items()},
            )

    async def _bitmaps(self, node: str, ids: list[bytes]) -> list[bytes | None] | None:
        """One bitmap for each version; None when the node gives no answer."""
        if node == self._node_id:
            return await self._on_disk(partial(self._own_bitmaps, ids))
        found: list[bytes | None] = []
        try:
            while len(found) < len(ids):
                question = messages.Inventory(tuple(ids[len(found) :]))
                reply, _ = await self._network.request(
                    node, question, messages.InventoryReply, timeout_s=limits.REQUEST_TIMEOUT_S
                )
                if not 0 < len(reply.bitmaps) <= len(ids) - len(found):
                    return None
                found += reply.bitmaps
        except PeerError as error:
            _log.info("inventory_missing", node=node, reason=error.message)
            return None
        return found

    def _own_bitmaps(self, ids: list[bytes]) -> list[bytes | None]:
        if self._shards is None:
            return [None] * len(ids)
        now = self._clock.wall_s()
        return [self._records.inventory(each.hex(), self._shards, now)[0] for each in ids]
