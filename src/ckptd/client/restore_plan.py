"""What a restore has to write, from the manifest and what was asked for. Pure decisions."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ckptd.client.output_files import OutputFile
from ckptd.client.pull_threads import WantedShard
from ckptd.core.documents import DirectoryEntry, FileEntry, Manifest, Part, SymlinkEntry
from ckptd.core.layout import Write, byte_ranges, whole_files
from ckptd.core.names import path_from_json
from ckptd.core.tensor_index import TensorRecord
from ckptd.core.tensor_selection import files_matching, merge_tensors

MERGED_NAME: Final = "tensors.safetensors"
MADE_FILE_MODE: Final = 0o644
MADE_DIRECTORY_MODE: Final = 0o755
"""Modes of what is made by a restore and is in no manifest."""
_LINKS_MAX: Final = 40  # followed for one path, as the kernel does


@dataclass(frozen=True)
class RestorePlan:
    """All paths are relative to the directory that is restored into.

    `shards` are those to fetch. `directories` holds
    each directory with its mode, parents first. `heads` are bytes that belong at the start of an
    output and come from no shard. `root_mode` is the mode of the directory itself.
    """

    files: tuple[OutputFile, ...]
    directories: tuple[tuple[str, int], ...]
    symlinks: tuple[tuple[str, str], ...]
    shards: tuple[WantedShard, ...]
    root_mode: int
    heads: Mapping[int, bytes]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def fetched_size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def paths(self) -> list[str]:
        """Every path that will be there."""
        return [
            *(path for path, _ in self.directories),
            *(file.path for file in self.files),
            *(path for path, _ in self.symlinks),
        ]


def plan_whole(manifest: Manifest) -> RestorePlan:
    """Everything in the checkpoint."""
    files: list[tuple[str, FileEntry]] = []
    directories: dict[str, int] = {}
    symlinks = []
    for entry in manifest.entries:
        path = path_from_json(entry.path)
        if isinstance(entry, FileEntry):
            files.append((path, entry))
        elif isinstance(entry, DirectoryEntry):
            directories[path] = entry.mode
        else:
            symlinks.append((path, path_from_json(entry.target)))
    root_mode = manifest.mode if manifest.unit == "directory" else MADE_DIRECTORY_MODE
    return _plan(manifest, files, directories, symlinks, root_mode)


def plan_files(manifest: Manifest, globs: Sequence[str]) -> RestorePlan:
    """The files that match, and the directories above them.

    A matching symlink to a file of the checkpoint comes as a copy of that file, since what it
    points to is not restored. NotFound, with the nearest paths, when a glob matches nothing.
    """
    modes = _directory_modes(manifest)
    by_path = {path_from_json(entry.path): entry for entry in manifest.entries}
    found = {
        path: file
        for path, entry in by_path.items()
        if not isinstance(entry, DirectoryEntry)
        and (file := _file_behind(path, by_path)) is not None
    }
    chosen = [(path, found[path]) for path in files_matching(list(found), globs)]
    above = {parent for path, _ in chosen for parent in _parents(path)}
    directories = {path: modes.get(path, MADE_DIRECTORY_MODE) for path in above}
    return _plan(manifest, chosen, directories, [], MADE_DIRECTORY_MODE)


def plan_tensors(
    manifest: Manifest, chosen: Sequence[TensorRecord], metadata: Mapping[str, str]
) -> RestorePlan:
    """One safetensors file of the `chosen` tensors, called MERGED_NAME.

    HeaderInvalid when its header would get too long.
    """
    merged = merge_tensors(chosen, metadata)
    writes = byte_ranges(file_parts(manifest), merged.segments)
    file = OutputFile(MERGED_NAME, merged.size, MADE_FILE_MODE)
    return RestorePlan(
        files=(file,),
        directories=(),
        symlinks=(),
        shards=wanted_shards(manifest, writes),
        root_mode=MADE_DIRECTORY_MODE,
        heads={0: merged.header},
    )


def file_parts(manifest: Manifest) -> dict[str, Sequence[Part]]:
    """The parts of each file, by path."""
    return {
        path_from_json(entry.path): entry.parts
        for entry in manifest.entries
        if isinstance(entry, FileEntry)
    }


def wanted_shards(
    manifest: Manifest, writes: Mapping[int, Sequence[Write]]
) -> tuple[WantedShard, ...]:
    """The shards of a manifest with their writes, in the order of `writes`."""
    return tuple(
        WantedShard(
            bytes.fromhex(manifest.shards[number].shard), manifest.shards[number].size, of_shard
        )
        for number, of_shard in writes.items()
    )


def _plan(
    manifest: Manifest,
    files: Sequence[tuple[str, FileEntry]],
    directories: Mapping[str, int],
    symlinks: Sequence[tuple[str, str]],
    root_mode: int,
) -> RestorePlan:
    # Every directory on the way is made, also one that the manifest leaves out.
    needed = dict(directories)
    for path in [*(path for path, _ in files), *(path for path, _ in symlinks), *directories]:
        for parent in _parents(path):
            needed.setdefault(parent, MADE_DIRECTORY_MODE)
    writes = whole_files([entry.parts for _, entry in files])
    return RestorePlan(
        files=tuple(OutputFile(path, e.size, e.mode) for path, e in files),
        directories=tuple(sorted(needed.items(), key=lambda item: item[0].split("/"))),
        symlinks=tuple(symlinks),
        shards=wanted_shards(manifest, writes),
        root_mode=root_mode,
        heads={},
    )


def _directory_modes(manifest: Manifest) -> dict[str, int]:
    return {
        path_from_json(entry.path): entry.mode
        for entry in manifest.entries
        if isinstance(entry, DirectoryEntry)
    }


def _parents(path: str) -> list[str]:
    """`a/b/c` gives `a`, `a/b`."""
    segments = path.split("/")
    return ["/".join(segments[:count]) for count in range(1, len(segments))]


def _file_behind(
    path: str, by_path: Mapping[str, FileEntry | DirectoryEntry | SymlinkEntry]
) -> FileEntry | None:
    """The file that a path leads to, through symlinks inside the checkpoint; None if none."""
    for _ in range(_LINKS_MAX):
        entry = by_path.get(path)
        if isinstance(entry, FileEntry):
            return entry
        link = next(
            (
                place
                for place in [*_parents(path), path]
                if isinstance(by_path.get(place), SymlinkEntry)
            ),
            None,
        )
        if link is None:
            return None
        found = by_path[link]
        assert isinstance(found, SymlinkEntry)
        target = posixpath.join(posixpath.dirname(link), path_from_json(found.target))
        path = posixpath.normpath(target + path[len(link) :])
    return None
