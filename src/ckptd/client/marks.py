"""Removing, bringing back, pinning: everything that a person decides about versions.

Each is a signed document. Which versions it names is read from signed manifests, not from what a
node tells: a worker that lies about names must not make somebody remove another checkpoint.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence

from msgspec import Struct, structs

from ckptd.client.cluster import Cluster, Inventoried
from ckptd.client.documents import confirm, publish, refusals, stamp, stored_on, tell_others, write
from ckptd.client.selection import select_version
from ckptd.client.survey import holdings_of, judge, machines_of, silent_workers
from ckptd.core import documents, limits
from ckptd.core.catalogue import Catalogue, VersionHeader
from ckptd.core.documents import Manifest, Pin, Tombstone, Unpin
from ckptd.core.headers import removed_contents, version_header
from ckptd.core.names import Selector, parse_selector
from ckptd.errors import NoGoodCopy, NotEnoughNodes, NotFound, Refused


class Undeleted(Struct, frozen=True):
    """A version that came back as the new version `version`."""

    name: str
    version: str
    restored_from: str
    state: str


class Marked(Struct, frozen=True):
    """The versions that were pinned or unpinned. `changed` is False when they were already."""

    name: str
    versions: tuple[str, ...]
    pinned: bool
    changed: bool


def reference(version: VersionHeader) -> str:
    """NAME@VERSION with all digits."""
    return f"{version.name}@{version.id}"


# -- rm


async def select_for_removal(
    cluster: Cluster, catalogue: Catalogue, selectors: Sequence[str]
) -> list[VersionHeader]:
    """The live versions that `selectors` mean: without @ all versions of the name.

    Each is confirmed by its signed manifest. Raises NameRefused, or NotFound when one means
    nothing, or nothing that any node can show a manifest of.
    """
    chosen: dict[str, VersionHeader] = {}
    for text in selectors:
        selector = parse_selector(text)
        newest = await select_version(cluster, catalogue, text)
        whole = selector == Selector(selector.name)
        for version in catalogue.versions(selector.name) if whole else [newest]:
            chosen[version.id] = version
    confirmed = await confirm(cluster, catalogue, chosen.values())
    same = [version for version in confirmed if version.name == chosen[version.id].name]
    if len(same) < len(chosen):
        known = {version.id for version in same}
        liars = ", ".join(v.label for v in chosen.values() if v.id not in known)
        raise NotFound(
            f"no node that answers can show the manifest of {liars} under that name",
            next="ckptd status",
        )
    return same


async def remove(cluster: Cluster, catalogue: Catalogue, versions: Sequence[VersionHeader]) -> None:
    """Declares versions dead for ever. Their shards go when a grace is over and no live version
    needs them. Raises NotEnoughNodes or Refused when no node keeps the tombstone, NotAuthorized
    when this certificate may not remove."""
    for start in range(0, len(versions), limits.TOMBSTONE_VERSIONS_MAX):
        batch = versions[start : start + limits.TOMBSTONE_VERSIONS_MAX]
        tombstone = Tombstone(
            **await stamp(cluster, catalogue),
            reason="rm",
            versions=tuple(version.id for version in batch),
            contents=removed_contents(batch),
        )
        await write(cluster, catalogue, tombstone)


# -- undelete


async def undelete(cluster: Cluster, selector: str) -> Undeleted:
    """Makes a new version with the content of a removed one: the newest removed one of a name, or
    NAME@VERSION.

    Raises NameRefused, NotFound, Refused when it is not removed or its content is live, NoGoodCopy
    when a shard is gone, NotEnoughNodes when one may be on a node that does not answer.
    """
    catalogue = await cluster.catalogue(with_dead=True)
    removed = _removed(catalogue, parse_selector(selector))
    for live in catalogue.versions(removed.name):
        if live.content_id == removed.content_id:
            raise Refused(
                f"{removed.label} has the content of {live.label}, which is live",
                next=f"ckptd show {removed.name}",
            )
    manifest = await cluster.manifest(removed.id)
    if manifest.name != removed.name:
        raise NotFound(f"version {removed.id} is not one of {removed.name}", next="ckptd status")
    await _require_shards(cluster, manifest, removed.label)
    renewed = structs.replace(
        manifest, **await stamp(cluster, catalogue), host=socket.gethostname()[:255]
    )
    raw = documents.encode(renewed)
    version_id = documents.document_id(raw)
    results = await publish(cluster, raw)
    stored = stored_on(results)
    if not stored:
        raise refusals(results, version_id)
    await tell_others(cluster, raw, results)
    bitmaps = {node: results[node].bitmap for node in stored}
    holdings = holdings_of(
        version_header(version_id, renewed),
        {node: None if b is None else Inventoried(b, -1.0) for node, b in bitmaps.items()},
        copies=cluster.config.replication.copies,
    )
    found = judge(
        holdings, machines_of(cluster), all_answered=not silent_workers(cluster), presumed=()
    )
    return Undeleted(manifest.name, version_id, removed.id, found.state.value)


def _removed(catalogue: Catalogue, selector: Selector) -> VersionHeader:
    if selector.which is not None:
        raise NotFound(
            f"{selector.which} means live versions only; name the removed one",
            next=f"ckptd undelete {selector.name}/NAME",
        )
    found = catalogue.resolve(selector, include_dead=True)  # raises when nothing is known
    if selector.version_prefix is None:
        versions = catalogue.versions(selector.name, include_dead=True)
        found = next((v for v in versions if catalogue.is_dead(v.id)), found)
    if not catalogue.is_dead(found.id):
        raise Refused(f"{found.label} is not removed", next=f"ckptd show {found.name}")
    return found


async def _require_shards(cluster: Cluster, manifest: Manifest, label: str) -> None:
    """Raises unless some node has each shard; they are touched, so that none is collected now."""
    shards = [bytes.fromhex(shard.shard) for shard in manifest.shards]
    holders = await cluster.holders(shards, touch=True) if shards else []
    gone = sum(not nodes for nodes in holders)
    if not gone:
        return
    what = f"{label} cannot come back: {gone} of its {len(shards)} shards are on no node"
    silent = silent_workers(cluster)
    if silent:
        raise NotEnoughNodes(
            f"{what} that answers; {', '.join(silent)} did not", next="ckptd nodes"
        )
    raise NoGoodCopy(what, next="ckptd ls")


# -- pin and unpin


async def pin(cluster: Cluster, selector: str) -> Marked:
    """Protects a version from retention: the newest of a name, or the selected one. Raises
    NameRefused, NotFound, NotEnoughNodes or NotAuthorized."""
    catalogue = await cluster.catalogue()
    chosen = await select_version(cluster, catalogue, selector)
    confirmed = await confirm(cluster, catalogue, [chosen])
    if not confirmed or confirmed[0].name != chosen.name:
        raise NotFound(
            f"no node that answers can show the manifest of {chosen.label}", next="ckptd status"
        )
    if catalogue.pins(chosen.id):
        return Marked(chosen.name, (chosen.id,), pinned=True, changed=False)
    mark = Pin(**await stamp(cluster, catalogue), version=chosen.id)
    await write(cluster, catalogue, mark)
    return Marked(chosen.name, (chosen.id,), pinned=True, changed=True)


async def unpin(cluster: Cluster, selector: str) -> Marked:
    """Takes back the pins of a version, or without @ of all versions of a name. Raises as `pin`."""
    catalogue = await cluster.catalogue()
    parsed = parse_selector(selector)
    newest = await select_version(cluster, catalogue, selector)
    whole = parsed == Selector(parsed.name)
    versions = catalogue.versions(parsed.name) if whole else [newest]
    pins = {version.id: [pin.id for pin in catalogue.pins(version.id)] for version in versions}
    pinned = tuple(version_id for version_id, found in pins.items() if found)
    if not pinned:
        return Marked(newest.name, (), pinned=False, changed=False)
    mark = Unpin(
        **await stamp(cluster, catalogue),
        pins=tuple(sorted(pin for found in pins.values() for pin in found)),
    )
    await write(cluster, catalogue, mark)
    return Marked(newest.name, pinned, pinned=False, changed=True)


# -- all of them


def pinned_among(catalogue: Catalogue, versions: Iterable[VersionHeader]) -> list[VersionHeader]:
    """Those of `versions` that are pinned: whoever removes them should know."""
    return [version for version in versions if catalogue.pins(version.id)]
