"""Frames: a header of 32 bytes, a small msgpack body, a raw payload.

    offset  size  field
         0     4  magic "CKPT"
         4     1  protocol version (1)
         5     1  hop: 0 from a client, 1 and more when forwarded along a chain
         6     2  message type
         8     2  flags (0 in this version; others are refused)
        10     2  reserved (0)
        12     4  request id: an answer carries that of its request
        16     8  body length in bytes
        24     8  payload length in bytes

All integers are big endian. `docs/formats/wire.md` is the full description.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from ckptd.core import limits
from ckptd.errors import LimitExceeded, ProtocolError
from ckptd.wire import messages

MAGIC: Final = b"CKPT"
PROTOCOL_VERSION: Final = 1
HEADER: Final = struct.Struct(">4sBBHHHIQQ")
HEADER_BYTES: Final = HEADER.size
assert HEADER_BYTES == 32


class FrameHeader(NamedTuple):
    """A parsed header. Lengths are in bytes and already within the limits."""

    type: int
    request_id: int
    hop: int
    body_bytes: int
    payload_bytes: int


def encode_header(
    type: int,  # noqa: A002
    request_id: int,
    body_bytes: int,
    payload_bytes: int = 0,
    *,
    hop: int = 0,
) -> bytes:
    """The 32 bytes in front of a body of `body_bytes` and a payload of `payload_bytes`."""
    return HEADER.pack(
        MAGIC, PROTOCOL_VERSION, hop, type, 0, 0, request_id, body_bytes, payload_bytes
    )


def encode_frame(
    message: messages.Message, request_id: int, payload_bytes: int = 0, *, hop: int = 0
) -> bytes:
    """Header and body of `message`; a payload of `payload_bytes` is to follow them on the wire."""
    body = messages.encode(message)
    number = messages.NUMBERS[type(message)]
    return encode_header(number, request_id, len(body), payload_bytes, hop=hop) + body


def parse_header(raw: bytes | bytearray | memoryview, *, peer: str) -> FrameHeader:
    """The header in `raw` (exactly 32 bytes) from `peer` (a name for messages).

    Raises ProtocolError for another magic, version or flags, LimitExceeded for lengths over the
    limits: nothing is allocated before this has passed.
    """
    magic, version, hop, kind, flags, reserved, request_id, body, payload = HEADER.unpack(raw)
    if magic != MAGIC:
        raise ProtocolError(peer, "does not speak the ckptd protocol")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(
            peer,
            f"speaks protocol version {version}, this side speaks {PROTOCOL_VERSION}: "
            "upgrade the older one",
        )
    if flags or reserved:
        raise ProtocolError(peer, f"sent a frame with unknown flags {flags:#06x}/{reserved:#06x}")
    if hop > limits.CHAIN_HOPS_MAX:
        raise LimitExceeded(peer, f"sent hop {hop}, over the limit of {limits.CHAIN_HOPS_MAX}")
    if body > limits.FRAME_BODY_MAX_BYTES:
        raise LimitExceeded(peer, f"announced a body of {body} bytes, over the limit")
    if payload > limits.FRAME_PAYLOAD_MAX_BYTES:
        raise LimitExceeded(peer, f"announced a payload of {payload} bytes, over the limit")
    return FrameHeader(kind, request_id, hop, body, payload)
