"""Reading every copy of chosen versions from its disk, on its node, and hashing it there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from msgspec import Struct

from ckptd.client.cluster import Cluster, Node
from ckptd.client.documents import manifests
from ckptd.client.progress import Progress
from ckptd.client.selection import select_version
from ckptd.client.survey import machines_of, silent_workers
from ckptd.core import limits
from ckptd.core.catalogue import VersionHeader
from ckptd.core.machines import machine_key
from ckptd.errors import ProtocolError
from ckptd.wire import messages

_OK: Final = "ok"
_CORRUPT: Final = "corrupt"
_BATCH_BYTES: Final = 256 * limits.MIB  # of one question, so that progress is told in between


class BadCopy(Struct, frozen=True, order=True):
    """A copy that is bad or not there. `node` is None when fewer copies than wanted exist, and no
    node claims to have the missing one."""

    shard: str
    node: str | None


class Verification(Struct, frozen=True):
    """What was found. `corrupt` copies are in quarantine now; `missing` ones could not be read.
    `unrecoverable` lists NAME@VERSION with a shard that has no good copy although every member
    answered, `unavailable` those where one did not. `silent`: members that did not answer."""

    ok: bool
    shards: int
    copies_checked: int
    corrupt: tuple[BadCopy, ...]
    missing: tuple[BadCopy, ...]
    unrecoverable: tuple[str, ...]
    unavailable: tuple[str, ...]
    silent: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        if self.unrecoverable:
            return 4
        if self.unavailable:
            return 5
        return 0 if self.ok else 3


@dataclass(slots=True)
class _Shard:
    """A shard to verify. `wanted` is the largest number of copies that a version asks for."""

    digest: bytes
    size: int
    wanted: int
    good: set[str] = field(default_factory=set)
    bad: dict[str, str] = field(default_factory=dict)  # by node, what is wrong


async def verify(
    cluster: Cluster,
    selectors: Sequence[str],
    *,
    progress: Progress,
) -> Verification:
    """Verifies the versions that `selectors` mean; none means all live versions.

    All nodes work at the same time, each reads one copy after the other. A bad copy goes to
    quarantine on its node. Raises NameRefused, NotFound, or NotEnoughNodes when no worker answers.
    """
    catalogue = await cluster.catalogue()
    if selectors:
        chosen = [await select_version(cluster, catalogue, text) for text in selectors]
        versions = list({version.id: version for version in chosen}.values())
    else:
        versions = catalogue.live_versions()
    return await _verify_versions(cluster, versions, progress)


async def _verify_versions(
    cluster: Cluster, versions: list[VersionHeader], progress: Progress
) -> Verification:
    shards: dict[bytes, _Shard] = {}
    contents: dict[str, list[bytes]] = {}
    unreadable = await _collect(cluster, versions, shards, contents)
    claims: dict[str, list[_Shard]] = {}
    everything = list(shards.values())
    holders = await cluster.holders(list(shards)) if shards else []
    for shard, nodes in zip(everything, holders, strict=True):
        for node in nodes:
            claims.setdefault(node, []).append(shard)
    progress.total(sum(shard.size for claimed in claims.values() for shard in claimed))

    async def check(node: Node) -> int:
        return await _check_on(node, claims[node.id], progress)

    asked = [node for node in cluster.workers if node.id in claims]
    await cluster.ask_all(check, asked)
    cluster.require_nodes()
    return _summed_up(cluster, versions, shards, contents, unreadable)


async def _collect(
    cluster: Cluster,
    versions: list[VersionHeader],
    shards: dict[bytes, _Shard],
    contents: dict[str, list[bytes]],
) -> set[str]:
    """Fills `shards` with what the manifests name and `contents` with the digests of each version;
    the ids of versions whose manifest no node that answers can show."""
    async for admitted, manifest in manifests(cluster, versions):
        copies = max(manifest.copies, cluster.config.replication.copies)
        digests = []
        for reference in manifest.shards:
            digest = bytes.fromhex(reference.shard)
            shard = shards.setdefault(digest, _Shard(digest, reference.size, copies))
            shard.wanted = max(shard.wanted, copies)
            digests.append(shard.digest)
        contents[admitted.id] = digests
    return {version.id for version in versions} - set(contents)


async def _check_on(node: Node, claimed: list[_Shard], progress: Progress) -> int:
    """Lets a node verify the copies that it claims to have; how many it has answered for."""
    checked = 0
    for batch in _batches(claimed):
        reply, _ = await node.control.request(
            messages.Verify(tuple(shard.digest for shard in batch)), messages.VerifyReply
        )
        if len(reply.results) != len(batch):
            raise ProtocolError(node.id, "verified another number of shards than asked for")
        for shard, result in zip(batch, reply.results, strict=True):
            if result == _OK:
                shard.good.add(node.id)
            else:
                shard.bad[node.id] = result
            progress.advance(shard.size)
            progress.node(node.id, shard.size)
        checked += len(batch)
    return checked


def _batches(shards: Iterable[_Shard]) -> Iterator[list[_Shard]]:
    batch: list[_Shard] = []
    size = 0
    for shard in shards:
        if batch and (len(batch) == limits.SHARDS_PER_VERIFY or size + shard.size > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(shard)
        size += shard.size
    if batch:
        yield batch


def _summed_up(
    cluster: Cluster,
    versions: list[VersionHeader],
    shards: dict[bytes, _Shard],
    contents: dict[str, list[bytes]],
    unreadable: set[str],
) -> Verification:
    machines = machines_of(cluster)
    corrupt: list[BadCopy] = []
    missing: list[BadCopy] = []
    for shard in shards.values():
        digest = shard.digest.hex()
        for node, result in sorted(shard.bad.items()):
            (corrupt if result == _CORRUPT else missing).append(BadCopy(digest, node))
        good = len({machines.get(node) or machine_key(node, "", "") for node in shard.good})
        nobodys = max(0, shard.wanted - good - len(shard.bad))
        missing.extend(BadCopy(digest, None) for _ in range(nobodys))
    dead = {digest for digest, shard in shards.items() if not shard.good}
    broken = tuple(
        f"{version.name}@{version.id}"
        for version in versions
        if version.id in unreadable or not dead.isdisjoint(contents[version.id])
    )
    silent = tuple(silent_workers(cluster))
    return Verification(
        ok=not (corrupt or missing or broken),
        shards=len(shards),
        copies_checked=sum(len(shard.good) + len(shard.bad) for shard in shards.values()),
        corrupt=tuple(corrupt),
        missing=tuple(missing),
        unrecoverable=() if silent else broken,
        unavailable=broken if silent else (),
        silent=silent,
    )
