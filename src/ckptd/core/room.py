"""How much more fits, and whether something does, with all its copies: the forecast of `status`,
and what a store asks before it sends the first byte.

Copies are wanted on machines of their own, as far as there are so many: with fewer machines a store
makes what copies it can. With enough machines and too little room it makes none: shards without
their copies would take the room from checkpoints that could have theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from ckptd.core.copysets import attainable_room
from ckptd.core.machines import MachineKey, machine_key
from ckptd.core.placement import Candidate, Placement


def storable_bytes(nodes: Iterable[Candidate], copies: int) -> int:
    """The bytes that fit with `copies` copies each; 0 when there are fewer machines than that."""
    room: Counter[MachineKey] = Counter()
    for node in nodes:
        room[machine_key(node.node_id, node.machine, node.zone)] += node.room_bytes
    return attainable_room(list(room.values()), copies) if room else 0


def possible_copies(nodes: Iterable[Candidate], copies: int) -> int:
    """How many of `copies` there are machines for, full ones included."""
    machines = {machine_key(node.node_id, node.machine, node.zone) for node in nodes}
    return min(copies, len(machines))


def surely_fit(shards: int, size_bytes: int, nodes: Sequence[Candidate], copies: int) -> bool:
    """Whether so many shards of at most `size_bytes` fit with all copies that there are machines
    for, though no node has any of them."""
    possible = possible_copies(nodes, copies)
    units = [
        Candidate(node.node_id, node.machine, node.zone, node.room_bytes // size_bytes)
        for node in nodes
    ]
    return possible > 0 and storable_bytes(units, possible) >= shards


def homeless_bytes(
    shards: Iterable[tuple[int, Collection[str]]], nodes: Sequence[Candidate], copies: int
) -> int:
    """Of shards, given as size and the nodes that have it, the bytes of those that would not get
    all copies that there are machines for."""
    possible = possible_copies(nodes, copies)
    placement = Placement(nodes, max(1, possible))
    machines = {n.node_id: machine_key(n.node_id, n.machine, n.zone) for n in nodes}
    homeless = 0
    for size, holders in shards:
        held = [node for node in holders if node in machines]
        lacking = possible - len({machines[node] for node in held})
        if lacking > 0 and len(placement.choose(size, already=held)) < lacking:
            homeless += size
    return homeless
