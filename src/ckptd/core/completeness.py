"""Whether a checkpoint is complete, from what a scan saw and what its files say of themselves.

`to_examine` says which files must be read, `assess` decides. Whether it has come to rest is decided
in `ckptd.core.pending`. docs/watching.md lists the rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, TypeAlias

from msgspec import Struct

from ckptd.core.checkpoint_units import Entry, Kind, Members, Unit, is_temporary, join
from ckptd.core.file_examination import Examination, Format, amount, format_of

STALE_S: Final = 600.0
"""A temporary file that nobody has changed for so long is forgotten by its writer."""

_NUMBERED: Final = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.[A-Za-z0-9]+)", re.ASCII)
_INDEXED_STEMS: Final = ("model", "pytorch_model", "diffusion_pytorch_model")
_INDEXED_SUFFIXES: Final = (".safetensors", ".bin")
"""What Hugging Face libraries never write in several files without an index."""
_TRAINER_STEP: Final = re.compile(r"checkpoint-[0-9]+", re.ASCII)
_RSYNC: Final = re.compile(r"\.(.+)\.[0-9A-Za-z]{6}", re.ASCII | re.DOTALL)
_SHOWN_MAX: Final = 200


class Complete(Struct, frozen=True):
    """It may be stored, without the `excluded` paths (relative to the checkpoint).
    `done`: its marker says so, and there is no need to wait until it has come to rest."""

    excluded: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    done: bool = False


class Incomplete(Struct, frozen=True):
    """It may not be stored yet; `reason` says why, in words for people."""

    reason: str


class LeftOut(Struct, frozen=True):
    """It has a temporary name and nobody works at it any more: it is not going to be stored."""

    warning: str


Assessment: TypeAlias = Complete | Incomplete | LeftOut


def to_examine(members: Members) -> dict[str, Format]:
    """The files whose bytes decide, by path, and how to examine them. Temporary ones do not."""
    wanted: dict[str, Format] = {}
    for path, entry in members.entries.items():
        file_format = format_of(path.rpartition("/")[2]) if entry.is_file else None
        if file_format is not None and not temporary_part(path):
            wanted[path] = file_format
    return wanted


def assess(
    unit: Unit,
    members: Members,
    examined: Mapping[str, Examination],
    *,
    wall_ns: int,
    unchanged_s: float,
) -> Assessment:
    """Decides about a checkpoint. `examined`: what the files of `to_examine` say. `wall_ns` is the
    time by the clock that file times come from, `unchanged_s` how long no scan saw a change."""
    name = temporary_part(unit.path)
    if name:
        if _is_stale(members.entries.values(), wall_ns, unchanged_s):
            return LeftOut(
                f"{_shown(unit.path)} is left out: {_shown(name)} is a temporary name, and nothing "
                "has changed there for 10 minutes"
            )
        return Incomplete(f"{_shown(name)} is a temporary name: it is not finished")
    temporaries = _temporaries(members)
    stale = {
        path for path, entries in temporaries.items() if _is_stale(entries, wall_ns, unchanged_s)
    }
    reason = _fault(unit, members, examined) or next(
        (_being_written(path, found) for path, found in temporaries.items() if path not in stale),
        "",
    )
    if reason:
        return Incomplete(reason)
    kept = [p for p, e in members.entries.items() if e.is_file and temporary_part(p) not in stale]
    if not kept:
        return Incomplete("holds no file yet")
    return Complete(
        excluded=members.excluded | stale,
        warnings=tuple(
            f"{_shown(path)} is left out: a temporary name, unchanged for 10 minutes"
            for path in sorted(stale)
        ),
        done=members.is_done,
    )


def temporary_part(path: str) -> str:
    """The part of a path, from its start, that ends with the first temporary name; "" if none."""
    end = 0
    while end < len(path):
        found = path.find("/", end)
        stop = len(path) if found < 0 else found
        if is_temporary(path[end:stop]):
            return path[:stop]
        end = stop + 1
    return ""


def _temporaries(members: Members) -> dict[str, list[Entry]]:
    """By the outermost temporary path, the entry itself and all below it."""
    found: dict[str, list[Entry]] = {}
    for path, entry in members.entries.items():
        if part := temporary_part(path):
            found.setdefault(part, []).append(entry)
    return found


def _is_stale(entries: Iterable[Entry], wall_ns: int, unchanged_s: float) -> bool:
    """Whether nobody changed any of these for long. The second way is for files from the future:
    the clock may have been set back."""
    changed_ns = max((entry.changed_ns for entry in entries), default=0)
    return wall_ns - changed_ns >= STALE_S * 1e9 or unchanged_s >= STALE_S


def _being_written(path: str, entries: list[Entry]) -> str:
    directory, _, name = path.rpartition("/")
    rsync = _RSYNC.fullmatch(name)
    if rsync:
        size = sum(entry.size for entry in entries)
        return f"{_shown(join(directory, rsync[1]))} is being written, {amount(size)} so far"
    return f"{_shown(path)} is a temporary name: it is not finished"


def _fault(unit: Unit, members: Members, examined: Mapping[str, Examination]) -> str:
    """What is not whole or not there, the first by path; "" if nothing is amiss."""
    checks = (_unwhole(examined), _not_there(members, examined), _numbers(members),
              _trainer_state(unit, members), _not_storable(members))  # fmt: skip
    return next((fault for faults in checks for fault in faults), "")


def _unwhole(examined: Mapping[str, Examination]) -> Iterator[str]:
    for path in sorted(examined):
        if examined[path].fault:
            yield f"{_shown(path)} {examined[path].fault}"


def _not_there(members: Members, examined: Mapping[str, Examination]) -> Iterator[str]:
    """Files that an index or the metadata of a distributed checkpoint names."""
    for path in sorted(examined):
        directory = path.rpartition("/")[0]
        for name in examined[path].names:
            if not _is_file(members, join(directory, name)):
                yield f"{_shown(join(directory, name))} is not there yet: {_shown(path)} names it"
    for path, entry in members.entries.items():
        directory = path.rpartition("/")[0]
        if entry.is_file and path.endswith(".distcp") and not temporary_part(path):
            metadata = join(directory, ".metadata")
            if not _is_file(members, metadata):
                yield f"{_shown(metadata)} is not there yet: it is written last"


def _numbers(members: Members) -> Iterator[str]:
    """Of files numbered NAME-00001-of-00003 all must be there; the writer may be between two."""
    groups: dict[tuple[str, str, str], None] = {}
    for path, entry in members.entries.items():
        found = _NUMBERED.fullmatch(path)
        if found and entry.is_file and not temporary_part(path):
            groups[found[1], found[3], found[4]] = None
    for stem, count, suffix in groups:
        for number in range(1, int(count) + 1):
            expected = f"{stem}-{number:05}-of-{count}{suffix}"
            if not _is_file(members, expected):
                yield f"{_shown(expected)} is not there yet"
        index = f"{stem}{suffix}.index.json"
        indexed = stem.rpartition("/")[2] in _INDEXED_STEMS and suffix in _INDEXED_SUFFIXES
        if indexed and int(count) > 1 and not _is_file(members, index):
            yield f"{_shown(index)} is not there yet"


def _trainer_state(unit: Unit, members: Members) -> Iterator[str]:
    for path in members.entries:
        directory, _, name = path.rpartition("/")
        above = (directory or unit.path).rpartition("/")[2]
        if name == "optimizer.pt" and _TRAINER_STEP.fullmatch(above):
            state = join(directory, "trainer_state.json")
            if not _is_file(members, state):
                yield f"{_shown(state)} is not there yet"


def _not_storable(members: Members) -> Iterator[str]:
    for path, entry in members.entries.items():
        if entry.kind is Kind.DANGLING_LINK:
            yield f"{_shown(path)} is a link to nothing: remove it, or bring back what it leads to"
        elif entry.kind is Kind.UNREADABLE:
            yield f"{_shown(path)} cannot be read, or lies too deep"
        elif entry.kind is Kind.SPECIAL:
            yield f"{_shown(path)} is a device, fifo or socket: move it out of the checkpoint"


def _is_file(members: Members, path: str) -> bool:
    entry = members.entries.get(path)
    return entry is not None and entry.is_file


def _shown(path: str) -> str:
    """A path in a message: printable, and not longer than a line or two."""
    text = path if path.isprintable() else ascii(path)
    return text if len(text) <= _SHOWN_MAX else f"{text[:150]}…{text[-40:]}"
