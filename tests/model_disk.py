"""A model of a disk that loses power, as a `FileSystem`.

Every file and directory has what the running system sees and what the medium is known to hold.
`fsync` and `fsync_directory` are the only calls that carry something from one to the other. After
a power cut, any selection of what was not flushed may or may not be there: writes in any
combination with zeros between them, names in any combination. One exception, which every
journaling file system grants: a rename never loses the old name without the new one being there.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ckptd.store.filesystem import BLOCK_BYTES, DirectoryEntry, FileIdentity, Volume

STATES_PER_CUT_MAX = 192
_inodes = itertools.count(1)


@dataclass(eq=False)
class File:
    inode: int = field(default_factory=lambda: next(_inodes))
    seen: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def variants(self) -> list[bytes]:
        """What may be read of this file after a power cut."""
        count = len(self.pending)
        if count <= 3:
            selections = [
                selection
                for size in range(count + 1)
                for selection in itertools.combinations(self.pending, size)
            ]
        else:
            selections = [tuple(self.pending[:size]) for size in range(count + 1)]
        # In this order, without repetitions: what was flushed, …, everything.
        contents = {self.durable: None}
        if self.pending:  # the size reached the medium, no data did
            contents[self.durable + bytes(len(self.seen) - len(self.durable))] = None
        contents |= {_written(self.durable, selection): None for selection in selections}
        return list(contents)


@dataclass(eq=False)
class NameChange:
    name: str
    node: File | Directory | None
    partner: NameChange | None = None  # of a removal by rename: the new name


@dataclass(eq=False)
class Directory:
    inode: int = field(default_factory=lambda: next(_inodes))
    seen: dict[str, File | Directory] = field(default_factory=dict)
    durable: dict[str, File | Directory] = field(default_factory=dict)
    pending: list[NameChange] = field(default_factory=list)


@dataclass(eq=False)
class _Opened:
    file: File
    past_cache: bool = False

    def check(self, *block_multiples: int) -> None:
        """As direct I/O does: whole blocks only."""
        if self.past_cache and any(each % BLOCK_BYTES for each in block_multiples):
            raise OSError(errno.EINVAL, "not whole blocks")


class ModelDisk:
    """The model as the store uses it. `can_allocate` False: fallocate is not supported;
    `can_bypass` False: nothing goes past the page cache."""

    def __init__(
        self,
        root: Directory | None = None,
        *,
        can_allocate: bool = True,
        can_bypass: bool = True,
    ) -> None:
        self.root = root or Directory()
        self.can_allocate = can_allocate
        self.can_bypass = can_bypass
        self._descriptors: dict[int, _Opened] = {}
        self._next_descriptor = itertools.count(3)
        self._locked: set[_Opened] = set()

    def restart_process(self) -> None:
        """The process has died: its descriptors are gone, what the system saw stays."""
        self._descriptors.clear()
        self._locked.clear()

    def make_all_durable(self) -> None:
        """As if everything had been flushed."""
        for node in self._nodes():
            node.pending.clear()
            if isinstance(node, File):
                node.durable = bytes(node.seen)
            else:
                node.durable = dict(node.seen)

    def after_power_cut(self) -> Iterator[ModelDisk]:
        """The disks that may be found after power was lost now, at most STATES_PER_CUT_MAX."""
        nodes = self._nodes()
        files = [node for node in nodes if isinstance(node, File)]
        names = [_name_selections(node.pending) for node in nodes if isinstance(node, Directory)]
        contents = [file.variants() for file in files]
        pending = {
            id(change) for node in nodes if isinstance(node, Directory) for change in node.pending
        }
        for picked in _combinations([*names, *contents]):
            kept = frozenset[int]().union(*picked[: len(names)])
            if all(_permitted(change, kept, pending) for change in self._removals(nodes)):
                contents_of = {
                    id(file): content
                    for file, content in zip(files, picked[len(names) :], strict=True)
                }
                rebuilt = _rebuilt(self.root, kept, contents_of)
                yield ModelDisk(rebuilt, can_allocate=self.can_allocate, can_bypass=self.can_bypass)

    def root_after_power_cut(self, chooser: random.Random) -> Directory:
        """One of the disks that may be found after power was lost now, at random."""
        nodes = self._nodes()
        changes = [
            change for node in nodes if isinstance(node, Directory) for change in node.pending
        ]
        share = chooser.choice((0.0, 0.5, 0.5, 1.0))
        kept = frozenset(id(change) for change in changes if chooser.random() < share)
        pending = {id(change) for change in changes}
        lost = [each for each in self._removals(nodes) if not _permitted(each, kept, pending)]
        kept -= {id(change) for change in lost}
        contents = {
            id(node): chooser.choice(node.variants()) for node in nodes if isinstance(node, File)
        }
        return _rebuilt(self.root, kept, contents)

    @staticmethod
    def _removals(nodes: list[File | Directory]) -> list[NameChange]:
        return [
            change
            for node in nodes
            if isinstance(node, Directory)
            for change in node.pending
            if change.partner is not None
        ]

    def fingerprint(self) -> tuple[tuple[str, bytes | None], ...]:
        """All paths and contents that the system sees: equal for disks that are the same to it."""
        return tuple(_contents(self.root, ""))

    # The port

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        directory, name = self._parent(path)
        node = directory.seen.get(name)
        if node is None:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, "no such file", path)
            node = File()
            self._change(directory, name, node)
        elif flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, "exists", path)
        if isinstance(node, Directory):
            raise IsADirectoryError(errno.EISDIR, "is a directory", path)
        return self._descriptor(_Opened(node))

    def close(self, descriptor: int) -> None:
        opened = self._descriptors.pop(descriptor)
        self._locked.discard(opened)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        opened = self._descriptors[descriptor]
        opened.check(offset, len(data))
        file = opened.file
        file.seen[:] = _written(bytes(file.seen), ((offset, bytes(data)),))
        file.pending.append((offset, bytes(data)))
        return len(data)

    def pread_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        opened = self._descriptors[descriptor]
        opened.check(offset, len(buffer))
        data = opened.file.seen[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    def fsync(self, descriptor: int) -> None:
        file = self._descriptors[descriptor].file
        file.durable = bytes(file.seen)
        file.pending.clear()

    def fsync_directory(self, path: str) -> None:
        directory = self._directory(path)
        directory.durable = dict(directory.seen)
        directory.pending.clear()

    def fallocate(self, descriptor: int, size_bytes: int) -> bool:
        return self.can_allocate

    def rename(self, source: str, target: str) -> None:
        source_directory, source_name = self._parent(source)
        target_directory, target_name = self._parent(target)
        if source_name not in source_directory.seen:
            raise FileNotFoundError(errno.ENOENT, "no such file", source)
        added = self._change(target_directory, target_name, source_directory.seen[source_name])
        self._change(source_directory, source_name, None, partner=added)

    def mkdir(self, path: str) -> None:
        directory, name = self._parent(path)
        if name in directory.seen:
            raise FileExistsError(errno.EEXIST, "exists", path)
        self._change(directory, name, Directory())

    def rmdir(self, path: str) -> None:
        if self._directory(path).seen:
            raise OSError(errno.ENOTEMPTY, "not empty", path)
        directory, name = self._parent(path)
        self._change(directory, name, None)

    def unlink(self, path: str) -> None:
        directory, name = self._parent(path)
        if name not in directory.seen:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        self._change(directory, name, None)

    def list_directory(self, path: str) -> list[DirectoryEntry]:
        return [
            DirectoryEntry(name, True, len(node.seen))
            if isinstance(node, File)
            else DirectoryEntry(name, False, 0)
            for name, node in self._directory(path).seen.items()
        ]

    def identify(self, descriptor: int) -> FileIdentity:
        file = self._descriptors[descriptor].file
        return FileIdentity(1, file.inode, len(file.seen))

    def identify_path(self, path: str) -> FileIdentity:
        directory, name = self._parent(path)
        node = directory.seen.get(name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        if isinstance(node, Directory):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return FileIdentity(1, node.inode, len(node.seen))

    def drop_cache(self, descriptor: int) -> None:
        self._descriptors[descriptor]

    def bypass_cache(self, descriptor: int, on: bool) -> bool:
        """What went past the cache is not on the medium either before it is flushed: a drive has a
        cache of its own, and the file's size is not written at once."""
        opened = self._descriptors[descriptor]
        opened.past_cache = on and self.can_bypass
        return opened.past_cache or not on

    def volume(self, path: str) -> Volume:
        return Volume(total_bytes=1 << 30, free_bytes=1 << 29, block_bytes=4096)

    def lock(self, descriptor: int) -> None:
        opened = self._descriptors[descriptor]
        if any(other.file is opened.file for other in self._locked):
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        self._locked.add(opened)

    # Inside

    def _descriptor(self, opened: _Opened) -> int:
        descriptor = next(self._next_descriptor)
        self._descriptors[descriptor] = opened
        return descriptor

    def _change(
        self,
        directory: Directory,
        name: str,
        node: File | Directory | None,
        partner: NameChange | None = None,
    ) -> NameChange:
        change = NameChange(name, node, partner)
        directory.pending.append(change)
        _apply(directory.seen, change)
        return change

    def _directory(self, path: str) -> Directory:
        node: File | Directory = self.root
        for part in path.strip("/").split("/"):
            if not part:
                continue
            if isinstance(node, File):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", path)
            found = node.seen.get(part)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, "no such directory", path)
            node = found
        if isinstance(node, File):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", path)
        return node

    def _parent(self, path: str) -> tuple[Directory, str]:
        parent, _, name = path.rpartition("/")
        return self._directory(parent), name

    def _nodes(self) -> list[File | Directory]:
        """Everything that some name leads to, now or on the medium."""
        found: dict[int, File | Directory] = {}
        waiting: list[File | Directory] = [self.root]
        while waiting:
            node = waiting.pop()
            if id(node) in found:
                continue
            found[id(node)] = node
            if isinstance(node, Directory):
                waiting.extend(node.seen.values())
                waiting.extend(node.durable.values())
                waiting.extend(change.node for change in node.pending if change.node is not None)
        return list(found.values())


