"""Where a node is: its machine, its addresses, its directory, and what it tells others of these."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ckptd.config import Config, NodeConfig
from ckptd.core import documents
from ckptd.core.catalogue import Catalogue
from ckptd.core.quantities import Address
from ckptd.errors import ConfigError
from ckptd.net.acceptor import listen
from ckptd.store.marker import StoreDirectory, init_store, open_store

DOCUMENTS: Final = "documents"
"""Below the state of a coordinator: its copy of the catalogue, laid out like a store."""
_WILDCARDS: Final = ("0.0.0.0", "::", "")


def boot_id() -> str:
    """An id of this machine's running kernel: nodes that share it share a fate. "" if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"{uuid.getnode():012x}"


def now_text() -> str:
    """The wall clock as documents show it (RFC 3339, UTC)."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def reachable_host(host: str, peers: Sequence[Address]) -> str:
    """The address that others reach a node at which listens on `host`: of the interface that a
    packet to the configured peers would leave by, when it listens on all of them."""
    if host not in _WILDCARDS:
        return host
    for peer in peers:
        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.connect((peer.host, peer.port))  # sends nothing: it only picks a route
            return str(probe.getsockname()[0])
    return socket.gethostname()


def listening(key: str, host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError about `key`."""
    try:
        return listen(host, port)
    except OSError as error:
        raise ConfigError(key, f"cannot listen on {host}:{port}: {error}") from error


def open_directory(config: Config) -> StoreDirectory:
    """Where the node keeps its documents, and a worker its shards.

    A worker's store is never made here. What a coordinator keeps is only a copy of what the
    workers have, so an empty place is as good as a full one, but for the time to fill it.
    """
    if config.is_worker:
        assert config.store is not None, "the config was checked"
        return open_store(str(config.store.path))
    assert config.node is not None and config.node.state is not None, "it is a coordinator"
    place = config.node.state / DOCUMENTS
    try:
        config.node.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError("node.state", f"{config.node.state}: {error.strerror}") from error
    init_store(str(place), store_id=secrets.token_hex(16))
    return open_store(str(place))


def member_document(
    catalogue: Catalogue, node: NodeConfig, *, cluster: str, address: str, bulk_port: int
) -> documents.Member | None:
    """What the node has to say of itself; None when its newest document in `catalogue` says it."""
    known = catalogue.members().get(node.id)
    # A member's order counts among the documents of this node alone, so it is set above them: a
    # machine that boots with an old clock must still be believed.
    order = max(
        int(time.time() * 1000),
        1 + catalogue.highest_order,
        1 + known.order if known is not None else 0,
    )
    member = documents.Member(
        format=1,
        cluster=cluster,
        order=order,
        created=now_text(),
        node=node.id,
        roles=node.roles,
        address=address,
        bulk_port=bulk_port,
        zone=node.zone,
    )
    if known is not None and (known.address, known.bulk_port, known.roles, known.zone) == (
        member.address,
        member.bulk_port,
        member.roles,
        member.zone,
    ):
        return None
    return member
