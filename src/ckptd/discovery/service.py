"""Finding and being found, for as long as a node or a command runs.

Networks come and go while a node runs: the interfaces are looked at again and again, and mDNS is
opened anew when what it speaks on has changed. A machine without a usable network is no error: the
node goes on with the peers that it knows, and tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import structlog

from ckptd.core import limits
from ckptd.discovery.announcer import announce
from ckptd.discovery.browser import Browser
from ckptd.discovery.hints import Hints
from ckptd.discovery.interfaces import Choice, Interface, choose, read_interfaces
from ckptd.discovery.multicast import Multicast, open_multicast
from ckptd.errors import DiscoveryFailed

_log = structlog.get_logger(__name__)


class OwnService(NamedTuple):
    """What a node announces of itself. `listen` is the address that it is bound to."""

    node: str
    software: str
    roles: tuple[str, ...]
    listen: str
    port: int


class Discovery:
    """Announces a node and listens for the others, until cancelled.

    `wanted` is the config's `discovery.interfaces`. What is heard is in `hints`, whose clock is
    the monotonic one.
    """

    def __init__(self, hints: Hints, wanted: Sequence[str], own: OwnService) -> None:
        self.hints = hints
        self._wanted = tuple(wanted)
        self._own = own
        self._told_failure = ""
        self._told_claimants: set[str] = set()

    async def run(self) -> None:
        """Keeps mDNS open on the interfaces that there are."""
        while True:
            interfaces = await asyncio.to_thread(read_interfaces)
            choice = choose(interfaces, self._wanted, self._own.listen)
            try:
                multicast = await open_multicast(choice.multicast)
            except DiscoveryFailed as error:
                self._tell_failure(error)
                await asyncio.sleep(limits.INTERFACES_CHECK_INTERVAL_S)
                continue
            self._told_failure = ""
            flooded = False
            try:
                flooded = await self._speak(multicast, interfaces, choice)
            finally:
                # The announcement is taken back also while this task is being cancelled.
                await asyncio.shield(asyncio.ensure_future(multicast.close()))
            if flooded:
                _log.warning(
                    "mdns_flooded",
                    next="find out who sends so much to UDP port 5353 on this network",
                )
                await asyncio.sleep(limits.MDNS_FLOOD_PAUSE_S)

    async def _speak(
        self, multicast: Multicast, interfaces: list[Interface], choice: Choice
    ) -> bool:
        """Announces and listens until the interfaces change; whether it was a flood instead."""
        self.hints.own_addresses.update(choice.advertised)
        browser = Browser(multicast, self.hints, interfaces, time.monotonic)
        try:
            if choice.advertised:
                own = self._own
                await announce(
                    multicast,
                    cluster=self.hints.cluster,
                    node=own.node,
                    software=own.software,
                    roles=own.roles,
                    addresses=choice.advertised[: limits.ANNOUNCED_ADDRESSES_MAX],
                    port=own.port,
                )
            _log.info("mdns_open", on=list(choice.multicast), announced=list(choice.advertised))
            asked_s = time.monotonic()
            while True:
                # A flood is noticed within a second, before it has filled much memory.
                for _ in range(int(limits.INTERFACES_CHECK_INTERVAL_S)):
                    await asyncio.sleep(1.0)
                    if multicast.flooded:
                        return True
                self._tell_claimants()
                found = await asyncio.to_thread(read_interfaces)
                if choose(found, self._wanted, self._own.listen) != choice:
                    return False
                if time.monotonic() - asked_s >= limits.MDNS_ASK_INTERVAL_S:
                    asked_s = time.monotonic()
                    browser.ask()
        finally:
            await browser.close()

    def _tell_failure(self, error: DiscoveryFailed) -> None:
        if error.message != self._told_failure:
            self._told_failure = error.message
            _log.warning("mdns_unavailable", reason=error.message, next=error.next)

    def _tell_claimants(self) -> None:
        for host in sorted(self.hints.claimants - self._told_claimants):
            self._told_claimants.add(host)
            _log.warning(
                "node_id_announced_elsewhere",
                node=self._own.node,
                address=host,
                next="give each node an id and a certificate of its own (was a card copied?)",
            )


class Lookout:
    """What a command hears of the nodes of a cluster while it looks for them."""

    def __init__(self, hints: Hints, choice: Choice) -> None:
        self.hints = hints
        self.choice = choice
        self.news = asyncio.Event()
        """Set when a node or an address was heard of that was not known."""


@contextlib.asynccontextmanager
async def look_out(cluster: str, wanted: Sequence[str]) -> AsyncIterator[Lookout]:
    """Listens for the nodes of `cluster` for the length of the context, and announces nothing.

    Raises DiscoveryFailed when mDNS cannot be used on this machine.
    """
    interfaces = await asyncio.to_thread(read_interfaces)
    choice = choose(interfaces, wanted)
    multicast = await open_multicast(choice.multicast)
    try:
        lookout = Lookout(Hints(cluster), choice)
        browser = Browser(
            multicast, lookout.hints, interfaces, time.monotonic, on_news=lookout.news.set
        )
        try:
            yield lookout
        finally:
            await browser.close()
    finally:
        await multicast.close()
