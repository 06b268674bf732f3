"""Snapshots in memory, and looking closely at them without a disk."""

from __future__ import annotations

from collections.abc import Mapping

from ckptd.core.checkpoint_units import Entry, Kind, Members, Unit, find_units, join, members
from ckptd.core.completeness import to_examine
from ckptd.core.file_examination import Examination, Format, examine

Contents = Mapping[str, bytes | Entry]


def snapshot_of(contents: Contents, *, changed_ns: int = 10**9) -> dict[str, dict[str, Entry]]:
    """A snapshot with these files. A path that ends with "/" is an empty directory."""
    snapshot: dict[str, dict[str, Entry]] = {"": {}}
    for number, (path, content) in enumerate(contents.items()):
        parts = path.rstrip("/").split("/")
        directories = parts if path.endswith("/") else parts[:-1]
        above = ""
        for name in directories:
            snapshot[above].setdefault(name, Entry(Kind.DIRECTORY, 0, changed_ns, changed_ns, 1))
            above = join(above, name)
            snapshot.setdefault(above, {})
        if path.endswith("/"):
            continue
        if isinstance(content, bytes):
            content = Entry(Kind.FILE, len(content), changed_ns, changed_ns, 100 + number)
        snapshot[above][parts[-1]] = content
    return snapshot


def examined_bytes(file_format: Format, content: bytes, size: int | None = None) -> Examination:
    """Drives an examination over bytes in memory. `size`: what the file claims to have."""
    examining = examine(file_format, len(content) if size is None else size)
    try:
        span = next(examining)
        while True:
            assert span.offset >= 0
            assert span.length > 0
            span = examining.send(content[span.offset : span.offset + span.length])
    except StopIteration as end:
        result: Examination = end.value
        return result


def examined(unit: Unit, found: Members, contents: Contents) -> dict[str, Examination]:
    """What the files of a unit say, from `contents` by path below the root."""
    result = {}
    for path, file_format in to_examine(found).items():
        content = contents[unit.path if unit.kind == "file" else join(unit.path, path)]
        assert isinstance(content, bytes)
        result[path] = examined_bytes(file_format, content)
    return result


def unit_of(snapshot: Mapping[str, Mapping[str, Entry]], path: str) -> tuple[Unit, Members]:
    """A unit of a snapshot by its path, and what belongs to it."""
    unit = next(unit for unit in find_units(snapshot).units if unit.path == path)
    found = members(snapshot, unit)
    assert found is not None
    return unit, found
