"""Which versions are protected at this moment, as those say who hold them.

Strict: only what workers confirm that answer now and take copies counts. A node that is away may
come back with its copies, and one that is to be emptied has them still, but nothing is ever removed
because of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ckptd.core.availability import Holdings, State, assess
from ckptd.core.headers import VersionHeader
from ckptd.core.repair import VersionCopies
from ckptd.core.steward import Standings
from ckptd.node.inventories import Inventories, batches
from ckptd.node.ports import OnDisk


class Confirmation:
    """Asks the workers; `standings` is what this node knows of all, itself included."""

    def __init__(
        self, inventories: Inventories, standings: Callable[[], Standings], on_disk: OnDisk
    ) -> None:
        self._inventories = inventories
        self._standings = standings
        self._on_disk = on_disk

    async def protected(self, versions: Sequence[VersionHeader]) -> set[str]:
        """The ids of those of `versions` that are protected. Raises nothing that comes from other
        nodes: one that does not answer confirms nothing."""
        found: set[str] = set()
        for batch in batches(versions):
            counted = [n for n, standing in self._standings().items() if standing.takes_copies]
            async for version in self._inventories.ask(batch, counted):
                if await self._on_disk(partial(self._is_protected, version)):
                    found.add(version.version)
        return found

    def _is_protected(self, version: VersionCopies) -> bool:
        holdings = Holdings(
            copies=version.copies,
            manifest=frozenset(node for node, held in version.bitmaps.items() if held is not None),
            shards=version.holders(),
        )
        machines = {node: standing.machine for node, standing in self._standings().items()}
        return assess(holdings, machines, all_answered=False).state is State.PROTECTED
