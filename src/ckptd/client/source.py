"""A checkpoint on this machine's disk: what belongs to it, and whether it held still.

A source is looked at three times: scanned, hashed, and sent. Each time a file is opened its
fingerprint is compared with that of the scan, and at the end once more by path: whatever changed in
between makes the version void (SourceChanged). Nothing is locked, and nothing is written.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ckptd.core import limits
from ckptd.core.checkpoint_units import DONE_MARKER
from ckptd.core.cutting import SourceFile as CutFile
from ckptd.core.cutting import tensor_cuts
from ckptd.core.documents import DirectoryEntry, SymlinkEntry
from ckptd.core.names import check_path, path_to_json, symlink_stays_inside
from ckptd.core.safetensors_header import parse_header, read_length
from ckptd.core.tensor_index import TensorRecord
from ckptd.errors import HeaderInvalid, NameRefused, NotFound, SourceChanged, SourceRefused

RACY_NS: Final = 2_100_000_000
"""A file that changed less than this before it was scanned may change again and keep its times:
they are as coarse as two seconds (FAT), and the clock of the system's file times ticks up to ten
milliseconds behind the one that we read. It is hashed a second time."""
_STORE_AGAIN: Final = "store it again when the training has finished writing it"


@dataclass(frozen=True)
class Fingerprint:
    """What tells that a file is the same, unchanged one: from fstat(2) or stat(2)."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Fingerprint:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True)
