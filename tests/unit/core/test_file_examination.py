"""Whether files are as long as they say: every cut of every format, and what cannot be cut."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.layouts import (
    archive,
    dcp_metadata,
    gguf,
    safetensors,
    trainer_state,
    weight_index,
)
from tests.unit.core.snapshots import examined_bytes

from ckptd.core import limits
from ckptd.core.file_examination import Format, amount, amounts, format_of

WHOLE: dict[Format, bytes] = {
    "safetensors": safetensors(300),
    "zip": archive(200),
    "raw": archive(200),
    "npz": archive(200),
    "gguf": gguf(),
    "index": weight_index(["a.safetensors"]),
    "json": trainer_state(4, loss=float("nan")),
}


@pytest.mark.parametrize("file_format", WHOLE)
def test_a_whole_file_has_no_fault(file_format: Format) -> None:
    assert examined_bytes(file_format, WHOLE[file_format]).fault == ""


@pytest.mark.parametrize("file_format", ["safetensors", "npz", "gguf", "index"])
def test_every_cut_is_seen(file_format: Format) -> None:
    content = WHOLE[file_format]
    for length in range(len(content)):
        assert examined_bytes(file_format, content[:length]).fault, length


@pytest.mark.parametrize("file_format", ["zip", "raw"])
def test_every_cut_of_an_archive_is_seen_once_it_begins_like_one(file_format: Format) -> None:
    content = WHOLE[file_format]
    for length in range(4, len(content)):
        assert examined_bytes(file_format, content[:length]).fault, length


def test_a_cut_state_is_seen() -> None:
    content = WHOLE["json"].rstrip()
    for length in range(len(content)):
        assert examined_bytes("json", content[:length]).fault, length


@pytest.mark.parametrize(
    ("name", "file_format"),
    [
        ("model.safetensors", "safetensors"),
        ("MODEL.SAFETENSORS", "safetensors"),
        ("optimizer.pt", "zip"),
        ("rng.pth", "zip"),
        ("last.ckpt", "zip"),
        ("training_args.bin", "raw"),
        ("weights.npz", "npz"),
        ("q4.gguf", "gguf"),
        ("model.safetensors.index.json", "index"),
        (".metadata", "dcp"),
        ("trainer_state.json", "json"),
        ("config.json", None),
        ("pt", None),
        ("__0_0.distcp", None),
    ],
)
def test_the_name_tells_the_format(name: str, file_format: Format | None) -> None:
    assert format_of(name) == file_format


def test_a_safetensors_file_says_how_much_of_it_is_there() -> None:
    content = safetensors(2_400_000)
    assert examined_bytes("safetensors", content[:1_200_000]).fault == "has 1.2 of 2.4 MB"
    assert examined_bytes("safetensors", content[:5]).fault == "has 5 bytes so far"
    assert "of its header alone" in examined_bytes("safetensors", content[:20]).fault
    longer = examined_bytes("safetensors", content + b"x")
    assert longer.fault == "has 1 bytes more than its header promises"


@pytest.mark.parametrize("content", [b"\xff" * 100, (3).to_bytes(8, "little") + b"{x}" + bytes(9)])
def test_what_is_no_safetensors_file_says_so(content: bytes) -> None:
    assert examined_bytes("safetensors", content).fault.startswith("is no valid safetensors file: ")


def test_a_file_of_zeros_is_reserved_room_not_content() -> None:
    assert examined_bytes("safetensors", bytes(100)).fault.startswith("begins with zeros")


def test_metadata_of_safetensors_is_handed_on_as_far_as_it_may_be_a_number() -> None:
    content = safetensors(10, metadata={"step": "5", "long": "x" * 33, "y" * 300: "1"})
    assert examined_bytes("safetensors", content).texts == {"step": "5"}


def test_the_smallest_amounts_that_differ_are_shown() -> None:
    assert amounts(1_200_000_000, 2_400_000_000) == "1.2 of 2.4 GB"
    assert amounts(3, 999) == "3 of 999 bytes"
    assert amounts(2_399_999_999, 2_400_000_000) == "2399999999 of 2400000000 bytes"
    assert amounts(0, 5 * 10**12) == "0.0 of 5.0 TB"
    assert amounts(500, 2000) == "0.5 of 2.0 kB"
    assert amount(999) == "999 bytes"
    assert amount(2_359_296) == "2.4 MB"


@pytest.mark.parametrize("file_format", [*WHOLE, "dcp"])
def test_an_empty_file_is_not_whole(file_format: Format) -> None:
    assert examined_bytes(file_format, b"").fault == "is empty so far"


def test_files_that_are_no_archives_pass_where_that_may_be() -> None:
    assert examined_bytes("raw", bytes(100)).fault == ""
    assert examined_bytes("zip", b"\x80\x02}q\0.").fault == ""
    assert "zeros" in examined_bytes("zip", bytes(100)).fault
    assert "no valid npz" in examined_bytes("npz", b"\x93NUMPY" + bytes(99)).fault


def test_an_empty_archive_and_one_with_a_comment_are_whole() -> None:
    end = b"PK\5\6" + bytes(16)
    assert examined_bytes("npz", end + b"\0\0").fault == ""
    assert examined_bytes("npz", end + b"\3\0abc").fault == ""
    assert examined_bytes("npz", end + b"\4\0abc").fault.startswith("has no end record")
    # The signature once more in the comment: the record is the one that reaches to the end.
    assert examined_bytes("npz", end + b"\4\0PK\5\6").fault == ""


def test_an_end_record_must_lead_to_the_directory() -> None:
    content = bytearray(archive(50))
    end = content.rfind(b"PK\5\6")
    offset = int.from_bytes(content[end + 16 : end + 20], "little")
    content[end + 16 : end + 20] = (offset + 1).to_bytes(4, "little")
    assert "does not fit" in examined_bytes("zip", bytes(content)).fault
    content[end + 16 : end + 20] = (offset - 1).to_bytes(4, "little")
    assert "no directory" in examined_bytes("zip", bytes(content)).fault


def _zip64(record_at: int | None = None) -> bytes:
    """An archive with a 64-bit end record, as archives over 4 GiB have."""
    content = archive(50)
    end = content.rfind(b"PK\5\6")
    length, offset = struct.unpack("<II", content[end + 12 : end + 20])
    record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 3, 3, length, offset)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, end if record_at is None else record_at, 1)
    short = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 3, 3, 2**32 - 1, 2**32 - 1, 0)
    return content[:end] + record + locator + short


def test_large_archives_have_a_larger_end_record() -> None:
    assert examined_bytes("zip", _zip64()).fault == ""
    assert "leads nowhere" in examined_bytes("zip", _zip64(record_at=7)).fault
    assert "leads nowhere" in examined_bytes("zip", _zip64(record_at=2**40)).fault


def test_an_index_names_its_files_once() -> None:
    assert examined_bytes("index", weight_index(["b", "a", "b"])).names == ("a", "b")


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"weight_map": [1]}', b"\xff\xfe{}"])
def test_an_index_without_files_is_not_whole(content: bytes) -> None:
    assert "not whole" in examined_bytes("index", content).fault


def test_the_metadata_of_a_distributed_checkpoint_names_its_files() -> None:
    names = ["__0_0.distcp", "__1_0.distcp"]
    assert examined_bytes("dcp", dcp_metadata([*names, *names])).names == tuple(names)


def test_files_too_large_to_read_are_not_read() -> None:
    large = limits.WEIGHT_INDEX_MAX_BYTES + 1
    assert "bytes" in examined_bytes("index", b"", large).fault
    assert examined_bytes("dcp", b"", large).fault == ""
    assert examined_bytes("json", b"", limits.TRAINING_STATE_MAX_BYTES + 1).fault == ""


# -- GGUF


@pytest.mark.parametrize("alignment", [1, 32, 64])
@pytest.mark.parametrize("version", [2, 3])
def test_gguf_ends_with_its_last_tensor(alignment: int, version: int) -> None:
    content = gguf(alignment=alignment, version=version)
    assert examined_bytes("gguf", content).fault == ""
    assert examined_bytes("gguf", content + b"padding").fault == ""
    assert examined_bytes("gguf", content[:-1]).fault.startswith("has ")


def test_gguf_of_another_version_or_byte_order_is_taken_as_it_is() -> None:
    assert examined_bytes("gguf", b"GGUF" + struct.pack("<I", 1)).fault == ""
    assert examined_bytes("gguf", b"GGUF" + struct.pack(">I", 3)).fault == ""
    assert "GGUF" in examined_bytes("gguf", bytes(50)).fault


def _header(tensors: int, values: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + rest


def test_gguf_without_tensors_ends_with_its_header() -> None:
    assert examined_bytes("gguf", _header(0, 0)).fault == ""


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (_header(2**40, 0), "claims"),
        (_header(0, 2**40), "claims"),
        (_header(0, 1, struct.pack("<Q", 2**40)), "a text"),
        (_header(0, 1, _text(b"k") + struct.pack("<I", 99)), "unknown type 99"),
        (_header(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "unknown type 9"),
        (_header(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 8, 2**40)), "an array"),
        (_header(1, 0, _text(b"t") + struct.pack("<I", 999)), "dimensions"),
    ],
)
def test_absurd_claims_of_a_gguf_header_are_refused(content: bytes, fault: str) -> None:
    assert fault in examined_bytes("gguf", content).fault


def test_a_gguf_tensor_of_an_unknown_type_counts_by_its_beginning() -> None:
    tensor = _text(b"t") + struct.pack("<IQIQ", 1, 10**6, 9999, 64)
    content = _header(1, 0, tensor)
    end = -(-len(content) // 32) * 32 + 64
    assert examined_bytes("gguf", content.ljust(end, b"\0")).fault == ""
    assert examined_bytes("gguf", content.ljust(end - 1, b"\0")).fault.startswith("has ")


def test_gguf_alignment_of_zero_or_another_type_does_no_harm() -> None:
    zero = _header(0, 1, _text(b"general.alignment") + struct.pack("<II", 4, 0))
    assert examined_bytes("gguf", zero).fault == ""
    other = _header(0, 1, _text(b"general.alignment") + struct.pack("<IQ", 10, 8))
    assert examined_bytes("gguf", other).fault == ""


def test_gguf_that_becomes_shorter_while_it_is_read_is_not_whole() -> None:
    assert examined_bytes("gguf", gguf()[:40], size=4000).fault == "became shorter"


def test_gguf_is_read_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    content = gguf()
    for window in (1, 7, 64):
        monkeypatch.setattr(limits, "GGUF_WINDOW_BYTES", window)
        assert examined_bytes("gguf", content).fault == ""
    monkeypatch.setattr(limits, "GGUF_HEADER_MAX_BYTES", 100)
    assert "header" in examined_bytes("gguf", content).fault


@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_whatever_the_bytes_an_examination_ends_with_an_answer(
    file_format: Format, data: st.DataObject
) -> None:
    content = bytearray(WHOLE[file_format])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert examined_bytes(file_format, bytes(content)).fault is not None
