"""What lies below a watched root: names, kinds, sizes and times, by stat(2) alone.

The scan is the truth about a root; file events only say when it is worth while. No file is opened,
no link to a directory followed.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

from ckptd.core import limits
from ckptd.core.checkpoint_units import (
    Entry,
    Kind,
    Members,
    Snapshot,
    Unit,
    is_own_leftover,
    join,
    members,
)
from ckptd.errors import RootUnreadable

_GONE: Final = (errno.ENOENT, errno.ENOTDIR)


class RootScanner:
    """Scans one root, again and again."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._device: int | None = None
        self.inode = 0
        """Of the root when it was last scanned: another one is another directory."""

    def scan(self, below: str = "") -> Snapshot:
        """The root, or only what lies below the directory `below` in it; {} when that is gone.

        Blocks on the disk. Raises RootUnreadable when the root as a whole cannot be read, its disk
        is not mounted any more, or it holds more than ckptd watches.
        """
        device = self._check_root()
        snapshot: dict[str, dict[str, Entry]] = {}
        pending = [below]
        count = 0
        while pending:
            directory = pending.pop()
            entries = self._list(directory, snapshot)
            if entries is None:
                continue
            snapshot[directory] = entries
            count += len(entries)
            if count > limits.WATCHED_ENTRIES_MAX:
                raise RootUnreadable(
                    f"{self.root} holds over {limits.WATCHED_ENTRIES_MAX} files and directories",
                    next="watch the directories of single runs instead",
                )
            pending += [
                join(directory, name)
                for name, entry in entries.items()
                if entry.kind is Kind.DIRECTORY and not is_own_leftover(name)
            ]
        if not below:
            self._check_mounted(device, snapshot)
        return snapshot

    def members(self, unit: Unit) -> Members | None:
        """What belongs to a unit now, None when it is not there. Raises RootUnreadable."""
        if unit.kind == "directory":
            return members(self.scan(unit.path), unit)
        self._check_root()
        location = join(self.root, unit.path)
        try:
            entry = _seen(location, os.lstat(location))
        except OSError:
            return None
        return Members({unit.path.rpartition("/")[2]: entry}) if entry.is_file else None

    def _check_root(self) -> int:
        try:
            found = os.stat(self.root)
        except OSError as error:
            raise RootUnreadable(
                f"{self.root}: {error.strerror}", next=f"ls -la {self.root}; is its disk mounted?"
            ) from error
        if not stat.S_ISDIR(found.st_mode):
            raise RootUnreadable(f"{self.root} is not a directory", next="ckptd config check")
        self.inode = found.st_ino
        return found.st_dev

    def _check_mounted(self, device: int, snapshot: Snapshot) -> None:
        """An empty directory on another disk than before is a mount point without its disk."""
        if self._device not in (None, device) and not snapshot.get(""):
            raise RootUnreadable(
                f"{self.root} is empty and on another disk than before",
                next="mount the disk with the checkpoints, or restart ckptd to go on without it",
            )
        self._device = device

    def _list(
        self, directory: str, snapshot: dict[str, dict[str, Entry]]
    ) -> dict[str, Entry] | None:
        """The entries of a directory, None when it cannot be read: then its own entry says so."""
        if directory.count("/") < limits.WATCHED_DEPTH_MAX:
            try:
                with os.scandir(join(self.root, directory)) as found:
                    return dict(filter(None, map(_entry, found)))
            except OSError as error:
                if not directory:
                    raise RootUnreadable(
                        f"{self.root}: {error.strerror}", next=f"ls -la {self.root}"
                    ) from error
                if error.errno in _GONE:
                    return None
        parent, _, name = directory.rpartition("/")
        if name in snapshot.get(parent, {}):
            snapshot[parent][name] = Entry(Kind.UNREADABLE)
        return None


def _entry(found: os.DirEntry[str]) -> tuple[str, Entry] | None:
    """The name and entry of what scandir found; None when it has gone meanwhile."""
    try:
        seen = found.stat(follow_symlinks=False)
    except OSError as error:
        return None if error.errno in _GONE else (found.name, Entry(Kind.UNREADABLE))
    return found.name, _seen(found.path, seen)


def _seen(path: str, seen: os.stat_result) -> Entry:
    if stat.S_ISLNK(seen.st_mode):
        return _link(path, seen)
    kind = _KINDS.get(stat.S_IFMT(seen.st_mode), Kind.SPECIAL)
    return _of(kind, seen, seen.st_ctime_ns)


def _link(path: str, link: os.stat_result) -> Entry:
    try:
        seen = os.stat(path)
    except OSError:
        return _of(Kind.DANGLING_LINK, link, link.st_ctime_ns)
    ctime_ns = max(link.st_ctime_ns, seen.st_ctime_ns)
    if stat.S_ISREG(seen.st_mode):
        return _of(Kind.FILE_LINK, seen, ctime_ns)
    is_directory = stat.S_ISDIR(seen.st_mode)
    return _of(Kind.DIRECTORY_LINK if is_directory else Kind.SPECIAL, link, ctime_ns)


def _of(kind: Kind, seen: os.stat_result, ctime_ns: int) -> Entry:
    return Entry(kind, seen.st_size, seen.st_mtime_ns, ctime_ns, seen.st_ino)


_KINDS: Final = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY}
