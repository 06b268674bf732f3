"""Where the bytes of each shard go when a version is restored.

A file of a version is a list of parts (shard index, offset in the shard, length) whose bytes follow
each other. A restore reads shard by shard, so the parts are turned round here: for each shard that
holds wanted bytes, the writes that it serves.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

from ckptd.core.tensor_selection import Segment


class PartLike(Protocol):
    """`length` bytes from `offset` on of shard number `shard_index`."""

    @property
    def shard_index(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...


class Write(NamedTuple):
    """`length` bytes from `shard_offset` on of a shard go to `output_offset` of an output."""

    output_index: int
    output_offset: int
    shard_offset: int
    length: int


def whole_files(files: Iterable[Sequence[PartLike]]) -> dict[int, list[Write]]:
    """For each shard that holds bytes of `files`, its writes in ascending order of `shard_offset`.

    `files` are the parts of each wanted file, in file order; `output_index` is a file's place among
    them. Shards come in the order of first need. Each byte of each file is written exactly once.
    """
    writes: dict[int, list[Write]] = {}
    for output_index, parts in enumerate(files):
        output_offset = 0
        for part in parts:
            write = Write(output_index, output_offset, part.offset, part.length)
            writes.setdefault(part.shard_index, []).append(write)
            output_offset += part.length
    return _in_shard_order(writes)


def byte_ranges(
    files: Mapping[str, Sequence[PartLike]], segments: Iterable[Segment]
) -> dict[int, list[Write]]:
    """For each shard that holds bytes of `segments`, its writes into one output, number 0.

    `files` gives the parts of each file that a segment names. Bytes of a shard that no segment
    wants are in no write. ValueError when a segment reaches past the end of its file.
    """
    writes: dict[int, list[Write]] = {}
    starts: dict[str, list[int]] = {}
    for segment in segments:
        parts = files[segment.file]
        if segment.file not in starts:
            starts[segment.file] = list(accumulate((part.length for part in parts), initial=0))
        for shard_index, write in _of_segment(segment, parts, starts[segment.file]):
            writes.setdefault(shard_index, []).append(write)
    return _in_shard_order(writes)


def _of_segment(
    segment: Segment, parts: Sequence[PartLike], starts: Sequence[int]
) -> Iterator[tuple[int, Write]]:
    """`starts[i]` is where part i begins in its file; one more entry is the file's size."""
    end = segment.begin + segment.length
    if segment.begin < 0 or end > starts[-1]:
        raise ValueError(f"{segment.file}: bytes {segment.begin} to {end} of {starts[-1]}")
    position = segment.begin
    part_index = bisect_right(starts, position) - 1
    while position < end:
        part = parts[part_index]
        inside = position - starts[part_index]
        length = min(part.length - inside, end - position)
        output_offset = segment.output_offset + position - segment.begin
        yield part.shard_index, Write(0, output_offset, part.offset + inside, length)
        position += length
        part_index += 1


def _in_shard_order(writes: dict[int, list[Write]]) -> dict[int, list[Write]]:
    """So that a shard that arrives in order is written as it comes."""
    for of_shard in writes.values():
        of_shard.sort(key=lambda write: write.shard_offset)
    return writes
