"""Background jobs of all nodes: how they are, pausing them, letting them go on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from msgspec import Struct

from ckptd.client.cluster import Cluster, Node
from ckptd.errors import CkptdError, NotEnoughNodes
from ckptd.wire import messages


class JobRow(Struct, frozen=True):
    """A background job of a node. `state`: running, waiting, paused or failed (it is tried again);
    `done_bytes` of `total_bytes`, which are 0 when it knows of nothing to do."""

    node: str
    name: str
    state: str
    done_bytes: int
    total_bytes: int
    last_error: str


class JobList(Struct, frozen=True):
    """As `ckptd jobs` prints it: by job and node. `unanswered`: nodes that were not reached or did
    not do as they were told, each with the reason."""

    jobs: tuple[JobRow, ...]
    unanswered: dict[str, str]


async def list_jobs(cluster: Cluster) -> JobList:
    """The jobs of all nodes that answer. Raises NotEnoughNodes when none does."""
    _require_nodes(cluster)
    return _listed(cluster, {node.id: node.status for node in cluster.nodes.values()}, {})


async def set_job(cluster: Cluster, job: str, *, paused: bool) -> JobList:
    """Pauses `job` on all nodes, or lets it go on. A node that does not answer now keeps to what
    it was told before. Raises NotEnoughNodes when no node answers."""
    _require_nodes(cluster)

    async def tell(node: Node) -> messages.NodeStatus | CkptdError:
        try:
            message = messages.SetJob(job, paused)
            return (await node.control.request(message, messages.NodeStatus))[0]
        except CkptdError as error:
            return error

    nodes = list(cluster.nodes.values())
    answers = await asyncio.gather(*(tell(node) for node in nodes))
    told, failed = {}, {}
    for node, answer in zip(nodes, answers, strict=True):
        if isinstance(answer, CkptdError):
            failed[node.id] = answer.message
        else:
            told[node.id] = answer
    return _listed(cluster, told, failed)


def _require_nodes(cluster: Cluster) -> None:
    if not cluster.nodes:
        raise NotEnoughNodes("no node answers", next="ckptd doctor")


def _listed(
    cluster: Cluster, statuses: Mapping[str, messages.NodeStatus], failed: Mapping[str, str]
) -> JobList:
    rows = [
        JobRow(node, job.name, job.state, job.done_bytes, job.total_bytes, job.last_error)
        for node, status in statuses.items()
        for job in status.jobs
    ]
    absent = {each.id or each.address: each.reason for each in cluster.absent.values()}
    return JobList(
        jobs=tuple(sorted(rows, key=lambda row: (row.name, row.node))),
        unanswered={**absent, **failed},
    )