class File:
    """A file of a checkpoint. `path` is relative to the checkpoint, `location` where it lies."""

    path: str
    location: str
    mode: int
    fingerprint: Fingerprint

    @property
    def size(self) -> int:
        return self.fingerprint.size

    def open(self) -> int:
        """A descriptor for reading. Raises SourceChanged when it is not the scanned file."""
        try:
            # Nonblocking: a fifo that took the file's place would be waited for without end.
            descriptor = os.open(self.location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise self._changed(error.strerror or "cannot be read") from error
        if Fingerprint.of(os.fstat(descriptor)) != self.fingerprint:
            os.close(descriptor)
            raise self._changed("was changed")
        return descriptor

    def check(self) -> None:
        """Raises SourceChanged unless the path still leads to the scanned, unchanged file."""
        try:
            found = os.stat(self.location)
        except OSError as error:
            raise self._changed(error.strerror or "cannot be read") from error
        if Fingerprint.of(found) != self.fingerprint:
            raise self._changed("was changed")

    def _changed(self, what: str) -> SourceChanged:
        return SourceChanged(f"{self.location} {what} while it was being stored", next=_STORE_AGAIN)


@dataclass
class Source:
    """A scanned checkpoint. `files` are in the order of their paths. `excluded` paths lie in it and
    are no part of it."""

    root: Path
    unit: str
    mode: int
    files: list[File]
    directories: list[DirectoryEntry]
    symlinks: list[SymlinkEntry]
    warnings: list[str]
    scanned_ns: int
    excluded: frozenset[str] = frozenset()
    cuts: dict[int, list[int]] = field(default_factory=dict)
    tensors: list[TensorRecord] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def to_cut(self) -> list[CutFile]:
        """The files as `ckptd.core.cutting` takes them."""
        return [
            CutFile(file.path, file.size, self.cuts.get(index))
            for index, file in enumerate(self.files)
        ]

    def is_racy(self, file: File) -> bool:
        """Whether the times of a file cannot prove that it held still. The time of change counts,
        too: a writer may set that of modification back."""
        newest_ns = max(file.fingerprint.mtime_ns, file.fingerprint.ctime_ns)
        return newest_ns > self.scanned_ns - RACY_NS

    def check(self) -> None:
        """Raises SourceChanged unless all files and links are unchanged, and no path came or
        went."""
        for file in self.files:
            file.check()
        if self.unit == "directory" and self._shape() != self._scanned_shape():
            raise SourceChanged(
                f"files or links came, went or changed in {self.root} while it was being stored",
                next=_STORE_AGAIN,
            )

    def _scanned_shape(self) -> dict[str, str | None]:
        shape: dict[str, str | None] = {path_to_json(file.path): None for file in self.files}
        shape |= {entry.path: "" for entry in self.directories}
        shape |= {entry.path: entry.target for entry in self.symlinks}
        return shape

    def _shape(self) -> dict[str, str | None]:
        """By path "" for a directory, a link's target, None for what is stored as a file."""
        files = {file.path for file in self.files}
        shape: dict[str, str | None] = {}
        try:
            for path, entry in _walk(self.root, self.excluded):
                if path in files:
                    shape[path_to_json(path)] = None
                elif entry.is_symlink():
                    shape[path_to_json(path)] = path_to_json(os.readlink(entry.path))
                else:
                    shape[path_to_json(path)] = "" if entry.is_dir() else "a new file"
        except (OSError, SourceRefused) as error:
            raise SourceChanged(
                f"{self.root} changed while it was being stored: {error}", next=_STORE_AGAIN
            ) from error
        return shape


def scan(path: Path, *, as_is: bool = False, excluded: Collection[str] = ()) -> Source:
    """What lies at `path`, a directory or a file.

    `excluded` paths below a directory (relative to it, directories with all below them) are left
    out, and so is its `.ckptd-done`. Raises NotFound; SourceRefused, by name, for devices, fifos,
    sockets, dangling links, unreadable files, and safetensors files with an invalid header (unless
    `as_is`: then they are plain bytes).
    """
    scanned_ns = time.time_ns()
    try:
        root = path.resolve(strict=True)
        found = root.stat()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is a loop of symlinks"
        raise NotFound(f"{path}: {reason}", next=f"ls -la {path.parent}") from error
    if stat.S_ISREG(found.st_mode):
        name = check_path(os.path.basename(root))
        mode = found.st_mode & 0o777
        source = Source(root, "file", mode, [], [], [], [], scanned_ns)
        source.files.append(_file(name, str(root), found))
    elif stat.S_ISDIR(found.st_mode):
        left_out = frozenset([*excluded, DONE_MARKER])
        mode = found.st_mode & 0o777
        source = Source(root, "directory", mode, [], [], [], [], scanned_ns, left_out)
        for relative, entry in _walk(root, left_out):
            _add(source, relative, entry)
        source.files.sort(key=lambda file: file.path)
    else:
        raise SourceRefused(f"{path} is neither a file nor a directory")
    count = len(source.files) + len(source.directories) + len(source.symlinks)
    if count > limits.ENTRIES_MAX:
        raise SourceRefused(f"{path} has {count} entries, more than {limits.ENTRIES_MAX}")
    if source.size > limits.CHECKPOINT_MAX_BYTES:
        raise SourceRefused(f"{path} has {source.size} bytes, more than ckptd stores at once")
    if not as_is:
        _read_headers(source)
    return source


def _walk(root: Path, excluded: frozenset[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All entries below `root`, never through a symlink, with their relative paths, but those that
    are `excluded`."""
    pending = [""]
    while pending:
        relative = pending.pop()
        directory = os.path.join(root, relative) if relative else str(root)
        try:
            with os.scandir(directory) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise SourceRefused(f"{directory}: {error.strerror}") from error
        for entry in found:
            path = f"{relative}/{entry.name}" if relative else entry.name
            if path in excluded:
                continue
            yield path, entry
            if entry.is_dir(follow_symlinks=False):
                pending.append(path)


def _add(source: Source, relative: str, entry: os.DirEntry[str]) -> None:
    try:
        check_path(relative)
        found = entry.stat(follow_symlinks=False)
    except (OSError, NameRefused) as error:
        raise SourceRefused(f"{entry.path}: {error}") from error
    if stat.S_ISREG(found.st_mode):
        source.files.append(_file(relative, entry.path, found))
    elif stat.S_ISDIR(found.st_mode):
        source.directories.append(DirectoryEntry(path_to_json(relative), found.st_mode & 0o777))
    elif stat.S_ISLNK(found.st_mode):
        _add_symlink(source, relative, entry.path)
    else:
        raise SourceRefused(
            f"{entry.path} is a {_kind(found.st_mode)}, which cannot be stored",
            next=f"remove it or move it out of {source.root}",
        )


def _add_symlink(source: Source, relative: str, location: str) -> None:
    target = os.readlink(location)
    try:
        pointed = os.stat(location)
    except OSError as error:
        raise SourceRefused(
            f"{location} is a link to {target}, which is not there",
            next=f"remove the link or bring back {target}",
        ) from error
    if symlink_stays_inside(relative, target):
        source.symlinks.append(SymlinkEntry(path_to_json(relative), path_to_json(target)))
        return
    if not stat.S_ISREG(pointed.st_mode):
        raise SourceRefused(
            f"{location} links to {target}, a {_kind(pointed.st_mode)} outside the checkpoint",
            next="copy it into the checkpoint, or remove the link",
        )
    source.files.append(_file(relative, location, pointed))
    source.warnings.append(
        f"{relative} is a link that leaves the checkpoint ({target}): stored as the file it "
        "points to"
    )


def _file(relative: str, location: str, found: os.stat_result) -> File:
    return File(relative, location, found.st_mode & 0o777, Fingerprint.of(found))


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFIFO: "fifo",
        stat.S_IFSOCK: "socket",
        stat.S_IFBLK: "block device",
        stat.S_IFCHR: "character device",
        stat.S_IFDIR: "directory",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")


def _read_headers(source: Source) -> None:
    """Finds the tensors of all safetensors files, for cutting along them and for the index."""
    for index, file in enumerate(source.files):
        if not file.path.endswith(".safetensors"):
            continue
        descriptor = file.open()
        try:
            length = read_length(os.pread(descriptor, 8, 0), file.size)
            header = parse_header(os.pread(descriptor, length, 8), file.size)
        except HeaderInvalid as error:
            raise SourceRefused(
                f"{file.location} is not a valid safetensors file: {error.message}",
                next=f"ckptd store {source.root} --as-is   (stores it as plain bytes)",
            ) from error
        except OSError as error:
            raise SourceRefused(f"{file.location}: {error.strerror}") from error
        finally:
            os.close(descriptor)
        source.cuts[index] = tensor_cuts(
            header.data_start, (tensor.end for tensor in header.tensors)
        )
        for tensor in header.tensors:
            source.tensors.append(
                TensorRecord(
                    tensor.name, file.path, tensor.dtype, tensor.shape, tensor.begin, tensor.end
                )
            )
