"""How much memory the control connections of a node may take together.

Each connection has a claim on a pool. A claim grows only while there is room. The owners (node ids
of certificates) take turns, and one gets over half of a pool only as its sole claim, so that nobody
can keep the others waiting for longer than one turn. Used on the event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable


class Claim:
    """What one holder has of a pool. `on_grant` is called when a refused wish was granted later."""

    def __init__(
        self, pool: MemoryPool, owner: str, on_grant: Callable[[], None] = lambda: None
    ) -> None:
        self._pool = pool
        self.owner = owner
        self.on_grant = on_grant
        self.held_bytes = 0
        self.wanted_bytes = 0

    def want(self, size_bytes: int) -> bool:
        """Wishes to hold `size_bytes` from now on; whether it does. Less than before always is."""
        if size_bytes == self.held_bytes == self.wanted_bytes:
            return True  # nothing changes for anybody, as after each small message
        self.wanted_bytes = size_bytes
        self._pool._settle(self)
        return self.held_bytes >= size_bytes

    def take(self, size_bytes: int) -> None:
        """Holds `size_bytes` now, be there room or not: others wait until there is again."""
        if size_bytes == self.held_bytes == self.wanted_bytes:
            return
        self.wanted_bytes = size_bytes
        self._pool._hold(self, size_bytes)
        self._pool._settle(self)


class MemoryPool:
    """`total_bytes` shared by claims. One claim alone may always have that much."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._held_by: Counter[str] = Counter()
        self._waiting: dict[Claim, None] = {}  # in the order of asking
        self._turns = itertools.count(1)
        self._last_turn: dict[str, int] = {}  # by owner
        self.held_bytes = 0

    @contextlib.asynccontextmanager
    async def claimed(self, owner: str, size_bytes: int) -> AsyncIterator[Claim]:
        """Waits for room of `size_bytes` and holds it for the length of the context."""
        granted = asyncio.Event()
        claim = Claim(self, owner, granted.set)
        try:
            if not claim.want(size_bytes):
                await granted.wait()
            yield claim
        finally:
            claim.want(0)

    def _settle(self, claim: Claim) -> None:
        self._waiting.pop(claim, None)
        if claim.wanted_bytes > claim.held_bytes:
            self._waiting[claim] = None
        else:
            self._hold(claim, claim.wanted_bytes)
        self._grant(claim)

    def _grant(self, asking: Claim) -> None:
        while (claim := self._next()) is not None:
            others = self.held_bytes - claim.held_bytes
            if others and others + claim.wanted_bytes > self._total_bytes:
                return  # nobody behind it may use up what it waits for
            del self._waiting[claim]
            self._last_turn[claim.owner] = next(self._turns)
            self._hold(claim, claim.wanted_bytes)
            if claim is not asking:
                claim.on_grant()

    def _next(self) -> Claim | None:
        """The waiting claim of the owner who had a turn longest ago, but for those who wait for
        their own other claims."""
        ready = [claim for claim in self._waiting if not self._owner_has_its_share(claim)]
        return min(ready, key=lambda claim: self._last_turn.get(claim.owner, 0), default=None)

    def _owner_has_its_share(self, claim: Claim) -> bool:
        others = self._held_by[claim.owner] - claim.held_bytes
        return bool(others) and others + claim.wanted_bytes > self._total_bytes // 2

    def _hold(self, claim: Claim, size_bytes: int) -> None:
        change = size_bytes - claim.held_bytes
        claim.held_bytes = size_bytes
        self.held_bytes += change
        self._held_by[claim.owner] += change
        if not self._held_by[claim.owner]:
            del self._held_by[claim.owner]
