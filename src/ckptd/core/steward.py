"""Which node plans repair, rebalancing and retention.

Nobody is elected: each node computes the steward from what it sees. Two at once do no harm, since
nobody orders a removal (docs/decisions/steward.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

from msgspec import Struct

from ckptd.core.machines import MachineKey, machine_key

NodeRole: TypeAlias = Literal["worker", "coordinator"]


class Standing(Struct, frozen=True):
    """What one node knows of a remembered node, possibly itself, at one moment.

    `absent_s`: for how many seconds it has been absent, None when it is present (a node that fell
    silent a moment ago still is). `failed`: it answers, but its disk has failed. `draining`: it is
    to give its copies away. `maintenance_s`: for how many more seconds somebody works on it.
    """

    node: str
    roles: frozenset[str]
    absent_s: float | None
    failed: bool = False
    draining: bool = False
    maintenance_s: float = 0.0
    address: str = ""
    bulk_port: int = 0
    boot_id: str = ""
    zone: str = ""

    @property
    def is_worker(self) -> bool:
        return "worker" in self.roles

    @property
    def is_live(self) -> bool:
        """Whether it is present and can do its work."""
        return self.absent_s is None and not self.failed

    @property
    def takes_copies(self) -> bool:
        """Whether new copies may go there."""
        return self.is_worker and self.is_live and not self.draining

    @property
    def machine(self) -> MachineKey:
        """Equal for nodes that die together."""
        return machine_key(self.node, self.boot_id, self.zone)


Standings: TypeAlias = Mapping[str, Standing]
"""All remembered nodes by id, the one that asks included."""


def steward(nodes: Iterable[Standing]) -> str | None:
    """The live coordinator with the smallest id, else the live worker with the smallest id."""
    live = [each for each in nodes if each.is_live]
    for role in ("coordinator", "worker"):
        ids = [each.node for each in live if role in each.roles]
        if ids:
            return min(ids)
    return None
