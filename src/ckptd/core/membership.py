"""Up, suspect or down: what a node thinks of another one, from how long ago it heard of it."""

from __future__ import annotations

from typing import Literal

PeerState = Literal["up", "suspect", "down"]


def peer_state(silent_s: float | None, *, suspect_s: float, down_s: float) -> PeerState:
    """The state of a peer that was last heard of `silent_s` seconds ago (None: never).

    `suspect_s` and `down_s` are the config's `membership.suspect` and `membership.down`.
    """
    if silent_s is None or silent_s >= down_s:
        return "down"
    return "suspect" if silent_s >= suspect_s else "up"
