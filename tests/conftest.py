"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from ckptd.client import local_cluster
from ckptd.node.descriptors import allow_descriptors

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("ckptd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ckptd")

# Both ends of hundreds of connections are in the process of the test.
allow_descriptors(8192)


@pytest.fixture(scope="session", autouse=True)
def own_ports(request: pytest.FixtureRequest) -> Iterator[None]:
    """Processes that test at the same time take ports of their own: between the choice of a port
    and the start of the node that listens there, another one would be free to choose it."""
    worker = getattr(request.config, "workerinput", {}).get("workerid", "gw0")
    first = 20_000 + 2_000 * (int(worker.removeprefix("gw")) % 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_cluster, "PORTS", range(first, first + 2_000))
        yield
