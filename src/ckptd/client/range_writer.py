"""Writing a range of a file that arrives from its start to its end, past the page cache.

Shards are cut at tensors, so a range begins and ends anywhere in the file. Its whole blocks go
straight to the disk from a buffer of its own. The pieces before the first and after the last one
go through the page cache, where they meet those of the neighbours: a block is never written both
ways.
"""

from __future__ import annotations

from typing import Final, Protocol

from ckptd.core.limits import BULK_BUFFER_BYTES, MIB
from ckptd.store.filesystem import BLOCK_BYTES, aligned_buffer

_PAST_CACHE_FROM_BYTES: Final = 1 * MIB


class Output(Protocol):
    """Outputs that can be written at any place."""

    def write(self, output: int, view: memoryview, offset: int) -> None:
        """Writes all of `view` at `offset`."""


class BlockOutput(Output, Protocol):
    """Outputs that have a second way for whole blocks."""

    def write_blocks(self, output: int, view: memoryview, offset: int) -> None:
        """As `write`, for whole blocks at a whole block's offset in an aligned buffer."""


class PlainRange:
    """Writes an output from `offset` on, one piece after the other as they come."""

    def __init__(self, outputs: Output, output: int, offset: int) -> None:
        self._outputs = outputs
        self._output = output
        self._position = offset

    def write(self, view: memoryview) -> None:
        """Takes the next bytes."""
        self._outputs.write(self._output, view, self._position)
        self._position += len(view)


class BlockRange:
    """Writes `length` bytes of an output from `offset` on, whole blocks past the page cache."""

    def __init__(self, outputs: BlockOutput, output: int, offset: int, length: int) -> None:
        self._outputs = outputs
        self._output = output
        self._position = offset
        self._blocks_begin = -(-offset // BLOCK_BYTES) * BLOCK_BYTES
        self._blocks_end = (offset + length) // BLOCK_BYTES * BLOCK_BYTES
        self._buffer = aligned_buffer(BULK_BUFFER_BYTES)
        self._filled = 0

    def write(self, view: memoryview) -> None:
        """Takes the next bytes. When all have been given, all are written."""
        while view:
            if self._blocks_begin <= self._position < self._blocks_end:
                count = self._write_blocks(view)
            else:
                count = len(view)
                if self._position < self._blocks_begin:
                    count = min(count, self._blocks_begin - self._position)
                self._outputs.write(self._output, view[:count], self._position)
            self._position += count
            view = view[count:]

    def _write_blocks(self, view: memoryview) -> int:
        count = min(len(view), len(self._buffer) - self._filled, self._blocks_end - self._position)
        self._buffer[self._filled : self._filled + count] = view[:count]
        self._filled += count
        end = self._position + count
        if self._filled == len(self._buffer) or end == self._blocks_end:
            begin = end - self._filled
            self._outputs.write_blocks(self._output, self._buffer[: self._filled], begin)
            self._filled = 0
        return count


def range_of_file(
    outputs: BlockOutput, output: int, offset: int, length: int
) -> PlainRange | BlockRange:
    """What writes `length` bytes of a file from `offset` on; short ranges as they come."""
    if length < _PAST_CACHE_FROM_BYTES:
        return PlainRange(outputs, output, offset)
    return BlockRange(outputs, output, offset, length)
