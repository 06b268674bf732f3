"""Before a store sends its first byte: whether there is room for all of it."""

from __future__ import annotations

import asyncio
import threading

from ckptd.client.cluster import Cluster
from ckptd.client.hashing import SourceHasher
from ckptd.client.progress import Progress
from ckptd.client.source import Source
from ckptd.core.cutting import cut
from ckptd.core.file_examination import amount
from ckptd.core.placement import Candidate
from ckptd.core.room import homeless_bytes, possible_copies, storable_bytes, surely_fit
from ckptd.errors import NoRoom


async def check_room(cluster: Cluster, source: Source, copies: int, progress: Progress) -> None:
    """Raises NoRoom when `source` does not fit, with as many of `copies` as there are machines for.

    What the nodes have already needs no room. To know what that is the source is read, but only
    where it might not fit. Raises SourceChanged if it did not hold still.
    """
    nodes = [node for node in cluster.workers if not node.is_draining]
    places = [node.candidate for node in nodes]
    possible = possible_copies(places, copies)
    if not possible:
        return  # whoever looks for a place will say why there is none
    shard_size = cluster.config.replication.shard_size_bytes
    count = await asyncio.to_thread(lambda: sum(1 for _ in cut(source.to_cut(), shard_size)))
    if surely_fit(count + bool(source.tensors), shard_size, places, possible):
        return
    lacking = source.size
    if source.size <= sum(node.status.bytes_free + node.status.bytes_used for node in nodes):
        progress.note("little room is left: what the nodes have already is found out first")
        lacking = await _lacking_bytes(cluster, source, places, possible)
    if lacking:
        room = storable_bytes(places, possible)
        raise NoRoom(
            f"{source.root} does not fit: {amount(lacking)} of it would lack copies; the "
            f"{len(nodes)} nodes that answer have room for {amount(room)} above their reserves, "
            f"with {possible} {'copies' if possible > 1 else 'copy'} of each byte",
            next="ckptd nodes   (then add a node, or put in a larger disk)",
        )


async def _lacking_bytes(
    cluster: Cluster, source: Source, places: list[Candidate], copies: int
) -> int:
    """The bytes that would lack copies. Of those that would not, nothing is needed any more: they
    are touched, so that they stay until they are stored."""
    stop = threading.Event()
    reading = asyncio.ensure_future(asyncio.to_thread(_read, cluster, source, stop))
    try:
        sizes = await asyncio.shield(reading)
    finally:
        stop.set()
        await asyncio.wait([reading])
    holders = await cluster.holders(list(sizes), touch=True)
    shards = list(zip(sizes.values(), holders, strict=True))
    return await asyncio.to_thread(homeless_bytes, shards, places, copies)


def _read(cluster: Cluster, source: Source, stop: threading.Event) -> dict[bytes, int]:
    """The shards of a source with their sizes. Blocks."""
    sizes: dict[bytes, int] = {}
    for shard in SourceHasher(source).shards(
        cut(source.to_cut(), cluster.config.replication.shard_size_bytes)
    ):
        sizes[shard.digest] = shard.size
        if stop.is_set():
            break
    return sizes
