"""Checkpoints as they are listed, and everything about one of them."""

from __future__ import annotations

import asyncio
import hashlib

from msgspec import Struct

from ckptd.client.cluster import Cluster
from ckptd.client.selection import select_version
from ckptd.client.shard_sources import NodeSources, ShardStream
from ckptd.client.survey import Survey, Surveyed, survey_versions, timestamp
from ckptd.core import tensor_index
from ckptd.core.catalogue import Catalogue, VersionHeader
from ckptd.core.documents import FileEntry, Manifest, ShardReference
from ckptd.core.names import Selector, check_name, parse_selector, path_from_json
from ckptd.core.training_state import is_finite, shown_metrics
from ckptd.errors import CkptdError, NoGoodCopy, NotFound
from ckptd.wire import messages


class Checkpoint(Struct, frozen=True):
    """One version of a checkpoint in a list. `version` has 64 hex digits; it is empty for what is
    pending or storing and has none yet. Times are RFC 3339 in UTC, `bytes` is the sum of the file
    sizes. `min_copies` counts the machines that confirmed the rarest shard; `verified_at` is when
    the copy whose last check is the oldest was checked, None when some copy was not since its
    node's start. `finite`: not stored with a loss that is no number.
    """

    name: str
    version: str
    created: str
    bytes: int
    files: int
    state: str
    min_copies: int
    verified_at: str | None
    step: int | None
    metrics: dict[str, float]
    pinned: bool
    finite: bool = True


class ShardPlace(Struct, frozen=True):
    """A shard and the nodes that have a copy of it, sorted."""

    shard: str
    bytes: int
    nodes: tuple[str, ...]


class VersionDetails(Struct, frozen=True):
    """A version with the places of its shards. Fields as in Checkpoint."""

    version: str
    created: str
    bytes: int
    state: str
    pinned: bool
    step: int | None
    metrics: dict[str, float]
    shards: tuple[ShardPlace, ...]
    min_copies: int
    host: str
    manifest_nodes: tuple[str, ...]


class FileDetails(Struct, frozen=True):
    """A file of a checkpoint. `path` is relative to it; `mode` holds its permission bits."""

    path: str
    bytes: int
    sha256: str
    mode: int