def _written(content: bytes, writes: tuple[tuple[int, bytes], ...]) -> bytes:
    result = bytearray(content)
    for offset, data in writes:
        if len(result) < offset + len(data):
            result.extend(bytes(offset + len(data) - len(result)))
        result[offset : offset + len(data)] = data
    return bytes(result)


def _apply(names: dict[str, File | Directory], change: NameChange) -> None:
    if change.node is None:
        names.pop(change.name, None)
    else:
        names[change.name] = change.node


def _contents(directory: Directory, path: str) -> Iterator[tuple[str, bytes | None]]:
    for name, node in sorted(directory.seen.items()):
        if isinstance(node, File):
            yield f"{path}/{name}", bytes(node.seen)
        else:
            yield f"{path}/{name}", None
            yield from _contents(node, f"{path}/{name}")


def _name_selections(pending: list[NameChange]) -> list[frozenset[int]]:
    """Which changes of one directory may have reached the medium: any of few; of many, those up to
    some moment, or all but one."""
    ids = [id(change) for change in pending]
    if len(ids) <= 4:
        return [
            frozenset(selection)
            for size in range(len(ids) + 1)
            for selection in itertools.combinations(ids, size)
        ]
    until = [frozenset(ids[:size]) for size in range(len(ids) + 1)]
    return until + [frozenset(ids) - {each} for each in ids]


