"""Outputs in memory: for tensors that are loaded, headers, and the tensor index."""

from __future__ import annotations

from collections.abc import Iterable


class MemoryOutputs:
    """One buffer for each of `sizes`, written from several threads at different places."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.buffers = [bytearray(size) for size in sizes]

    def write(self, output: int, view: memoryview, offset: int) -> None:
        """As Outputs of `pull_threads`."""
        self.buffers[output][offset : offset + len(view)] = view
