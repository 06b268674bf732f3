"""What a node still holds that others must get before it may go."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ckptd.core.availability import Holdings
from ckptd.core.machines import MachineKey, machine_key


def needed_here(
    node: str,
    holdings: Holdings,
    machines: Mapping[str, MachineKey],
    *,
    leaving: Collection[str],
    answers: bool = True,
) -> list[bool]:
    """For each shard of a version, whether it would have too few copies without those on `node`.

    Copies count as for *protected*: on distinct machines, on nodes that hold the manifest; those on
    nodes that are `leaving` (draining) do not, nor those on `node`. A node that does not answer
    (`answers`) may hold whatever lacks copies elsewhere.
    """
    gone = {node, *leaving}
    known: dict[frozenset[str], bool] = {}
    for holders in set(holdings.shards):
        staying = (holders & holdings.manifest) - gone
        elsewhere = len({machines.get(each) or machine_key(each, "", "") for each in staying})
        here = node in holders or not answers
        known[holders] = here and elsewhere < holdings.copies
    return [known[holders] for holders in holdings.shards]
