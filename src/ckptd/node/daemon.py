"""The daemon: puts the parts of a node together, runs them, and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path

import structlog
from cryptography import x509
from prometheus_client import CollectorRegistry

from ckptd import __version__
from ckptd.config import Config, NodeConfig, load
from ckptd.core import documents, limits
from ckptd.core.identity import Identity, load_ca
from ckptd.core.quantities import Address
from ckptd.core.signing import Signer
from ckptd.discovery.hints import Hints
from ckptd.discovery.interfaces import choose, read_interfaces
from ckptd.errors import CkptdError, ConfigError, DocumentRefused
from ckptd.net.acceptor import Acceptor, Handshake, Unauthenticated, listen, server_handshake
from ckptd.net.bulk import BulkConnector
from ckptd.net.control_server import ControlServer
from ckptd.net.loop import run
from ckptd.net.tls import check_peer, client_context, server_context
from ckptd.node.bulk_service import BulkService
from ckptd.node.heap import keep_heap_small
from ckptd.node.notify import notify
from ckptd.node.peers import Peers
from ckptd.node.records import Records
from ckptd.node.requests import Requests
from ckptd.node.traffic import Traffic
from ckptd.observe import http, logs
from ckptd.observe.metrics import Metrics
from ckptd.observe.pages import Health, Target
from ckptd.store.documents import DocumentFiles
from ckptd.store.marker import open_store
from ckptd.store.shards import ShardStore
from ckptd.wire import messages

_log = structlog.get_logger(__name__)

_WILDCARDS = ("0.0.0.0", "::", "")


def boot_id() -> str:
    """An id of this machine's running kernel: nodes that share it share a fate. "" if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"{uuid.getnode():012x}"