class TensorDetails(Struct, frozen=True):
    """A tensor of a safetensors file of the checkpoint."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]


class CheckpointDetails(Struct, frozen=True):
    """Everything about one checkpoint; files and tensors are those of its first version listed.
    `tensors_error` says why the tensors are not known, else it is empty."""

    name: str
    versions: tuple[VersionDetails, ...]
    files: tuple[FileDetails, ...]
    tensors: tuple[TensorDetails, ...]
    tensors_error: str = ""


def select_run(catalogue: Catalogue, run: str | None, *, all_versions: bool) -> list[VersionHeader]:
    """The live versions to list, by name, newest first: of all names, or of those below `run` (a
    checkpoint's own name is taken too). Without `all_versions` the newest of each name only.

    Raises NameRefused, or NotFound when nothing is there.
    """
    names = catalogue.names()
    if run is not None:
        run = check_name(run.rstrip("/"))
        below = [name for name in names if name == run or name.startswith(f"{run}/")]
        if not below:
            catalogue.resolve(Selector(run, which="latest"))  # raises with the nearest names
            raise NotFound(f"there is no run {run}", next="ckptd ls")
        names = below
    versions = [catalogue.versions(name) for name in names]
    return [version for found in versions for version in (found if all_versions else found[:1])]


async def list_checkpoints(
    cluster: Cluster, run: str | None = None, *, all_versions: bool = False
) -> list[Checkpoint]:
    """As `ckptd ls` lists them: what coordinators see and have not stored is listed where no
    version of the name is, with `all_versions` always.

    Raises NotEnoughNodes when no worker answers, NotFound for a run that does not exist,
    NameRefused for one that cannot.
    """
    catalogue = await cluster.catalogue()
    waiting = [
        unstored
        for unstored in await cluster.watched()
        if unstored.name
        and _lies_in(unstored.name, run)
        and (all_versions or catalogue.newest(unstored.name) is None)
    ]
    try:
        versions = select_run(catalogue, run, all_versions=all_versions)
    except NotFound:
        if not waiting:
            raise
        versions = []
    found = await survey_versions(cluster, catalogue, versions)
    rows = [_row(found, surveyed) for surveyed in found.versions.values()]
    # Sorting is stable: what is not stored yet is newer, and comes first among its name's.
    return sorted([*map(_waiting_row, waiting), *rows], key=lambda row: row.name)


def _lies_in(name: str, run: str | None) -> bool:
    return run is None or name == run.rstrip("/") or name.startswith(f"{run.rstrip('/')}/")


def _waiting_row(unstored: messages.Unstored) -> Checkpoint:
    return Checkpoint(
        name=unstored.name,
        version="",
        created=unstored.since,
        bytes=unstored.size,
        files=0,
        state=unstored.state,
        min_copies=0,
        verified_at=None,
        step=unstored.step,
        metrics={},
        pinned=False,
    )


def _row(survey: Survey, surveyed: Surveyed) -> Checkpoint:
    header = surveyed.header
    return Checkpoint(
        name=header.name,
        version=header.id,
        created=header.created,
        bytes=header.size,
        files=header.files,
        state=surveyed.state.value,
        min_copies=surveyed.assessment.min_copies,
        verified_at=timestamp(surveyed.verified_at),
        step=header.step,
        metrics=shown_metrics(header.metrics),
        pinned=bool(survey.catalogue.pins(header.id)),
        finite=is_finite(header.metrics),
    )


async def show_checkpoint(cluster: Cluster, selector: str) -> CheckpointDetails:
    """As `ckptd show` shows it: all live versions of a name, newest first, or the selected one.

    Raises NameRefused, NotFound, or NotEnoughNodes.
    """
    catalogue = await cluster.catalogue()
    chosen = await select_version(cluster, catalogue, selector)
    whole = parse_selector(selector) == Selector(chosen.name)
    headers = catalogue.versions(chosen.name) if whole else [chosen]
    found = await survey_versions(cluster, catalogue, headers)
    details = []
    files: tuple[FileDetails, ...] = ()
    index: ShardReference | None = None
    for number, surveyed in enumerate(found.versions.values()):
        manifest = await cluster.manifest(surveyed.header.id)
        details.append(_version(found, surveyed, manifest))
        if number == 0:
            files = _files(manifest)
            if manifest.tensor_index is not None:
                index = manifest.shards[manifest.tensor_index]
    tensors: tuple[TensorDetails, ...] = ()
    fault = ""
    if index is not None:
        try:
            tensors = await _tensors(cluster, index)
        except CkptdError as error:
            fault = error.message
    return CheckpointDetails(chosen.name, tuple(details), files, tensors, fault)


def _version(survey: Survey, surveyed: Surveyed, manifest: Manifest) -> VersionDetails:
    header = surveyed.header
    nodes = {holders: tuple(sorted(holders)) for holders in set(surveyed.holdings.shards)}
    return VersionDetails(
        version=header.id,
        created=manifest.created,
        bytes=header.size,
        state=surveyed.state.value,
        pinned=bool(survey.catalogue.pins(header.id)),
        step=manifest.step,
        metrics=shown_metrics(manifest.metrics),
        # Not strict: a header that a node made up may claim another number of shards.
        shards=tuple(
            ShardPlace(reference.shard, reference.size, nodes[holders])
            for reference, holders in zip(manifest.shards, surveyed.holdings.shards, strict=False)
        ),
        min_copies=surveyed.assessment.min_copies,
        host=manifest.host,
        manifest_nodes=tuple(sorted(surveyed.holdings.manifest)),
    )


def _files(manifest: Manifest) -> tuple[FileDetails, ...]:
    return tuple(
        FileDetails(path_from_json(entry.path), entry.size, entry.sha256, entry.mode)
        for entry in manifest.entries
        if isinstance(entry, FileEntry)
    )


async def _tensors(cluster: Cluster, index: ShardReference) -> tuple[TensorDetails, ...]:
    raw = await read_shard(cluster, bytes.fromhex(index.shard), index.size)
    records = await asyncio.to_thread(tensor_index.decode, raw)
    return tuple(TensorDetails(r.name, r.file, r.dtype, r.shape) for r in records)


async def read_shard(cluster: Cluster, shard: bytes, size: int) -> bytes:
    """The bytes of one shard from any node that has a good copy, compared with its hash.

    Nodes whose copy is bad are told. Raises NotFound when no node that answers has it, NoGoodCopy
    when none of them has a good one.
    """
    sources = NodeSources(cluster)
    holders = sorted((await cluster.holders([shard]))[0])
    if not holders:
        raise NotFound(f"no node that answers has shard {shard.hex()}", next="ckptd status")
    reasons = []
    for node in holders:
        try:
            raw = await asyncio.to_thread(_read_from, sources, node, shard, size)
        except CkptdError as error:
            reasons.append(error.message)
            continue
        if hashlib.sha256(raw).digest() == shard:
            return raw
        reasons.append(f"the copy on {node} is corrupt")
        sources.report_corrupt(node, shard)
    await asyncio.to_thread(sources.flush)
    raise NoGoodCopy(
        f"shard {shard.hex()} cannot be read: {'; '.join(reasons)}", next="ckptd verify --all"
    )


def _read_from(sources: NodeSources, node: str, shard: bytes, size: int) -> bytes:
    stream: ShardStream = sources.open(node)
    read = bytearray()
    try:
        stream.fetch(shard, size, read.extend)
    finally:
        stream.close()
    return bytes(read)
