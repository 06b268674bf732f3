"""The job "trim": drops copies of which others hold enough, on their promises alone.

The steward hints which copies are too many; nothing is believed of that. Before a copy goes, this
node reads its own live manifests to learn which versions name the shard and how many copies each
wants, and for each of them that many other workers, which take copies and have the manifest, must
promise to keep theirs, and prove that they have the bytes. The rules of promises are in
`ckptd.core.trimming`; why all this holds, whatever is delayed or restarted, in
docs/decisions/trimming.md.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import structlog

from ckptd.core import limits
from ckptd.core.headers import VersionHeader
from ckptd.core.steward import Standings
from ckptd.core.trimming import ACT_WITHIN, Claim, Promises, is_surplus, proof_of_possession
from ckptd.errors import CkptdError, NotFound, PeerBusy, PeerError, Refused
from ckptd.net.control_connection import Answer, Progress
from ckptd.node.copier import while_telling
from ckptd.node.jobs import JobProgress
from ckptd.node.ports import Clock, Network, OnDisk
from ckptd.node.records import Records
from ckptd.node.requests import NodeAnswerer
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

    `copies` is the cluster's setting; `promise_s` is how long promises last (`repair.promise`).
    `suspect` re-reads a copy that was found bad; `wake` lets the next slice begin.
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
        self._on_disk = on_disk
        self._clock = clock
        self._rng = rng
        self._promises = Promises(lasts_s=promise_s, started_s=clock.monotonic_s())
        self._noted: dict[bytes, int] = {}  # with the size in bytes
        self._asked_by: set[str] = set()
        self._proving = asyncio.Lock()  # one question at a time makes the disk busy
        self._salted: dict[tuple[bytes, bytes], bytes] = {}  # by nonce and shard
        self._dropped_bytes = 0
        self.wake: Callable[[], None] = lambda: None
        self.handlers: Mapping[type[Message], NodeAnswerer] = {
            messages.Promise: self._promise,
            messages.Surplus: self._surplus,
        }

    def progress(self) -> JobProgress:
        """As `Job.progress`."""
        left = sum(self._noted.values())
        return JobProgress(self._dropped_bytes, self._dropped_bytes + left)

    # -- questions of others

    async def _surplus(self, _: str, request: messages.Surplus, __: Progress) -> Answer:
        noted = 0
        for shard in request.shards:
            if shard in self._noted or self._note(shard):
                noted += 1
        if noted:
            self.wake()
        return messages.SurplusReply(noted), b""

    def _note(self, shard: bytes) -> bool:
        size = self._shards.size(shard)
        if size is None or len(self._noted) >= limits.SURPLUS_NOTED_MAX:
            return False
        self._noted[shard] = size
        return True

    async def _promise(self, asker: str, request: messages.Promise, progress: Progress) -> Answer:
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
        self._check_extent(request, sizes)
        if asker in self._asked_by:
            raise PeerBusy(self._node_id, f"answers another question of {asker}")
        self._asked_by.add(asker)
        try:
            proofs = await while_telling(self._prove(request, sizes), progress)
        finally:
            self._asked_by.remove(asker)
        return messages.PromiseReply(tuple(proofs)), b""

    @staticmethod
    def _check_extent(request: messages.Promise, sizes: Mapping[bytes, int]) -> None:
        """Raises Refused for more than one slice asks about: all of it is read from the disk."""
        if len(set(request.shards)) < len(request.shards):
            raise Refused("the same shard twice in one question")
        size = sum(sizes.values())
        if len(sizes) > 1 and size > limits.SURPLUS_PER_SLICE_BYTES:
            raise Refused(f"{size} bytes to be read for one question")

    async def _prove(self, request: messages.Promise, sizes: Mapping[bytes, int]) -> list[bytes]:
        async with self._proving:
            return [
                await self._keep(shard, size, request) if (size := sizes.get(shard)) else b""
                for shard in request.shards
            ]

    async def _keep(self, shard: bytes, size: int, request: messages.Promise) -> bytes:
        """Promises one copy; the proof that it is here, or empty."""
        now_s = self._clock.monotonic_s()
        if not self._shards.has(shard, size) or not self._promises.may_give(
            shard, request.seconds, now_s
        ):
            return b""
        salted = await self._read(shard, request.nonce)
        if not salted or not self._promises.give(shard, request.seconds, self._clock.monotonic_s()):
            return b""
        # Looked at once more: this node may have dropped its copy meanwhile.
        if not self._shards.has(shard, size):
            return b""
        return proof_of_possession(salted, self._node_id)

    async def _read(self, shard: bytes, nonce: bytes) -> bytes:
        """The SHA-256 over the nonce and the bytes of the copy here; empty without a good copy. One
        that several versions name is read once for each nonce."""
        if (nonce, shard) in self._salted:
            return self._salted[nonce, shard]
        look = await self._on_disk(partial(self._shards.look, shard, salt=nonce))
        if look.result is VerifyResult.CORRUPT:
            await self._suspect(shard)
        if look.salted:
            while len(self._salted) >= limits.SHARDS_PER_PROMISE_MAX * 2:
                del self._salted[next(iter(self._salted))]
            self._salted[nonce, shard] = look.salted
        return look.salted

    # -- the job

    async def step(self) -> float:
        """As `Job.step`."""
        wait_s = self._promises.wait_s(self._clock.monotonic_s())
        if wait_s:
            return wait_s
        if not self._noted:
            return limits.REPAIR_LOOK_S
        if await self._trim(self._take_noted()):
            return 0.0
        # Somebody else may ask about the same shards at the same time.
        return limits.REPAIR_LOOK_S * self._rng.uniform(0.5, 1.5)

    def _take_noted(self) -> dict[bytes, int]:
        """The noted shards of one slice, and their sizes in bytes."""
        some: dict[bytes, int] = {}
        total_bytes = 0
        for shard, size in self._noted.items():
            total_bytes += size
            if some and total_bytes > limits.SURPLUS_PER_SLICE_BYTES:
                break
            some[shard] = size
            if len(some) == limits.SHARDS_PER_PROMISE_MAX:
                break
        for shard in some:
            del self._noted[shard]
        return some

    async def _trim(self, shards: Mapping[bytes, int]) -> int:
        """Drops those of the shards that it may drop; how many that are."""
        now_s = self._clock.monotonic_s()
        since = _Since(now_s, self._clock.wall_s(), self._shards.now())
        asked = [shard for shard in shards if self._promises.begin(shard, now_s)]
        for shard, size in shards.items():
            if self._promises.promised(shard, now_s):
                self._noted[shard] = size  # its turn comes when the promise is over
        try:
            nonce = secrets.token_bytes(32)
            salted = {shard: await self._read(shard, nonce) for shard in asked}
            good = frozenset(shard for shard in asked if salted[shard])
            naming = await self._on_disk(partial(self._namings, good))
            claims = await self._claims(naming, nonce, salted)
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

    async def _claims(
        self, naming: Iterable[_Naming], nonce: bytes, salted: Mapping[bytes, bytes]
    ) -> dict[bytes, list[Claim]]:
        """For each shard what its versions want, and who promised to keep it and proved that it
        has it. `salted` is what this node read of its own copies with the nonce."""
        others = [
            node
            for node, standing in self._standings().items()
            if node != self._node_id and standing.takes_copies
        ]
        claims: dict[bytes, list[Claim]] = {}
        for version, copies, shards in naming:
            questions = (self._ask(node, version, shards, nonce) for node in others)
            answers = await asyncio.gather(*questions)
            for index, shard in enumerate(shards):
                promised_by = frozenset(
                    node
                    for node, proofs in zip(others, answers, strict=True)
                    if _is_proved(proofs[index], salted[shard], node)
                )
                claims.setdefault(shard, []).append(Claim(copies, promised_by))
        return claims

    async def _ask(
        self, node: str, version: str, shards: tuple[bytes, ...], nonce: bytes
    ) -> Sequence[bytes]:
        """The proofs of one node, one for each shard."""
        nothing = (b"",) * len(shards)
        question = messages.Promise(bytes.fromhex(version), shards, self._promises.lasts_s, nonce)
        try:
            async with asyncio.timeout(self._promises.lasts_s * ACT_WITHIN):
                reply, _ = await self._network.request(
                    node, question, messages.PromiseReply, timeout_s=limits.REQUEST_TIMEOUT_S
                )
        except (PeerError, TimeoutError) as error:
            _log.debug("no_promise", node=node, reason=str(error))
            return nothing
        return reply.proofs if len(reply.proofs) == len(shards) else nothing

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


def _is_proved(proof: bytes, salted: bytes, node: str) -> bool:
    """Whether a node has shown that it has the same bytes as this one, which has a good copy."""
    return bool(salted) and proof == proof_of_possession(salted, node)
