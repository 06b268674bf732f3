"""The nodes of a cluster as a client sees them: those that answer, and those that do not."""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.core.machines import MachineKey, machine_key
from ckptd.core.placement import Candidate
from ckptd.net.control import ControlClient
from ckptd.wire import messages


@dataclass
class Node:
    """One node that answers."""

    id: str
    control: ControlClient
    host: str
    bulk_port: int
    status: messages.NodeStatus

    @property
    def hello(self) -> messages.Hello:
        return self.control.hello

    @property
    def is_draining(self) -> bool:
        """Whether it gives its copies away: they do not count for new versions."""
        return self.status.state == "draining"

    @property
    def machine(self) -> MachineKey:
        """Equal for nodes that die together."""
        return machine_key(self.id, self.hello.boot_id, self.hello.zone)

    @property
    def candidate(self) -> Candidate:
        """What placement has to know of it."""
        return Candidate(
            node_id=self.id,
            machine=self.hello.boot_id,
            zone=self.hello.zone,
            room_bytes=self.status.bytes_free,
            write_bytes_per_s=self.status.write_bytes_per_s,
            queued_bytes=self.status.queued_bytes,
        )

    @property
    def hop(self) -> messages.Hop:
        """Where its bulk port is."""
        return messages.Hop(self.id, self.host, self.bulk_port)


@dataclass
class AbsentNode:
    """A node that is remembered (or configured) and does not answer. `id` is "" while unknown."""

    id: str
    address: str
    reason: str
    last_seen_s: float | None = None
    roles: tuple[str, ...] = ()
    zone: str = ""
    in_maintenance: bool = False
