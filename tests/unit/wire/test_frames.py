"""The frame header: 32 bytes that are checked before anything else of a frame is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core import limits
from ckptd.errors import LimitExceeded, ProtocolError
from ckptd.wire import frames, messages
from ckptd.wire.frames import FrameHeader

HEADERS = st.builds(
    FrameHeader,
    type=st.integers(0, 2**16 - 1),
    request_id=st.integers(0, 2**32 - 1),
    hop=st.integers(0, limits.CHAIN_HOPS_MAX),
    body_bytes=st.integers(0, limits.FRAME_BODY_MAX_BYTES),
    payload_bytes=st.integers(0, limits.FRAME_PAYLOAD_MAX_BYTES),
)


def pack(
    magic: bytes = b"CKPT",
    version: int = 1,
    hop: int = 0,
    kind: int = 4,
    flags: int = 0,
    reserved: int = 0,
    request_id: int = 1,
    body_bytes: int = 0,
    payload_bytes: int = 0,
) -> bytes:
    return frames.HEADER.pack(
        magic, version, hop, kind, flags, reserved, request_id, body_bytes, payload_bytes
    )


@given(HEADERS)
def test_what_is_encoded_is_parsed(header: FrameHeader) -> None:
    raw = frames.encode_header(
        header.type, header.request_id, header.body_bytes, header.payload_bytes, hop=header.hop
    )
    assert len(raw) == frames.HEADER_BYTES == 32
    assert frames.parse_header(raw, peer="pi1") == header


def test_every_field_stands_where_the_format_says() -> None:
    raw = frames.encode_header(0x0102, 0x03040506, 0x0708, 0x090A0B, hop=2)
    assert raw.hex(" ", 4) == (
        "434b5054 01020102 00000000 03040506 00000000 00000708 00000000 00090a0b"
    )


@given(st.binary(min_size=32, max_size=32))
def test_random_bytes_are_a_header_or_a_protocol_error(raw: bytes) -> None:
    try:
        header = frames.parse_header(raw, peer="pi1")
    except ProtocolError:
        return
    assert raw.startswith(b"CKPT") and header.body_bytes <= limits.FRAME_BODY_MAX_BYTES


@given(HEADERS, st.integers(0, 31), st.integers(1, 255))
def test_a_mutated_header_never_passes_for_the_original(
    header: FrameHeader, position: int, change: int
) -> None:
    raw = bytearray(
        frames.encode_header(
            header.type, header.request_id, header.body_bytes, header.payload_bytes, hop=header.hop
        )
    )
    raw[position] ^= change
    try:
        assert frames.parse_header(raw, peer="pi1") != header
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        (pack(magic=b"GET "), ProtocolError, "does not speak the ckptd protocol"),
        (pack(version=2), ProtocolError, "version 2, this side speaks 1: upgrade"),
        (pack(version=0), ProtocolError, "version 0"),
        (pack(flags=1), ProtocolError, "unknown flags 0x0001"),
        (pack(flags=0x8000), ProtocolError, "unknown flags"),
        (pack(reserved=1), ProtocolError, "unknown flags"),
        (pack(hop=limits.CHAIN_HOPS_MAX + 1), LimitExceeded, "hop 5"),
        (pack(body_bytes=limits.FRAME_BODY_MAX_BYTES + 1), LimitExceeded, "body"),
        (pack(body_bytes=2**63), LimitExceeded, "body of 9223372036854775808 bytes"),
        (pack(payload_bytes=limits.FRAME_PAYLOAD_MAX_BYTES + 1), LimitExceeded, "payload"),
        (pack(payload_bytes=2**63), LimitExceeded, "payload of 9223372036854775808 bytes"),
        (pack(payload_bytes=2**64 - 1), LimitExceeded, "payload"),
    ],
)
def test_refused_headers_name_the_peer_and_the_reason(
    raw: bytes, error: type[ProtocolError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        frames.parse_header(raw, peer="pi1")
    assert caught.value.node == "pi1"
    assert isinstance(caught.value, LimitExceeded) == (error is LimitExceeded)


def test_an_encoded_frame_is_header_and_body_and_announces_the_payload() -> None:
    message = messages.ShardData(b"\x07" * 32)
    frame = frames.encode_frame(message, 9, 1000, hop=3)
    header = frames.parse_header(frame[:32], peer="pi1")
    assert header == FrameHeader(37, 9, 3, len(frame) - 32, 1000)
    assert messages.decode(37, frame[32:], peer="pi1") == message
