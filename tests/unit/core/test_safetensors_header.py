"""The header parser, compared with the safetensors library on valid and invalid files."""

# ruff: noqa: UP031 (in JSON, str.format would want every brace twice)

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core import limits
from ckptd.core.safetensors_header import (
    DTYPE_BITS,
    LENGTH_BYTES,
    Header,
    Tensor,
    TensorOutline,
    build_header,
    byte_length,
    in_library_order,
    parse_header,
    read_length,
)
from ckptd.errors import HeaderInvalid

library_tensors: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize


def file_of(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def parsed(file: bytes) -> Header:
    length = read_length(file[:LENGTH_BYTES], len(file))
    return parse_header(file[LENGTH_BYTES : LENGTH_BYTES + length], len(file))


def library_accepts(file: bytes) -> bool:
    try:
        library_tensors(file)
    except safetensors.SafetensorError:
        return False
    return True


def we_accept(file: bytes) -> bool:
    try:
        parsed(file)
    except HeaderInvalid as refused:
        assert refused.message.isprintable()
        assert len(refused.message) < 1000
        return False
    return True


def described(dtype: str = "U8", shape: Any = (1,), offsets: Any = (0, 1), **more: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


ONE = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[%d,%d]}'

VALID = {
    "no tensor": file_of("{}"),
    "no tensor, padded": file_of("{ \n}  \t\r "),
    "one byte": file_of('{"a":%s}' % ONE, b"x"),
    "scalar": file_of(json.dumps({"a": described(shape=[])}), b"x"),
    "spaces everywhere": file_of(json.dumps({"a": described()}, indent=3) + "\n  ", b"x"),
    "order of offsets is not order of names": file_of(
        json.dumps({"b": described(offsets=(1, 2)), "a": described()}), b"xy"
    ),
    "order of fields": file_of('{"a":{"data_offsets":[0,1],"dtype":"U8","shape":[1]}}', b"x"),
    "unknown fields": file_of(
        json.dumps({"a": described(note=[1.5, None, True, "}{", [[]], 10**30])}), b"x"
    ),
    "metadata": file_of('{"__metadata__":{"format":"pt","é\\n":"\\u0000"},"a":%s}' % ONE, b"x"),
    "metadata last": file_of('{"a":%s,"__metadata__":{}}' % ONE, b"x"),
    "metadata null": file_of('{"__metadata__":null,"a":%s}' % ONE, b"x"),
    "empty name": file_of('{"":%s}' % ONE, b"x"),
    "escaped name": file_of('{"\\u00e9\\"\\\\\\/\\ud83d\\ude00":%s}' % ONE, b"x"),
    "braces in a name": file_of('{"}{,:":%s}' % ONE, b"x"),
    "name with DEL": file_of(b'{"a\x7fb":%s}' % ONE.encode(), b"x"),
    "empty tensors share an offset": file_of(
        '{"c":%s,"b":%s,"a":%s}' % (EMPTY % (0, 0), EMPTY % (0, 0), ONE), b"x"
    ),
    "empty tensor at the end": file_of('{"b":%s,"a":%s}' % (EMPTY % (1, 1), ONE), b"x"),
    "no elements, then absurd": file_of(
        json.dumps({"a": described(shape=[0, 2**64 - 1, 2**64 - 1], offsets=[0, 0])})
    ),
    "exactly 100 lists": file_of(json.dumps({"a": described(note=[[]] * 97)}), b"x"),
    "two elements of four bits": file_of(json.dumps({"a": described("F4", [2])}), b"x"),
    "64 dimensions": file_of(json.dumps({"a": described(shape=[1] * 64)}), b"x"),
}

INVALID = {
    "nothing": b"",
    "seven bytes": b"\2\0\0\0\0\0\0",
    "length 0": bytes(8),
    "length 2**63": (2**63).to_bytes(8, "little"),
    "length 2**64 - 1": b"\xff" * 8,
    "length over the cap": (100_000_001).to_bytes(8, "little") + b"{}",
    "length past the end": (3).to_bytes(8, "little") + b"{}",
    "not an object": file_of("[]"),
    "byte order mark": file_of(b"\xef\xbb\xbf{}"),
    "open object": file_of("{"),
    "open member": file_of('{"a"'),
    "open value": file_of('{"a":{"dtype":"U8"'),
    "no value": file_of('{"a":}'),
    "no separator": file_of('{"a":%s "b":%s}' % (ONE, EMPTY % (1, 1)), b"x"),
    "trailing comma": file_of('{"a":%s,}' % ONE, b"x"),
    "only a comma": file_of("{,}"),
    "text after the object": file_of("{}x"),
    "text after the members": file_of('{"a":%s}x' % ONE, b"x"),
    "NUL padding": file_of(b"{}\0"),
    "vertical tab": file_of("{\x0b}"),
    "no-break space": file_of("{\u00a0}"),
    "bytes after the last tensor": file_of('{"a":%s}' % ONE, b"xy"),
    "bytes after no tensor": file_of("{}", b"x"),
    "cut off": file_of('{"a":%s}' % ONE),
    "hole at the start": file_of(json.dumps({"a": described(offsets=(1, 2))}), b"xy"),
    "hole between": file_of(json.dumps({"a": described(), "b": described(offsets=(2, 3))}), b"xyz"),
    "overlap": file_of(json.dumps({"a": described(), "b": described()}), b"x"),
    "partial overlap": file_of(
        json.dumps({"a": described(shape=[2], offsets=(0, 2)), "b": described("U16", [1], (1, 3))}),
        b"xyz",
    ),
    "empty tensor inside another": file_of(
        '{"a":%s,"b":%s}' % ('{"dtype":"U8","shape":[2],"data_offsets":[0,2]}', EMPTY % (1, 1)),
        b"xy",
    ),
    "ends before it begins": file_of(json.dumps({"a": described(offsets=(1, 0))}), b"x"),
    "negative offset": file_of(json.dumps({"a": described(offsets=(-1, 0))}), b"x"),
    "negative dimension": file_of(json.dumps({"a": described(shape=[-1])}), b"x"),
    "two negative dimensions": file_of(json.dumps({"a": described(shape=[-1, -1])}), b"x"),
    "dimension -0": file_of('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
    "dimension 1.0": file_of(json.dumps({"a": described(shape=[1.0])}), b"x"),
    "dimension true": file_of(json.dumps({"a": described(shape=[True])}), b"x"),
    "dimension 2**64": file_of(json.dumps({"a": described(shape=[2**64])}), b"x"),
    "dimension of 5000 digits": file_of(
        '{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % ("9" * 5000), b"x"
    ),
    "shape is a number": file_of(json.dumps({"a": described(shape=1)}), b"x"),
    "size overflows": file_of(json.dumps({"a": described(shape=[2**33, 2**33], offsets=[0, 0])})),
    "absurd before no elements": file_of(
        json.dumps({"a": described(shape=[2**64 - 1, 2**64 - 1, 0], offsets=[0, 0])})
    ),
    "bits overflow": file_of(json.dumps({"a": described(shape=[2**63], offsets=[0, 2**63])})),
    "half a byte": file_of(json.dumps({"a": described("F4", [1])}), b"x"),
    "size is not that of the shape": file_of(json.dumps({"a": described("U16", [1])}), b"x"),
    "three offsets": file_of(json.dumps({"a": described(offsets=[0, 1, 2])}), b"x"),
    "one offset": file_of(json.dumps({"a": described(offsets=[0])}), b"x"),
    "no offsets": file_of('{"a":{"dtype":"U8","shape":[1]}}', b"x"),
    "no dtype": file_of('{"a":{"shape":[1],"data_offsets":[0,1]}}', b"x"),
    "dtype is null": file_of(json.dumps({"a": described(None)}), b"x"),  # type: ignore[arg-type]
    "unknown dtype": file_of(json.dumps({"a": described("u8")}), b"x"),
    "tensor is null": file_of('{"a":null}'),
    "tensor is a number": file_of('{"a":1}'),
    "field twice": file_of(
        '{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"
    ),
    "metadata twice": file_of('{"__metadata__":{"a":"b"},"__metadata__":{"a":"b"}}'),
    "metadata is a number": file_of('{"__metadata__":{"a":1}}'),
    "metadata is nested": file_of('{"__metadata__":{"a":{}}}'),
    "metadata is a list": file_of('{"__metadata__":[]}'),
    "name is not UTF-8": file_of(b'{"\xff":%s}' % ONE.encode(), b"x"),
    "name has an encoded surrogate": file_of(b'{"\xed\xa0\x80":%s}' % ONE.encode(), b"x"),
    "name has a lone surrogate": file_of('{"\\ud800":%s}' % ONE, b"x"),
    "name has a control character": file_of('{"a\nb":%s}' % ONE, b"x"),
    "name has an unknown escape": file_of('{"a\\xb":%s}' % ONE, b"x"),
    "metadata has a lone surrogate": file_of('{"__metadata__":{"a":"\\udc00"}}'),
    "metadata is not UTF-8": file_of(b'{"__metadata__":{"a":"\xff"}}'),
    "not a number": file_of(json.dumps({"a": described(note=float("nan"))}), b"x"),
    "number out of range": file_of(
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1e999}}', b"x"
    ),
    "whole number out of range": file_of(
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":%s}}' % ("9" * 400), b"x"
    ),
    "metadata is nested beyond all bounds": file_of(
        '{"__metadata__":{"a":%s}}' % ("[" * 30_000 + "]" * 30_000)
    ),
    "nested one level too deep": file_of(
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":%s}}' % ("[" * 126 + "]" * 126),
        b"x",
    ),
    "nested beyond all bounds": file_of(
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":%s}}'
        % ("[" * 30_000 + "]" * 30_000),
        b"x",
    ),
}

