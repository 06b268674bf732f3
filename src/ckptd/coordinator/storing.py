"""Storing one checkpoint that is complete: unless the cluster has its content, or had it and was
told to drop it.

The content id decides, not the time and not the path. Of a name that the cluster has never seen
nothing can be there already, so its first version is hashed and sent in one go; otherwise what lies
there is hashed first, unless its fingerprint tells that it was hashed before.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import structlog
from msgspec import Struct

from ckptd.client.contents import content_id_of
from ckptd.client.progress import Progress
from ckptd.client.source import Source, scan
from ckptd.client.store import StoreResult, store_source
from ckptd.coordinator.content_memory import ContentMemory
from ckptd.coordinator.link import Link
from ckptd.core.catalogue import Catalogue
from ckptd.core.training_state import TrainingState
from ckptd.errors import NotFound, SourceChanged

_log = structlog.get_logger(__name__)


class Candidate(Struct, frozen=True):
    """A checkpoint to store, that was found complete. `is_unchanged` says whether it still is what
    was found then; it blocks on the disk."""

    name: str
    path: Path
    excluded: frozenset[str]
    training: TrainingState
    is_unchanged: Callable[[], bool]


class Outcome(Struct, frozen=True):
    """`result` is None when there was nothing to store: the newest version has this content, or it
    was removed on purpose. `changed_ns`: when the newest of its files changed."""

    result: StoreResult | None
    changed_ns: int


async def store_candidate(
    candidate: Candidate, *, link: Link, memory: ContentMemory, progress: Progress
) -> Outcome:
    """Stores a checkpoint unless its content is in the cluster already.

    Raises SourceChanged when it is not any more, or does not stay, what was found complete;
    SourceRefused, NoRoom, NotEnoughNodes as a store does.
    """
    catalogue = await link.catalogue()
    source = await asyncio.to_thread(_scan, candidate)
    known = memory.get(source)
    if known is None and _may_be_known(catalogue, candidate.name, source):
        known = await _read(source)
        memory.put(source, known)
    if known is not None and _is_settled(catalogue, candidate.name, known):
        await asyncio.to_thread(memory.save)
        return Outcome(None, 0)
    result = await store_source(
        await link.cluster(),
        source,
        name=candidate.name,
        step=candidate.training.step,
        metrics=candidate.training.metrics,
        progress=progress,
    )
    memory.put(source, result.content_id)
    await asyncio.to_thread(memory.save)
    return Outcome(result, _newest_change_ns(source))


def _scan(candidate: Candidate) -> Source:
    """The source, as it was when it was found complete."""
    try:
        source = scan(candidate.path, excluded=candidate.excluded)
    except NotFound as error:
        raise SourceChanged(f"{candidate.path} is not there any more") from error
    # What is the same before and after the scan is what the scan saw.
    if not candidate.is_unchanged():
        raise SourceChanged(f"{candidate.path} changed after it was found complete")
    return source


async def _read(source: Source) -> str:
    stop = threading.Event()
    reading = asyncio.ensure_future(asyncio.to_thread(content_id_of, source, stop))
    try:
        return await asyncio.shield(reading)
    finally:
        stop.set()
        await asyncio.wait([reading])


def _is_settled(catalogue: Catalogue, name: str, content_id: str) -> bool:
    """Whether there is nothing to store."""
    newest = catalogue.newest(name)
    if newest is not None and newest.content_id == content_id:
        return True
    if catalogue.is_dead_content(name, content_id):
        _log.info("removed_content_left_alone", name=name, next=f"ckptd store --name {name} PATH")
        return True
    return False


def _may_be_known(catalogue: Catalogue, name: str, source: Source) -> bool:
    """Whether the newest version may have this content, or a removed one may have had it."""
    newest = catalogue.newest(name)
    if newest is not None and (newest.size, newest.files) == (source.size, len(source.files)):
        return True
    return catalogue.has_dead_content(name)


def _newest_change_ns(source: Source) -> int:
    changes = (max(file.fingerprint.mtime_ns, file.fingerprint.ctime_ns) for file in source.files)
    return max(changes, default=0)
