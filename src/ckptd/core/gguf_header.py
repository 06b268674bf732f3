"""Where the last tensor of a GGUF file ends, from its header.

Source: the specification in ggml-org/ggml (versions 2 and 3, little-endian); block sizes: ggml.c.
The header holds the vocabulary, so it has megabytes; it is read in windows and not kept.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Final, TypeAlias

from ckptd.core import limits
from ckptd.core.spans import Span, Unfinished
from ckptd.errors import HeaderInvalid

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ALIGNMENT_KEY: Final = b"general.alignment"
ALIGNMENT_DEFAULT_BYTES: Final = 32
_STRING: Final = 8
_ARRAY: Final = 9
_UINT32: Final = 4
_SCALAR_BYTES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# ggml type -> (elements of a block, bytes of a block)
BLOCKS: Final = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8),
    28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip

Number: TypeAlias = Generator[Span, bytes, int]
Bytes: TypeAlias = Generator[Span, bytes, bytes]


class _Window:
    """The header as a stream: asks for more when what it has is used up."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.position = 0  # in the file
        self._begin = 0
        self._bytes = b""

    def take(self, length: int) -> Bytes:
        offset = self.position - self._begin
        if offset < 0 or offset + length > len(self._bytes):
            if self.position + length > min(self.size, limits.GGUF_HEADER_MAX_BYTES):
                raise Unfinished(f"has {self.size} bytes so far, not even its whole header")
            wanted = max(length, limits.GGUF_WINDOW_BYTES)
            self._bytes = yield Span(self.position, min(wanted, self.size - self.position))
            self._begin, offset = self.position, 0
            if len(self._bytes) < length:
                raise Unfinished("became shorter")
        self.position += length
        return self._bytes[offset : offset + length]

    def number(self, length: int) -> Number:
        raw = yield from self.take(length)
        return int.from_bytes(raw, "little")


def gguf_end(size: int) -> Number:
    """The least size in bytes of the whole file. `size`: what it has
    now. Other versions and byte orders than those above are taken as
    they are: then it is `size`. Raises HeaderInvalid, Unfinished."""
    window = _Window(size)
    magic = yield from window.take(4)
    if magic != MAGIC:
        raise HeaderInvalid("it does not begin with GGUF")
    version = yield from window.number(4)
    if version not in VERSIONS:
        return size
    tensors = yield from window.number(8)
    values = yield from window.number(8)
    if max(tensors, values) > limits.TENSORS_PER_CHECKPOINT_MAX:
        raise HeaderInvalid(f"it claims {tensors} tensors and {values} values")
    alignment = ALIGNMENT_DEFAULT_BYTES
    for _ in range(values):
        key = yield from _string(window)
        kind = yield from window.number(4)
        if key == ALIGNMENT_KEY and kind == _UINT32:
            alignment = max(1, (yield from window.number(4)))
        else:
            yield from _skip_value(window, kind)
    end = 0
    for _ in range(tensors):
        end = max(end, (yield from _tensor_end(window)))
    return -(-window.position // alignment) * alignment + end if tensors else window.position


def _string(window: _Window) -> Bytes:
    length = yield from window.number(8)
    if length > limits.GGUF_TEXT_MAX_BYTES:
        raise HeaderInvalid(f"a text in its header claims {length} bytes")
    return (yield from window.take(length))


def _skip_value(window: _Window, kind: int) -> Generator[Span, bytes, None]:
    if kind == _STRING:
        yield from _string(window)
    elif kind == _ARRAY:
        element = yield from window.number(4)
        count = yield from window.number(8)
        if count > limits.GGUF_HEADER_MAX_BYTES:
            raise HeaderInvalid(f"an array in its header claims {count} values")
        if element == _STRING:
            for _ in range(count):
                yield from _string(window)
        else:
            window.position += _scalar_bytes(element) * count
    else:
        window.position += _scalar_bytes(kind)


def _scalar_bytes(kind: int) -> int:
    if kind not in _SCALAR_BYTES:
        raise HeaderInvalid(f"its header has a value of the unknown type {kind}")
    return _SCALAR_BYTES[kind]


def _tensor_end(window: _Window) -> Number:
    yield from _string(window)
    dimensions = yield from window.number(4)
    if dimensions > limits.TENSOR_DIMENSIONS_MAX:
        raise HeaderInvalid(f"a tensor claims {dimensions} dimensions")
    elements = 1
    for _ in range(dimensions):
        elements *= yield from window.number(8)
    kind = yield from window.number(4)
    offset = yield from window.number(8)
    # Of a type that came later only the beginning is known.
    block, block_bytes = BLOCKS.get(kind, (1, 0))
    return offset + -(-elements // block) * block_bytes
