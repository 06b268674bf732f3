"""Ranges of files: every byte at its place, whole blocks past the cache, no block both ways."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.client.output_files import OutputFile, OutputFiles
from ckptd.client.range_writer import BlockRange, PlainRange, range_of_file
from ckptd.core.limits import BULK_BUFFER_BYTES, MIB
from ckptd.errors import Refused
from ckptd.store.filesystem import BLOCK_BYTES, OPERATING_SYSTEM


class Recorded:
    """An output that knows which bytes came which way."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self.cached: set[int] = set()
        self.past_cache: set[int] = set()

    def write(self, output: int, view: memoryview, offset: int) -> None:
        self._write(view, offset)
        first, last = offset // BLOCK_BYTES, (offset + len(view) - 1) // BLOCK_BYTES
        self.cached.update(range(first, last + 1))

    def write_blocks(self, output: int, view: memoryview, offset: int) -> None:
        assert offset % BLOCK_BYTES == 0 and len(view) % BLOCK_BYTES == 0 and view
        self._write(view, offset)
        self.past_cache.update(range(offset // BLOCK_BYTES, (offset + len(view)) // BLOCK_BYTES))

    def _write(self, view: memoryview, offset: int) -> None:
        assert not any(self.content[offset : offset + len(view)]), "a byte is written twice"
        self.content[offset : offset + len(view)] = view


def letters(size: int) -> bytes:
    return bytes(range(1, 252)) * (size // 251 + 1)


edges = st.one_of(
    st.integers(0, 3 * BLOCK_BYTES),
    st.integers(-2, 2).map(lambda near: BULK_BUFFER_BYTES + near),
    st.integers(-2, 2).map(lambda near: BULK_BUFFER_BYTES + BLOCK_BYTES + near),
)


@given(
    offset=edges,
    lengths=st.lists(edges.filter(bool), min_size=1, max_size=4),
    piece=st.sampled_from([1000, BLOCK_BYTES, BULK_BUFFER_BYTES - 1, BULK_BUFFER_BYTES]),
)
def test_neighbouring_ranges_fill_a_file(offset: int, lengths: list[int], piece: int) -> None:
    size = sum(lengths)
    target = Recorded(offset + size)
    content = letters(size)[:size]
    begin = 0
    for length in lengths:
        writer = BlockRange(target, 0, offset + begin, length)
        for start in range(begin, begin + length, piece):
            writer.write(memoryview(content)[start : min(start + piece, begin + length)])
        begin += length
    assert bytes(target.content[offset:]) == content
    assert not target.cached & target.past_cache
    whole = (offset + lengths[0]) // BLOCK_BYTES - -(-offset // BLOCK_BYTES)
    assert len(target.past_cache) >= max(0, whole)


def test_short_ranges_are_written_as_they_come() -> None:
    target = Recorded(2 * MIB)
    assert isinstance(range_of_file(target, 0, 0, MIB - 1), PlainRange)
    assert isinstance(range_of_file(target, 0, 0, MIB), BlockRange)


@pytest.mark.parametrize(("can_bypass", "refused"), [(True, False), (True, True), (False, False)])
def test_a_real_file_gets_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_bypass: bool, refused: bool
) -> None:
    if not can_bypass:
        monkeypatch.setattr(OPERATING_SYSTEM, "bypass_cache", lambda descriptor, on: False, False)
    if refused:  # a medium with larger blocks than ours
        real, first = os.pwrite, [True]

        def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
            if first and len(data) == BULK_BUFFER_BYTES:
                first.clear()
                raise OSError(errno.EINVAL, "not my blocks")
            return real(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
    content = letters(3 * MIB + 77)[: 3 * MIB + 77]
    outputs = OutputFiles(str(tmp_path), [OutputFile("f", len(content) + 5, 0o600)])
    outputs.preallocate()
    outputs.write(0, memoryview(b"12345"), 0)
    writer = outputs.range_writer(0, 5, len(content))
    for start in range(0, len(content), 200_000):
        writer.write(memoryview(content)[start : start + 200_000])
    outputs.finish(0)
    outputs.close()
    assert (tmp_path / "f").read_bytes() == b"12345" + content


def test_no_file_stays_open_when_the_disk_fails_at_opening_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def bypass_cache(descriptor: int, on: bool) -> bool:
        opened.append(descriptor)
        raise OSError(errno.EIO, "gone")

    outputs = OutputFiles(str(tmp_path), [OutputFile("f", BLOCK_BYTES, 0o600)])
    outputs.preallocate()
    monkeypatch.setattr(OPERATING_SYSTEM, "bypass_cache", bypass_cache, False)
    with pytest.raises(Refused, match="gone"):
        outputs.write_blocks(0, memoryview(bytes(BLOCK_BYTES)), 0)
    outputs.close()
    (descriptor,) = opened
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(descriptor)
