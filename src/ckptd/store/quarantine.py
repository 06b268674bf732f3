"""Files whose bytes do not have their recorded hash: set aside, never served.

They are kept because they may be all that is left: a file with one flipped bit still holds nearly
everything that somebody may want back, and what was bad may have been the reading. Only a copy that
is known to be good elsewhere makes them useless.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from ckptd.store import durable, layout
from ckptd.store.filesystem import FileSystem


@dataclass(frozen=True, slots=True)
class QuarantinedFile:
    """One file in quarantine. `id` is the hash that it should have, `suffix` "" for a shard."""

    id: str
    suffix: str
    path: str
    size_bytes: int


class Quarantine:
    """The quarantine directory of one store. Thread-safe. All methods raise `OSError`."""

    def __init__(self, store: str, filesystem: FileSystem) -> None:
        self._store = store
        self._filesystem = filesystem
        self._lock = threading.Lock()
        self._total_bytes = sum(file.size_bytes for file in self.files())

    @property
    def total_bytes(self) -> int:
        """Bytes that lie in quarantine."""
        return self._total_bytes

    def files(self) -> list[QuarantinedFile]:
        """Everything in quarantine, in order of ids and numbers."""
        found = []
        directory = os.path.join(self._store, layout.QUARANTINE)
        for entry in self._filesystem.list_directory(directory):
            parsed = layout.parse_quarantine_name(entry.name)
            if parsed is not None and entry.is_file:
                found.append((parsed, os.path.join(directory, entry.name), entry.size_bytes))
        return [
            QuarantinedFile(id_, suffix, path, size_bytes)
            for (id_, suffix, _), path, size_bytes in sorted(found)
        ]

    def rename_into(self, source: str, size_bytes: int) -> str:
        """Move `source` here under the next free number; returns its new path.

        The move is durable only after `flush`: a caller that holds a lock flushes without it.
        """
        name = os.path.basename(source)
        with self._lock:
            target = layout.quarantine_path(self._store, name, self._next_number(name))
            self._filesystem.rename(source, target)
            self._total_bytes += size_bytes
        return target

    def flush(self, source: str, target: str) -> None:
        """Make a move by `rename_into` durable."""
        durable.flush_move(self._filesystem, source, target)

    def rename_out(self, file: QuarantinedFile, target: str) -> None:
        """Move a file back to where it came from; durable only after `flush`."""
        with self._lock:
            self._filesystem.rename(file.path, target)
            self._total_bytes -= file.size_bytes

    def remove(self, file: QuarantinedFile) -> None:
        """Delete a file. It may be back after a power cut."""
        with self._lock:
            self._filesystem.unlink(file.path)
            self._total_bytes -= file.size_bytes

    def _next_number(self, name: str) -> int:
        directory = os.path.join(self._store, layout.QUARANTINE)
        number = 0
        for entry in self._filesystem.list_directory(directory):
            parsed = layout.parse_quarantine_name(entry.name)
            if parsed is not None and parsed[0] + parsed[1] == name:
                number = max(number, parsed[2] + 1)
        return number
