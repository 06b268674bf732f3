"""Who belongs to the cluster and how they are, as this node sees it now.

Documents say who belongs (`ckptd.core.roster`), heartbeats how they are (`ckptd.core.membership`);
background jobs ask here, and act on `Standing`s alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog

from ckptd.clock import Clock
from ckptd.config import MembershipConfig
from ckptd.core import limits
from ckptd.core.identity import Identity
from ckptd.core.maintenance import MaintenanceClock
from ckptd.core.membership import Change, Membership, shown_state
from ckptd.core.roster import Roster
from ckptd.core.steward import Standing, steward
from ckptd.observe.metrics import Metrics
from ckptd.wire import messages

_log = structlog.get_logger(__name__)


@dataclass
class Peer:
    """What is known of one other node."""

    node: str
    address: str
    bulk_port: int = 0
    roles: tuple[str, ...] = ()
    zone: str = ""
    boot_id: str = ""
    failed: bool = False


class Members:
    """The nodes of the cluster. Used on the node's loop."""

    def __init__(
        self,
        *,
        roster: Roster,
        hello: Callable[[], messages.Hello],
        failed: Callable[[], bool],
        config: MembershipConfig,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        """`hello` is what this node says of itself, `failed` whether its disk has failed."""
        self.roster = roster
        self.own = hello().node
        self._hello = hello
        self._failed = failed
        self._clock = clock
        self._metrics = metrics
        self._peers: dict[str, Peer] = {}
        self._membership = Membership(
            suspect_s=config.suspect_s,
            down_s=config.down_s,
            now_s=clock.monotonic_s(),
            wall_s=clock.wall_s(),
        )
        self._maintenance = MaintenanceClock()
        self._steward: str | None = None

    # -- events

    def at(self, node: str, address: str) -> Peer:
        """The node is said to be at `address` ("": nobody knows)."""
        peer = self._peers.get(node)
        if peer is None:
            peer = self._peers[node] = Peer(node, address)
        elif address and self._membership.state(node) != "up":
            peer.address = address
        return peer

    def heard(self, identity: Identity, hello: messages.Hello) -> None:
        """The node with this certificate gave a sign of life."""
        peer = self.at(identity.node_id, hello.address)
        peer.bulk_port = hello.bulk_port
        peer.roles = tuple(sorted(identity.roles.intersection(hello.roles)))
        peer.zone = hello.zone
        peer.boot_id = hello.boot_id
        change = self._membership.heard(peer.node, self._clock.monotonic_s())
        if change is not None:
            self._note(change)

    def answered(self, node: str, status: messages.NodeStatus) -> None:
        """The node told how it is."""
        if (peer := self._peers.get(node)) is not None:
            peer.failed = status.state == "failed"

    def tick(self) -> None:
        """To be called at every heartbeat: takes in new documents, and notes who went silent."""
        for node, member in self.roster.members().items():
            if node != self.own:
                self.at(node, member.address)
        for node in self.roster.forgotten() & self._peers.keys():
            del self._peers[node]
            self._metrics.forget_node(node)
            _log.warning("node_forgotten", node=node)
        changes = self._membership.tick(
            self._peers, self._clock.monotonic_s(), self._clock.wall_s()
        )
        for change in changes:
            self._note(change)
        for node in self._peers:
            self._metrics.node_up(node, self._membership.state(node) == "up")
        if (found := self.steward()) != self._steward:
            _log.info("steward", node=found, before=self._steward)
            self._steward = found

    def _note(self, change: Change) -> None:
        _log.info("peer_state", node=change.node, state=change.state, before=change.before)
        self._metrics.node_up(change.node, change.state == "up")

    # -- questions

    def knows(self, node: str) -> bool:
        """Whether this node is remembered, or has proved who it is."""
        return node in self._peers

    def peer(self, node: str) -> Peer | None:
        """Where another node is, None for one that is not known."""
        return self._peers.get(node)

    def forgotten(self, serial: str) -> bool:
        """Whether the certificate with this serial number is refused."""
        return self.roster.refuses(serial)

    def is_draining(self) -> bool:
        """Whether this node is to give its copies away."""
        return self.roster.is_draining(self.own)

    def own_state(self) -> str:
        """The word for this node's own state."""
        return shown_state(
            "up",
            failed=self._failed(),
            draining=self.is_draining(),
            maintenance=self.maintenance_s(self.own) > 0,
        )

    def maintenance_s(self, node: str) -> float:
        """For how many more seconds somebody works on a node; 0 if nobody does."""
        return self._maintenance.left_s(
            node,
            self.roster.maintenance(node),
            now_s=self._clock.monotonic_s(),
            wall_s=self._clock.wall_s(),
        )

    def absent_since(self, node: str) -> float | None:
        """As `Membership.absent_since`; this node itself never is."""
        now_s = self._clock.monotonic_s()
        return None if node == self.own else self._membership.absent_since(node, now_s)

    def standings(self) -> dict[str, Standing]:
        """All remembered nodes, this one included, by id."""
        return {node: self._standing(node) for node in {*self.roster.members(), self.own}}

    def _standing(self, node: str) -> Standing:
        member = self.roster.last_said(node)
        draining, maintenance_s = self.roster.is_draining(node), self.maintenance_s(node)
        if node == self.own:
            hello = self._hello()
            return Standing(
                node=node,
                roles=frozenset(hello.roles),
                absent_s=None,
                failed=self._failed(),
                draining=draining,
                maintenance_s=maintenance_s,
                address=hello.address,
                bulk_port=hello.bulk_port,
                boot_id=hello.boot_id,
                zone=hello.zone,
            )
        peer = self._peers.get(node) or Peer(node, "")
        since_s = self.absent_since(node)
        return Standing(
            node=node,
            # What it said last time holds until it says something else.
            roles=frozenset(peer.roles or (member.roles if member else ())),
            absent_s=None if since_s is None else self._clock.monotonic_s() - since_s,
            failed=peer.failed,
            draining=draining,
            maintenance_s=maintenance_s,
            address=peer.address,
            bulk_port=peer.bulk_port or (member.bulk_port if member else 0),
            boot_id=peer.boot_id,
            zone=peer.zone or (member.zone if member else ""),
        )

    def steward(self) -> str | None:
        """The node that plans for all, as far as this one can see."""
        return steward(self.standings().values())

    def is_steward(self) -> bool:
        """Whether that is this node."""
        return self.steward() == self.own

    def views(self) -> Iterator[messages.PeerView]:
        """What this node thinks of each other one, and which nodes were forgotten."""
        now_s = self._clock.monotonic_s()
        forgotten = self.roster.forgotten()  # known at once, not from the next heartbeat on
        peers = [peer for peer in self._peers.values() if peer.node not in forgotten]
        del peers[limits.CLUSTER_NODES_MAX :]
        for peer in peers:
            silent_s = self._membership.silent_s(peer.node, now_s)
            state = shown_state(
                self._membership.state(peer.node),
                failed=peer.failed,
                draining=self.roster.is_draining(peer.node),
                maintenance=self.maintenance_s(peer.node) > 0,
            )
            seen_s = -1.0 if silent_s is None else silent_s
            yield messages.PeerView(
                peer.node, peer.address, peer.bulk_port, state, seen_s, peer.roles, peer.zone
            )
        for node in sorted(forgotten)[: limits.CLUSTER_NODES_MAX - len(peers)]:
            said = self.roster.last_said(node)
            address, roles = (said.address, said.roles) if said else ("", ())
            yield messages.PeerView(node, address, 0, "forgotten", -1.0, roles)
