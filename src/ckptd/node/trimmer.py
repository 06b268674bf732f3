"""The job "trim": drops copies of which others hold enough, on their promises alone.

The steward hints which copies are too many; nothing is believed of that. Before a copy goes, this
node reads its own live manifests to learn which versions name the shard and how many copies each
wants, and for each of them that many other workers, which take copies and have the manifest, must
promise to keep theirs. The rules of promises are in `ckptd.core.trimming`; why all this holds,
whatever is delayed or restarted, in docs/decisions/trimming.md.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import structlog

from ckptd.core import bitmaps, limits
from ckptd.core.headers import VersionHeader
from ckptd.core.steward import Standings
from ckptd.core.trimming import Claim, Promises, is_surplus
from ckptd.errors import CkptdError, NotFound, PeerError, Refused
from ckptd.net.control_connection import Answer, Payload, Progress
from ckptd.node.copier import while_telling
from ckptd.node.jobs import JobProgress
from ckptd.node.ports import Clock, Network, OnDisk
from ckptd.node.records import Records
from ckptd.node.requests import Answerer
from ckptd.store.copy_reader import VerifyResult
from ckptd.store.shards import ShardStore
from ckptd.wire import messages
from ckptd.wire.messages import Message

_log = structlog.get_logger(__name__)

_CLOCKS_APART_MAX_S = 1.0


class _Naming(NamedTuple):
    """A live version, how many copies it wants, and which of the shards in question it names."""

    version: str
    copies: int
    shards: tuple[bytes, ...]


class _Since(NamedTuple):
    """When the asking began: by both clocks, and by the store's."""

    monotonic_s: float
    wall_s: float
    store_s: float

    def still_holds(self, clock: Clock) -> bool:
        """Whether both clocks have gone on alike: a machine that slept cannot tell how old a
        promise is."""
        went_s = clock.monotonic_s() - self.monotonic_s
        return abs(clock.wall_s() - self.wall_s - went_s) < _CLOCKS_APART_MAX_S


