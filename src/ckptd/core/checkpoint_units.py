"""Which directories and files below a watched root are checkpoints.

In this order: a directory with an empty `.ckptd-checkpoint` file; what `watch[].pattern` fits, and
then nothing else; a directory that is named as a training step; a directory that directly holds
checkpoint files; a single checkpoint file in the root. docs/watching.md explains the rules.

A snapshot is what a scan of the root saw: directory path -> name -> entry, paths relative to the
root, "" for the root itself. Nothing here touches a disk.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Final, Literal, TypeAlias

from msgspec import Struct

from ckptd.core.names import check_name
from ckptd.errors import NameRefused

CHECKPOINT_MARKER: Final = ".ckptd-checkpoint"
DONE_MARKER: Final = ".ckptd-done"
MODEL_INDEX: Final = "model_index.json"
CHECKPOINT_SUFFIXES: Final = (
    ".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".gguf"
)  # fmt: skip

STEP_NAME: Final = re.compile(
    r"(?:checkpoint-|step[-_]|epoch[-_]|iter_|global_step|ckpt-)([0-9]{1,18})", re.ASCII
)
_TEMPORARY: Final = re.compile(
    r"tmp-.*|.*\.tmp|.*\.part|.*\.incomplete|\.~tmp~|\..+\.[0-9A-Za-z]{6}", re.ASCII | re.DOTALL
)
# What `ckptd restore` leaves next to its target when it is cut off.
_OWN_LEFTOVER: Final = re.compile(
    r"\..*\.ckptd-(?:restore|old)-[0-9a-f]+|\.ckptd-probe-.*", re.ASCII | re.DOTALL
)


class Kind(IntEnum):
    """What an entry is. A link to a file counts as that file, a link to a directory is never
    followed."""

    FILE = 0
    DIRECTORY = 1
    FILE_LINK = 2
    DIRECTORY_LINK = 3
    DANGLING_LINK = 4
    SPECIAL = 5
    UNREADABLE = 6


class Entry(Struct, frozen=True, gc=False):
    """One entry as stat(2) saw it; times in ns. For a link to a file: size and times of the file,
    and the later ctime of the two."""

    kind: Kind
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    inode: int = 0

    @property
    def is_file(self) -> bool:
        return self.kind is Kind.FILE or self.kind is Kind.FILE_LINK

    @property
    def changed_ns(self) -> int:
        """When it last changed, by the clock of the file system. A writer can set mtime back."""
        return max(self.mtime_ns, self.ctime_ns)


Snapshot: TypeAlias = Mapping[str, Mapping[str, Entry]]


class Unit(Struct, frozen=True, gc=False):
    """A checkpoint below a root. `path` is relative to the root, `name` what it is stored as.

    `splits`: step-named and marked directories below it are checkpoints of their own and no part
    of this one.
    """

    path: str
    name: str
    kind: Literal["directory", "file"]
    splits: bool = False


class RefusedUnit(Struct, frozen=True, gc=False):
    """A checkpoint that cannot have a name, and why."""

    path: str
    reason: str


class Units(Struct, frozen=True):
    """What was found below a root, each in the order of its path."""

    units: list[Unit]
    refused: list[RefusedUnit]


class Members(Struct, frozen=True):
    """What belongs to a unit: by path relative to it, sorted. For a single file, that file's name.

    `excluded`: directories, relative to the unit, that are no part of it.
    `marked_ns`: when the `.ckptd-done` marker last changed, None without one.
    """

    entries: dict[str, Entry]
    excluded: frozenset[str] = frozenset()
    marked_ns: int | None = None

    def fingerprint(self) -> bytes:
        """16 bytes that change whenever an entry comes, goes or changes. Directories count by
        their path alone: their times change with temporary files and markers."""
        digest = hashlib.blake2b(digest_size=16)
        for path, entry in self.entries.items():
            stamp = (
                f"{entry.kind:d} {entry.size} {entry.mtime_ns} {entry.ctime_ns} {entry.inode}"
                if entry.kind is not Kind.DIRECTORY
                else "directory"
            )
            digest.update(f"{path}\0{stamp}\0".encode("utf-8", "surrogateescape"))
        return digest.digest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.entries.values() if entry.is_file)

    @property
    def is_done(self) -> bool:
        """Whether the marker says that the writer has finished. One that is older than a file is
        of an earlier writing."""
        if self.marked_ns is None:
            return False
        changes = [e.changed_ns for e in self.entries.values() if e.kind is not Kind.DIRECTORY]
        return self.marked_ns >= max(changes, default=0)


def is_temporary(name: str) -> bool:
    """Whether a file or directory of this name is something that a writer has not finished."""
    return _TEMPORARY.fullmatch(name) is not None


def is_own_leftover(name: str) -> bool:
    """Whether `ckptd restore` made it: never a checkpoint, and nothing below it is."""
    return _OWN_LEFTOVER.fullmatch(name) is not None


def step_of(name: str) -> int | None:
    """The step in the last part of a path that is named as a step, else None."""
    found = STEP_NAME.fullmatch(name.rpartition("/")[2])
    return int(found[1]) if found else None


def join(directory: str, name: str) -> str:
    """The path of `name` in `directory`, which may be ""."""
    return f"{directory}/{name}" if directory else name


def find_units(snapshot: Snapshot, *, prefix: str = "", pattern: str = "") -> Units:
    """The checkpoints in a whole snapshot. `prefix` goes before names; `pattern` (`*` and `?`
    within a part of the path, `**` for any number of parts) replaces recognition by content."""
    fits = _compiled(pattern) if pattern else None
    found: list[Unit] = []
    refused: list[RefusedUnit] = []
    _collect(snapshot, fits, found, refused)
    units = []
    for unit in sorted(found, key=lambda unit: unit.path):
        name = join(prefix, unit.path) if unit.path else prefix
        try:
            units.append(Unit(unit.path, check_name(name), unit.kind, unit.splits))
        except NameRefused as error:
            reason = error.message if name else "the root itself needs watch[].prefix as its name"
            refused.append(RefusedUnit(unit.path, reason))
    return Units(units, sorted(refused, key=lambda unit: unit.path))


def members(snapshot: Snapshot, unit: Unit) -> Members | None:
    """What belongs to `unit` in a snapshot that holds at least everything below it; None when it
    is not there any more."""
    if unit.kind == "file":
        directory, _, name = unit.path.rpartition("/")
        entry = snapshot.get(directory, {}).get(name)
        return Members({name: entry}) if entry is not None and entry.is_file else None
    if unit.path not in snapshot:
        return None
    entries: dict[str, Entry] = {}
    excluded: set[str] = set()
    marker = snapshot[unit.path].get(DONE_MARKER)
    pending = [unit.path]
    while pending:
        directory = pending.pop()
        for name, entry in snapshot.get(directory, {}).items():
            path = join(directory, name)
            relative = path[len(unit.path) + 1 :] if unit.path else path
            if relative == DONE_MARKER:
                continue
            if entry.kind is Kind.DIRECTORY:
                if is_own_leftover(name) or (unit.splits and _stands_alone(snapshot, path, name)):
                    excluded.add(relative)
                    continue
                pending.append(path)
            entries[relative] = entry
    return Members(
        dict(sorted(entries.items())),
        frozenset(excluded),
        None if marker is None else marker.changed_ns,
    )


def _collect(
    snapshot: Snapshot,
    fits: Callable[[str], bool] | None,
    found: list[Unit],
    unreadable: list[RefusedUnit],
) -> None:
    if _is_marked(snapshot, ""):
        found.append(Unit("", "", "directory"))
        return
    pending = [("", False)]
    while pending:
        directory, inside = pending.pop()
        for name, entry in snapshot.get(directory, {}).items():
            path = join(directory, name)
            if entry.kind is Kind.DIRECTORY:
                if is_own_leftover(name):
                    continue
                unit = _directory_unit(snapshot, path, name, inside, fits)
                if unit is not None:
                    found.append(unit)
                if unit is None or unit.splits:
                    pending.append((path, inside or unit is not None))
            elif entry.is_file and not inside and _is_file_unit(path, fits):
                found.append(Unit(path, "", "file"))
            elif entry.kind is Kind.UNREADABLE and not inside:
                unreadable.append(RefusedUnit(path, "cannot be read, or lies too deep"))


def _directory_unit(
    snapshot: Snapshot, path: str, name: str, inside: bool, fits: Callable[[str], bool] | None
) -> Unit | None:
    if _is_marked(snapshot, path) or (fits is not None and fits(path)):
        return Unit(path, "", "directory")
    if fits is not None:
        return None
    if STEP_NAME.fullmatch(name):
        return Unit(path, "", "directory")
    if not inside and _holds_checkpoint(snapshot[path]):
        return Unit(path, "", "directory", splits=True)
    return None


def _is_file_unit(path: str, fits: Callable[[str], bool] | None) -> bool:
    if fits is not None:
        return fits(path)
    return "/" not in path and path.endswith(CHECKPOINT_SUFFIXES) and not is_temporary(path)


def _stands_alone(snapshot: Snapshot, path: str, name: str) -> bool:
    return STEP_NAME.fullmatch(name) is not None or _is_marked(snapshot, path)


def _is_marked(snapshot: Snapshot, path: str) -> bool:
    marker = snapshot.get(path, {}).get(CHECKPOINT_MARKER)
    return marker is not None and marker.is_file and marker.size == 0


def _holds_checkpoint(entries: Mapping[str, Entry]) -> bool:
    files = [name for name, entry in entries.items() if entry.is_file]
    if any(name == MODEL_INDEX or name.endswith(CHECKPOINT_SUFFIXES) for name in files):
        return True
    return ".metadata" in files and any(name.endswith(".distcp") for name in files)


def _compiled(pattern: str) -> Callable[[str], bool]:
    expression = "".join(
        "(?:[^/]+/)*" if part == "**" else "".join(map(_glob_character, part)) + "/"
        for part in pattern.strip("/").split("/")
    )
    compiled = re.compile(expression, re.DOTALL)
    return lambda path: compiled.fullmatch(path + "/") is not None


def _glob_character(character: str) -> str:
    return {"*": "[^/]*", "?": "[^/]"}.get(character) or re.escape(character)
