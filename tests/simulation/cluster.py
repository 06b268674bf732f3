"""Daemons, commands and machines of one simulated cluster."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, Generic, TypeVar
from unittest import mock

from cryptography import x509
from tests.simulation import network as networks
from tests.simulation import substitutes
from tests.simulation.disk import STORE, SimulatedDisk
from tests.simulation.kernel import Host, Process
from tests.simulation.network import Network, SimulatedLoop
from tests.simulation.threads import KERNEL

from ckptd.client.cluster import Cluster
from ckptd.client.connect import connect
from ckptd.client.pki import init_cluster, issue
from ckptd.config import Config, check
from ckptd.core.identity import Role
from ckptd.core.signing import Signer
from ckptd.node.daemon import Node
from ckptd.store.marker import init_store

_T = TypeVar("_T")

CLUSTER = "home"
WORKERS = ("pi1", "pi2", "pi3", "pi4", "pi5")
COORDINATORS = ("mac1", "mac2")
PORT = 7701

# Looks that cost nothing on a real node, and most of the time of a simulation.
_SLOWER: Final = {
    "ckptd.core.limits": {
        "REPAIR_LOOK_S": 8.0,
        "REPAIR_SURPLUS_INTERVAL_S": 60.0,
        "REBALANCE_LOOK_S": 60.0,
        "INTERFACES_CHECK_INTERVAL_S": 60.0,
    },
    "ckptd.node.retention": {"_LOOK_S": 5.0},
    "ckptd.coordinator.part": {"_AWAKE_CHECK_S": 60.0},
}


def ram_directory() -> Path:
    """A new directory for certificates and checkpoints, in memory where there is one."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="ckptd-sim-", dir=memory if memory.is_dir() else None))


