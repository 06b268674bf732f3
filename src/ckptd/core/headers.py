"""Headers: what is kept in memory of each document.

Compact and of fixed form, because a worker knows tens of thousands of them and has little memory.
Their fields have the names that they have on the wire; ids are 64 lower-case hex digits.
"""

from __future__ import annotations

from collections.abc import Iterable
from sys import intern
from typing import Literal

from msgspec import Struct

from ckptd.core.documents import FileEntry, Manifest, RemovedContent
from ckptd.core.names import VERSION_PREFIX_MIN_DIGITS


class DocumentHeader(Struct, frozen=True, gc=False):
    """What is kept of every document. `created` is for display only."""

    id: str
    kind: str
    order: int
    created: str


class VersionHeader(DocumentHeader, frozen=True, gc=False):
    """What is kept of a manifest; `id` is the version id.

    `size` is the sum of the checkpoint's file sizes in bytes, `files` and `shards` are counts,
    `copies` is the number that the manifest wants.
    """

    name: str
    content_id: str
    size: int
    files: int
    shards: int
    copies: int
    step: int | None
    metrics: dict[str, float]

    @property
    def run(self) -> str:
        """The run that this checkpoint belongs to, "" directly below a watched root."""
        return run_of(self.name)

    @property
    def label(self) -> str:
        """NAME@VERSION with the shortest prefix that the command line takes, for messages."""
        return f"{self.name}@{self.id[:VERSION_PREFIX_MIN_DIGITS]}"


class TombstoneHeader(DocumentHeader, frozen=True, gc=False):
    """What is kept of a tombstone besides the ids of the versions that it declares dead."""

    reason: Literal["rm", "retention"]
    justified_by: str | None


def run_of(name: str) -> str:
    """The run of the checkpoint `name`: everything before its last segment, "" if there is one."""
    return name.rpartition("/")[0]


def version_header(version_id: str, manifest: Manifest) -> VersionHeader:
    """The header of a manifest."""
    files = [entry for entry in manifest.entries if isinstance(entry, FileEntry)]
    return VersionHeader(
        id=version_id,
        kind="manifest",
        order=manifest.order,
        created=manifest.created,
        name=intern(manifest.name),
        content_id=manifest.content_id,
        size=sum(entry.size for entry in files),
        files=len(files),
        shards=len(manifest.shards),
        copies=manifest.copies,
        step=manifest.step,
        metrics={intern(metric): value for metric, value in manifest.metrics.items()},
    )


def removed_contents(versions: Iterable[VersionHeader]) -> tuple[RemovedContent, ...]:
    """What a tombstone of `versions` says that they held."""
    pairs = sorted({(version.name, version.content_id) for version in versions})
    return tuple(RemovedContent.of(name, content_id) for name, content_id in pairs)


def age_of(header: DocumentHeader) -> tuple[int, str]:
    """Sorts oldest first. The id breaks ties, so that every node sorts alike."""
    return header.order, header.id
