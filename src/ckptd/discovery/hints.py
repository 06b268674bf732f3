"""Where announced nodes may be: what was heard, for how long it counts, and how much is kept.

Nothing here is trusted. An announcement adds an address that is worth a try; it never takes away
one under which a node has proved itself, and it never ends a connection. So a node that comes and
goes every second, two that claim one id, and a stranger who announces nonsense cost a few tries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ckptd.core import limits
from ckptd.core.quantities import Address
from ckptd.discovery.records import Announcement


@dataclass
class _Place:
    """One address of one node. Times in seconds; `gone_s` is None while it is announced."""

    heard_s: float
    gone_s: float | None = None
    proved: bool = False

    def is_stale(self, now_s: float) -> bool:
        return self.gone_s is not None and now_s - self.gone_s >= limits.ANNOUNCEMENT_LINGER_S


@dataclass
class _Announced:
    heard_s: float
    places: dict[Address, _Place] = field(default_factory=dict)
    software: str = ""

    @property
    def proved(self) -> bool:
        return any(place.proved for place in self.places.values())


class Hints:
    """The announced nodes of one cluster. `now_s` is always of one monotonic clock, in seconds.

    `own_id` is left out: nobody has to find himself. `is_member` tells which ids the cluster
    remembers; when too many are announced, the others are forgotten first.
    """

    def __init__(
        self,
        cluster: str,
        own_id: str = "",
        is_member: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.cluster = cluster
        self._own_id = own_id
        self._is_member = is_member
        self._nodes: dict[str, _Announced] = {}
        self.other_clusters: set[str] = set()
        self.own_addresses: set[str] = set()
        self.claimants: set[str] = set()
        """Hosts that were announced as `own_id` and are not among `own_addresses`: a card that was
        copied into a second machine, or a lie."""

    def hear(self, announcement: Announcement, now_s: float) -> bool:
        """Takes note of an announcement; whether it brought a node or an address that was not
        known as announced before."""
        if announcement.cluster != self.cluster:
            if len(self.other_clusters) < limits.ANNOUNCED_NODES_MAX:
                self.other_clusters.add(announcement.cluster)
            return False
        if announcement.node == self._own_id:
            hosts = {address.host for address in announcement.addresses}
            if len(self.claimants) < limits.ANNOUNCED_ADDRESSES_MAX:
                self.claimants |= hosts - self.own_addresses
            return False
        self.forget_stale(now_s)
        known = self._nodes.get(announcement.node)
        if known is None:
            if not self._make_room(announcement.node):
                return False
            known = self._nodes[announcement.node] = _Announced(now_s)
        known.heard_s = now_s
        known.software = announcement.software
        return self._note_addresses(known, announcement.addresses, now_s)

    def withdraw(self, node: str, now_s: float) -> None:
        """The node's announcement was taken back or ran out. Its addresses stay for a while: who
        took it back need not have been the node."""
        known = self._nodes.get(node)
        if known is not None:
            for place in known.places.values():
                if place.gone_s is None:
                    place.gone_s = now_s

    def prove(self, node: str, address: Address, now_s: float) -> None:
        """The node answered at this address, with its certificate."""
        known = self._nodes.get(node)
        if known is not None and address in known.places:
            place = known.places[address]
            place.proved, place.heard_s = True, now_s
            if place.gone_s is not None:
                place.gone_s = now_s

    def disprove(self, node: str, address: Address) -> None:
        """Nothing, or something else, answered at this address."""
        known = self._nodes.get(node)
        if known is not None and address in known.places:
            known.places[address].proved = False

    def nodes(self, now_s: float) -> list[str]:
        """The ids of the nodes that are worth a try."""
        self.forget_stale(now_s)
        return list(self._nodes)

    def addresses(self, node: str, now_s: float) -> list[Address]:
        """Where to try this node: addresses that are announced now first, of these the ones that
        were right before, then the latest. Empty when it is not announced any more."""
        return [address for address, _ in self._places(node, now_s)]

    def announced(self, node: str, now_s: float) -> list[Address]:
        """As `addresses`, without those that were taken back."""
        return [address for address, place in self._places(node, now_s) if place.gone_s is None]

    def _places(self, node: str, now_s: float) -> list[tuple[Address, _Place]]:
        known = self._nodes.get(node)
        if known is None:
            return []
        # In the order of the announcement as far as nothing else decides.
        found = [item for item in known.places.items() if not item[1].is_stale(now_s)]
        found.sort(key=lambda item: (item[1].gone_s is not None, not item[1].proved,
                                     -item[1].heard_s))  # fmt: skip
        return found

    def software(self, node: str) -> str:
        """The version that a node says it runs; "" when it is not announced."""
        return self._nodes[node].software if node in self._nodes else ""

    def forget_stale(self, now_s: float) -> None:
        """Drops what has been gone for ANNOUNCEMENT_LINGER_S."""
        for node, known in list(self._nodes.items()):
            for address, place in list(known.places.items()):
                if place.is_stale(now_s):
                    del known.places[address]
            if not known.places:
                del self._nodes[node]

    def _make_room(self, newcomer: str) -> bool:
        if len(self._nodes) < limits.ANNOUNCED_NODES_MAX:
            return True
        # Whoever floods us with inventions must not drive out the nodes that we know to be ours. Of
        # strangers the first to come stay until they are gone: else none would ever be tried,
        # because the next invention comes before its turn does.
        if not self._is_member(newcomer):
            return False
        strangers = [
            (known.heard_s, node)
            for node, known in self._nodes.items()
            if not known.proved and not self._is_member(node)
        ]
        if not strangers:
            return False
        del self._nodes[min(strangers)[1]]
        return True

    def _note_addresses(
        self, known: _Announced, addresses: tuple[Address, ...], now_s: float
    ) -> bool:
        fresh = False
        for address, place in known.places.items():
            if address not in addresses and place.gone_s is None:
                place.gone_s = now_s
        for address in addresses:
            place_ = known.places.get(address)
            if place_ is None:
                fresh = True
                if len(known.places) >= limits.ANNOUNCED_ADDRESSES_MAX:
                    del known.places[_least(known.places)]
                known.places[address] = _Place(now_s)
            else:
                fresh = fresh or place_.gone_s is not None
                place_.heard_s, place_.gone_s = now_s, None
        return fresh


def _least(places: dict[Address, _Place]) -> Address:
    """The address to forget first: unproved, gone, heard longest ago."""
    return min(
        places,
        key=lambda address: (
            places[address].proved,
            places[address].gone_s is None,
            places[address].heard_s,
        ),
    )
