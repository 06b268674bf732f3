"""Looks after the copies in this node's quarantine: reads them again, and lets them go in the end.

Bytes that could not be read right may be read right another time; as long as nobody else has them,
they are all there is. Only when the wanted number of copies is known to be good without them, and
has been for the grace, are they deleted.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Final

import structlog

from ckptd.clock import Clock
from ckptd.core import bitmaps, limits
from ckptd.core.scrubbing import Pace, Quarantined, decide_quarantined
from ckptd.errors import PeerError
from ckptd.node.ports import Network, OnDisk
from ckptd.store.quarantine import QuarantinedFile
from ckptd.store.shards import ShardStore
from ckptd.wire import messages

_log = structlog.get_logger(__name__)

_ASK_EVERY_S: Final = 60.0


class QuarantineKeeper:
    """`workers` gives the ids of the other workers that are up. A shard is healed when `copies`
    nodes hold it and have hashed it since they started; after `grace_s` of that its bad bytes
    go."""

    def __init__(
        self,
        *,
        store: ShardStore,
        network: Network,
        workers: Callable[[], Sequence[str]],
        copies: int,
        grace_s: float,
        pace: Pace,
        clock: Clock,
        on_disk: OnDisk,
    ) -> None:
        self._store = store
        self._network = network
        self._workers = workers
        self._copies = copies
        self._grace_s = grace_s
        self._pace = pace
        self._clock = clock
        self._on_disk = on_disk
        self._read_s: dict[str, float] = {}  # by path
        self._healed_s: dict[str, float] = {}  # by id: since when it is known
        self._asked_s = -math.inf

    async def step(self) -> None:
        """Does what is due: at most one file is read. Raises the store's errors."""
        found = await self._on_disk(self._store.quarantined)
        files = [file for file in found if not file.suffix]
        ids = {file.id for file in files}
        # Bytes that have just come have their own grace, whatever lies there of the same shard.
        fresh = {file.id for file in files if file.path not in self._read_s}
        self._read_s = {file.path: self._read_s.get(file.path, -math.inf) for file in files}
        self._healed_s = {id_: at for id_, at in self._healed_s.items() if id_ in ids - fresh}
        if not files:
            return
        await self._ask_if_due(ids)
        now_s = self._clock.monotonic_s()
        for file in files:
            if self._decide(file, now_s) is Quarantined.RETRY:
                await self._retry(file)
                return
        for file in files:
            if self._decide(file, now_s) is Quarantined.DROP:
                await self._drop(file)

    def _decide(self, file: QuarantinedFile, now_s: float) -> Quarantined:
        healed_s = self._healed_s.get(file.id)
        return decide_quarantined(
            since_retry_s=now_s - self._read_s[file.path],
            healed_for_s=None if healed_s is None else now_s - healed_s,
            grace_s=self._grace_s,
            pace=self._pace,
        )

    async def _retry(self, file: QuarantinedFile) -> None:
        self._read_s[file.path] = self._clock.monotonic_s()
        if await self._on_disk(partial(self._store.retry_quarantined, file)):
            _log.warning(
                "quarantined_copy_was_good",
                shard=file.id,
                next="vcgencmd get_throttled: a weak supply makes a Pi read wrong bytes",
            )

    async def _drop(self, file: QuarantinedFile) -> None:
        await self._ask({file.id})  # it is deleted by what is true now
        if file.id in self._healed_s:
            await self._on_disk(partial(self._store.drop_quarantined, file))
            _log.info("quarantined_copy_dropped", shard=file.id, size_bytes=file.size_bytes)

    async def _ask_if_due(self, ids: Collection[str]) -> None:
        now_s = self._clock.monotonic_s()
        if now_s - self._asked_s >= min(_ASK_EVERY_S, self._grace_s / 4):
            self._asked_s = now_s
            await self._ask(ids)

    async def _ask(self, ids: Collection[str]) -> None:
        """Notes which of these shards have enough good copies now."""
        shards = [bytes.fromhex(id_) for id_ in sorted(ids)]
        good = dict.fromkeys(shards, 0)
        for shard in shards:
            good[shard] += self._store.verified_at(shard) is not None
        answers = await asyncio.gather(*(self._have(node, shards) for node in self._workers()))
        for answer in answers:
            for shard in answer:
                good[shard] += 1
        now_s = self._clock.monotonic_s()
        for shard, count in good.items():
            if count >= self._copies:
                self._healed_s.setdefault(shard.hex(), now_s)
            else:
                self._healed_s.pop(shard.hex(), None)

    async def _have(self, node: str, shards: Sequence[bytes]) -> list[bytes]:
        """Those of `shards` of which `node` has a copy that it has hashed since it started."""
        found: list[bytes] = []
        for start in range(0, len(shards), limits.SHARDS_PER_QUESTION):
            part = shards[start : start + limits.SHARDS_PER_QUESTION]
            try:
                reply, _ = await self._network.request(
                    node,
                    messages.Have(tuple(part)),
                    messages.HaveReply,
                    timeout_s=limits.REQUEST_TIMEOUT_S,
                )
            except PeerError:
                return []
            held = bitmaps.unpack(reply.held, len(part))
            if len(reply.verified_age_s) != len(part):
                return []
            found += [
                shard
                for shard, here, age_s in zip(part, held, reply.verified_age_s, strict=True)
                if here and age_s >= 0
            ]
        return found
