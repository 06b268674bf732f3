"""Hashes of shards and files out of one reading, for any layout, also while files change."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.client import contents
from ckptd.client.contents import content_id_of
from ckptd.client.hashing import (
    BytesReader,
    HashedShard,
    PieceReader,
    SourceHasher,
    hash_file,
)
from ckptd.client.source import RACY_NS, File, Fingerprint, Source, scan
from ckptd.core.cutting import cut
from ckptd.errors import SourceChanged


def _hash_all(source: Source, shard_size: int) -> tuple[list[HashedShard], list[str]]:
    hasher = SourceHasher(source)
    shards = list(hasher.shards(cut(source.to_cut(), shard_size)))
    return shards, hasher.file_hashes()


def _read(source: Source, shard: HashedShard, step: int) -> bytes:
    reader = PieceReader(source, shard)
    content = bytearray()
    try:
        while len(content) < shard.size:
            piece = reader.piece(len(content), step)
            assert 0 < len(piece) <= step
            content += piece
    finally:
        reader.close()
    return bytes(content)


def _write_tensors(path: Path, sizes: list[int], content: bytes) -> None:
    header, offset = {}, 0
    for number, size in enumerate(sizes):
        header[f"t{number}"] = {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header).encode()
    data = (content * (offset // len(content) + 1))[:offset]
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@settings(max_examples=60)
@given(
    plain=st.lists(st.binary(max_size=600), max_size=5),
    tensors=st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=6), max_size=3),
    shard_size=st.integers(1, 400),
    step=st.integers(1, 500),
)
def test_hashes_are_those_of_hashlib_for_any_layout(
    plain: list[bytes], tensors: list[list[int]], shard_size: int, step: int
) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for number, content in enumerate(plain):
            (root / f"plain{number}").write_bytes(content)
        for number, sizes in enumerate(tensors):
            _write_tensors(root / f"m{number}.safetensors", sizes, b"some tensor bytes \xff")
        source = scan(root)
        shards, hashes = _hash_all(source, shard_size)
        assert hashes == [
            hashlib.sha256(Path(file.location).read_bytes()).hexdigest() for file in source.files
        ]
        assert sum(shard.size for shard in shards) == source.size
        for shard in shards:
            assert 0 < shard.size <= shard_size
            assert hashlib.sha256(_read(source, shard, step)).digest() == shard.digest


def test_pieces_can_be_read_again_from_any_offset(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"f{number}").write_bytes(bytes([number]) * 10)
    source = scan(tmp_path)
    ((shard,), _) = _hash_all(source, 1000)
    reader = PieceReader(source, shard)
    assert bytes(reader.piece(45, 100)) == b"\x04" * 5
    assert bytes(reader.piece(0, 100)) == b"\x00" * 10
    assert reader.digest() == shard.digest
    reader.close()


def test_few_files_stay_open_however_many_there_are(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"f{number:03}").write_bytes(b"x")
    source = scan(tmp_path)
    before = len(os.listdir("/dev/fd"))
    hasher = SourceHasher(source)
    for _ in hasher.shards(cut(source.to_cut(), 1)):
        assert len(os.listdir("/dev/fd")) <= before + 17
    assert len(os.listdir("/dev/fd")) == before


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "a").write_bytes(os.urandom(5000))
    (tmp_path / "b").write_bytes(os.urandom(5000))
    return scan(tmp_path)


def _shrink(path: Path) -> None:
    os.truncate(path, 100)


def _replace(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    os.replace(path.with_name("new"), path)


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [_shrink, _replace, _remove])
def test_a_file_that_changes_before_its_turn_is_noticed(source: Source, change: object) -> None:
    hasher = SourceHasher(source)
    shards = hasher.shards(cut(source.to_cut(), 1000))
    next(shards)
    assert callable(change)
    change(source.root / "b")
    with pytest.raises(SourceChanged, match="/b"):
        list(shards)


def test_an_open_file_that_shrinks_is_noticed(source: Source) -> None:
    shards = SourceHasher(source).shards(cut(source.to_cut(), 1000))
    next(shards)
    os.truncate(source.root / "a", 1000)
    with pytest.raises(SourceChanged, match="/a became shorter"):
        list(shards)


def test_an_open_file_that_grows_is_noticed_by_the_check(source: Source) -> None:
    shards = SourceHasher(source).shards(cut(source.to_cut(), 1000))
    next(shards)
    with open(source.root / "a", "ab") as file:
        file.write(b"more")
    list(shards)
    with pytest.raises(SourceChanged, match="/a"):
        source.check()


def test_a_shard_that_changed_in_place_reads_as_another_hash(source: Source) -> None:
    shards, _ = _hash_all(source, 1000)
    reader = PieceReader(source, shards[0])
    piece = reader.piece(0, 10)  # the file is open from here on
    with open(source.root / "a", "r+b") as file:
        file.write(bytes(byte ^ 0xFF for byte in piece))
    assert reader.digest() != shards[0].digest
    reader.close()


def test_a_reader_notices_a_file_that_became_shorter(source: Source) -> None:
    shards, _ = _hash_all(source, 1000)
    reader = PieceReader(source, shards[2])
    piece = bytes(reader.piece(0, 10))
    os.truncate(source.root / "a", 2003)
    assert bytes(reader.piece(0, 10)) == piece[:3]
    os.truncate(source.root / "a", 0)
    with pytest.raises(SourceChanged, match="became shorter"):
        reader.piece(10, 10)
    reader.close()


def test_hash_file_refuses_a_changed_file(source: Source) -> None:
    stop = threading.Event()
    expected = hashlib.sha256((source.root / "a").read_bytes()).hexdigest()
    assert hash_file(source.files[0], stop) == expected
    os.truncate(source.root / "a", 1)
    with pytest.raises(SourceChanged):
        hash_file(source.files[0], stop)


def test_hash_file_ends_when_it_is_told_to(source: Source) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(SourceChanged, match="not read to its end"):
        hash_file(source.files[0], stop)


def test_bytes_in_memory_read_like_a_shard() -> None:
    reader = BytesReader(b"index")
    assert bytes(reader.piece(0, 3)) == b"ind"
    assert bytes(reader.piece(3, 3)) == b"ex"
    assert reader.digest() == hashlib.sha256(b"index").digest()
    reader.close()


# -- whether the source held still


def _hashed(source: Source) -> SourceHasher:
    hasher = SourceHasher(source)
    for _ in hasher.shards(cut(source.to_cut(), 1000)):
        pass
    return hasher


def _change_unseen(source: Source, index: int, offset: int) -> None:
    """Changes a byte of a file within one tick of the file system's clock: its times stay."""
    file = source.files[index]
    with open(file.location, "r+b") as opened:
        byte = os.pread(opened.fileno(), 1, offset)
        os.pwrite(opened.fileno(), bytes([byte[0] ^ 0xFF]), offset)
    source.files[index] = replace(file, fingerprint=Fingerprint.of(os.stat(file.location)))


