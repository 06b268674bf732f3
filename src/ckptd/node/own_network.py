"""The network as the jobs of one node use it: this node can be asked like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ckptd.core import limits
from ckptd.errors import CkptdError, PeerError, PeerRefused
from ckptd.net.bulk import refusal
from ckptd.node.ports import Network
from ckptd.node.requests import NodeAnswerer
from ckptd.wire.messages import CopyReport, Message

_A = TypeVar("_A", bound=Message)


class OwnNetwork:
    """As `Network`, where a question to `node_id` is answered by `handlers`, and all others go
    to `others`."""

    def __init__(
        self, node_id: str, handlers: Mapping[type[Message], NodeAnswerer], others: Network
    ) -> None:
        self._node_id = node_id
        self._handlers = handlers
        self._others = others

    async def request(
        self,
        node: str,
        message: Message,
        answer: type[_A],
        *,
        payload: bytes = b"",
        timeout_s: float = limits.REQUEST_TIMEOUT_S,
    ) -> tuple[_A, bytes]:
        """As `Network.request`."""
        if node != self._node_id:
            return await self._others.request(
                node, message, answer, payload=payload, timeout_s=timeout_s
            )
        handler = self._handlers.get(type(message))
        if handler is None:
            raise PeerRefused(node, "refused", f"{node} has not the role for this")
        try:
            reply, received = await handler(self._node_id, message, lambda _: None)
        except PeerError:
            raise
        except CkptdError as error:
            raise PeerRefused(node, error.kind, error.message, next=error.next) from error
        if not isinstance(reply, answer):
            raise refusal(node, reply)
        return reply, bytes(received)

    async def push(
        self, shard: bytes, size: int, target: str, *, rate_bytes_per_s: float | None = None
    ) -> CopyReport:
        """As `Network.push`."""
        return await self._others.push(shard, size, target, rate_bytes_per_s=rate_bytes_per_s)
