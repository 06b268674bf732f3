"""Up, suspect or down, absent or not: what a node thinks of the others, from what it heard when.

Two answers, because they serve two purposes:

- The **state** is what people are shown: up, suspect after `membership.suspect` of silence, down
  after `membership.down`. A node that keeps falling silent (a bad cable, a power supply) is up
  again only after it was heard for a while without a gap, the longer the more often it did.
- **Absent** is what repair and the choice of the steward go by: a node is absent from the moment
  that it is down until it is up, with nothing in between.

A machine that sleeps, or a process that is stopped, hears nothing meanwhile. That is not the
others' fault: after such a gap everybody has the whole time again.

Times are seconds; `now_s` is the monotonic clock, `wall_s` the wall clock, used for nothing but to
notice sleep: the monotonic clock stands still in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from ckptd.core import limits

PeerState = Literal["up", "suspect", "down"]


class Change(NamedTuple):
    """A node whose state changed."""

    node: str
    before: PeerState
    state: PeerState


def peer_state(silent_s: float | None, *, suspect_s: float, down_s: float) -> PeerState:
    """The state of a peer that was last heard of `silent_s` seconds ago (None: never), by that
    alone.

    `suspect_s` and `down_s` are the config's `membership.suspect` and `membership.down`.
    """
    if silent_s is None or silent_s >= down_s:
        return "down"
    return "suspect" if silent_s >= suspect_s else "up"


def shown_state(state: PeerState, *, failed: bool, draining: bool, maintenance: bool) -> str:
    """The word that people see for a node. What keeps it from its work comes first; one that does
    not answer because somebody works on it is no reason for alarm."""
    if state != "up":
        return "maintenance" if maintenance else state
    if failed:
        return "failed"
    return "draining" if draining else "maintenance" if maintenance else "up"


class _Peer:
    """What is remembered of one node."""

    def __init__(self, now_s: float) -> None:
        self.heard_s: float | None = None
        self.steady_since_s = now_s  # heard without a gap
        self.state: PeerState = "down"
        self.absent_since_s: float | None = now_s
        self.lapses: deque[float] = deque(maxlen=16)  # when it fell silent after it was up


class Membership:
    """What one node knows of how the others are."""

    def __init__(self, *, suspect_s: float, down_s: float, now_s: float, wall_s: float) -> None:
        """`suspect_s` and `down_s` are those of the config."""
        self._suspect_s = suspect_s
        self._down_s = down_s
        self._looked_s = now_s
        self._looked_wall_s = wall_s
        self._peers: dict[str, _Peer] = {}

    # -- events

    def heard(self, node: str, now_s: float) -> Change | None:
        """The node gave a sign of life, just now."""
        peer = self._known(node, now_s)
        if peer.heard_s is None or now_s - peer.heard_s >= self._suspect_s:
            self._judge(node, peer, now_s)  # what this silence was
            peer.steady_since_s = now_s
        peer.heard_s = now_s
        return self._judge(node, peer, now_s)

    def tick(self, nodes: Iterable[str], now_s: float, wall_s: float) -> list[Change]:
        """Time has passed. To be called at every heartbeat, with the nodes that are remembered
        and are not this one: all others are dropped. Returns what changed."""
        asleep_s = (wall_s - self._looked_wall_s) - (now_s - self._looked_s)
        stopped_s = now_s - self._looked_s
        self._looked_s, self._looked_wall_s = now_s, wall_s
        wanted = set(nodes)
        for node in self._peers.keys() - wanted:
            del self._peers[node]
        for node in wanted:
            self._known(node, now_s)
        if asleep_s >= limits.SLEEP_GAP_S or stopped_s >= 2 * self._suspect_s:
            self._begin_anew(now_s)
        changes = [self._judge(node, peer, now_s) for node, peer in self._peers.items()]
        return [change for change in changes if change is not None]

    def _known(self, node: str, now_s: float) -> _Peer:
        peer = self._peers.get(node)
        if peer is None:
            peer = self._peers[node] = _Peer(now_s)
        return peer

    def _begin_anew(self, now_s: float) -> None:
        for peer in self._peers.values():
            peer.lapses.clear()
            if peer.absent_since_s is None:
                peer.heard_s = peer.steady_since_s = now_s
            else:
                peer.absent_since_s = now_s

    def _judge(self, node: str, peer: _Peer, now_s: float) -> Change | None:
        before = peer.state
        silent_s = None if peer.heard_s is None else now_s - peer.heard_s
        state = peer_state(silent_s, suspect_s=self._suspect_s, down_s=self._down_s)
        if state == "up" and before != "up" and now_s - peer.steady_since_s < self._proof_s(peer):
            state = "suspect"
        if before == "up" and state != "up":
            peer.lapses.append(now_s)
        if state == "up":
            peer.absent_since_s = None
            self._drop_old_lapses(peer, now_s)
        elif state == "down" and peer.absent_since_s is None:
            peer.absent_since_s = now_s
        peer.state = state
        return None if state == before else Change(node, before, state)

    def _drop_old_lapses(self, peer: _Peer, now_s: float) -> None:
        while peer.lapses and now_s - peer.lapses[0] >= limits.FLAP_WINDOW_S:
            peer.lapses.popleft()

    def _proof_s(self, peer: _Peer) -> float:
        """How long a node must be heard without a gap before it is up again."""
        more = len(peer.lapses) - limits.FLAPS_FREE
        if more <= 0:
            return 0.0
        return min(self._suspect_s * 2.0 ** (more - 1), limits.FLAP_STEADY_MAX_S)

    # -- questions

    def state(self, node: str) -> PeerState:
        """As of the last event; down for a node that is not known."""
        peer = self._peers.get(node)
        return "down" if peer is None else peer.state

    def silent_s(self, node: str, now_s: float) -> float | None:
        """How long ago the node was heard; None for never."""
        peer = self._peers.get(node)
        return None if peer is None or peer.heard_s is None else max(0.0, now_s - peer.heard_s)

    def absent_since(self, node: str, now_s: float) -> float | None:
        """Since when, by the monotonic clock, the node counts as absent; None while it does not.

        Never earlier than this process began to look for it: one that has not been heard of since
        is absent from that moment on. A node that nobody remembers is absent from now on.
        """
        peer = self._peers.get(node)
        return now_s if peer is None else peer.absent_since_s

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._peers))
