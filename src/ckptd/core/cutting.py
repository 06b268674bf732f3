"""Where shards begin and end.

The aim is that bytes which did not change give the same shards next time, although a checkpoint is
stored again whole. So the cuts follow from sizes alone, never from content:

- a tensor over `shard_size` is split on its own, from its start; its last piece shares no shard;
- smaller tensors of a file, in the order of their bytes, are grouped up to `shard_size`;
- other files, and the headers of safetensors files (they change with every metadata), are cut at
  multiples of `shard_size`;
- what is left small by these rules (under a quarter of `shard_size`) is packed in the order of the
  files: small groups of tensors with each other, tiny files, tails and headers with each other. So
  20 JSON files cost one shard, and a changed JSON file does not change a shard of tensors.

Plans come out one by one, and only two unfinished packs are held: a terabyte costs no more memory
than a megabyte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

# Packs are closed when the next item does not fit, so they are filled to at least 3/4.
PACKED_BELOW_DIVISOR: Final = 4


class SourceFile(NamedTuple):
    """A file to cut. `cuts` of a safetensors file: the offsets at which its tensors begin, in
    ascending order, followed by `size`; the first one is the end of the header. None: plain bytes.
    """

    path: str
    size: int
    cuts: Sequence[int] | None = None


class Piece(NamedTuple):
    """`length` bytes from `offset` on of file number `file_index`."""

    file_index: int
    offset: int
    length: int


class ShardPlan(NamedTuple):
    """The pieces whose bytes, joined in this order, are one shard."""

    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of the shard."""
        return sum(piece.length for piece in self.pieces)


def tensor_cuts(data_start: int, ends: Iterable[int]) -> list[int]:
    """The `cuts` of a safetensors file: `data_start` is the end of its header, `ends` are the ends
    of its tensors in the order of their bytes. Empty tensors add no cut."""
    cuts = [data_start]
    for end in ends:
        if end != cuts[-1]:
            cuts.append(end)
    return cuts


def cut(files: Iterable[SourceFile], shard_size: int) -> Iterator[ShardPlan]:
    """Plans of at most `shard_size` bytes that hold each byte of each file exactly once.

    `files` in the order in which small files are to be packed: by path, to be the same next time.
    Empty files appear in no plan. ValueError for cuts that are not ascending or do not end at the
    file's size.
    """
    threshold = max(1, shard_size // PACKED_BELOW_DIVISOR)
    small_bytes = _Pack(shard_size)
    small_tensors = _Pack(shard_size)
    for file_index, file in enumerate(files):
        data_start = file.size
        if file.cuts is not None:
            _check_cuts(file)
            data_start = file.cuts[0]
            for group in _tensor_groups(file_index, file.cuts, shard_size):
                pack = None if group.remainder else small_tensors
                yield from _placed(group.piece, pack, threshold)
        for piece in _fixed(file_index, 0, data_start, shard_size):
            yield from _placed(piece, small_bytes, threshold)
    yield from small_tensors.close()
    yield from small_bytes.close()


class _Group(NamedTuple):
    piece: Piece
    remainder: bool  # of a tensor that was split: stays alone however small it is


class _Pack:
    """Small pieces that wait for others to share a shard with."""

    def __init__(self, shard_size: int) -> None:
        self._shard_size = shard_size
        self._pieces: list[Piece] = []
        self._length = 0

    def add(self, piece: Piece) -> Iterator[ShardPlan]:
        if self._length + piece.length > self._shard_size:
            yield from self.close()
        self._pieces.append(piece)
        self._length += piece.length

    def close(self) -> Iterator[ShardPlan]:
        if self._pieces:
            yield ShardPlan(tuple(self._pieces))
        self._pieces = []
        self._length = 0


def _placed(piece: Piece, pack: _Pack | None, threshold: int) -> Iterator[ShardPlan]:
    if pack is not None and piece.length < threshold:
        yield from pack.add(piece)
    else:
        yield ShardPlan((piece,))


def _fixed(file_index: int, start: int, end: int, shard_size: int) -> Iterator[Piece]:
    for offset in range(start, end, shard_size):
        yield Piece(file_index, offset, min(shard_size, end - offset))


def _tensor_groups(file_index: int, cuts: Sequence[int], shard_size: int) -> Iterator[_Group]:
    """Runs of whole tensors up to `shard_size`, and the pieces of each tensor that is larger."""
    start = cuts[0]
    for begin, end in pairwise(cuts):
        if end - start <= shard_size:
            continue  # joins the run that began at `start`
        if begin > start:
            yield _Group(Piece(file_index, start, begin - start), remainder=False)
        start = begin
        if end - begin > shard_size:
            for piece in _fixed(file_index, begin, end, shard_size):
                yield _Group(piece, remainder=True)
            start = end
    if cuts[-1] > start:
        yield _Group(Piece(file_index, start, cuts[-1] - start), remainder=False)


def _check_cuts(file: SourceFile) -> None:
    cuts = file.cuts
    if not cuts or cuts[0] < 0 or cuts[-1] != file.size:
        raise ValueError(f"{file.path}: cuts do not end at the file's size of {file.size}")
    if any(end <= begin for begin, end in pairwise(cuts)):
        raise ValueError(f"{file.path}: cuts are not in ascending order")
