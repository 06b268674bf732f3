"""Which nodes die together: two daemons on one machine are one, unless the user says otherwise."""

from __future__ import annotations

from typing import TypeAlias

MachineKey: TypeAlias = tuple[str, str]


def machine_key(node_id: str, boot_id: str, zone: str) -> MachineKey:
    """A key that is equal for nodes that count as one machine.

    Those are the nodes that report one kernel boot id and have the same zone in their configs. A
    node whose boot id is not known ("") counts as a machine of its own.
    """
    return (f"boot {boot_id}", zone) if boot_id else (f"node {node_id}", "")
