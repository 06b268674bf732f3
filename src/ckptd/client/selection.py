"""Which version a question about the cluster means."""

from __future__ import annotations

from ckptd.client.choose_version import best_metric
from ckptd.client.cluster import Cluster
from ckptd.client.survey import survey_versions
from ckptd.core.availability import State
from ckptd.core.catalogue import Catalogue
from ckptd.core.headers import VersionHeader
from ckptd.core.names import parse_selector


async def select_version(cluster: Cluster, catalogue: Catalogue, text: str) -> VersionHeader:
    """The version that NAME, NAME@VERSION, RUN@latest or RUN@best means; the last two mean one of
    which every shard can be read now. Raises NameRefused, or NotFound with the nearest names."""
    selector = parse_selector(text)
    if selector.which is None:
        return catalogue.resolve(selector)
    found = await survey_versions(cluster, catalogue, catalogue.run_versions(selector.name))
    complete = {
        version_id
        for version_id, version in found.versions.items()
        if version.state in (State.PROTECTED, State.DEGRADED)
    }
    return catalogue.resolve(
        selector,
        best=best_metric(selector, cluster.config),
        accept=lambda version: version.id in complete,
    )
