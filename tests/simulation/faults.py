"""What happens to machines, disks, clocks and the network."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final

from tests.simulation.cluster import SimulatedNode
from tests.simulation.world import World

TEN_YEARS_S: Final = 10 * 365 * 86_400.0


class Faults:
    """Faults, as methods that can be drawn, and what ends them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = world.rng
        self.cluster = world.cluster
        self.ledger = world.ledger
        self.guarantees = world.guarantees

    def choices(self) -> list[Callable[[], None]]:
        return [
            *(2 * [self.kill]), *(2 * [self.cut_power]), *(4 * [self.start_stopped]),
            self.cut_link, self.isolate, *(2 * [self.heal]), self.reset_connections,
            self.slow_network, self.sleep, *(2 * [self.wake_all]), self.jump_clock,
            self.fill_disk, self.fail_disk, self.flip_bit, self.read_badly, self.kill_command,
            self.replace_card,
            self.nothing,
        ]  # fmt: skip

    def _node(self) -> SimulatedNode:
        return self.rng.choice(self.cluster.living)

    def nothing(self) -> None:
        self.cluster.run(self.rng.choice((30.0, 120.0, 300.0, 1000.0)))

    def kill(self) -> None:
        self._node().crash(power_cut=False)

    def cut_power(self) -> None:
        self._node().crash(power_cut=True)

    def start_stopped(self) -> None:
        stopped = [node for node in self.cluster.living if not node.running]
        if stopped:
            node = self.rng.choice(stopped)
            node.disk.fault = 0
            node.start()

    def cut_link(self) -> None:
        """In one direction; sometimes in both."""
        hosts = [*self.cluster.nodes, "laptop"]
        one, other = self.rng.sample(hosts, 2)
        self.world.note(f"{one} no longer reaches {other}")
        self.cluster.network.cut(one, other)
        if self.rng.random() < 0.5:
            self.cluster.network.cut(other, one)

    def isolate(self) -> None:
        """The network falls into two parts."""
        hosts = [*self.cluster.nodes, "laptop"]
        self.rng.shuffle(hosts)
        split = self.rng.randint(1, len(hosts) - 1)
        self.world.note(f"the network falls into {sorted(hosts[:split])} and the others")
        for one in hosts[:split]:
            for other in hosts[split:]:
                self.cluster.network.cut(one, other)
                self.cluster.network.cut(other, one)

    def heal(self) -> None:
        if self.cluster.network.blocked:
            self.world.note("the network is whole again")
        self.cluster.network.heal()
        self.cluster.network.slow.clear()

    def reset_connections(self) -> None:
        self.world.note("connections break")
        self.cluster.network.reset_some(self.rng.choice((0.1, 0.5, 1.0)))

    def slow_network(self) -> None:
        name = self._node().name
        self.world.note(f"{name} has a slow network")
        self.cluster.network.slow[name] = self.rng.choice((20.0, 300.0, 2000.0))

    def sleep(self) -> None:
        node = self._node()
        if node.running and node.host.asleep_since_s is None:
            self.world.note(f"{node.name} falls asleep")
            node.host.sleep(self.world.now_s)

    def wake_all(self) -> None:
        for node in self.cluster.nodes.values():
            if node.host.asleep_since_s is not None:
                self.world.note(f"{node.name} wakes up")
                node.host.wake(self.cluster.kernel)

    def jump_clock(self) -> None:
        host = self.rng.choice(
            [*(n.host for n in self.cluster.nodes.values()), self.cluster.laptop]
        )
        by_s = self.rng.choice((-TEN_YEARS_S, TEN_YEARS_S, 1.0, 60.0, 3600.0)) * self.rng.uniform(
            -1, 1
        )
        self.world.note(f"the clock of {host.name} jumps by {by_s:.0f} s")
        host.wall_offset_s += by_s

    def fill_disk(self) -> None:
        node = self.rng.choice(self.cluster.workers)
        self.world.note(f"the disk of {node.name} is full")
        node.disk.capacity_bytes = node.disk.used_bytes + self.rng.choice((0, 100_000, 1_200_000))

    def fail_disk(self) -> None:
        node = self.rng.choice(self.cluster.workers)
        node.disk.fault = self.rng.choice((errno.EIO, errno.EROFS, errno.ENODEV))
        self.world.note(f"the disk of {node.name} fails: {os.strerror(node.disk.fault)}")

    def flip_bit(self) -> None:
        node = self.rng.choice(self.cluster.workers)
        whole = sorted(self.guarantees.media.good_shards(node))
        whole = [shard for shard in whole if len(node.disk.shards()[shard].durable)]
        if not whole:
            return
        shard = self.rng.choice(whole)
        if not self.guarantees.may_damage(node, [shard]):
            return
        self.damage(node, shard)

    def damage(self, node: SimulatedNode, shard: str) -> None:
        self.world.note(f"a bit of shard {shard[:12]} flips on {node.name}")
        self.ledger.flipped[node.name, shard] = self.world.now_s
        self.ledger.damaged_at_s[shard] = self.world.now_s
        node.disk.flip_bit(node.disk.shards()[shard])

    def read_badly(self) -> None:
        node = self.rng.choice(self.cluster.workers)
        self.world.note(f"{node.name} reads wrong bits")
        node.disk.bad_reads = self.rng.choice((1, 1, 3))
        self.ledger.misread_at_s[node.name] = self.world.now_s
        for shard in node.disk.shards():
            self.ledger.damaged_at_s[shard] = self.world.now_s

    def replace_card(self) -> None:
        """The card of a node dies; it comes back with an empty one and its old name."""
        node = self.rng.choice(self.cluster.workers)
        if self.loses(node):
            self.world.note(f"{node.name} gets a new card")
            node.crash(power_cut=True)
            node.wipe()
            node.start()

    def loses(self, node: SimulatedNode) -> bool:
        """Whether all of a node's disk may be lost now. Then that is noted."""
        media = self.guarantees.media
        shards = media.good_shards(node) | media.set_aside(node)
        if not self.guarantees.may_damage(node, shards):
            return False
        self.ledger.lost_at_s = self.world.now_s
        documents = self.guarantees.media.look().documents
        only_here = documents.pop(node.name, set()).difference(*documents.values())
        self.ledger.lost_documents |= only_here  # one node was enough for whoever wrote them
        for shard in shards:
            self.ledger.damaged_at_s[shard] = self.world.now_s
        for key in [key for key in self.ledger.flipped if key[0] == node.name]:
            del self.ledger.flipped[key]
        return True

    def kill_command(self) -> None:
        if self.world.running:
            command = self.rng.choice(self.world.running)
            self.world.note(f"{command.process.name} is killed")
            self.cluster.end(command.process, silent=self.rng.random() < 0.5)
