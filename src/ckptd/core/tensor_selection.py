"""Pick files and tensors by glob, and lay picked tensors out as one safetensors file.

A glob matches a whole name, case-sensitively: `*` and `?` match every character, dots and slashes
too, `[…]` a set. A name is also matched by itself, whatever brackets it has.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import nlargest
from typing import Final, NamedTuple

from ckptd.core.safetensors_header import TensorOutline, build_header, in_library_order
from ckptd.core.tensor_index import TensorRecord
from ckptd.errors import NotFound, Refused

NEAREST_NAMES: Final = 3
# Comparing two names costs tens of microseconds: only the most similar beginnings are compared.
_COMPARED_NAMES_MAX: Final = 500


class Segment(NamedTuple):
    """`length` bytes from `begin` on of the file at path `file` go to `output_offset`."""

    file: str
    begin: int
    length: int
    output_offset: int


class MergedFile(NamedTuple):
    """One safetensors file made of tensors of several: `header` at its start, then `segments` in
    the order of their output offsets. `size` in bytes, header included."""

    header: bytes
    segments: tuple[Segment, ...]
    size: int


def choose_tensors(records: Sequence[TensorRecord], globs: Sequence[str]) -> list[TensorRecord]:
    """The records whose names match any of `globs`, in the order given.

    NotFound, with the nearest names, when a glob matches none; Refused when a chosen name occurs in
    two files.
    """
    names = _matching({record.name for record in records}, globs, "tensor")
    chosen = [record for record in records if record.name in names]
    file_of: dict[str, str] = {}
    for record in chosen:
        first = file_of.setdefault(record.name, record.file)
        if first != record.file:
            raise Refused(
                f"tensor {_shown(record.name)} is in two files, {_shown(first)} and "
                f"{_shown(record.file)}: one safetensors file holds a name once"
            )
    return chosen


def files_matching(paths: Sequence[str], globs: Sequence[str]) -> list[str]:
    """The paths that match any of `globs`, in the order given. NotFound, with the nearest paths,
    when a glob matches none."""
    matched = _matching(set(paths), globs, "file")
    return [path for path in paths if path in matched]


def merge_tensors(chosen: Iterable[TensorRecord], metadata: Mapping[str, str]) -> MergedFile:
    """One safetensors file of the `chosen` tensors, byte for byte as the library would write it.

    HeaderInvalid (a refusal) when its header would exceed the library's limit or a name twice.
    """
    records: dict[str, TensorRecord] = {}
    outlines = []
    for record in chosen:
        records[record.name] = record
        outlines.append(
            TensorOutline(record.name, record.dtype, record.shape, record.end - record.begin)
        )
    ordered = in_library_order(outlines)
    header = build_header(ordered, metadata)
    segments: list[Segment] = []
    output_offset = len(header)
    for outline in ordered:
        record = records[outline.name]
        if outline.length:
            _append(segments, Segment(record.file, record.begin, outline.length, output_offset))
        output_offset += outline.length
    return MergedFile(header, tuple(segments), output_offset)


def _append(segments: list[Segment], segment: Segment) -> None:
    """Neighbours in source and output become one segment."""
    if segments:
        last = segments[-1]
        if last.file == segment.file and last.begin + last.length == segment.begin:
            segments[-1] = last._replace(length=last.length + segment.length)
            return
    segments.append(segment)


def _matching(names: Collection[str], globs: Sequence[str], what: str) -> set[str]:
    matched: set[str] = set()
    for glob in globs:
        pattern = re.compile(fnmatch.translate(glob))
        found = {name for name in names if name == glob or pattern.match(name)}
        if not found:
            raise NotFound(_nothing_matches(glob, names, what))
        matched |= found
    return matched


def _nothing_matches(glob: str, names: Collection[str], what: str) -> str:
    if not names:
        return f"no {what} matches {_shown(glob)}: the checkpoint has no {what}s"
    nearest = nearest_names(glob, names)
    return f"no {what} matches {_shown(glob)}; nearest: {', '.join(map(_shown, nearest))}"


def nearest_names(wanted: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names` that are most like `wanted`, wildcards left out, best first."""
    text = re.sub(r"[*?\[\]]", "", wanted)

    def likeness(name: str) -> tuple[int, int, str]:
        length = min(len(text), len(name))
        shared = next((i for i in range(length) if text[i] != name[i]), length)
        return (shared, -abs(len(name) - len(text)), name)

    candidates = nlargest(_COMPARED_NAMES_MAX, names, key=likeness)
    return difflib.get_close_matches(text, candidates, NEAREST_NAMES, cutoff=0.0)


def _shown(name: str) -> str:
    quoted = f"'{name}'" if name.isprintable() else ascii(name)
    return quoted if len(quoted) <= 200 else f"{quoted[:150]}…{quoted[-40:]}"
