"""Whether somebody works on a node just now.

A mark of maintenance holds repair back, so it must end by itself, whatever the clocks say. It is in
force as long as both clocks agree: the node's own monotonic one, from the moment when this process
learned of the mark, and the wall clock, from the mark's creation. A wall clock that lags makes it
last for its own length of running time at most; one that runs ahead ends it early, which costs
traffic and never data. See docs/decisions/maintenance.md.
"""

from __future__ import annotations

from ckptd.core.roster import MaintenanceMark


class MaintenanceClock:
    """When this process learned of each node's mark. Times are in seconds."""

    def __init__(self) -> None:
        self._learned: dict[str, tuple[str, float]] = {}  # by node: the mark, and when

    def left_s(
        self, node: str, mark: MaintenanceMark | None, *, now_s: float, wall_s: float
    ) -> float:
        """How much longer `mark`, the newest of `node`, is in force; 0 when it is not.

        `now_s` is the monotonic clock, `wall_s` the wall clock in seconds since 1970. To be asked
        again and again: a mark counts from the first time.
        """
        if mark is None:
            return 0.0
        known = self._learned.get(node)
        if known is None or known[0] != mark.id:
            known = self._learned[node] = (mark.id, now_s)
        by_own_time_s = mark.seconds - (now_s - known[1])
        by_wall_s = mark.seconds - (wall_s - mark.created_s)
        return max(0.0, min(by_own_time_s, by_wall_s))