def now_text() -> str:
    """The wall clock as documents show it (RFC 3339, UTC)."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Node:
    """One running node in the role worker."""

    def __init__(self, config: Config, config_path: Path | None = None) -> None:
        if config.node is None or config.store is None:
            raise ConfigError("node", "missing: this config is one of a client, not of a node")
        self.config = config
        self._config_path = config_path
        self._node: NodeConfig = config.node
        self._started_s = time.monotonic()
        tls = config.tls
        self._server_context = server_context(tls.ca, tls.cert, tls.key)
        self._client_context = client_context(tls.ca, tls.cert, tls.key)
        self._ca = load_ca(tls.ca.read_bytes())
        self._signer = Signer.from_pem(tls.cert.read_bytes(), tls.key.read_bytes())
        self._check_certificate()
        self.metrics = Metrics(CollectorRegistry(), version=__version__)
        certificate = x509.load_der_x509_certificate(self._signer.certificate_der)
        self.metrics.certificate_expiry(certificate.not_valid_after_utc.timestamp())
        self.traffic = Traffic(self.metrics)
        self._directory = open_store(str(config.store.path))
        try:
            reserve = config.store.reserve
            self.shards = ShardStore(
                self._directory, reserve=reserve.size_bytes or reserve.percent / 100
            )
            self.records = Records(
                DocumentFiles(self._directory), cluster=config.cluster, ca=self._ca
            )
            self.records.load()
        except BaseException:
            self._directory.close()
            raise
        self._boot_id = boot_id()
        self._bulk_port = 0
        self._address = ""
        self.failed_part: str | None = None
        self._stop = asyncio.Event()

    def _check_certificate(self) -> None:
        identity = check_peer(self._signer.certificate_der, cluster=self.config.cluster)
        if identity.node_id != self._node.id or not identity.is_node:
            raise ConfigError(
                "tls.cert",
                f"the certificate is for {identity}, but node.id is {self._node.id}",
                next=f"ckptd pki issue worker {self._node.id}",
            )

    # -- what this node says of itself

    def hello(self) -> messages.Hello:
        """The first message on each connection."""
        return messages.Hello(
            cluster=self.config.cluster,
            node=self._node.id,
            roles=self._node.roles,
            software=__version__,
            clock_ms=int(time.time() * 1000),
            highest_order=self.records.catalogue.highest_order,
            boot_id=self._boot_id,
            zone=self._node.zone,
            address=self._address,
            bulk_port=self._bulk_port,
        )

    def state(self) -> str:
        return "failed" if self._directory.medium.failed else "up"

    def status(self) -> messages.NodeStatus:
        """What this node is and holds, now."""
        catalogue = self.records.catalogue
        failed = self._directory.medium.failed
        total = used = free = quarantined = count = 0
        if failed is None:
            with contextlib.suppress(CkptdError):  # the medium just failed: the next call says so
                room = self.shards.room()
                total, used, free = room.bytes_total, room.bytes_used, max(0, room.bytes_free)
                quarantined = sum(not file.suffix for file in self.shards.quarantined())
                count = len(self.shards)
        return messages.NodeStatus(
            node=self._node.id,
            state=self.state(),
            bytes_total=total,
            bytes_used=used,
            bytes_free=free,
            write_bytes_per_s=self.traffic.write_bytes_per_s,
            queued_bytes=self.traffic.queued_bytes,
            shards=count,
            quarantined=quarantined,
            documents=len(catalogue),
            unknown_documents=int(catalogue.has_unknown) + len(self.records.unreadable),
            documents_digest=self.records.digest(),
            highest_order=catalogue.highest_order,
            software=__version__,
            clock_ms=int(time.time() * 1000),
            uptime_s=time.monotonic() - self._started_s,
            failed_reason=failed or "",
            peers=tuple(self._peers.views()) if self._peers else (),
        )

    _peers: Peers | None = None
    bulk: BulkService
    control: ControlServer

    def _health(self) -> Health:
        failed = self._directory.medium.failed
        return Health({role: [failed] if failed else [] for role in self._node.roles})

    def _metrics_text(self) -> bytes:
        status = self.status()
        self.metrics.sample_store(
            used_bytes=status.bytes_used,
            capacity_bytes=status.bytes_total,
            free_bytes=status.bytes_free,
            read_only=status.state == "failed",
        )
        self.metrics.node_up(self._node.id, status.state == "up")
        return self.metrics.text()

    def _targets(self) -> list[Target]:
        """All nodes, each with the port of its own pages as far as it is the same as here."""
        port = self._http.address.port
        own_host = Address(*self._split(self._address)).host if self._address else "127.0.0.1"
        found = [self._target(self._node.id, Address(own_host, port), self._node.roles)]
        for node, member in self.records.catalogue.members().items():
            if node != self._node.id and member.address:
                host = self._split(member.address)[0]
                found.append(self._target(node, Address(host, port), member.roles))
        return found

    def _target(self, node: str, address: Address, roles: tuple[str, ...]) -> Target:
        return Target(node, address, roles, self.config.cluster, self.config.observe.tls)

    @staticmethod
    def _split(address: str) -> tuple[str, int]:
        host, _, port = address.rpartition(":")
        return host.strip("[]"), int(port)

    # -- running

    def request_stop(self) -> None:
        """Begins a graceful stop."""
        self._stop.set()

    async def run(self, ready: Callable[[], object] = lambda: None) -> None:
        """Serves until `request_stop`. `ready` is called once connections are accepted."""
        control = bulk_listener = None
        try:
            control, bulk_listener = self._listen()
            await self._serve(control, bulk_listener, ready)
        finally:
            for listener in (control, bulk_listener):
                if listener is not None:
                    listener.close()
            self._directory.close()

    def _listen(self) -> tuple[socket.socket, socket.socket]:
        host, port = self._node.listen
        try:
            control = listen(host, port)
        except OSError as error:
            raise ConfigError("node.listen", f"cannot listen on {host}:{port}: {error}") from error
        try:
            bulk = listen(host, self._node.bulk_port)
        except OSError as error:
            control.close()
            raise ConfigError(
                "node.bulk_port", f"cannot listen on {host}:{self._node.bulk_port}: {error}"
            ) from error
        self._bulk_port = bulk.getsockname()[1]
        self._bound = Address(*control.getsockname()[:2])
        self._address = str(Address(self._reachable_host(), self._bound.port))
        return control, bulk

    def _reachable_host(self) -> str:
        """The address that others reach this node at: when it listens on all interfaces, of the
        one that a packet to the configured peers would leave by, else of the first fit one."""
        if self._node.listen.host not in _WILDCARDS:
            return self._node.listen.host
        for peer in self.config.discovery.peers:
            with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
                probe.connect((peer.host, peer.port))  # sends nothing: it only picks a route
                host = str(probe.getsockname()[0])
                if not host.startswith("127.") or peer.host.startswith("127."):
                    return host  # else the peer is this node itself, by its name
        wanted = self.config.discovery.interfaces
        choice = choose(read_interfaces(), wanted, self._bound.host)
        return choice.advertised[0] if choice.advertised else socket.gethostname()

    async def _serve(
        self, control: socket.socket, bulk_listener: socket.socket, ready: Callable[[], object]
    ) -> None:
        connector = BulkConnector(self._client_context, self.config.cluster, self.hello)
        requests = Requests(
            records=self.records, shards=self.shards, metrics=self.metrics, status=self.status
        )
        loop = asyncio.get_running_loop()

        def suspect(shard: bytes) -> None:
            asyncio.run_coroutine_threadsafe(_quietly(requests.suspect(shard)), loop)

        bulk = self.bulk = BulkService(
            cluster=self.config.cluster,
            node_id=self._node.id,
            store=self.shards,
            connector=connector,
            hello=self.hello,
            traffic=self.traffic,
            on_suspicion=suspect,
        )
        hints = Hints(self.config.cluster, self._node.id, self._is_known)
        self._peers = Peers(
            cluster=self.config.cluster,
            node_id=self._node.id,
            context=self._client_context,
            config=self.config.membership,
            addresses=self.config.discovery.peers,
            records=self.records,
            hello=self.hello,
            on_disk=requests.on_disk,
            metrics=self.metrics,
            hints=hints,
        )
        server = self.control = ControlServer(
            cluster=self.config.cluster,
            node_id=self._node.id,
            context=self._server_context,
            hello=self.hello,
            handler=requests.answer,
            on_hello=self._peers.on_hello,
        )
        await self._start_http()
        try:
            await requests.on_disk(self._remember_self)
        except DocumentRefused as error:  # it said so too often: others still hear it from hellos
            _log.warning("address_not_remembered", reason=error.message)
        waiting = Unauthenticated()
        tasks = [
            self._task(Acceptor(control, waiting, server.handshake).run(), "accept control"),
            self._task(
                Acceptor(bulk_listener, waiting, self._bulk_handshake(bulk)).run(), "accept bulk"
            ),
            self._task(self._peers.run(), "peers"),
            self._task(self._watch_medium(), "medium"),
            self._task(self._watch_address(requests), "address"),
        ]
        if self.config.discovery.mdns:
            tasks.append(self._task(self._discover(hints), "discovery"))
        _log.info("node_started", node=self._node.id, address=self._address, bulk=self._bulk_port)
        ready()
        try:
            await self._stop.wait()
        finally:
            _log.info("node_stopping", node=self._node.id)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(bulk.stop, limits.SHUTDOWN_TIMEOUT_S)
            await server.close()
            connector.close()
            await self._http.close()
            await asyncio.to_thread(requests.close)
            _log.info("node_stopped", node=self._node.id)

    def _is_known(self, node: str) -> bool:
        return self._peers is not None and self._peers.knows(node)

    async def _discover(self, hints: Hints) -> None:
        # Takes memory, which a node without mDNS has better use for.
        from ckptd.discovery.service import Discovery, OwnService

        own = OwnService(
            self._node.id, __version__, self._node.roles, self._bound.host, self._bound.port
        )
        await Discovery(hints, self.config.discovery.interfaces, own).run()

    async def _watch_address(self, requests: Requests) -> None:
        """Follows the machine when it gets another address. The others hear of it at once; a
        document, which is kept for ever, comes less often the more often that happens."""
        pause_s, next_s = limits.ADDRESS_DOCUMENT_PAUSE_MIN_S, 0.0
        while True:
            await asyncio.sleep(limits.INTERFACES_CHECK_INTERVAL_S)
            address = str(Address(await asyncio.to_thread(self._reachable_host), self._bound.port))
            if address != self._address:
                _log.info("address_changed", address=address, before=self._address)
                self._address = address
            if time.monotonic() < next_s:
                continue
            try:
                written = await requests.on_disk(self._remember_self)
            except CkptdError as error:  # the peers know the address from hellos all the same
                _log.warning("address_not_remembered", reason=error.message)
                written = address
            if written:
                next_s = time.monotonic() + pause_s
                pause_s = min(2 * pause_s, limits.ADDRESS_DOCUMENT_PAUSE_MAX_S)

    def _task(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """A part that ends by itself has failed: the node stops, and its supervisor restarts it."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("part_failed", part=task.get_name(), exc_info=error)
            self.failed_part = task.get_name()
            self.request_stop()

    def _bulk_handshake(self, bulk: BulkService) -> Handshake:
        async def handshake(sock: socket.socket) -> Callable[[], None]:
            secured = await server_handshake(sock, self._server_context)
            try:
                identity: Identity = check_peer(secured, cluster=self.config.cluster)
            except CkptdError as error:
                secured.close()
                raise ConnectionRefusedError(error.message) from error
            return lambda: bulk.start(secured, identity)

        return handshake

    async def _start_http(self) -> None:
        observe = self.config.observe
        loopback = observe.listen.host in ("127.0.0.1", "::1", "localhost")
        tls = self.config.tls
        context = http.tls_context(tls.ca, tls.cert, tls.key) if observe.tls else None
        self._http = http.HttpServer(
            observe.listen,
            context,
            loopback=loopback,
            cluster=self.config.cluster,
            metrics=self._metrics_text,
            health=self._health,
            targets=self._targets,
        )
        await self._http.start()

    def _remember_self(self) -> str:
        """Writes this node's member document, unless the newest one says the same."""
        known = self.records.catalogue.members().get(self._node.id)
        # A member's order counts among the documents of this node alone, so it is set above them:
        # a machine that boots with an old clock must still be believed.
        order = max(
            int(time.time() * 1000),
            1 + self.records.catalogue.highest_order,
            1 + known.order if known is not None else 0,
        )
        member = documents.Member(
            format=1,
            cluster=self.config.cluster,
            order=order,
            created=now_text(),
            node=self._node.id,
            roles=self._node.roles,
            address=self._address,
            bulk_port=self._bulk_port,
            zone=self._node.zone,
        )
        if known is not None and (known.address, known.bulk_port, known.roles, known.zone) == (
            member.address,
            member.bulk_port,
            member.roles,
            member.zone,
        ):
            return ""
        return self.records.write(documents.encode(member), self._signer)

    async def _watch_medium(self) -> None:
        """Sets the failed state when the disk is gone although nobody uses it."""
        healthy = True
        while True:
            ok = await asyncio.to_thread(self._directory.medium.check)
            if healthy and not ok:
                healthy = False
                _log.error(
                    "medium_failed",
                    reason=self._directory.medium.failed,
                    next="check the disk, then: systemctl restart ckptd",
                )
            await asyncio.sleep(limits.MEDIUM_CHECK_INTERVAL_S)

    def reload(self) -> None:
        """SIGHUP: reads the config again; what can change while running, does."""
        if self._config_path is None:
            return
        try:
            config = load(self._config_path)
        except ConfigError as error:
            _log.error("config_not_reloaded", reason=error.message, next=error.next)
            return
        logs.configure(config.observe.log_level)
        fixed = [
            key
            for key in ("cluster", "node", "store", "tls", "discovery", "membership")
            if getattr(config, key) != getattr(self.config, key)
        ]
        _log.info("config_reloaded", log_level=config.observe.log_level, needs_restart=fixed)


async def _quietly(work: Awaitable[object]) -> None:
    try:
        await work
    except CkptdError as error:
        _log.warning("verify_failed", reason=error.message)


def serve(config: Config, config_path: Path | None) -> None:
    """Runs a node until SIGTERM or SIGINT. Raises CkptdError when it cannot start."""

    keep_heap_small()

    async def main() -> None:
        node = Node(config, config_path)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, node.request_stop)
        loop.add_signal_handler(signal.SIGHUP, node.reload)
        await node.run(lambda: notify("READY=1"))
        if node.failed_part is not None:
            raise CkptdError(
                f"the node stopped because a part of it failed: {node.failed_part}",
                next="look at the log above; the service manager starts the node again",
            )

    run(main())