class Pki:
    """The certificates of a cluster, made once for all seeds."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # Who is forgotten is told by serial number: one that differs changes a seed's documents.
        with mock.patch.object(x509, "random_serial_number", itertools.count(1).__next__):
            init_cluster(directory, CLUSTER)
            for name in WORKERS:
                issue(directory, [Role.WORKER], name)
            for name in COORDINATORS:
                issue(directory, [Role.COORDINATOR], name)
            issue(directory, [Role.WORKER], "mallory")
            issue(directory, [Role.CLIENT, Role.ADMIN], "person")

    def signer(self, name: str) -> Signer:
        at = self.directory
        return Signer.from_pem((at / f"{name}.pem").read_bytes(), (at / f"{name}.key").read_bytes())

    def state(self, name: str) -> Path:
        """Of a coordinator. Its documents are on a simulated disk; the directory is made for real,
        and stays empty."""
        return self.directory / "state" / name

    def section(self, name: str) -> dict[str, str]:
        at = self.directory
        return {
            "ca": str(at / "ca.pem"),
            "cert": str(at / f"{name}.pem"),
            "key": str(at / f"{name}.key"),
        }


@dataclass(frozen=True)
class Settings:
    """How a cluster is set up: the same for all its nodes."""

    workers: int = 4
    coordinators: int = 0
    copies: int = 2
    capacity_bytes: int = 64 * 1024 * 1024
    heartbeat_s: float = 15.0
    suspect_s: float = 35.0
    down_s: float = 60.0
    repair_after_s: float = 120.0
    promise_s: float = 120.0
    gc_grace_s: float = 600.0
    scrub_interval_s: float = 900.0
    retention: tuple[tuple[dict[str, object], ...], ...] = ((), ())


def _config(pki: Pki, settings: Settings, name: str, role: str | None, address: str) -> Config:
    peers = [f"10.0.0.{number + 1}:{PORT}" for number in range(settings.workers)]
    document: dict[str, Any] = {
        "cluster": CLUSTER,
        "replication": {"copies": settings.copies, "shard_size": "64KiB"},
        "tls": pki.section(name if role else "person"),
        "discovery": {"mdns": False, "peers": peers},
        "membership": {
            "heartbeat": f"{settings.heartbeat_s:g}s",
            "suspect": f"{settings.suspect_s:g}s",
            "down": f"{settings.down_s:g}s",
        },
        "repair": {
            "after": f"{settings.repair_after_s:g}s",
            "promise": f"{settings.promise_s:g}s",
        },
        "gc": {"grace": f"{settings.gc_grace_s:g}s"},
        "scrub": {"interval": f"{settings.scrub_interval_s:g}s"},
    }
    if role is not None:
        document["node"] = {
            "id": name,
            "roles": [role],
            "listen": f"{address}:{PORT}",
            "bulk_port": PORT + 1,
        }
    if role == "worker":
        document["store"] = {"path": STORE, "reserve": "1MiB"}
    if role == "coordinator":
        document["node"]["state"] = str(pki.state(name))
        rules = settings.retention[COORDINATORS.index(name)]
        if rules:
            document["retention"] = list(rules)
    return _checked(json.dumps(document))


@cache
def _checked(text: str) -> Config:
    """Most seeds have the same few configs, and YAML takes its time (JSON is a part of it)."""
    config, errors = check(text)
    if config is None:
        raise AssertionError(f"the simulation's config is refused: {errors}")
    return config


class SimulatedNode:
    """One machine with a daemon, through all of its lives."""

    def __init__(
        self, cluster: SimulatedCluster, name: str, address: str, config: Config, disk: Any
    ) -> None:
        self.cluster = cluster
        self.name = name
        self.host = Host(name)
        self.address = address
        self.config = config
        self.disk: SimulatedDisk = disk
        self.process: Process | None = None
        self.node: Node | None = None
        self.lives = 0
        self.started_s = 0.0
        self.times_s: list[tuple[float, float]] = []  # of earlier lives: from, to
        self.forgotten = False  # it never comes back
        cluster.network.hosts[address] = self.host

    def ran_since(self, moment_s: float) -> float:
        """The start of the first life in which it could answer somebody after `moment_s`."""
        starts = (start_s for start_s, end_s in self.times_s if end_s > moment_s)
        return next(starts, self.started_s)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.alive

    @property
    def is_worker(self) -> bool:
        return self.config.is_worker

    def start(self) -> None:
        """Boots the machine if it is off, and starts the daemon."""
        kernel = self.cluster.kernel
        if self.running or self.forgotten:
            return
        if not self.host.powered or not self.host.boots:
            self.host.power_on(kernel.now_s)
        self.lives += 1
        self.started_s = kernel.now_s
        self.process = Process(self.host, self.name)
        self.process.disk = self.disk
        self.cluster.note(f"{self.name} starts")
        self.cluster.on_topology()
        context = kernel.in_process(self.process)
        context.run(self._begin)

    def _begin(self) -> None:
        task = self.cluster.kernel.create_task(self._run(), name=f"node {self.name}")
        task.add_done_callback(partial(self._ended, self.process))

    async def _run(self) -> None:
        self.node = Node(self.config, None, self.cluster.parts_of(self))
        await self.node.run()
        if self.node.failed_part is not None:
            self.cluster.fail(f"{self.name}: the part {self.node.failed_part} ended by itself")

    def _ended(self, process: Process | None, task: asyncio.Task[None]) -> None:
        """Of a process that was killed it is told a turn later: then the next one may run."""
        if process is None or not process.alive or task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self.cluster.note(f"{self.name} does not run: {error!r}")
            if not self.disk.fault and not hasattr(error, "next"):
                self.cluster.fail(f"{self.name} ended with {error!r}")
        self.crash(power_cut=False)

    def crash(self, *, power_cut: bool) -> None:
        """The daemon is killed; with `power_cut` the whole machine, and what was not flushed."""
        process = self.process
        if process is None or not process.alive:
            return
        self.cluster.note(f"{self.name} {'loses power' if power_cut else 'is killed'}")
        self.times_s.append((self.started_s, self.cluster.kernel.now_s))
        self.cluster.end(process, silent=power_cut)
        if power_cut:
            self.host.power_off()
        self.disk = self.disk.after_crash(power_cut=power_cut)
        self.node = None
        self.cluster.on_topology()

    def wipe(self) -> None:
        """A new, empty card. The daemon must not be running."""
        assert not self.running
        removed = self.disk.on_removed
        self.disk = self.cluster.new_disk()
        self.disk.on_removed = removed
        self.cluster.initialise(self.host, self.disk)


class SimulatedCluster:
    """All machines, the network between them, and the commands that somebody runs."""

    def __init__(self, seed: int, settings: Settings, pki: Pki) -> None:
        self.seed = seed
        self.settings = settings
        self.pki = pki
        self.kernel = SimulatedLoop(seed)
        self.rng = random.Random(seed ^ 0x5EED)
        self.network = Network(self.kernel)
        self.trace: list[str] = []
        self.write: Callable[[str], None] | None = None
        self.failures: list[str] = []
        self.directory = ram_directory()
        self.laptop = Host("laptop")
        self.laptop.power_on(0.0)
        self.nodes: dict[str, SimulatedNode] = {}
        self.commands = 0
        self.on_topology: Callable[[], None] = lambda: None  # a node has started, or died

    def __enter__(self) -> SimulatedCluster:
        substitutes.install()
        for module, looks in _SLOWER.items():
            for name, value in looks.items():
                assert hasattr(sys.modules[module], name), f"{module} has no {name} any more"
                setattr(sys.modules[module], name, value)
        KERNEL[:] = [self.kernel]
        random.seed(self.seed)
        networks.begin(self.network)
        asyncio.events._set_running_loop(None)
        self.network.hosts["10.0.1.1"] = self.laptop
        roles = [("worker", name) for name in WORKERS[: self.settings.workers]]
        roles += [("coordinator", name) for name in COORDINATORS[: self.settings.coordinators]]
        for number, (role, name) in enumerate(roles):
            self._add_node(role, name, f"10.0.0.{number + 1}")
        self.client_config = _config(self.pki, self.settings, "client", None, "")
        sys.modules["ckptd.node.daemon"].__dict__["boot_id"] = _boot_id
        return self

    def _add_node(self, role: str, name: str, address: str) -> None:
        config = _config(self.pki, self.settings, name, role, address)
        disk = self.new_disk()
        node = self.nodes[name] = SimulatedNode(self, name, address, config, disk)
        if role == "worker":
            self.initialise(node.host, disk)
        else:
            disk.make_parents(str(self.pki.state(name) / "documents"))

    def __exit__(self, *error: object) -> None:
        for node in self.nodes.values():
            if node.process is not None:
                self.end(node.process, silent=True)
        for _ in range(10):
            self.kernel.run_until_complete(_turns(20))
            left = asyncio.all_tasks(self.kernel)
            for task in left:
                task.cancel()
            if not left:
                break
        self.kernel.stop_stacks()
        self.kernel.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def workers(self) -> list[SimulatedNode]:
        """All that may still come back."""
        return [node for node in self.nodes.values() if node.is_worker and not node.forgotten]

    @property
    def living(self) -> list[SimulatedNode]:
        return [node for node in self.nodes.values() if not node.forgotten]

    def new_disk(self) -> SimulatedDisk:
        return SimulatedDisk(
            random.Random(self.rng.getrandbits(64)), capacity_bytes=self.settings.capacity_bytes
        )

    def initialise(self, host: Host, disk: SimulatedDisk) -> None:
        """As `ckptd serve --init`."""
        process = Process(host, "init")
        process.disk = disk
        store_id = f"{self.rng.getrandbits(128):032x}"
        self.kernel.in_process(process).run(lambda: init_store(STORE, store_id=store_id))

    def parts_of(self, node: SimulatedNode) -> tuple[Any, ...]:
        if node.is_worker:
            return ()
        from ckptd.coordinator.part import Coordinator

        return (Coordinator,)

    def end(self, process: Process, *, silent: bool) -> None:
        """Kills a process; its connections are reset unless the machine is gone with it."""
        if not silent:
            for stream in list(self.network.streams.values()):
                if stream.process is process:
                    stream.reset()
        self.kernel.kill(process)
        for stream in list(self.network.streams.values()):
            if stream.process is process:
                self.network.streams.pop(stream.number, None)
                stream.on_readable = None

    def note(self, text: str) -> None:
        text = substitutes.RAM_DIRECTORY.sub("…", text)
        line = f"{self.kernel.now_s:12.3f} {'*':10} {text}"
        self.trace.append(line)
        if self.write is not None:
            self.write(line)

    def fail(self, text: str) -> None:
        """A guarantee is broken, or something ended that must not."""
        self.note(f"VIOLATION {text}")
        self.failures.append(text)

    # -- commands

    def command(
        self, name: str, work: Callable[[Cluster], Awaitable[_T]], *, host: Host | None = None
    ) -> Command[_T]:
        """Runs a command on the laptop: connects as a client, then `work`."""
        self.commands += 1
        process = Process(host or self.laptop, f"{name}{self.commands}")

        async def run() -> _T:
            async with connect(self.client_config) as cluster:
                return await work(cluster)

        context = self.kernel.in_process(process)
        task = context.run(lambda: self.kernel.create_task(run(), name=process.name))
        return Command(process, task)

    def run(self, seconds: float) -> None:
        """Lets virtual time pass."""
        self.kernel.run_until_complete(asyncio.sleep(seconds))
        self._take_failures()

    def run_until(self, work: Coroutine[Any, Any, _T]) -> _T:
        result = self.kernel.run_until_complete(work)
        self._take_failures()
        return result

    def _take_failures(self) -> None:
        for failure in self.kernel.failures:
            self.fail(failure)
        self.kernel.failures.clear()


@dataclass
class Command(Generic[_T]):
    process: Process
    task: asyncio.Task[_T]
    started: dict[str, Any] = field(default_factory=dict)


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def _boot_id() -> str:
    from tests.simulation.kernel import current_process

    process = current_process()
    assert process is not None
    return f"{process.host.name}-{process.host.boots}"