class Trimmer:
    """As `ckptd.node.jobs.Job`, and answers Promise and Surplus.

    `copies` is the cluster's setting; `fresh_s` how long a check of a copy is worth something
    (`scrub.interval`), after that it is hashed anew before it is promised; `promise_s` is how long
    promises last (`repair.promise`). `suspect` re-reads a copy; `wake` lets the next slice begin.
    """

    name = "trim"

    def __init__(
        self,
        *,
        node_id: str,
        records: Records,
        shards: ShardStore,
        network: Network,
        standings: Callable[[], Standings],
        suspect: Callable[[bytes], Awaitable[VerifyResult]],
        copies: int,
        promise_s: float,
        fresh_s: float,
        on_disk: OnDisk,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._node_id = node_id
        self._records = records
        self._shards = shards
        self._network = network
        self._standings = standings
        self._suspect = suspect
        self._copies = copies
        self._fresh_s = fresh_s
        self._on_disk = on_disk
        self._clock = clock
        self._rng = rng
        self._promises = Promises(lasts_s=promise_s, started_s=clock.monotonic_s())
        self._noted: dict[bytes, None] = {}
        self._dropped_bytes = 0
        self.wake: Callable[[], None] = lambda: None
        self.handlers: Mapping[type[Message], Answerer] = {
            messages.Promise: self._promise,
            messages.Surplus: self._surplus,
        }

    def progress(self) -> JobProgress:
        """As `Job.progress`."""
        left = sum(self._shards.size(shard) or 0 for shard in list(self._noted))
        return JobProgress(self._dropped_bytes, self._dropped_bytes + left)

    # -- questions of others

    async def _surplus(self, request: messages.Surplus, _: Payload, __: Progress) -> Answer:
        noted = 0
        for shard in request.shards:
            known = shard in self._noted
            if known or (len(self._noted) < limits.SURPLUS_NOTED_MAX and self._shards.has(shard)):
                self._noted[shard] = None
                noted += 1
        if noted:
            self.wake()
        return messages.SurplusReply(noted), b""

    async def _promise(self, request: messages.Promise, _: Payload, progress: Progress) -> Answer:
        own = self._standings().get(self._node_id)
        if own is None or not own.takes_copies:
            raise Refused(f"{self._node_id} is to be emptied, and promises nothing")
        version = request.version.hex()
        references = None
        if not self._records.is_dead(version):
            references = await self._on_disk(partial(self._records.references, version))
        if references is None:
            raise NotFound(f"{self._node_id} has no manifest of a live version {version}")
        wanted = frozenset(request.shards)
        sizes = {shard: size for shard, size in references if shard in wanted}
        kept = []
        for shard in request.shards:
            size = sizes.get(shard)
            kept.append(size is not None and await self._keep(shard, size, request, progress))
        return messages.PromiseReply(bitmaps.pack(kept)), b""

    async def _keep(
        self, shard: bytes, size: int, request: messages.Promise, progress: Progress
    ) -> bool:
        if not self._shards.has(shard, size):
            return False
        verified_at = self._shards.verified_at(shard)
        if verified_at is None or self._shards.now() - verified_at > self._fresh_s:
            checking = self._suspect(shard)
            if await while_telling(checking, progress) is not VerifyResult.OK:
                return False
        # Looked at once more: this node may have dropped its copy meanwhile.
        now_s = self._clock.monotonic_s()
        promised = self._promises.give(shard, request.seconds, now_s)
        return promised and self._shards.has(shard, size)

    # -- the job

    async def step(self) -> float:
        """As `Job.step`."""
        wait_s = self._promises.wait_s(self._clock.monotonic_s())
        if wait_s:
            return wait_s
        if not self._noted:
            return limits.REPAIR_LOOK_S
        some = list(self._noted)[: limits.SURPLUS_PER_SLICE]
        for shard in some:
            del self._noted[shard]
        if await self._trim(some):
            return 0.0
        # Somebody else may ask about the same shards at the same time.
        return limits.REPAIR_LOOK_S * self._rng.uniform(0.5, 1.5)

    async def _trim(self, shards: Collection[bytes]) -> int:
        """Drops those of the shards that it may drop; how many that are."""
        now_s = self._clock.monotonic_s()
        since = _Since(now_s, self._clock.wall_s(), self._shards.now())
        asked = [shard for shard in shards if self._promises.begin(shard, now_s)]
        for shard in shards:
            if self._promises.promised(shard, now_s):
                self._noted[shard] = None  # its turn comes when the promise is over
        try:
            naming = await self._on_disk(partial(self._namings, frozenset(asked)))
            claims = await self._claims(naming)
            surplus = [shard for shard in asked if self._is_surplus(claims.get(shard, ()))]
            dropped_bytes = 0
            count = 0
            for shard in surplus:
                size = await self._on_disk(partial(self._drop, shard, since))
                count += bool(size)
                dropped_bytes += size
        finally:
            for shard in asked:
                self._promises.end(shard)
        self._dropped_bytes += dropped_bytes
        if asked:
            _log.info("copies_trimmed", asked=len(asked), dropped=count, bytes=dropped_bytes)
        return count

    def _namings(self, shards: frozenset[bytes]) -> list[_Naming]:
        """Which live versions name these shards. Blocks on the disk. Raises NotFound when that
        cannot be known: then nothing may be dropped."""
        if doubt := self._records.doubt():
            raise NotFound(
                f"{doubt}: a document that is not known here could name any shard",
                next="ckptd doctor",
            )
        found = []
        for header in self._records.live_versions():
            naming = self._naming(header, shards)
            if naming.shards:
                found.append(naming)
        return found

    def _naming(self, header: VersionHeader, shards: frozenset[bytes]) -> _Naming:
        references = self._records.references(header.id)
        if references is None:
            raise NotFound(f"the manifest of {header.label} cannot be read", next="ckptd doctor")
        named = tuple(shard for shard, _ in references if shard in shards)
        return _Naming(header.id, max(self._copies, header.copies), named)

    async def _claims(self, naming: Iterable[_Naming]) -> dict[bytes, list[Claim]]:
        """For each shard what its versions want, and who promised to keep it."""
        others = [
            node
            for node, standing in self._standings().items()
            if node != self._node_id and standing.takes_copies
        ]
        claims: dict[bytes, list[Claim]] = {}
        for version, copies, shards in naming:
            answers = await asyncio.gather(*(self._ask(node, version, shards) for node in others))
            for index, shard in enumerate(shards):
                promised_by = frozenset(
                    node for node, kept in zip(others, answers, strict=True) if kept[index]
                )
                claims.setdefault(shard, []).append(Claim(copies, promised_by))
        return claims

    async def _ask(self, node: str, version: str, shards: tuple[bytes, ...]) -> list[bool]:
        question = messages.Promise(bytes.fromhex(version), shards, self._promises.lasts_s)
        try:
            reply, _ = await self._network.request(
                node, question, messages.PromiseReply, timeout_s=limits.REQUEST_TIMEOUT_S
            )
        except PeerError as error:
            _log.debug("no_promise", node=node, reason=error.message)
            return [False] * len(shards)
        return list(bitmaps.unpack(reply.kept, len(shards)))

    def _is_surplus(self, claims: Collection[Claim]) -> bool:
        machines = {
            node: standing.machine
            for node, standing in self._standings().items()
            if standing.takes_copies
        }
        return is_surplus(self._node_id, claims, machines)

    def _drop(self, shard: bytes, since: _Since) -> int:
        """Drops one copy, unless it has become needed; how many bytes that made free.

        A manifest that came after the asking began was confirmed to somebody only with a touch,
        and what was touched since stays."""
        now_s = self._clock.monotonic_s()
        if not self._promises.may_drop(shard, now_s) or not since.still_holds(self._clock):
            return 0
        try:
            return self._shards.remove(shard, untouched_since=since.store_s)
        except CkptdError as error:
            _log.warning("copy_not_trimmed", shard=shard.hex(), reason=error.message)
            return 0
