"""Outputs in memory: for tensors that are loaded, headers, and the tensor index."""

from __future__ import annotations

from collections.abc import Iterable

from ckptd.client.range_writer import PlainRange


class MemoryOutputs:
    """One buffer for each of `sizes`, written from several threads at different places."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.buffers = [bytearray(size) for size in sizes]

    def write(self, output: int, view: memoryview, offset: int) -> None:
        """Copies `view` to `offset`."""
        self.buffers[output][offset : offset + len(view)] = view

    def range_writer(self, output: int, offset: int, length: int) -> PlainRange:
        """As in Outputs of `pull_threads`."""
        return PlainRange(self, output, offset)