STRICTER = {
    "name twice": file_of('{"a":%s,"a":%s}' % (ONE, ONE), b"x"),
    "metadata key twice": file_of('{"__metadata__":{"a":"b","a":"c"}}'),
    "unknown field twice": file_of('{"a":{"x":1,"x":2,%s}' % ONE[1:], b"x"),
    "space before the object": file_of(" {}"),
    "tensor as a list": file_of('{"a":["U8",[1],[0,1]]}', b"x"),
    "dtype as an object": file_of(
        '{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}', b"x"
    ),
    "unknown field with an object": file_of(json.dumps({"a": described(note={})}), b"x"),
    "over 100 lists": file_of(json.dumps({"a": described(note=[[]] * 98)}), b"x"),
    "65 dimensions": file_of(json.dumps({"a": described(shape=[1] * 65)}), b"x"),
    "endless name": file_of(json.dumps({"a" * 4097: described()}), b"x"),
    "endless description": file_of(json.dumps({"a": described(note="x" * 2**16)}), b"x"),
    "endless metadata": file_of(json.dumps({"__metadata__": {"a": "x" * 2**24}})),
}


@pytest.mark.parametrize("case", VALID)
def test_what_the_library_accepts_is_accepted(case: str) -> None:
    file = VALID[case]
    assert library_accepts(file)
    assert_same_as_library(file)


