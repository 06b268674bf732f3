"""One seed: a cluster, what people do with it, what happens to it, and what must hold all along."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.simulation.cluster import Command, Pki, Settings, SimulatedCluster, SimulatedNode
from tests.simulation.guarantees import Guarantees, Ledger

from ckptd.client import marks
from ckptd.client.cluster import Cluster
from ckptd.client.progress import Progress
from ckptd.client.restore import restore
from ckptd.client.store import store
from ckptd.client.verification import verify
from ckptd.core import documents
from ckptd.errors import CkptdError, NoGoodCopy
from ckptd.wire import messages

NAMES: Final = ("a/step-1", "a/step-2", "a/step-3", "b/latest", "b/final", "c")
_SIZES: Final = (0, 7, 900, 5_000, 40_000, 66_000, 140_000)
_COMMAND_LIMIT_S: Final = 1800.0
_COMMANDS_AT_ONCE: Final = 3
_CONVERGE_MAX_S: Final = 4 * 3600.0
TEN_YEARS_S: Final = 10 * 365 * 86_400.0


@dataclass
class Outcome:
    seed: int
    failures: list[str]
    trace: list[str]
    virtual_s: float
    stored: int
    counts: dict[str, int]


def settings_of(rng: random.Random) -> Settings:
    """A cluster of this seed."""
    return Settings(
        workers=rng.choice((3, 4, 4, 5)),
        copies=rng.choice((2, 2, 2, 3)),
        capacity_bytes=rng.choice((6, 24, 64)) * 1024 * 1024,
        heartbeat_s=10.0,
        suspect_s=25.0,
        down_s=60.0,
    )


class Scenario:
    """Drives one cluster through faults and commands, then lets it come to rest."""

    def __init__(
        self, seed: int, pki: Pki, write: Callable[[str], None] | None = None
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.cluster = SimulatedCluster(seed, settings_of(self.rng), pki)
        self.cluster.write = write
        self.ledger = Ledger()
        self.guarantees = Guarantees(self.cluster, self.ledger)
        self.running: list[tuple[Command[Any], Callable[[Command[Any]], None]]] = []
        self.counts: dict[str, int] = {}
        self.quiet = False
        self.targets = 0

    @property
    def now_s(self) -> float:
        return self.cluster.kernel.now_s

    def run(self, steps: int) -> Outcome:
        cluster = self.cluster
        with cluster:
            try:
                self._start()
                for _ in range(steps):
                    self.step()
                    if cluster.failures:
                        break
                if not cluster.failures:
                    self.come_to_rest()
            except AssertionError as error:
                cluster.fail(f"the simulation itself: {error!r}")
                raise
            return Outcome(
                self.seed,
                list(cluster.failures),
                list(cluster.trace),
                self.now_s,
                len(self.ledger.protected),
                self.counts,
            )

    def _start(self) -> None:
        rng = self.rng
        for node in self.cluster.nodes.values():
            if rng.random() < 0.3:
                node.host.wall_offset_s = rng.uniform(-TEN_YEARS_S, TEN_YEARS_S)
            node.disk.slowness = rng.choice((0.3, 1.0, 5.0))
            node.disk.on_removed = partial(self.guarantees.check_removed, node)
            node.start()
            self.cluster.run(rng.uniform(0.0, 5.0))
        if rng.random() < 0.3:
            self.cluster.laptop.wall_offset_s = rng.uniform(-TEN_YEARS_S, TEN_YEARS_S)
        self.cluster.run(20.0)

    def step(self) -> None:
        """One thing happens, and some time passes."""
        act = self.rng.choice(
            self._commands() if len(self.running) < _COMMANDS_AT_ONCE else self._faults()
        ) if self.rng.random() < 0.55 else self.rng.choice(self._faults())
        self.count(act.__name__)
        act()
        self.cluster.run(self.rng.choice((0.05, 0.3, 1.0, 3.0, 10.0, 30.0, 90.0)))
        self.reap()
        self.guarantees.check()

    def count(self, what: str) -> None:
        what = what.strip("_")
        self.counts[what] = self.counts.get(what, 0) + 1

    # -- commands

    def _commands(self) -> list[Callable[[], None]]:
        return [
            *(4 * [self._store]), self._store_again, self._store_changing,
            self._store_while_a_node_dies, self._rot_while_off, *(2 * [self._restore]), self._remove,
            self._pin, self._unpin, self._undelete, self._verify, self._forge,
        ]  # fmt: skip

    def begin(
        self,
        what: str,
        work: Callable[[Cluster], Awaitable[Any]],
        done: Callable[[Any], None] = lambda _: None,
        failed: Callable[[CkptdError], None] = lambda _: None,
    ) -> None:
        """Starts a command; `done` gets its result, `failed` its error."""
        self.cluster.note(f"begin {what}")

        def conclude(command: Command[Any]) -> None:
            error = command.task.exception()
            if error is None:
                self.cluster.note(f"done {what}")
                self.count("succeeded")
                done(command.task.result())
            elif isinstance(error, CkptdError):
                self.cluster.note(f"failed {what}: {error.kind}: {error.message[:200]}")
                self.count("refused")
                failed(error)
            else:
                self.cluster.fail(f"{what} ended with {error!r}")

        command = self.cluster.command(what.split()[0], work)
        command.started["at_s"] = self.now_s
        # At once, so that what was announced is compared with the media of that very moment.
        command.task.add_done_callback(lambda _: self._concluded(command, conclude))
        self.running.append((command, conclude))

    def _concluded(self, command: Command[Any], conclude: Callable[[Command[Any]], None]) -> None:
        if not command.process.alive or command.task.cancelled():
            return
        conclude(command)
        command.started["concluded"] = True

    def reap(self) -> None:
        """Forgets commands that have ended, and gives up on those that never do."""
        left = []
        for command, conclude in self.running:
            if command.task.done() or not command.process.alive:
                self.cluster.end(command.process, silent=False)
                continue
            if self.now_s - command.started["at_s"] > _COMMAND_LIMIT_S:
                self.cluster.fail(f"{command.process.name} has not ended for half an hour")
                self.cluster.end(command.process, silent=False)
                continue
            left.append((command, conclude))
        self.running = left

    def _content(self, name: str) -> dict[str, bytes]:
        """New content: mostly that of before, with some files changed."""
        before = self.ledger.contents.get(name, [{}])[-1]
        content = dict(before) if self.rng.random() < 0.7 else {}
        for number in range(self.rng.randint(1, 3)):
            path = f"{self.rng.choice(('', 'sub/'))}file{number}.bin"
            content[path] = self.rng.randbytes(self.rng.choice(_SIZES))
        return content

    def _write(self, content: dict[str, bytes]) -> Path:
        self.targets += 1
        root = self.cluster.directory / f"source{self.targets}"
        for path, data in content.items():
            place = root / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        return root

    def _store(self) -> None:
        name = self.rng.choice(NAMES)
        self._store_content(name, self._content(name))

    def _store_again(self) -> None:
        """Content that was stored before, so that it is there already, or was removed."""
        name = self.rng.choice(NAMES)
        known = self.ledger.contents.get(name)
        if known:
            self._store_content(name, self.rng.choice(known))

    def _store_content(self, name: str, content: dict[str, bytes]) -> None:
        self.ledger.contents.setdefault(name, []).append(content)
        root = self._write(content)
        known = self._newest_that_is_reachable(name)

        def done(result: Any) -> None:
            self.ledger.of_version[result.version] = content
            if result.state == "protected":
                self.guarantees.check_announced(result.version)
            version = self.guarantees.media.versions.get(result.version)
            if version and known and version.order <= known[1] and result.version != known[0]:
                self.cluster.fail(
                    f"{name}@{result.version[:12]} was stored after {known[0][:12]}, and its "
                    "order is not higher"
                )

        self.begin(f"store {name}", lambda cluster: store(cluster, root, name=name), done)

    def _store_changing(self) -> None:
        """A trainer writes into a file while it is being stored."""
        name = self.rng.choice(NAMES)
        before = {"big.bin": self.rng.randbytes(200_000), "other.bin": self.rng.randbytes(500)}
        position = self.rng.randrange(200_000)
        after = {**before, "big.bin": _changed(before["big.bin"], position)}
        self.ledger.contents.setdefault(name, []).extend([before, after])
        root = self._write(before)
        time.sleep(0.006)  # so that the real file system gives the change a later time

        def change() -> None:
            with open(root / "big.bin", "r+b") as file:
                file.seek(position)
                file.write(after["big.bin"][position : position + 1])

        self.cluster.kernel.call_later(self.rng.uniform(0.0, 0.4), change)

        def done(result: Any) -> None:
            if result.state == "protected":
                self.guarantees.check_announced(result.version)

        self.begin(f"store {name}", lambda cluster: store(cluster, root, name=name), done)

    def _store_while_a_node_dies(self) -> None:
        """A node dies at some call to its disk, comes back, and the same is stored again."""
        name = self.rng.choice(NAMES)
        content = self._content(name)
        node = self.rng.choice(self.cluster.workers)
        if not node.running:
            return
        power_cut = self.rng.random() < 0.5
        disk = node.disk
        call = self.rng.choice(("pwrite", "fsync", "rename", "rename", "fsync_directory"))
        disk.last_call = (call, self.rng.randint(1, 12))

        def die() -> None:
            self.cluster.note(f"{node.name} dies after a call of {call}")
            node.crash(power_cut=power_cut)

        disk.on_last_call = die
        self._store_content(name, content)
        self.cluster.run(self.rng.uniform(1.0, 5.0))
        disk.last_call = None
        node.start()
        self.cluster.run(self.rng.uniform(1.0, 20.0))
        self._store_content(self.rng.choice(NAMES), content)

    def _rot_while_off(self) -> None:
        """A copy rots while its node is off; then the same content is stored once more."""
        live = [v for v in self.guarantees.live_protected() if v.id in self.ledger.of_version]
        if not live:
            return
        version = self.rng.choice(sorted(live, key=lambda version: version.id))
        look = self.guarantees.media.look()
        holders = [
            (node, shard)
            for node in self.cluster.workers
            for shard in version.shards
            if shard in look.shards[node.name] and node.host.asleep_since_s is None
        ]
        if not holders:
            return
        node, shard = self.rng.choice(holders)
        if not self.guarantees.may_damage(node, [shard]):
            return
        node.crash(power_cut=False)
        if shard not in self.guarantees.media.good_shards(node):
            return
        self._damage(node, shard)
        self.cluster.run(1.0)
        node.start()
        self.cluster.run(self.rng.uniform(5.0, 30.0))
        self._store_content("copy/of-it", self.ledger.of_version[version.id])

    def _newest_that_is_reachable(self, name: str) -> tuple[str, int] | None:
        """The newest version of a name that every worker has, while all are in reach: what is
        stored from now on must come after it."""
        if self.cluster.network.blocked or not all(n.running for n in self.cluster.workers):
            return None
        look = self.guarantees.media.look()
        everywhere = set.intersection(*(look.documents[n.name] for n in self.cluster.workers))
        found = [
            (version.order, version.id)
            for version in self.guarantees.media.versions.values()
            if version.name == name and version.id in everywhere
        ]
        return (max(found)[1], max(found)[0]) if found else None

    def _restore(self) -> None:
        name = self.rng.choice(NAMES)
        if name in self.ledger.contents:
            self._restore_name(name)

    def _restore_name(self, selector: str, version_id: str | None = None) -> None:
        self.targets += 1
        target = self.cluster.directory / f"target{self.targets}"
        name = selector.partition("@")[0]

        def done(result: Any) -> None:
            found = {
                str(path.relative_to(target)): path.read_bytes()
                for path in target.rglob("*")
                if path.is_file()
            }
            expected = self.ledger.of_version.get(result.version)
            known = [expected] if expected is not None else self.ledger.contents[name]
            if found not in known:
                self.cluster.fail(f"{selector} was restored with other bytes than were stored")
            shutil.rmtree(target, ignore_errors=True)

        def failed(error: CkptdError) -> None:
            if version_id is not None:
                self.cluster.fail(f"{selector} cannot be restored: {error.message}")
            elif isinstance(error, NoGoodCopy):
                self.cluster.note(f"no good copy is said of {selector}")

        self.begin(
            f"restore {selector}", lambda cluster: restore(cluster, selector, to=target), done, failed
        )

    def _live_name(self) -> str | None:
        live = sorted({version.name for version in self.guarantees.live_protected()})
        return self.rng.choice(live) if live else None

    def _remove(self) -> None:
        name = self._live_name()
        if name is None:
            return

        async def work(cluster: Cluster) -> None:
            catalogue = await cluster.catalogue()
            versions = await marks.select_for_removal(cluster, catalogue, [name])
            if self.rng.random() < 0.5:
                versions = versions[:1]
            self.ledger.removable.update(version.id for version in versions)
            await marks.remove(cluster, catalogue, versions)

        self.begin(f"rm {name}", work)

    def _pin(self) -> None:
        name = self._live_name()
        if name is not None:
            self.begin(f"pin {name}", lambda cluster: marks.pin(cluster, name))

    def _unpin(self) -> None:
        name = self._live_name()
        if name is not None:
            self.begin(f"unpin {name}", lambda cluster: marks.unpin(cluster, name))

    def _undelete(self) -> None:
        removed = sorted(self.ledger.removable & self.guarantees.media.versions.keys())
        if not removed:
            return
        version = self.guarantees.media.versions[self.rng.choice(removed)]

        def done(result: Any) -> None:
            content = self.ledger.of_version.get(version.id)
            if content is not None:
                self.ledger.of_version[result.version] = content
            if result.state == "protected":
                self.guarantees.check_announced(result.version)

        self.begin(
            f"undelete {version.name}",
            lambda cluster: marks.undelete(cluster, f"{version.name}@{version.id}"),
            done,
        )

    def _verify(self) -> None:
        self.begin("verify all", lambda cluster: verify(cluster, [], progress=Progress()))

    def _forge(self) -> None:
        """A stolen worker brings documents that it may not write, and one that nobody signed."""
        worker = self.cluster.pki.signer("mallory")
        live = self.guarantees.live_protected()
        nonce = f"{self.rng.getrandbits(128):032x}"
        fields: dict[str, Any] = {
            "format": 1, "cluster": "home", "order": self.rng.randrange(1, 2**50),
            "created": "2026-01-01T00:00:00Z", "nonce": nonce,
        }  # fmt: skip
        versions = (self.rng.choice(live).id,) if live else ("0" * 64,)
        forged = [
            documents.encode(documents.Tombstone(**fields, reason="rm", versions=versions)),
            documents.encode(documents.Pin(**fields, version=versions[0])),
            json.dumps(
                {"kind": "hologram", **fields, "format": 7}, sort_keys=True, separators=(",", ":")
            ).encode(),
        ]
        raw = self.rng.choice(forged)
        envelope = worker.sign(raw)
        if raw is forged[-1] or self.rng.random() < 0.3:
            envelope = worker.sign(raw + b" ")  # of other bytes
        self.ledger.forged.add(documents.document_id(raw))
        payload = messages.encode_documents((messages.SignedDocument(raw, envelope),))

        async def work(cluster: Cluster) -> None:
            for node in cluster.workers:
                await node.control.request(
                    messages.PutDocuments(1), messages.PutDocumentsReply, payload=payload
                )

        self.begin("forge document", work)

    # -- faults

    def _faults(self) -> list[Callable[[], None]]:
        return [
            *(2 * [self._kill]), *(2 * [self._cut_power]), *(4 * [self._start_stopped]),
            self._cut_link, self._isolate, *(2 * [self._heal]), self._reset_connections,
            self._slow_network, self._sleep, *(2 * [self._wake_all]), self._jump_clock,
            self._fill_disk, self._fail_disk, self._flip_bit, self._read_badly, self._kill_command,
            self._nothing,
        ]  # fmt: skip

    def _node(self) -> SimulatedNode:
        return self.rng.choice(list(self.cluster.nodes.values()))

    def _nothing(self) -> None:
        self.cluster.run(self.rng.uniform(10.0, 300.0))

    def _kill(self) -> None:
        self._node().crash(power_cut=False)

    def _cut_power(self) -> None:
        self._node().crash(power_cut=True)

    def _start_stopped(self) -> None:
        stopped = [node for node in self.cluster.nodes.values() if not node.running]
        if stopped:
            node = self.rng.choice(stopped)
            node.disk.fault = 0
            node.start()

    def _cut_link(self) -> None:
        """In one direction; sometimes in both."""
        hosts = [*self.cluster.nodes, "laptop"]
        one, other = self.rng.sample(hosts, 2)
        self.cluster.note(f"{one} no longer reaches {other}")
        self.cluster.network.cut(one, other)
        if self.rng.random() < 0.5:
            self.cluster.network.cut(other, one)

    def _isolate(self) -> None:
        """The network falls into two parts."""
        hosts = [*self.cluster.nodes, "laptop"]
        self.rng.shuffle(hosts)
        split = self.rng.randint(1, len(hosts) - 1)
        self.cluster.note(f"the network falls into {sorted(hosts[:split])} and the others")
        for one in hosts[:split]:
            for other in hosts[split:]:
                self.cluster.network.cut(one, other)
                self.cluster.network.cut(other, one)

    def _heal(self) -> None:
        if self.cluster.network.blocked:
            self.cluster.note("the network is whole again")
        self.cluster.network.heal()
        self.cluster.network.slow.clear()

    def _reset_connections(self) -> None:
        self.cluster.note("connections break")
        self.cluster.network.reset_some(self.rng.choice((0.1, 0.5, 1.0)))

    def _slow_network(self) -> None:
        name = self._node().name
        self.cluster.note(f"{name} has a slow network")
        self.cluster.network.slow[name] = self.rng.choice((20.0, 300.0, 2000.0))

    def _sleep(self) -> None:
        node = self._node()
        if node.running and node.host.asleep_since_s is None:
            self.cluster.note(f"{node.name} falls asleep")
            node.host.sleep(self.now_s)

    def _wake_all(self) -> None:
        for node in self.cluster.nodes.values():
            if node.host.asleep_since_s is not None:
                self.cluster.note(f"{node.name} wakes up")
                node.host.wake(self.cluster.kernel)

    def _jump_clock(self) -> None:
        host = self.rng.choice([*(n.host for n in self.cluster.nodes.values()), self.cluster.laptop])
        by_s = self.rng.choice((-TEN_YEARS_S, TEN_YEARS_S, 1.0, 60.0, 3600.0)) * self.rng.uniform(-1, 1)
        self.cluster.note(f"the clock of {host.name} jumps by {by_s:.0f} s")
        host.wall_offset_s += by_s

    def _fill_disk(self) -> None:
        node = self.rng.choice(self.cluster.workers)
        self.cluster.note(f"the disk of {node.name} is full")
        node.disk.capacity_bytes = node.disk.used_bytes + self.rng.choice((0, 100_000, 1_200_000))

    def _fail_disk(self) -> None:
        node = self.rng.choice(self.cluster.workers)
        node.disk.fault = self.rng.choice((errno.EIO, errno.EROFS, errno.ENODEV))
        self.cluster.note(f"the disk of {node.name} fails: {os.strerror(node.disk.fault)}")

    def _flip_bit(self) -> None:
        node = self.rng.choice(self.cluster.workers)
        whole = sorted(self.guarantees.media.good_shards(node))
        whole = [shard for shard in whole if len(node.disk.shards()[shard].durable)]
        if not whole:
            return
        shard = self.rng.choice(whole)
        if not self.guarantees.may_damage(node, [shard]):
            return
        self._damage(node, shard)

    def _damage(self, node: SimulatedNode, shard: str) -> None:
        self.cluster.note(f"a bit of shard {shard[:12]} flips on {node.name}")
        self.ledger.flipped[node.name, shard] = self.now_s
        self.ledger.damaged_at_s[shard] = self.now_s
        node.disk.flip_bit(node.disk.shards()[shard])

    def _read_badly(self) -> None:
        node = self.rng.choice(self.cluster.workers)
        self.cluster.note(f"{node.name} reads wrong bits")
        node.disk.bad_reads = self.rng.choice((1, 1, 3))
        self.ledger.misread_at_s[node.name] = self.now_s
        for shard in node.disk.shards():
            self.ledger.damaged_at_s[shard] = self.now_s

    def _kill_command(self) -> None:
        if self.running:
            command, _ = self.rng.choice(self.running)
            self.cluster.note(f"{command.process.name} is killed")
            self.cluster.end(command.process, silent=self.rng.random() < 0.5)

    # -- the end

    def come_to_rest(self) -> None:
        """Faults stop; everything must come together again."""
        cluster = self.cluster
        cluster.note("faults stop")
        self._wake_all()
        self._heal()
        for node in cluster.nodes.values():
            node.disk.capacity_bytes = cluster.settings.capacity_bytes * 4
            node.disk.bad_reads = 0
            failed = node.disk.fault or self._has_failed(node)
            node.disk.fault = 0
            if failed:
                node.crash(power_cut=False)
            node.start()
        end_s = self.now_s + _CONVERGE_MAX_S
        unsettled = ["not looked yet"]
        while unsettled and self.now_s < end_s and not cluster.failures:
            cluster.run(60.0)
            self.reap()
            self.guarantees.check()
            unsettled = self.unsettled()
        if unsettled and not cluster.failures:
            cluster.fail(f"does not come to rest: {unsettled[0]}")
        if not cluster.failures:
            self._final_restores()

    def _has_failed(self, node: SimulatedNode) -> bool:
        return node.running and node.node is not None and node.node.state() == "failed"

    def unsettled(self) -> list[str]:
        """What still has to happen."""
        if self.running:
            return [f"{command.process.name} still runs" for command, _ in self.running]
        for node in self.cluster.nodes.values():
            if not node.running:
                node.start()
                return [f"{node.name} did not run"]
        look = self.guarantees.media.look()
        catalogues = {node: ids for node, ids in look.documents.items()}
        everything = set.union(*catalogues.values())
        for node, ids in catalogues.items():
            if ids != everything:
                return [f"{node} lacks {len(everything - ids)} documents"]
        return self._disagreements()

    def _disagreements(self) -> list[str]:
        """Nodes whose catalogue says something else than the documents that all of them have."""
        media = self.guarantees.media
        dead = media.tombstones.keys()
        live = media.versions.keys() - dead
        for node in self.cluster.nodes.values():
            assert node.node is not None
            said = {version.id for version in node.node.records.catalogue.live_versions()}
            if said != live:
                return [f"{node.name} takes {len(said ^ live)} versions for live or dead wrongly"]
        return []

    def _final_restores(self) -> None:
        """Everything that is protected and live is there, byte for byte."""
        self.quiet = True
        live = self.guarantees.live_protected()
        for version in sorted(live, key=lambda version: version.id):
            self._restore_name(f"{version.name}@{version.id}", version.id)
            while self.running and not self.cluster.failures:
                self.cluster.run(5.0)
                self.reap()


def _changed(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :]


def run_seed(
    seed: int, pki: Pki, *, steps: int = 40, write: Callable[[str], None] | None = None
) -> Outcome:
    return Scenario(seed, pki, write).run(steps)


__all__ = ["Outcome", "Scenario", "asyncio", "run_seed"]