def _permitted(change: NameChange, kept: frozenset[int], pending: set[int]) -> bool:
    """A removal by rename happens with the new name, unless that one was flushed before."""
    if change.partner is None or id(change) not in kept:
        return True
    return id(change.partner) in kept or id(change.partner) not in pending


def _rebuilt(node: Directory, kept: frozenset[int], contents_of: dict[int, bytes]) -> Directory:
    names = dict(node.durable)
    for change in node.pending:
        if id(change) in kept:
            _apply(names, change)
    rebuilt = Directory()
    for name, child in names.items():
        if isinstance(child, Directory):
            rebuilt.seen[name] = _rebuilt(child, kept, contents_of)
        else:
            content = contents_of[id(child)]
            rebuilt.seen[name] = File(seen=bytearray(content), durable=content)
    rebuilt.durable = dict(rebuilt.seen)
    return rebuilt


def _combinations(choices: list[list[Any]]) -> Iterator[tuple[Any, ...]]:
    """One of each: all combinations where they are few enough; else the first of all, the last of
    all, and a fixed sample."""
    count = math.prod(len(each) for each in choices)
    if count <= STATES_PER_CUT_MAX:
        yield from itertools.product(*choices)
        return
    yield tuple(each[0] for each in choices)
    yield tuple(each[-1] for each in choices)
    chooser = random.Random(count)
    for _ in range(STATES_PER_CUT_MAX - 2):
        yield tuple(chooser.choice(each) for each in choices)
