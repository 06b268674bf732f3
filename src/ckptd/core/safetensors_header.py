"""Read and write the header of a safetensors file, without reading its tensors.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length N, N bytes of
a JSON object {name: {"dtype", "shape", "data_offsets"}, "__metadata__": {text: text}}, then the
tensors, which fill the rest of the file without holes or overlaps.

A header that the safetensors library (0.8) refuses is refused here, and one that it accepts is
accepted here, except that these are refused, all of which its own writer never makes:
- one name twice in any object (the library keeps the last one silently);
- white space before the "{" (the format forbids it);
- a tensor described by a list, a dtype spelled as an object, any other nested object, or over 100
  "[" in one description (the library stops at 125 levels of lists);
- lone surrogates in keys or values that nobody looks at;
- over `TENSORS_PER_FILE_MAX` tensors, `TENSOR_DIMENSIONS_MAX` dimensions, and names, descriptions
  or metadata longer than their limits, so that a header never unfolds to many times its size.

The scan goes over the bytes once and unfolds one description at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeGuard

import msgspec

from ckptd.core import limits
from ckptd.errors import HeaderInvalid

LENGTH_BYTES: Final = 8
ALIGNMENT_BYTES: Final = 8
METADATA_KEY: Final = "__metadata__"

# Bits of one element, in the order in which the library's writer sorts types (the last one first).
DTYPE_BITS: Final[Mapping[str, int]] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_DTYPE_RANK: Final = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}
_U64_MAX: Final = 2**64 - 1
_LISTS_PER_DESCRIPTION_MAX: Final = 100

_STRING_BODY = rb'[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+'
_KEY = re.compile(rb'[ \t\n\r]*+"(' + _STRING_BODY + rb')"[ \t\n\r]*+:[ \t\n\r]*+', re.DOTALL)
# An object without objects inside, or null. What stands inside is checked when it is decoded.
_VALUE = re.compile(rb'(\{[^{}"]*+(?:"' + _STRING_BODY + rb'"[^{}"]*+)*+\}|null)[ \t\n\r]*+')
_EMPTY = re.compile(rb"\{[ \t\n\r]*+\}")
_SPACE = re.compile(rb"[ \t\n\r]*+")


class Tensor(msgspec.Struct, frozen=True, gc=False):
    """One tensor: its bytes are `begin` to `end` of the file (not of the data section)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(msgspec.Struct, frozen=True):
    """A valid header. `tensors` in the order of their bytes, which start at `data_start`.

    `header_length` is the length of the JSON with its padding; `data_start` is 8 more.
    """

    tensors: tuple[Tensor, ...]
    metadata: dict[str, str]
    header_length: int
    data_start: int

    @property
    def file_size(self) -> int:
        """The size in bytes that a complete file with this header has."""
        return self.tensors[-1].end if self.tensors else self.data_start


class TensorOutline(NamedTuple):
    """A tensor that is going to be written: `length` is its size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    length: int


def read_length(first_bytes: bytes, file_size: int) -> int:
    """The length of the JSON that follows the first 8 bytes of a file of `file_size` bytes.

    Decide by it before anything is allocated: HeaderInvalid when the file is too short, or the
    length is over 100,000,000 bytes or past the end of the file.
    """
    if len(first_bytes) < LENGTH_BYTES:
        raise HeaderInvalid(f"the file has {file_size} bytes, too few for a safetensors header")
    length = int.from_bytes(first_bytes[:LENGTH_BYTES], "little")
    if length > limits.SAFETENSORS_HEADER_MAX_BYTES:
        raise HeaderInvalid(
            f"the header claims {length} bytes, more than {limits.SAFETENSORS_HEADER_MAX_BYTES}"
        )
    if LENGTH_BYTES + length > file_size:
        raise HeaderInvalid(
            f"the header claims {length} bytes, but the file has {file_size}: it is cut off, "
            "or no safetensors file"
        )
    return length


def parse_header(raw: bytes, file_size: int) -> Header:
    """The header in `raw` (the JSON after the first 8 bytes) of a file of `file_size` bytes.

    HeaderInvalid unless it is valid and the file is exactly as long as it promises.
    """
    header = read_header(raw)
    if file_size < header.file_size:
        raise HeaderInvalid(
            f"the file is cut off: its header promises {header.file_size} bytes, it has {file_size}"
        )
    if file_size > header.file_size:
        raise HeaderInvalid(
            f"{file_size - header.file_size} bytes follow after the last tensor: the header "
            f"promises {header.file_size} bytes, the file has {file_size}"
        )
    return header


def read_header(raw: bytes) -> Header:
    """The header in `raw`, of a file that may not be whole yet: compare its `file_size`.

    HeaderInvalid unless it is valid.
    """
    if not raw.startswith(b"{"):
        raise HeaderInvalid("the header does not start with {")
    data_start = LENGTH_BYTES + len(raw)
    metadata, tensors = _scan(raw, data_start)
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_ranges(tensors, data_start)
    return Header(tuple(tensors), metadata, len(raw), data_start)


def byte_length(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. HeaderInvalid for an unknown dtype, negative or absurd dimensions, and
    elements below a byte that do not fill whole bytes."""
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise HeaderInvalid(f"unknown dtype {_shown(dtype)}")
    if len(shape) > limits.TENSOR_DIMENSIONS_MAX:
        raise HeaderInvalid(f"{len(shape)} dimensions, more than {limits.TENSOR_DIMENSIONS_MAX}")
    # In order and with the element size last, because the library checks each step for overflow:
    # (0, 2**64 - 1, 2) has no elements, and (2**64 - 1, 2, 0) overflows.
    product = 1
    for dimension in (*shape, bits):
        if dimension < 0:
            raise HeaderInvalid(f"negative dimension {dimension}")
        product *= dimension
        if product > _U64_MAX:
            raise HeaderInvalid(f"absurd shape {_shown(tuple(shape))}: its size overflows 64 bits")
    if product % 8:
        raise HeaderInvalid(f"{product} bits of {dtype} do not fill whole bytes")
    return product // 8


