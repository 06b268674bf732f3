"""Which event loop runs: uvloop, unless somebody wants asyncio's own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


def event_loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """For asyncio.Runner: uvloop, or asyncio's own loop when CKPTD_LOOP=asyncio asks for it."""
    if os.environ.get("CKPTD_LOOP") == "asyncio":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Runs `work` on a loop of its own and returns its result."""
    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        return runner.run(work)