@pytest.mark.parametrize("case", INVALID)
def test_what_the_library_refuses_is_refused(case: str) -> None:
    assert not library_accepts(INVALID[case])
    assert not we_accept(INVALID[case])


@pytest.mark.parametrize("case", STRICTER)
def test_where_we_are_stricter_than_the_library_on_purpose(case: str) -> None:
    assert library_accepts(STRICTER[case])
    assert not we_accept(STRICTER[case])


def test_more_tensors_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TENSORS_PER_FILE_MAX", 3)
    names = ("a", "b", "c", "d")
    members = [f'"{name}":{EMPTY % (0, 0)}' for name in names]
    assert len(parsed(file_of("{" + ",".join(members[:3]) + "}")).tensors) == 3
    with pytest.raises(HeaderInvalid, match="more than 3 tensors"):
        parsed(file_of("{" + ",".join(members) + "}"))


def test_messages_name_tensor_and_fault() -> None:
    expected = {
        "hole between": "tensor 'b' leaves a hole",
        "overlap": "tensor 'b' overlaps the one before",
        "cut off": "promises 62 bytes, it has 61",
        "bytes after the last tensor": "1 bytes follow after the last tensor",
        "unknown dtype": "tensor 'a': unknown dtype 'u8'",
        "length past the end": "claims 3 bytes, but the file has 10",
        "metadata is a number": "metadata 'a' is not text",
        "size is not that of the shape": "1 bytes by its offsets, 2 by dtype and shape",
    }
    for case, message in expected.items():
        with pytest.raises(HeaderInvalid) as refused:
            parsed(INVALID[case])
        assert message in refused.value.message
    with pytest.raises(HeaderInvalid, match="tensor name 'a' occurs twice"):
        parsed(STRICTER["name twice"])