def in_library_order(tensors: Iterable[TensorOutline]) -> list[TensorOutline]:
    """Sorted as the library writes them: by type, most strictly aligned first, then by name."""
    return sorted(tensors, key=lambda tensor: (-_DTYPE_RANK[tensor.dtype], tensor.name.encode()))


def build_header(tensors: Sequence[TensorOutline], metadata: Mapping[str, str]) -> bytes:
    """All bytes of a safetensors file up to its first tensor, whose data follows in this order.

    Byte for byte what the library writes for tensors `in_library_order` (with metadata sorted by
    key): compact JSON padded with spaces to 8 bytes, which aligns the data in the file.
    HeaderInvalid when a length does not follow from dtype and shape, a name occurs twice, or the
    header gets too long.
    """
    described: dict[str, Any] = {}
    if metadata:
        described[METADATA_KEY] = dict(sorted(metadata.items()))
    offset = 0
    for tensor in tensors:
        if tensor.name in described or tensor.name == METADATA_KEY:
            raise HeaderInvalid(f"tensor name {_shown(tensor.name)} occurs twice or is reserved")
        if tensor.length != byte_length(tensor.dtype, tensor.shape):
            raise HeaderInvalid(
                f"tensor {_shown(tensor.name)} has {tensor.length} bytes, its dtype and shape "
                f"say {byte_length(tensor.dtype, tensor.shape)}"
            )
        described[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.length),
        }
        offset += tensor.length
    raw = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % ALIGNMENT_BYTES)
    if len(raw) > limits.SAFETENSORS_HEADER_MAX_BYTES:
        raise HeaderInvalid(
            f"the header of {len(tensors)} tensors would have {len(raw)} bytes, "
            f"more than {limits.SAFETENSORS_HEADER_MAX_BYTES}"
        )
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


def _scan(raw: bytes, data_start: int) -> tuple[dict[str, str], list[Tensor]]:
    """Metadata and tensors in the order of the JSON."""
    metadata: dict[str, str] = {}
    tensors: list[Tensor] = []
    seen: set[str] = set()
    empty = _EMPTY.match(raw)
    if empty:
        _expect_end(raw, empty.end())
        return metadata, tensors
    position = 1
    while True:
        name, value, position = _next_member(raw, position)
        if name in seen:
            raise HeaderInvalid(f"tensor name {_shown(name)} occurs twice")
        seen.add(name)
        if name == METADATA_KEY:
            metadata = _metadata(value)
        elif len(tensors) == limits.TENSORS_PER_FILE_MAX:
            raise HeaderInvalid(f"more than {limits.TENSORS_PER_FILE_MAX} tensors")
        else:
            tensors.append(_described(name, value, data_start))
        separator = raw[position : position + 1]
        position += 1
        if separator == b"}":
            _expect_end(raw, position)
            return metadata, tensors
        if separator != b",":
            raise HeaderInvalid(f"broken JSON: no , or }} at byte {position - 1} of the header")


