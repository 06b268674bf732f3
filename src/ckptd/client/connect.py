"""Connecting to a cluster: who this process is there, and every node that can be found."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec

from ckptd import __version__
from ckptd.client.cluster import Cluster
from ckptd.client.nodes import AbsentNode, Node
from ckptd.client.search import Search
from ckptd.config import Config, DiscoveryConfig
from ckptd.core.identity import Identity, load_ca
from ckptd.core.quantities import Address
from ckptd.core.signing import Signer
from ckptd.errors import NotAuthorized
from ckptd.net.bulk import BulkConnector
from ckptd.net.control import connect_control
from ckptd.net.tls import check_peer, client_context
from ckptd.wire import messages


@contextlib.asynccontextmanager
async def connect(
    config: Config, hello: Callable[[], messages.Hello] | None = None
) -> AsyncIterator[Cluster]:
    """Connects to all nodes that can be found, for the length of the context.

    `hello` is what a node says of itself; whoever is no node needs none.
    Nodes that do not answer are listed in `absent`; it is not an error if none does: commands
    differ in what they need. Raises ConfigError for unusable certificates.
    """
    cluster = _unconnected(config, hello)
    try:
        assert cluster.search is not None
        await cluster.search.run(cluster.first)
        yield cluster
    finally:
        await cluster.close()


def _unconnected(config: Config, own_hello: Callable[[], messages.Hello] | None) -> Cluster:
    """The cluster before its first search, without a node."""
    tls = config.tls
    context = client_context(tls.ca, tls.cert, tls.key)
    signer = Signer.from_pem(tls.cert.read_bytes(), tls.key.read_bytes())
    identity = _identity(signer, config.cluster)
    hello = own_hello or _client_hello(config.cluster, identity)
    revoked: set[str] = set()

    async def reach(address: Address, expected: str) -> Node:
        control = await connect_control(
            address.host,
            address.port,
            context=context,
            cluster=config.cluster,
            hello=hello(),
            expected_node_id=expected or None,
            forgotten=revoked.__contains__,
        )
        try:
            status, _ = await control.request(messages.GetStatus(), messages.NodeStatus)
        except BaseException:
            await control.close()
            raise
        return Node(control.node_id, control, address.host, control.hello.bulk_port, status)

    nodes: dict[str, Node] = {}
    absent: dict[str, AbsentNode] = {}
    discovery = config.discovery if own_hello is None else _without_mdns(config.discovery)
    return Cluster(
        config=config,
        identity=identity,
        signer=signer,
        bulk=BulkConnector(context, config.cluster, hello, revoked.__contains__),
        nodes=nodes,
        absent=absent,
        ca=load_ca(tls.ca.read_bytes()),
        search=Search(config.cluster, discovery, nodes, absent, reach),
        first=tuple(_first_addresses(config, own_hello)),
        revoked=revoked,
    )


def _identity(signer: Signer, cluster: str) -> Identity:
    try:
        return check_peer(signer.certificate_der, cluster=cluster)
    except NotAuthorized as error:
        error.next = "ckptd doctor"
        raise


def _client_hello(cluster: str, identity: Identity) -> Callable[[], messages.Hello]:
    """What somebody says who is no node."""
    host = socket.gethostname()[:255]

    def hello() -> messages.Hello:
        return messages.Hello(
            cluster=cluster,
            node=identity.node_id,
            roles=tuple(sorted(role.value for role in identity.roles)),
            software=__version__,
            clock_ms=int(time.time() * 1000),
            highest_order=0,
            address=host,
        )

    return hello


def _without_mdns(discovery: DiscoveryConfig) -> DiscoveryConfig:
    """A node listens all the time: what it heard is in what it says of its peers."""
    return msgspec.structs.replace(discovery, mdns=False)


def _first_addresses(
    config: Config, own_hello: Callable[[], messages.Hello] | None
) -> Iterator[str]:
    """Where to look first: the configured peers, and the node of this machine."""
    yield from (str(address) for address in config.discovery.peers)
    if config.node is not None and config.node.listen.port:
        host, port = config.node.listen
        yield str(Address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port))
    elif own_hello is not None:
        yield own_hello().address
