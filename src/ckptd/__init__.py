"""Checkpoint storage for machines at home: stored on two of them, verified, back byte for byte.

`Client` is the interface for asyncio, `SyncClient` the same without it. They are imported when they
are first used: a worker needs neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Client", "SyncClient", "__version__"]

if TYPE_CHECKING:
    from ckptd.client.api import Client, SyncClient


def __getattr__(name: str) -> Any:
    if name in ("Client", "SyncClient"):
        from ckptd.client import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
