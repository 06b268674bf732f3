"""What a node does to keep the wanted number of copies: the parts of repair, put together."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

from ckptd.clock import Clock
from ckptd.config import Config
from ckptd.core.steward import Standings
from ckptd.node.copier import Copier
from ckptd.node.fleet import Fleet
from ckptd.node.inventories import Inventories
from ckptd.node.jobs import Job
from ckptd.node.own_network import OwnNetwork
from ckptd.node.ports import Network, OnDisk
from ckptd.node.rebalancer import Rebalancer
from ckptd.node.records import Records
from ckptd.node.repairer import Repairer
from ckptd.node.requests import NodeAnswerer
from ckptd.node.trimmer import Trimmer
from ckptd.observe.metrics import Metrics
from ckptd.store.copy_reader import VerifyResult
from ckptd.store.shards import ShardStore
from ckptd.wire import messages
from ckptd.wire.messages import Message


class Upkeep:
    """Repair, trimming and rebalancing of one node. `shards` is None on a node that keeps none: it
    plans, as every node does that is the steward, and has nothing to send or to drop."""

    def __init__(
        self,
        *,
        node_id: str,
        config: Config,
        records: Records,
        shards: ShardStore | None,
        inventories: Inventories,
        standings: Callable[[], Standings],
        status: Callable[[], messages.NodeStatus],
        suspect: Callable[[bytes], Awaitable[VerifyResult]],
        network: Network,
        metrics: Metrics,
        on_disk: OnDisk,
        clock: Clock,
    ) -> None:
        self.handlers: dict[type[Message], NodeAnswerer] = {}
        self.jobs: tuple[Job, ...] = ()
        own_network = OwnNetwork(node_id, self.handlers, network)
        fleet = Fleet(
            node_id=node_id,
            standings=standings,
            status=status,
            network=own_network,
            clock=clock,
        )
        self.repairer = Repairer(
            fleet=fleet,
            inventories=inventories,
            records=records,
            network=own_network,
            config=config.repair,
            metrics=metrics,
            on_disk=on_disk,
            clock=clock,
        )
        rebalancer = Rebalancer(
            fleet=fleet,
            inventories=inventories,
            records=records,
            repairer=self.repairer,
            network=own_network,
            rate_bytes_per_s=config.repair.rate_bytes_per_s,
        )
        self.jobs = (self.repairer, rebalancer)
        if shards is None:
            return
        copier = Copier(
            node_id=node_id,
            records=records,
            shards=shards,
            network=network,
            standings=standings,
            suspect=suspect,
            rate_bytes_per_s=config.repair.rate_bytes_per_s,
            on_disk=on_disk,
            clock=clock,
        )
        self.trimmer = Trimmer(
            node_id=node_id,
            records=records,
            shards=shards,
            network=network,
            standings=standings,
            suspect=suspect,
            copies=config.replication.copies,
            promise_s=config.repair.promise_s,
            on_disk=on_disk,
            clock=clock,
            rng=random.Random(),
        )
        self.handlers |= {**copier.handlers, **self.trimmer.handlers}
        self.jobs += (self.trimmer,)

    trimmer: Trimmer
