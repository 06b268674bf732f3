"""The versions whose manifests were dropped after garbage collection, for ever: sorted ids of 32
bytes each in one file. Whatever else may happen to the catalogue, they never come back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

import structlog

from ckptd.core import limits
from ckptd.store.marker import StoreDirectory
from ckptd.store.state_file import StateFile

_log = structlog.get_logger(__name__)

FILE: Final = "dead-versions"
_ID_BYTES: Final = 32


class DeadVersions:
    """The ids in the file. Thread-safe; errors are those of `StateFile`."""

    def __init__(self, directory: StoreDirectory) -> None:
        self._file = StateFile(directory, FILE, max_bytes=limits.DEAD_VERSIONS_MAX * _ID_BYTES)
        self._lock = threading.Lock()
        self._packed = self._read()

    def _read(self) -> bytes:
        packed = self._file.read() or b""
        ids = [packed[at : at + _ID_BYTES] for at in range(0, len(packed), _ID_BYTES)]
        whole = sorted({each for each in ids if len(each) == _ID_BYTES})
        if whole != ids:
            # The tombstones say the same, so nothing comes back to life by this.
            _log.error("dead_versions_damaged", path=self._file.path)
        return b"".join(whole)

    def __len__(self) -> int:
        return len(self._packed) // _ID_BYTES

    def __contains__(self, version_id: str) -> bool:
        wanted = bytes.fromhex(version_id)
        packed = self._packed
        low, high = 0, len(packed) // _ID_BYTES
        while low < high:
            middle = (low + high) // 2
            if packed[middle * _ID_BYTES : (middle + 1) * _ID_BYTES] < wanted:
                low = middle + 1
            else:
                high = middle
        return packed[low * _ID_BYTES : (low + 1) * _ID_BYTES] == wanted

    def add(self, version_ids: Iterable[str]) -> None:
        """Makes these ids durable in the file. Raises StoreOperationFailed when it is full."""
        with self._lock:
            known = self._packed
            ids = {known[at : at + _ID_BYTES] for at in range(0, len(known), _ID_BYTES)}
            packed = b"".join(sorted(ids.union(map(bytes.fromhex, version_ids))))
            if packed != known:
                self._file.write(packed)
                self._packed = packed
