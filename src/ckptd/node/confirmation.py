"""Which versions are protected at this moment, as those say who hold them.

Strict: only what workers that answer now confirm counts. A node that is away may come back with its
copies, but nothing is ever removed because of that hope.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from ckptd.core import limits
from ckptd.core.availability import Holdings, State, assess, holders_from_bitmaps
from ckptd.core.headers import VersionHeader
from ckptd.core.machines import MachineKey
from ckptd.errors import CkptdError
from ckptd.node.ports import Network, OnDisk
from ckptd.wire import messages

_TIMEOUT_S: Final = limits.REQUEST_TIMEOUT_S


class Confirmation:
    """Asks this node and the other workers.

    `node_id` is this node; `own` tells which shards of a version are here (None: the manifest is
    not, or this node keeps no shards). `workers` are the other workers that are up, and the machine
    of each node, this one included. `copies` is the cluster's setting.
    """

    def __init__(
        self,
        *,
        node_id: str,
        own: Callable[[str], bytes | None],
        network: Network,
        workers: Callable[[], Sequence[str]],
        machines: Callable[[], Mapping[str, MachineKey]],
        on_disk: OnDisk,
        copies: int,
    ) -> None:
        self._node_id = node_id
        self._own = own
        self._network = network
        self._workers = workers
        self._machines = machines
        self._on_disk = on_disk
        self._copies = copies

    async def protected(self, versions: Sequence[VersionHeader]) -> set[str]:
        """The ids of those of `versions` that are protected. Raises nothing that comes from other
        nodes: one that does not answer confirms nothing."""
        found: set[str] = set()
        for start in range(0, len(versions), limits.VERSIONS_PER_QUESTION):
            batch = versions[start : start + limits.VERSIONS_PER_QUESTION]
            found |= await self._protected(batch)
        return found

    async def _protected(self, versions: Sequence[VersionHeader]) -> set[str]:
        others = [node for node in self._workers() if node != self._node_id]
        asked = await asyncio.gather(*(self._ask(node, versions) for node in others))
        own = [await self._on_disk(partial(self._own, version.id)) for version in versions]
        bitmaps = dict(zip(others, asked, strict=True))
        bitmaps[self._node_id] = own
        machines = self._machines()
        found = set()
        for index, version in enumerate(versions):
            held = {
                node: bitmap
                for node, answers in bitmaps.items()
                if (bitmap := answers[index]) is not None
            }
            holdings = Holdings(
                copies=max(self._copies, version.copies),
                manifest=frozenset(held),
                shards=holders_from_bitmaps(held, version.shards),
            )
            if assess(holdings, machines, all_answered=False).state is State.PROTECTED:
                found.add(version.id)
        return found

    async def _ask(self, node: str, versions: Sequence[VersionHeader]) -> list[bytes | None]:
        """A bitmap for each version; None for what `node` does not hold or did not tell."""
        told: list[bytes | None] = []
        try:
            while len(told) < len(versions):
                rest = tuple(bytes.fromhex(version.id) for version in versions[len(told) :])
                reply, _ = await self._network.request(
                    node,
                    messages.Inventory(rest),
                    messages.InventoryReply,
                    timeout_s=_TIMEOUT_S,
                )
                if not reply.bitmaps:
                    break
                told += reply.bitmaps
        except CkptdError:
            pass
        told += [None] * len(versions)
        return told[: len(versions)]