def assert_same_as_library(file: bytes) -> None:
    header = parsed(file)
    assert header.file_size == len(file)
    assert header.data_start == 8 + header.header_length
    ours = {
        t.name: {
            "shape": list(t.shape),
            "dtype": t.dtype,
            "data": file[t.begin : t.end],
        }
        for t in header.tensors
    }
    theirs = {
        name: {**tensor, "data": bytes(tensor["data"])} for name, tensor in library_tensors(file)
    }
    assert ours == theirs


def test_every_dtype_of_the_library_is_known_with_its_size() -> None:
    with pytest.raises(safetensors.SafetensorError) as refused:
        library_tensors(file_of(json.dumps({"a": described("?")}), b"x"))
    listed = str(refused.value).split("expected one of", 1)[1]
    assert listed.split("`")[1::2] == list(DTYPE_BITS)
    for dtype, bits in DTYPE_BITS.items():
        file = file_of(json.dumps({"a": described(dtype, [8], [0, bits])}), bytes(bits))
        assert_same_as_library(file)


def test_byte_length_refuses_what_no_tensor_has() -> None:
    assert byte_length("F32", (2, 3)) == 24
    assert byte_length("F6_E2M3", (4,)) == 3
    with pytest.raises(HeaderInvalid, match="negative"):
        byte_length("F32", (-1,))


NAMES = st.text(
    alphabet=st.one_of(st.sampled_from('.{}",:\\\n\x00\x7fé😀'), st.characters(codec="utf-8")),
    max_size=12,
).filter(lambda name: name != "__metadata__")


@st.composite
def outlines(draw: st.DrawFn) -> list[TensorOutline]:
    tensors = []
    for name in draw(st.lists(NAMES, unique=True, max_size=6)):
        dtype = draw(st.sampled_from(list(DTYPE_BITS)))
        shape = (*draw(st.lists(st.integers(0, 4), max_size=3)), draw(st.sampled_from((0, 4, 8))))
        tensors.append(TensorOutline(name, dtype, shape, byte_length(dtype, shape)))
    return tensors


METADATA = st.dictionaries(NAMES, NAMES, max_size=4)


@given(outlines(), METADATA)
def test_a_header_that_we_build_is_read_alike_by_us_and_the_library(
    tensors: list[TensorOutline], metadata: dict[str, str]
) -> None:
    start = build_header(tensors, metadata)
    data = bytes(i % 251 for i in range(sum(tensor.length for tensor in tensors)))
    assert len(start) % 8 == 0
    assert_same_as_library(start + data)
    header = parsed(start + data)
    assert header.metadata == metadata
    expected = []
    begin = len(start)
    for tensor in tensors:
        end = begin + tensor.length
        expected.append(Tensor(tensor.name, tensor.dtype, tensor.shape, begin, end))
        begin = end
    assert sorted(header.tensors, key=lambda t: t.name) == sorted(expected, key=lambda t: t.name)


NUMPY_DTYPES = {"F32": "<f4", "F64": "<f8", "I8": "i1", "U16": "<u2", "BOOL": "?", "F16": "<f2"}


