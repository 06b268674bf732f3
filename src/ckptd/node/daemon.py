"""The daemon: puts the parts of a node together, runs them, and stops them in order.

What every node has is here: identity, catalogue, peers, control connections, HTTP. A worker's part
is `ckptd.node.worker`; other roles come as a `Part` from further out.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import structlog
from cryptography import x509
from prometheus_client import CollectorRegistry

from ckptd import __version__
from ckptd.clock import SYSTEM_CLOCK
from ckptd.config import Config, NodeConfig, load
from ckptd.core import limits
from ckptd.core.identity import load_ca
from ckptd.core.signing import Signer
from ckptd.discovery.hints import Hints
from ckptd.errors import CkptdError, ConfigError
from ckptd.net.acceptor import Acceptor, Unauthenticated
from ckptd.net.bulk import BulkConnector
from ckptd.net.control_connection import Answer, Payload, Progress
from ckptd.net.control_server import ControlServer
from ckptd.net.loop import run
from ckptd.net.tls import check_peer, client_context, server_context
from ckptd.node.background import Background, Ground
from ckptd.node.descriptors import allow_descriptors
from ckptd.node.heap import keep_heap_small
from ckptd.node.http_pages import HttpPages
from ckptd.node.members import Members
from ckptd.node.network import NodeNetwork
from ckptd.node.notify import notify
from ckptd.node.part import Part
from ckptd.node.peers import Peers
from ckptd.node.presence import Presence, boot_id, open_directory
from ckptd.node.records import Records
from ckptd.node.requests import Requests
from ckptd.node.worker import Worker
from ckptd.observe import logs
from ckptd.observe.metrics import Metrics
from ckptd.store.documents import DocumentFiles
from ckptd.store.room import Room
from ckptd.wire import messages
from ckptd.wire.messages import Message

_log = structlog.get_logger(__name__)

_NEED_RESTART: Final = (
    *("cluster", "node", "store", "tls", "discovery", "membership", "watch"),
    *("replication", "repair", "gc", "scrub"),
)

MakePart = Callable[["Node"], Part]
"""Makes what a role adds to a node. It is called before the loop runs."""


class Node:
    """One running node. `parts` make what its roles besides worker need."""

    def __init__(
        self, config: Config, config_path: Path | None = None, parts: Sequence[MakePart] = ()
    ) -> None:
        if config.node is None:
            raise ConfigError("node", "missing: this config is one of a client, not of a node")
        self.config = config
        self._config_path = config_path
        self._node: NodeConfig = config.node
        self._started_s = time.monotonic()
        tls = config.tls
        self._server_context = server_context(tls.ca, tls.cert, tls.key)
        self._client_context = client_context(tls.ca, tls.cert, tls.key)
        ca = load_ca(tls.ca.read_bytes())
        self._signer = Signer.from_pem(tls.cert.read_bytes(), tls.key.read_bytes())
        self._check_certificate()
        self.metrics = Metrics(CollectorRegistry(), version=__version__)
        certificate = x509.load_der_x509_certificate(self._signer.certificate_der)
        self.metrics.certificate_expiry(certificate.not_valid_after_utc.timestamp())
        self._directory = open_directory(config)
        try:
            self.worker = (
                Worker(config.store, self._directory, self.metrics)
                if config.is_worker and config.store is not None
                else None
            )
            self.records = Records(
                DocumentFiles(self._directory),
                cluster=config.cluster,
                ca=ca,
                shards=self.worker.shards if self.worker else None,
            )
            self.records.load()
            self._boot_id = boot_id()
            self._presence = Presence(config, self.records, self._signer)
            self.members = Members(
                roster=self.records.catalogue.roster,
                hello=self.hello,
                failed=lambda: self._directory.medium.failed is not None,
                config=config.membership,
                clock=SYSTEM_CLOCK,
                metrics=self.metrics,
            )
            self.failed_part: str | None = None
            self._stop = asyncio.Event()
            self._parts = [make(self) for make in parts]
        except BaseException:
            self._directory.close()
            raise

    def _check_certificate(self) -> None:
        identity = check_peer(self._signer.certificate_der, cluster=self.config.cluster)
        roles = {role.value for role in identity.roles}
        if identity.node_id != self._node.id or not roles.issuperset(self._node.roles):
            raise ConfigError(
                "tls.cert",
                f"the certificate is for {identity}, but this is to be "
                f"{' and '.join(self._node.roles)} {self._node.id}",
                next=f"ckptd pki issue {','.join(self._node.roles)} {self._node.id}",
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
            address=self._presence.address,
            bulk_port=self._presence.bulk_port,
        )

    def state(self) -> str:
        state = self.members.own_state()
        return "suspect" if state == "up" and self._suspicion() else state

    def _suspicion(self) -> str:
        return self.background.suspicion if self.background is not None else ""

    def status(self) -> messages.NodeStatus:
        """What this node is and holds, now."""
        catalogue = self.records.catalogue
        room, shards, quarantined = self.worker.room() if self.worker else (Room(0, 0, 0), 0, 0)
        traffic = self.worker.traffic if self.worker else None
        return messages.NodeStatus(
            node=self._node.id,
            state=self.state(),
            bytes_total=room.bytes_total,
            bytes_used=room.bytes_used,
            bytes_free=max(0, room.bytes_free),
            write_bytes_per_s=traffic.write_bytes_per_s if traffic else 0.0,
            queued_bytes=traffic.queued_bytes if traffic else 0,
            shards=shards,
            quarantined=quarantined,
            documents=len(catalogue),
            unknown_documents=int(catalogue.has_unknown) + len(self.records.unreadable),
            documents_digest=self.records.digest(),
            highest_order=catalogue.highest_order,
            software=__version__,
            clock_ms=int(time.time() * 1000),
            uptime_s=time.monotonic() - self._started_s,
            failed_reason=self._directory.medium.failed or self._suspicion(),
            peers=tuple(self.members.views()),
            repair=self.background.repair_view() if self.background is not None else None,
            jobs=self.background.jobs.views() if self.background is not None else (),
        )

    async def _set_job(self, request: messages.SetJob, _: Payload, __: Progress) -> Answer:
        assert self.background is not None, "requests come while it runs"
        await self.background.jobs.set_paused(request.job, request.paused)
        return self.status(), b""

    async def _prune(self, request: messages.Prune, _: Payload, progress: Progress) -> Answer:
        assert self.background is not None, "requests come while it runs"
        pruning = asyncio.ensure_future(self.background.prune(request))
        while not pruning.done():
            await asyncio.wait([pruning], timeout=limits.PROGRESS_INTERVAL_S)
            progress(messages.Progress(()))
        return pruning.result(), b""

    async def _ask_jobs(self, asker: str, request: Message, progress: Progress) -> Answer:
        assert self.background is not None, "requests come while it runs"
        return await self.background.answer(asker, request, progress)

    peers: Peers | None = None
    background: Background | None = None
    control: ControlServer

    # -- running

    def request_stop(self) -> None:
        """Begins a graceful stop."""
        self._stop.set()

    async def run(self, ready: Callable[[], object] = lambda: None) -> None:
        """Serves until `request_stop`. `ready` is called once connections are accepted."""
        listeners: list[socket.socket] = []
        try:
            listeners = self._presence.listen()
            await self._serve(listeners, ready)
        finally:
            for listener in listeners:
                listener.close()
            self._directory.close()

    async def _serve(self, listeners: Sequence[socket.socket], ready: Callable[[], object]) -> None:
        requests = self._make_requests()
        hints = Hints(self.config.cluster, self._node.id, self.members.knows)
        self.peers = self._make_peers(requests, hints)
        self.control = ControlServer(
            cluster=self.config.cluster,
            node_id=self._node.id,
            context=self._server_context,
            hello=self.hello,
            handler=requests.answer,
            on_hello=self.peers.on_hello,
            forgotten=self.members.forgotten,
        )
        connector = BulkConnector(
            self._client_context, self.config.cluster, self.hello, self.members.forgotten
        )
        network = NodeNetwork(
            client=self.peers.client,
            members=self.members,
            connector=connector,
            store=self.worker.shards if self.worker else None,
            traffic=self.worker.traffic if self.worker else None,
        )
        self.background = Background(self._ground(network, requests))
        if self.worker is not None:
            self.worker.start(
                cluster=self.config.cluster,
                node_id=self._node.id,
                connector=connector,
                hello=self.hello,
                suspect=requests.suspect,
                forgotten=self.members.forgotten,
                draining=self.members.is_draining,
            )
        pages = self._make_pages()
        await pages.start()
        await self._presence.say(requests.on_disk)
        tasks = self._start_tasks(listeners, requests, hints)
        _log.info(
            "node_started",
            node=self._node.id,
            roles=self._node.roles,
            address=self._presence.address,
            bulk=self._presence.bulk_port,
        )
        ready()
        try:
            await self._stop.wait()
        finally:
            _log.info("node_stopping", node=self._node.id)
            await self._stop_all(tasks)
            await pages.close()
            await self.background.stop()
            connector.close()
            await asyncio.to_thread(network.close)
            await asyncio.to_thread(requests.close)
            _log.info("node_stopped", node=self._node.id)

    def _make_requests(self) -> Requests:
        return Requests(
            records=self.records,
            shards=self.worker.shards if self.worker else None,
            metrics=self.metrics,
            status=self.status,
            more={
                messages.SetJob: self._set_job,
                messages.Prune: self._prune,
                **{kind: answer for part in self._parts for kind, answer in part.handlers.items()},
            },
            of_nodes={
                messages.CopyShards: self._ask_jobs,
                messages.Promise: self._ask_jobs,
                messages.Surplus: self._ask_jobs,
            },
        )

    def _make_peers(self, requests: Requests, hints: Hints) -> Peers:
        return Peers(
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
            members=self.members,
        )

    def _make_pages(self) -> HttpPages:
        return HttpPages(
            config=self.config,
            node=self._node,
            medium=self._directory.medium,
            records=self.records,
            metrics=self.metrics,
            worker=self.worker,
            parts=self._parts,
            address=lambda: self._presence.address,
            forgotten=self.members.forgotten,
        )

    def _ground(self, network: NodeNetwork, requests: Requests) -> Ground:
        assert self.peers is not None
        return Ground(
            config=self.config,
            directory=self._directory,
            shards=self.worker.shards if self.worker else None,
            records=self.records,
            members=self.members,
            network=network,
            clock=SYSTEM_CLOCK,
            on_disk=requests.on_disk,
            metrics=self.metrics,
            on_corrupt=requests.note_corrupt,
            signer=self._signer,
            known_until_s=self.peers.known_until_s,
            status=self.status,
            suspect=requests.suspect,
        )

    def _start_tasks(
        self, listeners: Sequence[socket.socket], requests: Requests, hints: Hints
    ) -> list[asyncio.Task[None]]:
        assert self.peers is not None and self.background is not None
        waiting = Unauthenticated()
        work: dict[str, Callable[[], Coroutine[None, None, None]]] = {
            "accept control": Acceptor(listeners[0], waiting, self.control.handshake).run,
            "peers": self.peers.run,
            "jobs": self.background.run,
            "medium": self._watch_medium,
            "presence": partial(self._presence.follow, requests.on_disk),
        }
        if self.config.discovery.mdns:
            work["discovery"] = partial(self._discover, hints)
        if self.worker is not None:
            secure = self.worker.handshake(
                self._server_context, self.config.cluster, self.members.forgotten
            )
            work["accept bulk"] = Acceptor(listeners[1], waiting, secure).run
        for part in self._parts:
            work.update(part.work())
        return [self._task(start(), name) for name, start in work.items()]

    async def _stop_all(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for part in self._parts:
            await part.stop()
        if self.worker is not None:
            await self.worker.stop()
        await self.control.close()

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

    async def _discover(self, hints: Hints) -> None:
        # Takes memory, which a node without mDNS has better use for.
        from ckptd.discovery.service import Discovery, OwnService

        host, port = self._presence.bound
        own = OwnService(self._node.id, __version__, self._node.roles, host, port)
        await Discovery(hints, self.config.discovery.interfaces, own).run()

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
        fixed = [key for key in _NEED_RESTART if getattr(config, key) != getattr(self.config, key)]
        _log.info("config_reloaded", log_level=config.observe.log_level, needs_restart=fixed)


def serve(config: Config, config_path: Path | None, parts: Sequence[MakePart] = ()) -> None:
    """Runs a node until SIGTERM or SIGINT. Raises CkptdError when it cannot start."""
    keep_heap_small()
    allow_descriptors()

    async def main() -> None:
        node = Node(config, config_path, parts)
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
