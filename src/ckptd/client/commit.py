"""The end of a store: the manifest is published, and what each node confirms is counted.

Copies that were lost meanwhile, or that a node does not confirm, are made anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ckptd.client.cluster import Cluster
from ckptd.client.documents import publish
from ckptd.client.transfers import Shard, Transfers
from ckptd.core import bitmaps, limits
from ckptd.core.documents import Manifest
from ckptd.errors import NotEnoughNodes
from ckptd.wire import messages


class Commit:
    """Makes a version of `name` exist. `shards` are those of its manifest, by digest; `copies` of
    each are wanted."""

    def __init__(
        self,
        cluster: Cluster,
        transfers: Transfers,
        shards: Mapping[bytes, Shard],
        *,
        name: str,
        copies: int,
    ) -> None:
        self._cluster = cluster
        self._transfers = transfers
        self._shards = shards
        self._name = name
        self._copies = copies

    async def run(self, manifest: Manifest, raw: bytes) -> int:
        """Publishes the manifest until every shard has its copies or no node is left to take one;
        the smallest number of copies.

        `raw` is the manifest's canonical bytes. Raises NotEnoughNodes or NoRoom.
        """
        await self._replace_lost()
        reached = 0
        for _ in range(limits.COMMIT_ROUNDS_MAX):
            results = await publish(self._cluster, raw)
            accepted = {node: r for node, r in results.items() if not r.refused}
            if not accepted:
                reasons = "; ".join(f"{node}: {r.refused}" for node, r in results.items())
                raise NotEnoughNodes(
                    f"no node took the manifest of {self._name} ({reasons or 'none answers'})",
                    next="ckptd status",
                )
            lacking, reached = self._count(manifest, accepted)
            if not await self._send_again(lacking):
                break
        if reached == 0:
            raise NotEnoughNodes(
                f"all nodes with some shard of {self._name} died while it was being stored",
                next="ckptd nodes",
            )
        return reached

    async def _replace_lost(self) -> None:
        """Before the version exists: copies on nodes that died since they took them are made
        anew. Raises NotEnoughNodes or NoRoom when a shard is on no node that answers."""
        await self._cluster.refresh()
        await self._transfers.readmit_lost()
        for shard in self._shards.values():
            shard.holders &= self._cluster.nodes.keys()
        await self._send_again(
            [
                shard
                for shard in self._shards.values()
                if self._transfers.distinct(shard.holders) < self._copies
            ]
        )
        for shard in self._shards.values():
            if not shard.holders:
                raise self._transfers.why_nowhere(shard)

    async def _send_again(self, lacking: list[Shard]) -> bool:
        """Sends shards that lack copies; whether that changed anything."""
        before = [set(shard.holders) for shard in lacking]
        async with asyncio.TaskGroup() as group:
            for shard in lacking:
                group.create_task(self._transfers.protect(shard), name=shard.digest.hex())
        return before != [shard.holders for shard in lacking]

    def _count(
        self, manifest: Manifest, results: dict[str, messages.PutDocumentResult]
    ) -> tuple[list[Shard], int]:
        """Shards without all their copies according to the nodes' bitmaps, and the smallest
        number of copies. Only nodes that hold the manifest durably count."""
        counted = {
            node: list(bitmaps.unpack(result.bitmap or b"", len(manifest.shards)))
            for node, result in results.items()
        }
        reached = self._transfers.distinct(counted)
        lacking = []
        for index, reference in enumerate(manifest.shards):
            shard = self._shards[bytes.fromhex(reference.shard)]
            shard.holders = {node for node, held in counted.items() if held[index]}
            copies = self._transfers.distinct(shard.holders)
            reached = min(reached, copies)
            if copies < self._copies:
                lacking.append(shard)
        return lacking, reached
