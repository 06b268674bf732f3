"""Where shards come from: nodes of a cluster, or store directories of mounted disks.

Both are used alike. A *place* is a node's id or a store's path. Bytes are handed over as they
come: whoever takes them compares the hash.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import structlog

from ckptd.client.cluster import Cluster
from ckptd.core import limits
from ckptd.errors import (
    CkptdError,
    NotFound,
    PeerError,
    PeerRefused,
    PeerStalled,
    ProtocolError,
    ShardCorrupt,
)
from ckptd.net.bulk import BulkChannel, refusal
from ckptd.store import layout
from ckptd.wire import messages

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

Take = Callable[[memoryview], None]
"""Takes the next bytes of a shard; the view is used again afterwards."""

# To deliver a report. The node goes on with it when nobody waits any more: it reads a bad copy
# twice, some seconds apart.
_REPORT_TIMEOUT_S: Final = 1.0


class ShardStream(Protocol):
    """A way to fetch shards from one place, one after the other, by one thread."""

    def fetch(self, shard: bytes, size: int, take: Take) -> None:
        """Hands all `size` bytes of a shard to `take`, in pieces of at most BULK_BUFFER_BYTES.

        Raises NotFound when it is not there, ShardCorrupt when it has another size, PeerBusy,
        PeerError or CkptdError when it cannot be read now, and whatever `take` raises. Its hash is
        not compared here.
        """

    def interrupt(self) -> None:
        """From another thread: makes a `fetch` that waits fail at once."""

    @property
    def broken(self) -> bool:
        """Whether nothing more can be fetched through this stream."""

    def close(self) -> None: ...


class ShardSources(Protocol):
    """All places that can be asked. Thread-safe."""

    def holders(self, shards: Sequence[bytes]) -> list[tuple[str, ...]]:
        """For each shard the places that have it."""

    def open(self, place: str) -> ShardStream:
        """A stream from one place. Raises PeerError when it cannot be reached."""

    def report_corrupt(self, place: str, shard: bytes) -> None:
        """Tells a place that its copy is bad; returns at once."""

    def lose(self, place: str, error: CkptdError) -> None:
        """Notes that a place can no longer be asked."""

    @property
    def how_to_reach(self) -> str:
        """What to do about places that are absent, for a message."""

    def absent(self) -> list[str]:
        """Places that may have copies and did not answer, in words for a message."""

    def flush(self) -> None:
        """Waits until the reports are delivered, for a limited time. Raises nothing."""


class NodeSources:
    """The nodes of a cluster. Made on the event loop of `cluster`, used from other threads."""

    how_to_reach = "ckptd nodes; start those that are down, then restore again"

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._loop = asyncio.get_running_loop()
        self._reports: list[Future[None]] = []

    def holders(self, shards: Sequence[bytes]) -> list[tuple[str, ...]]:
        """As in ShardSources. One question to each node for thousands of shards."""
        asked = list(shards)
        interned: dict[tuple[str, ...], tuple[str, ...]] = {}
        found: list[tuple[str, ...]] = []
        for start in range(0, len(asked), limits.SHARDS_PER_QUESTION):
            batch = asked[start : start + limits.SHARDS_PER_QUESTION]
            for nodes in self._on_loop(self._cluster.holders(batch)):
                places = tuple(sorted(nodes))
                found.append(interned.setdefault(places, places))
        return found

    def open(self, place: str) -> ShardStream:
        """As in ShardSources. Raises PeerUnreachable, PeerBusy, PeerStalled or NotAuthorized."""
        node = self._cluster.nodes.get(place)
        if node is None:
            raise NotFound(f"{place} is no longer reachable")
        return _NodeStream(self._cluster, node.hop)

    def report_corrupt(self, place: str, shard: bytes) -> None:
        """As in ShardSources: the node re-reads its copy and moves a bad one to quarantine."""
        node = self._cluster.nodes.get(place)
        if node is None:
            return

        async def report() -> None:
            try:
                await node.control.request(messages.ReportCorrupt(shard), messages.VerifyReply)
            except CkptdError as error:
                _log.info("report_unanswered", node=place, reason=error.message)

        self._reports.append(asyncio.run_coroutine_threadsafe(report(), self._loop))

    def lose(self, place: str, error: CkptdError) -> None:
        """As in ShardSources; the cluster counts the node as absent from then on."""

        async def lose() -> None:
            node = self._cluster.nodes.get(place)
            if node is not None:
                self._cluster.lose(node, error)

        self._on_loop(lose())

    def absent(self) -> list[str]:
        """As in ShardSources."""
        missing = [
            f"{node.id or node.address} ({node.reason})" for node in self._cluster.absent.values()
        ]
        failed = [
            f"{node.id} (its disk fails: {node.status.failed_reason})"
            for node in self._cluster.nodes.values()
            if node.status.state == "failed"
        ]
        return missing + failed

    def flush(self) -> None:
        """As in ShardSources."""
        deadline_s = time.monotonic() + _REPORT_TIMEOUT_S
        for report in self._reports:
            with contextlib.suppress(TimeoutError):
                report.result(max(0.0, deadline_s - time.monotonic()))
        self._reports.clear()

    def _on_loop(self, work: Coroutine[Any, Any, _T]) -> _T:
        # Every request inside has a deadline of its own.
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _NodeStream:
    """One bulk connection to a node."""

    def __init__(self, cluster: Cluster, hop: messages.Hop) -> None:
        self._connector = cluster.bulk
        self._hop = hop
        self._channel: BulkChannel = self._connector.acquire(hop.node, hop.host, hop.port)
        self._buffer = memoryview(bytearray(limits.BULK_BUFFER_BYTES))

    @property
    def broken(self) -> bool:
        return self._channel.broken

    def fetch(self, shard: bytes, size: int, take: Take) -> None:
        self._request(shard, size)
        try:
            left = size
            while left:
                piece = self._buffer[: min(left, len(self._buffer))]
                self._fill(piece)
                take(piece)
                left -= len(piece)
        except BaseException:
            # Bytes of this answer may still come: nothing else can be read behind them.
            self._channel.broken = True
            raise

    def _request(self, shard: bytes, size: int) -> None:
        self._channel.send(messages.GetShard(shard))
        header, answer = self._channel.receive()
        if isinstance(answer, messages.Busy | messages.Error):
            raise self._as_copy_error(refusal(self._hop.node, answer), shard)
        self._channel.broken = True  # until the whole payload has been read
        if not isinstance(answer, messages.ShardData) or answer.shard != shard:
            raise ProtocolError(self._hop.node, "answered something else than the shard asked for")
        if header.payload_bytes != size:
            raise ShardCorrupt(shard.hex(), node=self._hop.node)
        self._channel.broken = False

    def _fill(self, piece: memoryview) -> None:
        """Fills `piece`. A peer that only trickles counts as stalled."""
        deadline_s = time.monotonic() + limits.STALL_TIMEOUT_S
        filled = 0
        while filled < len(piece):
            filled += self._channel.receive_payload(piece[filled:])
            if time.monotonic() > deadline_s:
                self._channel.broken = True
                raise PeerStalled(self._hop.node, "sent next to nothing within the deadline")

    def _as_copy_error(self, error: PeerError, shard: bytes) -> CkptdError:
        """What a refusal says about this one copy; `error` itself when it says nothing."""
        code = error.code if isinstance(error, PeerRefused) else ""
        if code == NotFound.kind:
            return NotFound(f"{self._hop.node} no longer has shard {shard.hex()}")
        if code == ShardCorrupt.kind:
            return ShardCorrupt(shard.hex(), node=self._hop.node)
        return error

    def interrupt(self) -> None:
        self._channel.interrupt()

    def close(self) -> None:
        hop = self._hop
        self._connector.release(hop.node, hop.host, hop.port, self._channel)


class DirectorySources:
    """Store directories, read without a daemon, a network, or a write.

    `known_nodes`: how many nodes the documents in them name. Fewer directories than that leave
    open whether the others have copies.
    """

    how_to_reach = "mount more of the stores, and add --from STORE_DIR for each of them"

    def __init__(self, directories: Iterable[Path], *, known_nodes: int) -> None:
        self._paths = [str(path) for path in directories]
        self._known_nodes = known_nodes
        self._unreadable: dict[str, str] = {}

    def holders(self, shards: Sequence[bytes]) -> list[tuple[str, ...]]:
        """As in ShardSources: by looking whether the file is there."""
        return [
            tuple(path for path in self._paths if os.path.isfile(layout.shard_path(path, digest)))
            for digest in shards
        ]

    def open(self, place: str) -> ShardStream:
        """As in ShardSources."""
        return _DirectoryStream(place)

    def report_corrupt(self, place: str, shard: bytes) -> None:
        """As in ShardSources: only noted, as the disk may be mounted read-only."""
        _log.warning("shard_corrupt", store=place, shard=shard.hex())

    def lose(self, place: str, error: CkptdError) -> None:
        """As in ShardSources."""
        self._unreadable[place] = error.message

    def absent(self) -> list[str]:
        """As in ShardSources: there are more nodes than directories given, or one failed."""
        missing = [f"{path} ({reason})" for path, reason in self._unreadable.items()]
        others = self._known_nodes - len(self._paths)
        if others > 0:
            missing.append(f"{others} more stores that this cluster has")
        return missing

    def flush(self) -> None:
        """As in ShardSources: nothing is under way."""


class _DirectoryStream:
    """Files below one store directory."""

    broken = False

    def __init__(self, path: str) -> None:
        self._path = path
        self._buffer = memoryview(bytearray(limits.BULK_BUFFER_BYTES))

    def fetch(self, shard: bytes, size: int, take: Take) -> None:
        path = layout.shard_path(self._path, shard)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise NotFound(f"{path} is gone") from error
        except OSError as error:
            raise ShardCorrupt(shard.hex(), node=self._path) from error
        try:
            if os.fstat(descriptor).st_size != size:
                raise ShardCorrupt(shard.hex(), node=self._path)
            offset = 0
            while offset < size:
                piece = self._buffer[: min(len(self._buffer), size - offset)]
                count = self._read(descriptor, shard, piece, offset)
                take(piece[:count])
                offset += count
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, shard: bytes, piece: memoryview, offset: int) -> int:
        try:
            count = os.preadv(descriptor, [piece], offset)
        except OSError as error:  # an unreadable sector: other shards of this disk may be fine
            raise ShardCorrupt(shard.hex(), node=self._path) from error
        if not count:
            raise ShardCorrupt(shard.hex(), node=self._path)
        return count

    def interrupt(self) -> None:
        """Reads of a local disk cannot be cut off."""

    def close(self) -> None:
        """Nothing stays open between two shards."""