def test_a_source_that_held_still_passes(source: Source) -> None:
    _hashed(source).check_fresh(threading.Event())
    source.check()


@pytest.mark.parametrize("name", ["a", "c"])
def test_what_came_or_changed_since_it_was_hashed_is_noticed(source: Source, name: str) -> None:
    source.scanned_ns += RACY_NS
    hasher = _hashed(source)
    (source.root / name).write_bytes(b"longer or new")
    hasher.check_fresh(threading.Event())
    with pytest.raises(SourceChanged):
        source.check()


@pytest.mark.parametrize("offset", [0, 2500, 4999])
def test_a_file_written_a_moment_ago_is_hashed_once_more(source: Source, offset: int) -> None:
    hasher = _hashed(source)
    _change_unseen(source, 1, offset)
    with pytest.raises(SourceChanged, match="/b changed while it was being stored"):
        hasher.check_fresh(threading.Event())
    source.scanned_ns += 60 * RACY_NS  # its times would tell
    hasher.check_fresh(threading.Event())


# -- content ids


def test_a_content_id_is_of_what_holds_still(source: Source) -> None:
    stop = threading.Event()
    assert content_id_of(source, stop) == content_id_of(scan(source.root), stop)
    stop.set()
    with pytest.raises(SourceChanged, match="not read to its end"):
        content_id_of(source, stop)


def test_a_fresh_file_is_read_twice_for_a_content_id(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_file_and_change_it(file: File, stop: threading.Event) -> str:
        hashed = hash_file(file, stop)
        _change_unseen(source, source.files.index(file), 10)
        return hashed

    monkeypatch.setattr(contents, "hash_file", hash_file_and_change_it)
    with pytest.raises(SourceChanged, match="/a"):
        content_id_of(source, threading.Event())


def test_what_comes_while_a_content_id_is_made_is_noticed(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_file_while_another_comes(file: File, stop: threading.Event) -> str:
        (source.root / "c").touch()
        return hash_file(file, stop)

    monkeypatch.setattr(contents, "hash_file", hash_file_while_another_comes)
    with pytest.raises(SourceChanged, match="came, went or changed"):
        content_id_of(source, threading.Event())
