"""What the coordinator does while it can do nothing."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from tests.unit.watch.test_watcher import unreadable_with_something_ready

from ckptd.coordinator.part import Coordinator


def test_nothing_spins_while_what_is_ready_cannot_be_read(tmp_path: Path) -> None:
    part = Coordinator.__new__(Coordinator)
    part._watcher = unreadable_with_something_ready(tmp_path).watcher
    turns = 0

    async def reach() -> bool:
        nonlocal turns
        turns += 1
        return True

    part._reach_workers = reach  # type: ignore[method-assign]

    async def for_a_moment() -> None:
        part._ready = asyncio.Event()
        part._ready.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await part._store_ready()

    asyncio.run(for_a_moment())
    assert turns == 0
