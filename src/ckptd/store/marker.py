"""A store directory: how it becomes one, and how one process opens it.

A directory is a store because a marker lies in it, made once by `ckptd serve --init`. Without the
marker nothing is written: an unmounted disk must never become an empty store on the card below.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from typing import Final

from ckptd.core import limits
from ckptd.errors import Refused, StoreLocked, StoreMarkerMissing
from ckptd.store import durable, layout
from ckptd.store.filesystem import OPERATING_SYSTEM, FileSystem
from ckptd.store.medium import Medium
from ckptd.store.quarantine import Quarantine

MARKER_FORMAT: Final = "ckptd-store-1"
_STORE_ID = re.compile(r"[0-9a-f]{32}\Z")
# What a directory may hold and still become a store: the file system's own directory, and what an
# init that was cut off has left.
_NOT_CONTENT: Final = frozenset({"lost+found", layout.MARKER_NEW})


class StoreDirectory:
    """An opened, locked store: the ground that `ShardStore` and `DocumentFiles` stand on.

    Holding it means that no other process has the store open, that its directories exist durably
    and that nothing lies in incoming/ from an earlier process.
    """

    def __init__(
        self, path: str, store_id: str, filesystem: FileSystem, medium: Medium, lock: int
    ) -> None:
        self.path = path
        self.store_id = store_id
        self.filesystem = filesystem
        self.medium = medium
        self.quarantine = Quarantine(path, filesystem)
        self._lock: int | None = lock

    @property
    def incoming(self) -> str:
        """Where temporary files lie."""
        return os.path.join(self.path, layout.INCOMING)

    def close(self) -> None:
        """Let another process open the store. May be called twice; raises nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with contextlib.suppress(OSError):  # the lock is gone all the same
                self.filesystem.close(lock)

    def __enter__(self) -> StoreDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def init_store(path: str, *, store_id: str, filesystem: FileSystem = OPERATING_SYSTEM) -> str:
    """Make `path` a store, durably; returns its store id.

    `store_id` (32 hex digits, random) is used only when there is no marker yet: a directory that
    is a store already stays as it is. The directory itself is made when its parent exists. Refuses
    (`Refused`) a directory that holds anything else, `StoreMarkerMissing` on a damaged marker.
    """
    if _STORE_ID.match(store_id) is None:
        raise ValueError("a store id has 32 lower-case hex digits")
    path = os.path.abspath(path)
    medium = _medium(path, filesystem)
    with medium.operation("make a store"):
        try:
            found = {entry.name for entry in filesystem.list_directory(path)}
            # Whoever made the directory may not have flushed its name. A parent that this user may
            # not open is the work of an administrator.
            with contextlib.suppress(PermissionError):
                filesystem.fsync_directory(os.path.dirname(path))
        except FileNotFoundError:
            found = set()
            durable.make_directory(filesystem, path)
        if layout.MARKER in found:
            store_id = read_marker(path, filesystem)
            filesystem.fsync_directory(path)
            return store_id
        if foreign := sorted(found - _NOT_CONTENT):
            raise Refused(
                f"{path} holds {foreign[0]!r} and is no store: it was not made one",
                next=f"ls -la {path}; then choose an empty directory as store.path",
            )
        if layout.MARKER_NEW in found:
            filesystem.unlink(os.path.join(path, layout.MARKER_NEW))
        _write_marker(path, store_id, filesystem)
    return store_id


def open_store(path: str, *, filesystem: FileSystem = OPERATING_SYSTEM) -> StoreDirectory:
    """Open and lock the store at `path`, make its directories, empty incoming/.

    Errors: `StoreMarkerMissing` (nothing was written), `StoreLocked`, `MediumFailed`, `NoRoom`.
    """
    path = os.path.abspath(path)
    medium = _medium(path, filesystem)
    with medium.operation("open the store"):
        store_id = read_marker(path, filesystem)
        medium = _medium(path, filesystem, store_id)
    with medium.operation("open the store"):
        lock = _take_lock(path, filesystem)
        with _closed_on_error(filesystem, lock):
            for name in layout.DIRECTORIES:
                with contextlib.suppress(FileExistsError):
                    filesystem.mkdir(os.path.join(path, name))
            # One flush for all of them, and for whatever a killed process had not flushed.
            filesystem.fsync_directory(path)
            incoming = os.path.join(path, layout.INCOMING)
            for entry in filesystem.list_directory(incoming):
                if entry.is_file:
                    filesystem.unlink(os.path.join(incoming, entry.name))
            return StoreDirectory(path, store_id, filesystem, medium, lock)


def read_marker(
    path: str, filesystem: FileSystem = OPERATING_SYSTEM, *, uncached: bool = False
) -> str:
    """The store id in the marker of the store at `path`.

    `StoreMarkerMissing` when there is none or when it is not a marker; `OSError` from the disk.
    """
    marker = os.path.join(path, layout.MARKER)
    try:
        text = durable.read_file(
            filesystem, marker, limits.STORE_MARKER_MAX_BYTES, uncached=uncached
        )
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise StoreMarkerMissing(
                f"{path} is not a store: it has no {layout.MARKER}. Is the disk mounted?",
                next=f"findmnt --target {path}; only for a new store: ckptd serve --init",
            ) from error
        raise
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if isinstance(fields, dict) and fields.get("format") == MARKER_FORMAT:
        store_id = fields.get("store_id")
        if isinstance(store_id, str) and _STORE_ID.match(store_id):
            return store_id
    raise StoreMarkerMissing(
        f"{marker} is damaged or of a newer format: the store is not opened",
        next=f"cat {marker}; docs/formats/disk.md says what it must hold",
    )


def _write_marker(path: str, store_id: str, filesystem: FileSystem) -> None:
    # Not through incoming/: as long as the marker is not there, nothing else may be.
    text = json.dumps({"format": MARKER_FORMAT, "store_id": store_id}, sort_keys=True) + "\n"
    new = os.path.join(path, layout.MARKER_NEW)
    durable.write_file(filesystem, new, os.path.join(path, layout.MARKER), text.encode())


def _take_lock(path: str, filesystem: FileSystem) -> int:
    lock = filesystem.open(os.path.join(path, layout.LOCK), os.O_RDWR | os.O_CREAT)
    with _closed_on_error(filesystem, lock):
        try:
            filesystem.lock(lock)
        except BlockingIOError as error:
            raise StoreLocked(
                f"another process has the store {path} open",
                next=f"fuser -v {os.path.join(path, layout.LOCK)}; stop that ckptd first",
            ) from error
    return lock


def _medium(path: str, filesystem: FileSystem, store_id: str | None = None) -> Medium:
    def probe() -> None:
        if store_id is None:
            return  # not known to be a store yet: the marker's absence says nothing of the disk
        found = read_marker(path, filesystem, uncached=True)
        if found != store_id:
            raise OSError(errno.ENODEV, f"another store ({found}) is mounted here now")

    return Medium(path, probe)


@contextlib.contextmanager
def _closed_on_error(filesystem: FileSystem, descriptor: int) -> Iterator[None]:
    try:
        yield
    except Exception:
        with contextlib.suppress(OSError):
            filesystem.close(descriptor)
        raise