@given(
    st.dictionaries(NAMES, st.sampled_from(sorted(NUMPY_DTYPES)), max_size=6),
    st.none() | st.tuples(NAMES, NAMES),
)
def test_in_library_order_the_header_is_byte_for_byte_the_librarys(
    dtypes: dict[str, str], metadata: tuple[str, str] | None
) -> None:
    arrays = {name: np.zeros((2, 3), NUMPY_DTYPES[dtype]) for name, dtype in dtypes.items()}
    texts = dict([metadata]) if metadata else {}
    theirs = safetensors.numpy.save(arrays, texts or None)
    ours = build_header(
        in_library_order(
            TensorOutline(name, dtype, (2, 3), byte_length(dtype, (2, 3)))
            for name, dtype in dtypes.items()
        ),
        texts,
    )
    assert theirs[: len(ours)] == ours


JSON_PIECES = st.sampled_from(
    [
        '"', "\\", "{", "}", "[", "]", ",", ":", " ", "0", "1", "-", ".", "e", "\x00", "\n", "a",
        "null", "true", "18446744073709551615", "18446744073709551616", "\\u0041", "\\ud800",
        '"U8"', '"F4"', "__metadata__", '"dtype"', "\x7f", "é",
    ]
)  # fmt: skip


@settings(max_examples=400)
@given(st.sampled_from(sorted(VALID)), st.data())
def test_a_damaged_header_is_never_accepted_where_the_library_refuses(
    case: str, data: st.DataObject
) -> None:
    """Stricter is allowed for what is documented, laxer never; equal content where both accept."""
    original = VALID[case]
    length = int.from_bytes(original[:8], "little")
    text = original[8 : 8 + length].decode()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 4)))
    inserted = "".join(data.draw(st.lists(JSON_PIECES, max_size=3)))
    file = file_of(text[:start] + inserted + text[end:], original[8 + length :])
    if we_accept(file):
        assert_same_as_library(file)
    elif library_accepts(file):
        damaged = text[:start] + inserted + text[end:]
        assert (
            damaged[:1].isspace()
            or has_key_twice(damaged)
            or "\\ud800" in damaged  # in a field that the library does not look at
            or nests_or_is_over_a_limit(damaged)
        ), damaged


def has_key_twice(text: str) -> bool:
    twice = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.append(len(dict(pairs)) != len(pairs))
        return dict(pairs)

    json.loads(text, object_pairs_hook=look)
    return any(twice)


def nests_or_is_over_a_limit(text: str) -> bool:
    """Whether a tensor is a list, holds another object, or has too many lists or dimensions."""
    tensors = [tensor for tensor in json.loads(text).values() if tensor is not None]
    return text.count("[") > 100 or any(
        isinstance(tensor, list)
        or any(holds_object(value) for value in tensor.values())
        or len(tensor.get("shape", "")) > 64
        for tensor in tensors
    )


def holds_object(value: object) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(holds_object(item) for item in value)
    )


@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_judged_as_by_the_library(file: bytes) -> None:
    assert we_accept(file) == library_accepts(file)


def test_the_length_is_judged_before_the_header_is_read() -> None:
    terabyte = 2**40
    assert read_length((100_000_000).to_bytes(8, "little"), terabyte) == 100_000_000
    with pytest.raises(HeaderInvalid, match="claims 100000001 bytes"):
        read_length((100_000_001).to_bytes(8, "little"), terabyte)
    with pytest.raises(HeaderInvalid, match="too few"):
        read_length(b"\0" * 7, 7)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([TensorOutline("a", "U8", (1,), 1)] * 2, "occurs twice"),
        ([TensorOutline("__metadata__", "U8", (1,), 1)], "reserved"),
        ([TensorOutline("a", "U8", (1,), 2)], "say 1"),
    ],
)
def test_a_header_that_would_be_invalid_is_not_built(
    tensors: list[TensorOutline], message: str
) -> None:
    with pytest.raises(HeaderInvalid, match=message):
        build_header(tensors, {})


def test_a_header_over_the_cap_is_not_built() -> None:
    with pytest.raises(HeaderInvalid, match="would have 100000032 bytes"):
        build_header([], {"a": "x" * 100_000_000})
