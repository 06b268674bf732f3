"""The pages that a node serves over HTTP: its metrics, its health, and where all nodes are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ckptd.config import Config, NodeConfig
from ckptd.core.quantities import Address
from ckptd.node.part import Part
from ckptd.node.records import Records
from ckptd.node.worker import Worker
from ckptd.observe import http
from ckptd.observe.metrics import Metrics
from ckptd.observe.pages import Health, Target
from ckptd.store.medium import Medium


class HttpPages:
    """`address` gives where the other nodes reach this one, "" while that is unknown; `worker` is
    None on a node that keeps no shards; `forgotten` says of a certificate's serial number whether
    it is refused."""

    def __init__(
        self,
        *,
        config: Config,
        node: NodeConfig,
        medium: Medium,
        records: Records,
        metrics: Metrics,
        worker: Worker | None,
        parts: Sequence[Part],
        address: Callable[[], str],
        forgotten: Callable[[str], bool],
    ) -> None:
        self._cluster = config.cluster
        self._uses_tls = config.observe.tls
        self._node = node
        self._medium = medium
        self._records = records
        self._metrics = metrics
        self._worker = worker
        self._parts = parts
        self._address = address
        listen, tls = config.observe.listen, config.tls
        self._server = http.HttpServer(
            listen,
            http.tls_context(tls.ca, tls.cert, tls.key) if config.observe.tls else None,
            loopback=listen.host in ("127.0.0.1", "::1", "localhost"),
            cluster=config.cluster,
            metrics=self._metrics_text,
            health=self._health,
            targets=self._targets,
            forgotten=forgotten,
        )

    async def start(self) -> None:
        """Begins to serve."""
        await self._server.start()

    async def close(self) -> None:
        """Serves no more."""
        await self._server.close()

    def _health(self) -> Health:
        failed = self._medium.failed
        faults: dict[str, list[str]] = {}
        for role in self._node.roles:
            faults[role] = [failed] if failed else []
        for part in self._parts:
            faults[part.role] += part.faults()
        return Health(faults)

    def _metrics_text(self) -> bytes:
        if self._worker is not None:
            self._worker.sample()
        for part in self._parts:
            part.sample()
        self._metrics.node_up(self._node.id, self._medium.failed is None)
        return self._metrics.text()

    def _targets(self) -> list[Target]:
        """All nodes, each with the port of its own pages as far as it is the same as here."""
        port = self._server.address.port
        own_host = _host(self._address() or "127.0.0.1:0")
        found = [self._target(self._node.id, own_host, port, self._node.roles)]
        for node, member in self._records.catalogue.members().items():
            if node != self._node.id and member.address:
                found.append(self._target(node, _host(member.address), port, member.roles))
        return found

    def _target(self, node: str, host: str, port: int, roles: tuple[str, ...]) -> Target:
        return Target(node, Address(host, port), roles, self._cluster, self._uses_tls)


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")
