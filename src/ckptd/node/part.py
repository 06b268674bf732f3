"""What a role besides worker adds to a node: the seam through which it comes from further out."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Protocol

from ckptd.config import Role
from ckptd.node.requests import Answerer
from ckptd.wire.messages import Message


class Part(Protocol):
    """What a role adds to a node. Its methods are called on the node's loop."""

    role: Role
    handlers: Mapping[type[Message], Answerer]

    def work(self) -> Mapping[str, Callable[[], Coroutine[None, None, None]]]:
        """What is to run as long as the node does, by name. One that ends by itself has failed."""
        ...

    def faults(self) -> Sequence[str]:
        """Why this role cannot be done now, if so."""
        ...

    def sample(self) -> None:
        """Brings the part's gauges up to date."""
        ...

    async def stop(self) -> None:
        """Lets go of everything, once the work is cancelled."""
        ...
