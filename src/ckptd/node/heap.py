"""Keeping a long-running node's heap small: what was used once goes back to the system.

The GNU allocator raises the size from which a block gets pages of its own as large blocks are
freed, up to 32 MiB, and opens several heaps for threads. After a burst of large requests their
memory then stays with the process for good. mallopt(3) fixes both; other allocators (macOS, musl)
have no such call and no such habit.
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_LARGE_BLOCK_BYTES: Final = 128 * 1024  # the allocator's own first value
_ARENAS: Final = 2


def keep_heap_small() -> bool:
    """Sets the allocator for the whole process, once at its start; whether it took the settings."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {
        _M_MMAP_THRESHOLD: _LARGE_BLOCK_BYTES,
        _M_TRIM_THRESHOLD: _LARGE_BLOCK_BYTES,
        _M_ARENA_MAX: _ARENAS,
    }
    return all(mallopt(option, value) == 1 for option, value in settings.items())
