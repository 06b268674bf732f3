"""A small file of a node's own state in its store: replaced whole and durably, never changed."""

from __future__ import annotations

import os

from ckptd.errors import StoreOperationFailed
from ckptd.store import durable
from ckptd.store.marker import StoreDirectory


class StateFile:
    """The file `name` in the store `directory`. What it means, and whether it makes sense, is up to
    whoever reads it: it may be missing at any time. Methods block, and raise `MediumFailed`,
    `NoRoom` and `StoreOperationFailed`."""

    def __init__(self, directory: StoreDirectory, name: str, *, max_bytes: int) -> None:
        self._directory = directory
        self._name = name
        self._max_bytes = max_bytes
        self.path = os.path.join(directory.path, name)

    def read(self) -> bytes | None:
        """What was written last; None when there is no such file, or one that is too long."""
        with self._directory.medium.operation(f"read {self._name}"):
            try:
                return durable.read_file(self._directory.filesystem, self.path, self._max_bytes)
            except (FileNotFoundError, durable.FileTooLong):
                return None

    def write(self, data: bytes) -> None:
        """Replaces the file. It is on the medium once this has returned."""
        if len(data) > self._max_bytes:
            raise StoreOperationFailed(f"{self.path}: {len(data)} bytes, over its limit")
        temporary = durable.temporary_path(self._directory.incoming, self._name)
        with self._directory.medium.operation(f"write {self._name}"):
            durable.write_file(self._directory.filesystem, temporary, self.path, data)
