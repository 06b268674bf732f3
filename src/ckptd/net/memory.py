"""How much memory the control connections of a node may take together.

Each connection has a claim on a pool. A claim grows only while there is room, in the order of
asking; one owner (a certificate's node id) gets over half of a pool only as its sole claim, so that
nobody can keep all others waiting. Used on the event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
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
        self.wanted_bytes = size_bytes
        self._pool._settle(self)
        return self.held_bytes >= size_bytes

    def take(self, size_bytes: int) -> None:
        """Holds `size_bytes` now, be there room or not: others wait until there is again."""
        self.wanted_bytes = size_bytes
        self._pool._hold(self, size_bytes)
        self._pool._settle(self)


class MemoryPool:
    """`total_bytes` shared by claims. One claim alone may always have that much."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._held_by: Counter[str] = Counter()
        self._waiting: dict[Claim, None] = {}
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
        for claim in list(self._waiting):
            more = claim.wanted_bytes - claim.held_bytes
            owned = self._held_by[claim.owner]
            if owned and owned + more > self._total_bytes // 2:
                continue  # waits for its own owner's claims, and lets others pass
            if self.held_bytes and self.held_bytes + more > self._total_bytes:
                return  # the first in line: who came later must not use up what it waits for
            del self._waiting[claim]
            self._hold(claim, claim.wanted_bytes)
            if claim is not asking:
                claim.on_grant()

    def _hold(self, claim: Claim, size_bytes: int) -> None:
        change = size_bytes - claim.held_bytes
        claim.held_bytes = size_bytes
        self.held_bytes += change
        self._held_by[claim.owner] += change
        if not self._held_by[claim.owner]:
            del self._held_by[claim.owner]
