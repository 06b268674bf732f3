"""What the parts of a node reach the world through, besides its disk: a clock and the network.

Background jobs and request handlers take these as arguments. They never read the `time` module,
open no socket and make no thread, so that a whole cluster of them runs in a test on virtual time.
The third port is `ckptd.store.filesystem.FileSystem`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from ckptd.clock import SYSTEM_CLOCK, Clock, SystemClock
from ckptd.wire.messages import CopyReport, Message

__all__ = ["SYSTEM_CLOCK", "Clock", "Network", "OnDisk", "SystemClock"]

_A = TypeVar("_A", bound=Message)
_T = TypeVar("_T")


class Network(Protocol):
    """The other nodes as one node reaches them, by their ids. All methods raise PeerError: a node
    that is not known or does not answer is PeerUnreachable, a refusal is PeerRefused."""

    async def request(
        self,
        node: str,
        message: Message,
        answer: type[_A],
        *,
        payload: bytes = b"",
        timeout_s: float,
    ) -> tuple[_A, bytes]:
        """Asks `node` over an authenticated control connection; its answer and payload.

        `timeout_s` bounds the time without any sign of life for this request."""

    async def push(
        self, shard: bytes, size: int, target: str, *, rate_bytes_per_s: float | None = None
    ) -> CopyReport:
        """Sends this node's own copy of a shard of `size` bytes to `target`, on the slots that
        are kept for pushes; what `target` says of its copy. It is not sent faster than
        `rate_bytes_per_s` (None: without a limit). Raises NotFound or ShardCorrupt, too, when it
        is not here to be sent."""


class OnDisk(Protocol):
    """Runs work that blocks on the disk in a bounded pool of threads."""

    def __call__(self, work: Callable[[], _T]) -> Awaitable[_T]: ...
