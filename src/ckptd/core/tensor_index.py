"""The tensor index of a version: which tensor lies where in which file.

It lets a restore fetch single tensors without a safetensors header, and lists tensors without
reading shards of weights. It is kept as an ordinary shard that the manifest names.

Format 1: zlib (RFC 1950) around canonical JSON (sorted keys, no white space, UTF-8):
`{"files":[PATH…],"format":1,"tensors":[[NAME,FILE,DTYPE,[DIMENSION…],BEGIN,END]…]}`.
PATH as written by `names.path_to_json`, ascending by bytes; FILE is an index into `files`; BEGIN
and END are byte offsets in that file; tensors ascend by (FILE, BEGIN, END, NAME).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from ckptd.core import limits
from ckptd.core.names import check_path, path_from_json, path_to_json
from ckptd.core.safetensors_header import byte_length
from ckptd.errors import DocumentRefused, HeaderInvalid, NameRefused, Refused

FORMAT: Final = 1
COMPRESSION_LEVEL: Final = 6
_OFFSET_MAX: Final = 2**62

_Size: TypeAlias = Annotated[int, Meta(ge=0, le=_OFFSET_MAX)]
# A tensor without elements may have any other dimension, up to 2**64 - 1.
_Shape: TypeAlias = Annotated[tuple[int, ...], Meta(max_length=limits.TENSOR_DIMENSIONS_MAX)]


class TensorRecord(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a checkpoint: bytes `begin` to `end` of the file at path `file`."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Row(msgspec.Struct, frozen=True, gc=False, array_like=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(max_length=limits.TENSOR_NAME_MAX_BYTES)]
    file: _Size
    dtype: str
    shape: _Shape
    begin: _Size
    end: _Size


class _Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    files: list[str]
    format: Literal[1]
    tensors: Annotated[list[_Row], Meta(max_length=limits.TENSORS_PER_CHECKPOINT_MAX)]


class _Envelope(msgspec.Struct, frozen=True):
    format: int


_encoder = msgspec.json.Encoder(order="sorted")
_decoder = msgspec.json.Decoder(_Index)
_envelope_decoder = msgspec.json.Decoder(_Envelope)


def encode(records: Sequence[TensorRecord]) -> bytes:
    """The compressed document for `records` in any order; equal records give equal JSON.

    The compressed bytes may differ between builds of zlib. Refused when there are more tensors
    than one checkpoint may have, or the JSON gets longer than TENSOR_INDEX_MAX_BYTES.
    """
    if len(records) > limits.TENSORS_PER_CHECKPOINT_MAX:
        raise Refused(
            f"the checkpoint has {len(records)} tensors, more than "
            f"{limits.TENSORS_PER_CHECKPOINT_MAX}"
        )
    files = sorted({record.file for record in records}, key=_path_bytes)
    file_index = {file: index for index, file in enumerate(files)}
    rows = [_Row(r.name, file_index[r.file], r.dtype, r.shape, r.begin, r.end) for r in records]
    rows.sort(key=_place)
    raw = _encoder.encode(_Index([path_to_json(file) for file in files], FORMAT, rows))
    if len(raw) > limits.TENSOR_INDEX_MAX_BYTES:
        raise Refused(
            f"the list of tensors has {len(raw)} bytes, more than {limits.TENSOR_INDEX_MAX_BYTES}"
        )
    return zlib.compress(raw, COMPRESSION_LEVEL)


def decode(compressed: bytes) -> list[TensorRecord]:
    """The records of a document made by `encode`, in the order of (file, bytes).

    DocumentRefused unless it is valid: at most TENSOR_INDEX_MAX_BYTES are ever decompressed, the
    JSON is canonical, paths may be joined to a directory, sizes follow from dtype and shape, and
    no tensors of a file overlap or share a name.
    """
    raw = _decompressed(compressed)
    index = _parsed(raw)
    if _encoder.encode(index) != raw:
        raise DocumentRefused("the tensor index is not in canonical form")
    files = [_checked_path(text) for text in index.files]
    if any(_path_bytes(a) >= _path_bytes(b) for a, b in pairwise(files)):
        raise DocumentRefused("the files of the tensor index are not in ascending order")
    if {row.file for row in index.tensors} != set(range(len(files))):
        raise DocumentRefused("the tensor index names files without tensors, or leaves some out")
    _check_rows(index.tensors, files)
    return [
        TensorRecord(row.name, files[row.file], row.dtype, row.shape, row.begin, row.end)
        for row in index.tensors
    ]


def _decompressed(compressed: bytes) -> bytes:
    decompressor = zlib.decompressobj()
    try:
        raw = decompressor.decompress(compressed, limits.TENSOR_INDEX_MAX_BYTES + 1)
    except zlib.error as fault:
        raise DocumentRefused(f"the tensor index cannot be decompressed: {fault}") from fault
    if len(raw) > limits.TENSOR_INDEX_MAX_BYTES:
        raise DocumentRefused(
            f"the tensor index has more than {limits.TENSOR_INDEX_MAX_BYTES} bytes of JSON"
        )
    if not decompressor.eof or decompressor.unused_data:
        raise DocumentRefused("the tensor index is cut off, or bytes follow after it")
    return raw


def _parsed(raw: bytes) -> _Index:
    try:
        found = _envelope_decoder.decode(raw).format
        if found != FORMAT:
            raise DocumentRefused(
                f"the tensor index has format {found}, this version reads {FORMAT}",
                next="ckptd --version",
            )
        return _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise DocumentRefused(f"the tensor index is malformed: {fault}") from fault


def _checked_path(text: str) -> str:
    try:
        return check_path(path_from_json(text))
    except NameRefused as fault:
        raise DocumentRefused(f"the tensor index names a forbidden {fault.message}") from fault


def _check_rows(rows: list[_Row], files: list[str]) -> None:
    before: _Row | None = None
    names: set[str] = set()
    for row in rows:
        where = f"tensor {ascii(row.name)[:200]} in {ascii(files[row.file])[:200]}"
        if before is not None and _place(row) < _place(before):
            raise DocumentRefused(f"{where} is not in the order of files and bytes")
        if before is None or row.file != before.file:
            names = set()
        elif row.begin < before.end:
            raise DocumentRefused(f"{where} overlaps the tensor before it")
        if row.name in names:
            raise DocumentRefused(f"{where} is listed twice")
        names.add(row.name)
        before = row
        try:
            length = byte_length(row.dtype, row.shape)
        except HeaderInvalid as fault:
            raise DocumentRefused(f"{where}: {fault.message}") from fault
        if row.end - row.begin != length:
            raise DocumentRefused(f"{where} has not the size that its dtype and shape say")


def _place(row: _Row) -> tuple[int, int, int, str]:
    return (row.file, row.begin, row.end, row.name)


def _path_bytes(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")
