"""The doctor: looks at this machine and at the cluster, and says what to type next."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from ckptd.client.cluster_checks import check_cluster
from ckptd.client.connect import connect
from ckptd.client.findings import Finding
from ckptd.client.machine_checks import (
    check_certificate,
    check_cipher,
    check_config,
    check_mdns,
    listen,
    read_cpuinfo,
)
from ckptd.config import Config
from ckptd.errors import CkptdError


async def diagnose(config: Config, *, environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Looks at config, certificate, ports, clocks, disks, room and versions. Raises nothing that
    it can report."""
    findings = [*check_config(config), *check_certificate(config, time.time())]
    findings += check_cipher(read_cpuinfo(), environ)
    if any(finding.check == "certificate" and finding.state == "error" for finding in findings):
        return findings
    heard = await listen(config)
    answering: set[str] = set()
    try:
        async with connect(config) as cluster:
            answering = set(cluster.nodes)
            findings += await check_cluster(cluster)
    except CkptdError as error:
        findings.append(Finding("connection", "error", error.message, error.next or "ckptd nodes"))
    findings += check_mdns(config, heard, answering)
    return findings
