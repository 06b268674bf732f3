"""mDNS on chosen interfaces: opening and closing it, and a bound on what strangers can store in it.

The library keeps every record that anybody on the network multicasts, of whatever service, up to a
number and not up to a size. So what was heard is counted, and when it is too much, all of it is
dropped by opening everything anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from zeroconf import RecordUpdate, RecordUpdateListener, Zeroconf
from zeroconf._dns import DNSRecord  # in the documentation of the library, but in no __all__
from zeroconf.asyncio import AsyncZeroconf

from ckptd.core import limits
from ckptd.errors import DiscoveryFailed

_RECORD_BYTES = 512  # what a record takes in memory besides its text, names included

# It reports malformed packets of others, which nobody here can do anything about.
logging.getLogger("zeroconf").setLevel(logging.CRITICAL)


def _weight(record: DNSRecord) -> int:
    return _RECORD_BYTES + len(getattr(record, "text", b""))


class _Weigher(RecordUpdateListener):
    """Adds up what the library had to remember."""

    def __init__(self) -> None:
        self.heard_bytes = 0

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
        for update in records:
            if update.old is None:
                self.heard_bytes += _weight(update.new)

    def async_update_records_complete(self) -> None:
        pass


class Multicast:
    """mDNS, open on some interfaces. Made by `open_multicast`."""

    def __init__(self, zeroconf: AsyncZeroconf, addresses: Sequence[str]) -> None:
        self.library = zeroconf
        self.addresses = tuple(addresses)
        self._weigher = _Weigher()
        zeroconf.zeroconf.async_add_listener(self._weigher, None)

    @property
    def flooded(self) -> bool:
        """Whether so much was heard that everything is to be dropped: `close`, and open anew."""
        if self._weigher.heard_bytes <= limits.MDNS_HEARD_MAX_BYTES:
            return False
        # Most of it may have run out long ago: only what is still there counts.
        cached = self.library.zeroconf.cache
        self._weigher.heard_bytes = sum(
            _weight(record) for name in cached.names() for record in cached.entries_with_name(name)
        )
        return self._weigher.heard_bytes > limits.MDNS_HEARD_MAX_BYTES // 2

    async def close(self) -> None:
        """Takes back what was announced, and closes."""
        await self.library.async_close()


async def open_multicast(addresses: Sequence[str]) -> Multicast:
    """Opens mDNS on the interfaces that have these addresses, one each.

    Raises DiscoveryFailed when that is not possible on this machine.
    """
    if not addresses:
        raise DiscoveryFailed("no network interface is left to speak mDNS on", next="ckptd doctor")
    try:
        library = AsyncZeroconf(interfaces=list(addresses))
    except (OSError, RuntimeError) as error:
        raise DiscoveryFailed(
            f"cannot open mDNS (UDP port 5353) on {', '.join(addresses)}: {error}",
            next="ckptd doctor",
        ) from error
    try:
        async with asyncio.timeout(limits.CONNECT_TIMEOUT_S):
            await library.zeroconf.async_wait_for_start()
        if not library.zeroconf.engine.senders:
            raise DiscoveryFailed(
                f"mDNS cannot send on {', '.join(addresses)}: no multicast there",
                next="ckptd doctor",
            )
        return Multicast(library, addresses)
    except BaseException as error:
        await library.async_close()
        if isinstance(error, TimeoutError | OSError):
            raise DiscoveryFailed(f"mDNS does not start: {error}", next="ckptd doctor") from error
        raise
