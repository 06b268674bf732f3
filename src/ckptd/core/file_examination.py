"""Whether a file is as long as its own header or directory says.

An examination is a generator: it yields the `Span` of the file that it needs, is sent its bytes
(fewer at the end of the file), and returns an `Examination`. Whoever drives it reads the disk.

Sources: safetensors: `ckptd.core.safetensors_header`. Zip: PKWARE APPNOTE 6.3.10, sections 4.3.14
to 4.3.16 (what torch.save and numpy.savez write). GGUF: `ckptd.core.gguf_header`. Index:
`weight_map` of Hugging Face transformers. Distributed checkpoints: the file names that
torch.distributed.checkpoint pickles into `.metadata`; nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Final, Literal, TypeAlias

import msgspec
from msgspec import Struct

from ckptd.core import limits
from ckptd.core.gguf_header import gguf_end
from ckptd.core.safetensors_header import LENGTH_BYTES, read_header
from ckptd.core.spans import Span, Unfinished
from ckptd.errors import HeaderInvalid

Format: TypeAlias = Literal["safetensors", "zip", "npz", "raw", "gguf", "index", "dcp", "json"]
"""`raw`: zip-based or not, and if not, any bytes will do."""

_ZIP_END: Final = b"PK\5\6"
_ZIP64_END: Final = b"PK\6\6"
_ZIP64_LOCATOR: Final = b"PK\6\7"
_ZIP_FILE: Final = b"PK\3\4"
_ZIP_DIRECTORY: Final = b"PK\1\2"
_ZIP_END_BYTES: Final = 22
_ZIP64_LOCATOR_BYTES: Final = 20
_ZIP64_END_BYTES: Final = 56
_ZIP_TAIL_BYTES: Final = 64 * limits.KIB + _ZIP_END_BYTES + _ZIP64_LOCATOR_BYTES
_DCP_FILE: Final = re.compile(rb"__[0-9]{1,9}_[0-9]{1,9}\.distcp")


class Examination(Struct, frozen=True, gc=False):
    """What a file says of itself. `fault` completes a sentence that begins with the file's name,
    "" if the file is whole. `names`: files beside it that it needs. `texts`: its metadata."""

    fault: str = ""
    names: tuple[str, ...] = ()
    texts: dict[str, str] = {}


Examining: TypeAlias = Generator[Span, bytes, Examination]


def format_of(name: str) -> Format | None:
    """How to examine a file of this name; None: nothing is known of it."""
    lowered = name.lower()
    if lowered.endswith(".index.json"):
        return "index"
    if name == ".metadata":
        return "dcp"
    if name == "trainer_state.json":
        return "json"
    suffix = lowered.rpartition(".")[2]
    formats: dict[str, Format] = {
        "safetensors": "safetensors", "pt": "zip", "pth": "zip", "ckpt": "zip", "bin": "raw",
        "npz": "npz", "gguf": "gguf",
    }  # fmt: skip
    return formats.get(suffix) if "." in lowered else None


def examine(file_format: Format, size: int) -> Examining:
    """The examination of a file of `size` bytes."""
    if size == 0:
        return Examination("is empty so far")
    try:
        match file_format:
            case "safetensors":
                return (yield from _safetensors(size))
            case "gguf":
                end = yield from gguf_end(size)
                return Examination(_shortfall(size, end))
            case "index":
                return (yield from _index(size))
            case "dcp":
                return (yield from _dcp(size))
            case "json":
                return (yield from _json(size))
            case _:
                return (yield from _archive(file_format, size))
    except Unfinished as error:
        return Examination(str(error))
    except HeaderInvalid as error:
        return Examination(f"is no valid {file_format} file: {error.message}")


def amounts(size: int, promised: int) -> str:
    """ "1.2 of 2.4 GB": in the unit that fits the larger one, exact where that would look equal."""
    unit, factor = _unit(promised)
    shown, whole = f"{size / factor:.1f}", f"{promised / factor:.1f}"
    if factor == 1 or shown == whole:
        return f"{size} of {promised} bytes"
    return f"{shown} of {whole} {unit}"


def amount(size: int) -> str:
    """ "1.2 GB": in the unit that fits."""
    unit, factor = _unit(size)
    return f"{size} {unit}" if factor == 1 else f"{size / factor:.1f} {unit}"


def _unit(size: int) -> tuple[str, int]:
    found = ("bytes", 1)
    for unit, factor in (("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12)):
        if size >= factor:
            found = (unit, factor)
    return found


def _shortfall(size: int, promised: int) -> str:
    return f"has {amounts(size, promised)}" if size < promised else ""


def _safetensors(size: int) -> Examining:
    first = yield Span(0, LENGTH_BYTES)
    if len(first) < LENGTH_BYTES:
        raise Unfinished(f"has {size} bytes so far")
    length = int.from_bytes(first, "little")
    if not length:
        raise Unfinished("begins with zeros: its header is not written yet")
    if length > limits.SAFETENSORS_HEADER_MAX_BYTES:
        raise HeaderInvalid(f"the header claims {length} bytes")
    if LENGTH_BYTES + length > size:
        raise Unfinished(f"has {amounts(size, LENGTH_BYTES + length)} of its header alone")
    raw = yield Span(LENGTH_BYTES, length)
    header = read_header(raw)
    if size > header.file_size:
        return Examination(f"has {size - header.file_size} bytes more than its header promises")
    return Examination(_shortfall(size, header.file_size), texts=_short(header.metadata))


def _short(metadata: dict[str, str]) -> dict[str, str]:
    """What may be a step or a metric: numbers under short names."""
    short = {
        name: text
        for name, text in metadata.items()
        if len(name) <= limits.METRIC_NAME_MAX_CHARACTERS and len(text) <= 32
    }
    return dict(list(short.items())[: limits.METRICS_MAX])


def _archive(file_format: Format, size: int) -> Examining:
    first = yield Span(0, 4)
    if first not in (_ZIP_FILE, _ZIP_END):
        if file_format == "npz":
            raise HeaderInvalid("it does not begin like one")
        if file_format == "zip" and not any(first):
            raise Unfinished("begins with zeros: its beginning is not written yet")
        return Examination()
    begin = max(0, size - _ZIP_TAIL_BYTES)
    tail = yield Span(begin, size - begin)
    end = _zip_end(tail)
    if end < 0:
        raise Unfinished(f"has no end record yet, with {size} bytes")
    length = int.from_bytes(tail[end + 12 : end + 16], "little")
    offset = int.from_bytes(tail[end + 16 : end + 20], "little")
    directory_end = begin + end
    locator = tail[max(0, end - _ZIP64_LOCATOR_BYTES) : end]
    if locator.startswith(_ZIP64_LOCATOR):
        directory_end = int.from_bytes(locator[8:16], "little")
        record = yield Span(directory_end, _ZIP64_END_BYTES)
        if len(record) < _ZIP64_END_BYTES or not record.startswith(_ZIP64_END):
            raise Unfinished("has an end record that leads nowhere")
        length = int.from_bytes(record[40:48], "little")
        offset = int.from_bytes(record[48:56], "little")
    if offset + length > directory_end:
        raise Unfinished("has an end record that does not fit its length")
    if length:
        begins = yield Span(offset, 4)
        if begins != _ZIP_DIRECTORY:
            raise Unfinished("has an end record, but no directory where it says")
    return Examination()


def _zip_end(tail: bytes) -> int:
    """Where the end record begins; -1 without one. Its comment must reach to the end exactly."""
    position = tail.rfind(_ZIP_END)
    while position >= 0:
        comment = tail[position + 20 : position + 22]
        if len(comment) == 2 and position + _ZIP_END_BYTES + int.from_bytes(
            comment, "little"
        ) == len(tail):
            return position
        position = tail.rfind(_ZIP_END, 0, position)
    return -1


class _Index(Struct):
    weight_map: dict[str, str]


def _index(size: int) -> Examining:
    if size > limits.WEIGHT_INDEX_MAX_BYTES:
        raise HeaderInvalid(f"it has {size} bytes")
    raw = yield Span(0, size)
    try:
        index = msgspec.json.decode(raw, type=_Index)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unfinished(f"is not whole yet, or no index: {error}") from error
    return Examination(names=tuple(sorted(set(index.weight_map.values()))))


def _dcp(size: int) -> Examining:
    if size > limits.WEIGHT_INDEX_MAX_BYTES:
        return Examination()
    raw = yield Span(0, size)
    return Examination(names=tuple(sorted({name.decode() for name in _DCP_FILE.findall(raw)})))


def _json(size: int) -> Examining:
    if size > limits.TRAINING_STATE_MAX_BYTES:
        return Examination()
    raw = yield Span(0, size)
    try:
        json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Unfinished(f"is not whole yet: {error}") from error
    return Examination()
