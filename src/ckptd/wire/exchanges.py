"""Which message answers which, on which channel, and how much payload each may carry.

These tables are the protocol's grammar; `docs/formats/wire.md` prints them. A request is answered
by any number of Progress frames and then exactly one final response: one of its own answers, or
Error, or Busy.
"""

from __future__ import annotations

from enum import Flag
from typing import Final

from ckptd.core import limits
from ckptd.errors import LimitExceeded, ProtocolError
from ckptd.wire import frames, messages
from ckptd.wire.messages import Message


class Channel(Flag):
    """The two kinds of connections. Shards travel on bulk ones only."""

    CONTROL = 1
    BULK = 2
    BOTH = 3


REQUESTS: Final[dict[type[Message], frozenset[type[Message]]]] = {
    messages.Ping: frozenset({messages.NodeStatus}),
    messages.GetStatus: frozenset({messages.NodeStatus}),
    messages.Have: frozenset({messages.HaveReply}),
    messages.Inventory: frozenset({messages.InventoryReply}),
    messages.ListDocuments: frozenset({messages.DocumentHeaders}),
    messages.GetDocuments: frozenset({messages.Documents}),
    messages.PutDocuments: frozenset({messages.PutDocumentsReply}),
    messages.Sync: frozenset({messages.SyncReply}),
    messages.Verify: frozenset({messages.VerifyReply}),
    messages.ReportCorrupt: frozenset({messages.VerifyReply}),
    messages.GetWatched: frozenset({messages.Watched}),
    messages.Prune: frozenset({messages.PruneReply}),
    messages.SetJob: frozenset({messages.NodeStatus}),
    messages.CopyShards: frozenset({messages.CopyShardsReply}),
    messages.Promise: frozenset({messages.PromiseReply}),
    messages.Surplus: frozenset({messages.SurplusReply}),
    messages.PushShard: frozenset({messages.PutResult}),
    messages.PutShard: frozenset({messages.Ready, messages.PutResult}),
    messages.GetShard: frozenset({messages.ShardData}),
}
"""Each request with the responses of its own."""

PROGRESSIVE: Final[frozenset[type[Message]]] = frozenset(
    {
        messages.Verify,
        messages.ReportCorrupt,
        messages.Prune,
        messages.CopyShards,
        messages.Promise,
    }
)
"""Requests on control connections that take long. While one is worked on, Progress keeps it alive;
no other request is, or a peer could hold whoever asks it for as long as it likes."""

ANY_REQUEST: Final[frozenset[type[Message]]] = frozenset({messages.Error, messages.Busy})
"""Final responses that every request may get."""

RESPONSES: Final[frozenset[type[Message]]] = (
    frozenset().union(*REQUESTS.values()) | ANY_REQUEST | {messages.Progress}
)

_CHANNELS: Final[dict[type[Message], Channel]] = {
    messages.Hello: Channel.BOTH,
    messages.Error: Channel.BOTH,
    messages.Busy: Channel.BOTH,
    messages.Progress: Channel.BOTH,
    messages.PutShard: Channel.BULK,
    messages.PushShard: Channel.BULK,
    messages.Ready: Channel.BULK,
    messages.PutResult: Channel.BULK,
    messages.GetShard: Channel.BULK,
    messages.ShardData: Channel.BULK,
}

PAYLOADS_MAX_BYTES: Final[dict[type[Message], int]] = {
    messages.Documents: limits.DOCUMENTS_PAYLOAD_MAX_BYTES,
    messages.PutDocuments: limits.DOCUMENTS_PAYLOAD_MAX_BYTES,
    messages.SyncReply: 32 * limits.CATALOGUE_DOCUMENTS_MAX,
    messages.ShardData: limits.SHARD_SIZE_MAX_BYTES,
}
"""Messages that may carry a payload. All others carry none."""


def channel_of(kind: type[Message]) -> Channel:
    """On which connections messages of type `kind` are allowed."""
    return _CHANNELS.get(kind, Channel.CONTROL)


def body_limit(kind: type[Message]) -> int:
    """The longest body of a message of type `kind`, in bytes. Requests are held to less, because
    a node holds many of them at a time, and so is what travels on the many bulk connections."""
    if channel_of(kind) & Channel.BULK:
        return limits.BULK_BODY_MAX_BYTES
    if kind in REQUESTS or kind is messages.Hello:
        return limits.REQUEST_BODY_MAX_BYTES
    return limits.FRAME_BODY_MAX_BYTES


def check_header(header: frames.FrameHeader, channel: Channel, *, peer: str) -> type[Message]:
    """The type of message that `header` announces, before anything of it is read.

    Raises ProtocolError for a type that is unknown or does not belong on `channel` (CONTROL or
    BULK), LimitExceeded for a body or payload that is too long for it.
    """
    kind = messages.type_of(header.type, peer=peer)
    if not channel_of(kind) & channel:
        raise ProtocolError(
            peer, f"sent {kind.__name__} on a {str(channel.name).lower()} connection"
        )
    if header.body_bytes > body_limit(kind):
        raise LimitExceeded(
            peer,
            f"announced {kind.__name__} of {header.body_bytes} bytes, "
            f"over the limit of {body_limit(kind)}",
        )
    payload_limit = PAYLOADS_MAX_BYTES.get(kind, 0)
    if header.payload_bytes > payload_limit:
        raise LimitExceeded(
            peer,
            f"announced a payload of {header.payload_bytes} bytes after {kind.__name__}, "
            f"over the limit of {payload_limit}",
        )
    return kind