def _next_member(raw: bytes, position: int) -> tuple[str, bytes, int]:
    key = _KEY.match(raw, position)
    if key is None:
        raise HeaderInvalid(f"broken JSON: no name and colon at byte {position} of the header")
    if key.end(1) - key.start(1) > limits.TENSOR_NAME_MAX_BYTES:
        raise HeaderInvalid(f"a tensor name has over {limits.TENSOR_NAME_MAX_BYTES} bytes")
    name: str = _decoded(b'"' + key[1] + b'"', "a tensor name")
    value = _VALUE.match(raw, key.end())
    if value is None:
        raise HeaderInvalid(f"tensor {_shown(name)} is not described by a flat JSON object")
    limit = (
        limits.SAFETENSORS_METADATA_MAX_BYTES
        if name == METADATA_KEY
        else limits.TENSOR_DESCRIPTION_MAX_BYTES
    )
    if value.end(1) - value.start(1) > limit:
        raise HeaderInvalid(f"the description of {_shown(name)} has over {limit} bytes")
    return name, value[1], value.end()


def _expect_end(raw: bytes, position: int) -> None:
    space = _SPACE.match(raw, position)
    if space is None or space.end() != len(raw):
        raise HeaderInvalid(f"bytes follow after the JSON, at byte {position} of the header")


def _metadata(value: bytes) -> dict[str, str]:
    metadata = _decoded(value, METADATA_KEY)
    if metadata is None:
        return {}
    for key, text in metadata.items():
        if type(text) is not str:
            raise HeaderInvalid(f"metadata {_shown(key)} is not text")
    return metadata  # type: ignore[no-any-return]  # _VALUE lets through objects and null alone


def _described(name: str, value: bytes, data_start: int) -> Tensor:
    where = f"tensor {_shown(name)}"
    if value.count(b"[") > _LISTS_PER_DESCRIPTION_MAX:  # how deep Python decodes differs by version
        raise HeaderInvalid(f"{where} has over {_LISTS_PER_DESCRIPTION_MAX} times a [")
    fields = _decoded(value, where)
    if fields is None:
        raise HeaderInvalid(f"{where} is not described by a flat JSON object")
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if type(dtype) is not str:
        raise HeaderInvalid(f"{where} has no dtype")
    if not _is_sizes(shape):
        raise HeaderInvalid(f"{where} has no shape of whole numbers from 0 to 2**64 - 1")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise HeaderInvalid(f"{where} has no data_offsets of two whole numbers")
    begin, end = offsets
    if end < begin:
        raise HeaderInvalid(f"{where} ends at {end}, before it begins at {begin}")
    try:
        length = byte_length(dtype, shape)
    except HeaderInvalid as fault:
        raise HeaderInvalid(f"{where}: {fault.message}") from None
    if end - begin != length:
        raise HeaderInvalid(
            f"{where} has {end - begin} bytes by its offsets, {length} by dtype and shape"
        )
    return Tensor(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _check_ranges(tensors: Iterable[Tensor], data_start: int) -> None:
    """HeaderInvalid for holes and overlaps between tensors in the order of their ranges."""
    expected = data_start
    for tensor in tensors:
        if tensor.begin != expected:
            fault = "overlaps the one before" if tensor.begin < expected else "leaves a hole"
            raise HeaderInvalid(
                f"tensor {_shown(tensor.name)} {fault}: it begins at byte {tensor.begin} of the "
                f"file, not at {expected}"
            )
        expected = tensor.end


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return type(value) is list and all(type(n) is int and 0 <= n <= _U64_MAX for n in value)


def _decoded(raw: bytes, where: str) -> Any:
    """Strict JSON: UTF-8, no name twice, no NaN, no number out of range, no lone surrogates."""
    try:
        text = raw.decode()
        value, end = _DECODER.raw_decode(text)
        if "\\" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise HeaderInvalid(f"{where} is not UTF-8") from None
    except (ValueError, RecursionError) as fault:
        raise HeaderInvalid(f"{where} is broken JSON: {fault}") from None
    # The scan cut out one object, null or string: there is nothing after it.
    assert end == len(text)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key occurs twice")
    return unique


def _whole_number(digits: str) -> int | float:
    # As in the library: -0 and what does not fit 64 bits are floating-point numbers.
    if digits == "-0" or len(digits) > 20:
        return _fraction(digits)
    return int(digits)


def _fraction(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number is out of range")
    return number


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=_whole_number,
    parse_float=_fraction,
    parse_constant=_no_constant,
)


def _shown(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 200 else f"{shown[:150]}…{shown[-40:]}"
