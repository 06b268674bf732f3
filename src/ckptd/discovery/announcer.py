"""Tells the local network that a node is here."""

from __future__ import annotations

from collections.abc import Sequence

from zeroconf import ServiceInfo

from ckptd.discovery import records
from ckptd.discovery.multicast import Multicast


async def announce(
    multicast: Multicast,
    *,
    cluster: str,
    node: str,
    software: str,
    roles: Sequence[str],
    addresses: Sequence[str],
    port: int,
) -> None:
    """Announces a node until `multicast` is closed, which takes the announcement back.

    `addresses` are those of this machine that others can reach, `port` the one for control
    connections. Returns once it has been said for the first time.
    """
    service = ServiceInfo(
        records.SERVICE,
        records.instance_name(cluster, node),
        port=port,
        properties=records.text(cluster, node, software, roles),
        server=records.host_name(cluster, node),
        parsed_addresses=list(addresses),
    )
    # Without asking first whether somebody has the name: whoever claimed it could silence us.
    # Our text has a dot-free label and so is a plain name for every other mDNS program.
    await multicast.library.async_register_service(service, cooperating_responders=True)
