"""The tensor index document: golden bytes, round trip, and what is refused."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core import limits
from ckptd.core.tensor_index import TensorRecord, decode, encode
from ckptd.errors import DocumentRefused, Refused

GOLDEN = Path(__file__).parents[2] / "golden" / "tensor-index-1"
RECORDS = [
    TensorRecord("b", "a.safetensors", "F32", (2, 3), 64, 88),
    TensorRecord("empty", "a.safetensors", "F32", (0, 2**64 - 1), 88, 88),
    TensorRecord("a.größe", "a.safetensors", "F6_E2M3", (4,), 88, 91),
    TensorRecord("b", "dir/\udcff.safetensors", "BOOL", (), 2**40, 2**40 + 1),
]


def test_the_format_is_that_of_the_golden_files() -> None:
    expected = (GOLDEN / "index.json").read_bytes()
    assert zlib.decompress(encode(RECORDS)) == expected
    assert decode((GOLDEN / "index.json.zlib").read_bytes()) == RECORDS
    assert zlib.decompress((GOLDEN / "index.json.zlib").read_bytes()) == expected


@st.composite
def records(draw: st.DrawFn) -> list[TensorRecord]:
    found = []
    file_name = st.binary(min_size=1, max_size=6).filter(
        lambda raw: not set(raw) & {0, 47} and raw not in (b".", b"..")
    )
    for raw in draw(st.sets(file_name, max_size=3)):
        begin = draw(st.integers(0, 2**41))
        for name in draw(st.sets(st.text(max_size=6), min_size=1, max_size=4)):
            begin += draw(st.integers(0, 9))
            length = draw(st.integers(0, 2**33))
            path = raw.decode("utf-8", "surrogateescape")
            found.append(TensorRecord(name, path, "U8", (length,), begin, begin + length))
            begin += length
    return found


@given(records(), st.integers())
def test_round_trip_in_any_order(found: list[TensorRecord], seed: int) -> None:
    shuffled = list(found)
    random.Random(seed).shuffle(shuffled)
    assert encode(shuffled) == encode(found)
    decoded = decode(encode(found))
    assert sorted(decoded, key=repr) == sorted(found, key=repr)
    assert encode(decoded) == encode(found)


def document(**changes: Any) -> dict[str, Any]:
    return {"files": ["f"], "format": 1, "tensors": [["a", 0, "U8", [1], 8, 9]], **changes}


def compressed(value: Any) -> bytes:
    return zlib.compress(json.dumps(value, separators=(",", ":"), sort_keys=True).encode())


def row(**changes: Any) -> list[Any]:
    return list({"n": "a", "f": 0, "d": "U8", "s": [1], "b": 8, "e": 9, **changes}.values())


def test_the_document_that_the_refused_ones_are_made_from_is_good() -> None:
    assert decode(compressed(document())) == [TensorRecord("a", "f", "U8", (1,), 8, 9)]
    assert decode(compressed(document(files=[], tensors=[]))) == []


REFUSED = {
    "not zlib": (b"nonsense", "cannot be decompressed"),
    "empty": (b"", "cut off"),
    "cut off": (compressed(document())[:-1], "cut off"),
    "bytes after it": (compressed(document()) + b"x", "bytes follow"),
    "not JSON": (zlib.compress(b"{"), "malformed"),
    "not UTF-8": (zlib.compress(b'{"format":1,"x":"\xff"}'), "malformed"),
    "not an object": (compressed([]), "malformed"),
    "newer format": (compressed(document(format=2)), "has format 2, this version reads 1"),
    "unknown field": (compressed(document(more=1)), "malformed"),
    "not canonical": (zlib.compress(json.dumps(document()).encode()), "canonical"),
    "leaves the directory": (compressed(document(files=["../f"])), "forbidden path"),
    "second spelling": (compressed(document(files=["\x0041"])), "forbidden path"),
    "files out of order": (
        compressed(document(files=["g", "f"], tensors=[row(), row(f=1)])),
        "ascending order",
    ),
    "file twice": (
        compressed(document(files=["f", "f"], tensors=[row(), row(f=1)])),
        "ascending order",
    ),
    "file without tensors": (compressed(document(files=["f", "g"])), "leaves some out"),
    "file that is not listed": (compressed(document(tensors=[row(f=1)])), "leaves some out"),
    "files mixed": (
        compressed(document(files=["f", "g"], tensors=[row(f=1), row()])),
        "order of files and bytes",
    ),
    "rows out of order": (
        compressed(document(tensors=[row(b=9, e=10), row(n="b")])),
        "order of files and bytes",
    ),
    "overlap": (
        compressed(document(tensors=[row(s=[2], e=10), row(n="b", b=9, e=10)])),
        "overlaps",
    ),
    "name twice": (compressed(document(tensors=[row(), row(b=9, e=10)])), "listed twice"),
    "row twice": (
        compressed(document(tensors=[row(s=[0], e=8), row(s=[0], e=8)])),
        "listed twice",
    ),
    "unknown dtype": (compressed(document(tensors=[row(d="U7")])), "unknown dtype"),
    "wrong size": (compressed(document(tensors=[row(e=10)])), "has not the size"),
    "ends before it begins": (compressed(document(tensors=[row(e=7)])), "has not the size"),
    "negative offset": (compressed(document(tensors=[row(b=-1, e=0)])), "malformed"),
    "negative dimension": (compressed(document(tensors=[row(s=[-1])])), "negative"),
    "dimension is a fraction": (compressed(document(tensors=[row(s=[1.0])])), "malformed"),
    "65 dimensions": (compressed(document(tensors=[row(s=[1] * 65)])), "malformed"),
    "endless name": (compressed(document(tensors=[row(n="a" * 4097)])), "malformed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_invalid_document_is_refused(case: str) -> None:
    raw, message = REFUSED[case]
    with pytest.raises(DocumentRefused, match=message):
        decode(raw)


def test_a_document_that_unfolds_beyond_the_limit_is_refused_before_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = len(zlib.decompress(encode(RECORDS)))
    monkeypatch.setattr(limits, "TENSOR_INDEX_MAX_BYTES", exact)
    assert decode(encode(RECORDS)) == RECORDS
    with pytest.raises(DocumentRefused, match="more than"):
        decode(zlib.compress(b" " * 2**24))
    monkeypatch.setattr(limits, "TENSOR_INDEX_MAX_BYTES", exact - 1)
    with pytest.raises(DocumentRefused, match="more than"):
        decode((GOLDEN / "index.json.zlib").read_bytes())
    with pytest.raises(Refused, match="more than"):
        encode(RECORDS)


def test_more_tensors_than_a_checkpoint_may_have_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "TENSORS_PER_CHECKPOINT_MAX", 3)
    with pytest.raises(Refused, match="4 tensors"):
        encode(RECORDS)


@given(st.binary(max_size=40), st.integers(0, 200))
def test_damaged_documents_are_refused_or_read_but_nothing_else(junk: bytes, at: int) -> None:
    raw = zlib.decompress(encode(RECORDS))
    damaged = raw[:at] + junk + raw[at + len(junk) :]
    try:
        found = decode(zlib.compress(damaged))
    except DocumentRefused:
        return
    assert zlib.decompress(encode(found)) == damaged
    assert msgspec.json.decode(damaged)["format"] == 1
