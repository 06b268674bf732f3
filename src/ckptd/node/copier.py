"""The holder's side of repair: sends copies to other nodes because a steward asked.

The steward may be wrong, or a stolen worker. So the holder decides by itself: a live manifest that
it holds must name the shard, the target must be a remembered worker that takes copies, and the copy
must be good. Neither a target that takes its bytes slowly nor a low rate in a request keeps it from
sending to others, and whoever asks leaves room for what others ask. One that was not hashed since
the start is hashed first, so that a copy that rotted while the node was off is not spread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TypeVar

import structlog

from ckptd.core import limits
from ckptd.core.names import check_node_id
from ckptd.core.steward import Standings
from ckptd.errors import (
    CkptdError,
    MediumFailed,
    NameRefused,
    NotFound,
    PeerBusy,
    Refused,
    ShardCorrupt,
    StoreOperationFailed,
)
from ckptd.net.control_connection import Answer, Progress
from ckptd.node.forwarder import failed_report
from ckptd.node.ports import Clock, Network, OnDisk
from ckptd.node.records import Records
from ckptd.node.requests import NodeAnswerer
from ckptd.store.copy_reader import VerifyResult
from ckptd.store.shards import ShardStore
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport, Message

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


async def while_telling(work: Awaitable[_T], progress: Progress) -> _T:
    """The result of `work`; whoever waits for it is told every second that it goes on."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=limits.PROGRESS_INTERVAL_S)
            progress(messages.Progress(()))
    finally:
        task.cancel()
    return task.result()


class Copier:
    """Answers CopyShards. `suspect` re-reads a copy that is said to be bad."""

    def __init__(
        self,
        *,
        node_id: str,
        records: Records,
        shards: ShardStore,
        network: Network,
        standings: Callable[[], Standings],
        suspect: Callable[[bytes], Awaitable[VerifyResult]],
        rate_bytes_per_s: float,
        on_disk: OnDisk,
        clock: Clock,
    ) -> None:
        self._node_id = node_id
        self._records = records
        self._shards = shards
        self._network = network
        self._standings = standings
        self._suspect = suspect
        self._rate_bytes_per_s = rate_bytes_per_s
        self._on_disk = on_disk
        self._clock = clock
        self._sending: set[tuple[str, str]] = set()  # who asked, and for whom
        self.handlers: Mapping[type[Message], NodeAnswerer] = {
            messages.CopyShards: self._copy_shards
        }

    async def _copy_shards(
        self, asker: str, request: messages.CopyShards, progress: Progress
    ) -> Answer:
        self._check_target(request.target)
        slot = (asker, request.target)
        of_asker = sum(by == asker for by, _ in self._sending)
        if (
            slot in self._sending
            or of_asker >= limits.COPY_SLOTS_PER_ASKER
            or len(self._sending) >= limits.BULK_PUSH_SLOTS
        ):
            raise PeerBusy(self._node_id, "sends copies because of another request")
        self._sending.add(slot)
        try:
            return await self._answer(request, progress), b""
        finally:
            self._sending.remove(slot)

    def _rate(self, asked_bytes_per_s: float) -> float:
        """What is sent of one copy. All that this node sends by itself stays within its own rate;
        whoever asks may ask for less, as one that divides it among all nodes would."""
        own = self._rate_bytes_per_s / len(self._sending)
        least = self._rate_bytes_per_s / limits.COPY_RATE_SHARES_MAX
        return min(own, max(asked_bytes_per_s or own, least))

    async def _answer(
        self, request: messages.CopyShards, progress: Progress
    ) -> messages.CopyShardsReply:
        sizes = await self._named(request.version.hex(), frozenset(request.shards))
        until_s = self._clock.monotonic_s() + limits.COPY_SLICE_S
        reports: list[CopyReport] = []
        for shard in request.shards:
            if reports and self._clock.monotonic_s() >= until_s:
                break
            rate = self._rate(request.rate_bytes_per_s)
            sending = self._copy(shard, sizes.get(shard), request.target, rate)
            reports.append(await while_telling(sending, progress))
        return messages.CopyShardsReply(tuple(reports))

    def _check_target(self, target: str) -> None:
        try:
            check_node_id(target)
        except NameRefused as error:
            raise Refused(f"{target!a} is no node: {error.message}") from error
        standing = self._standings().get(target)
        if target == self._node_id or standing is None or not standing.takes_copies:
            raise Refused(f"{target} takes no copies, as far as {self._node_id} knows")

    async def _named(self, version: str, wanted: frozenset[bytes]) -> dict[bytes, int]:
        """The size of each wanted shard that the version names. Raises NotFound unless it is
        live and its manifest is here."""
        references = None
        if not self._records.is_dead(version):
            references = await self._on_disk(partial(self._records.references, version))
        if references is None:
            raise NotFound(f"{self._node_id} has no manifest of a live version {version}")
        return {shard: size for shard, size in references if shard in wanted}

    async def _copy(
        self, shard: bytes, size: int | None, target: str, rate_bytes_per_s: float
    ) -> CopyReport:
        try:
            if size is None:
                raise Refused(f"the version does not name shard {shard.hex()}")
            await self._require_good(shard, size)
        except CkptdError as error:
            return failed_report(self._node_id, error)
        try:
            report = await self._network.push(
                shard, size, target, rate_bytes_per_s=rate_bytes_per_s
            )
        except ShardCorrupt as error:  # it ends too early
            await self._suspect(shard)
            return failed_report(self._node_id, error)
        except (NotFound, MediumFailed, StoreOperationFailed) as error:
            return failed_report(self._node_id, error)
        except CkptdError as error:
            return failed_report(target, error)
        if report.code == ShardCorrupt.kind:  # it was good on the disk, and bad over there
            await self._suspect(shard)
        return report

    async def _require_good(self, shard: bytes, size: int) -> None:
        """Raises NotFound or ShardCorrupt unless a good copy is here."""
        if not self._shards.has(shard, size):
            raise NotFound(f"shard {shard.hex()} is not on {self._node_id}")
        if self._shards.verified_at(shard) is not None:
            return
        if await self._suspect(shard) is not VerifyResult.OK:
            raise ShardCorrupt(shard.hex(), node=self._node_id)
