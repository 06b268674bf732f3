"""A cluster with a coordinator, and what a test may ask of it.

What a test says of such a cluster it reads from the commands that users type, from the nodes' disks
and from what they count: a shard byte that was sent is a byte that some worker received.
"""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.kill_fixtures import BreakableCluster, kept_up, wait_until

from ckptd.client.connect import connect
from ckptd.config import load
from ckptd.net.loop import run as run_on_loop
from ckptd.wire import messages

SETTLE_S = 0.5
RETRY_S = 0.5
SETTINGS = (
    "replication.shard_size=256KiB",
    f"watch.settle={int(SETTLE_S * 1000)}ms",
    "watch.settle_max=4s",
    f"watch.retry={int(RETRY_S * 1000)}ms",
    "gc.grace=1h",  # what is on the disks stays there as long as a test looks
)
PROTECTED_S = 15.0
"""Within this a checkpoint is to be protected once its last byte is there."""


class Watched(BreakableCluster):
    """A cluster with a coordinator."""

    @property
    def root(self) -> Path:
        return self.local.watch_root

    def status(self) -> dict[str, Any]:
        return self.command("status").document

    def pending(self, path: Path) -> dict[str, Any] | None:
        """What `ckptd status` says of a checkpoint that waits."""
        found = [row for row in self.status()["pending"] if row["path"] == str(path)]
        return found[0] if found else None

    def rows(self, run: str) -> dict[str, dict[str, Any]]:
        """What `ckptd ls RUN` lists, by name."""
        found = self.command("ls", run).document.get("checkpoints", [])
        return {row["name"]: row for row in found}

    def versions(self, name: str) -> list[str]:
        """The live versions of a name, newest first."""
        found = self.command("show", name)
        return [version["version"] for version in found.document.get("versions", [])]

    def is_protected(self, name: str) -> bool:
        return self.rows(name).get(name, {}).get("state") == "protected"

    def wait_protected(self, name: str, *, timeout_s: float = PROTECTED_S) -> None:
        wait_until(lambda: self.is_protected(name), f"{name} to be protected", timeout_s=timeout_s)

    def log(self) -> list[dict[str, Any]]:
        text = (self.directory / "coordinator" / "node.log").read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def stored_events(self, name: str) -> list[dict[str, Any]]:
        return [
            line
            for line in self.log()
            if line["event"] == "checkpoint_stored" and line["name"] == name
        ]

    def metrics(self) -> dict[str, float]:
        """What the coordinator tells at /metrics."""
        return samples_of(self.local.describe()["coordinator"]["metrics_url"])

    def received(self) -> float:
        """The shard bytes that the workers, since they run, have received from whoever is no
        worker: the coordinators."""
        workers = {f'peer="{node.id}"' for node in self.local.nodes()}
        found = [samples_of(node.describe()["metrics_url"]) for node in self.local.nodes()]
        return sum(
            value
            for samples in found
            for sample, value in samples.items()
            if sample.startswith("ckptd_shard_transfer_bytes_total")
            and 'direction="received"' in sample
            and not any(worker in sample for worker in workers)
        )

    def rest(self) -> None:
        """Waits until the whole root was scanned three times more, and nothing is to be done.

        Each time something is laid there that only a scan of the root can find.
        """
        for number in range(3):
            found = self.root / f"found-by-scan-{number}"
            found.mkdir()
            (found / "model.safetensors").write_bytes(b"not whole")
            wait_until(lambda path=str(found): path in self.waiting(), "a scan")  # type: ignore[misc]
            shutil.rmtree(found)
        wait_until(lambda: not self.waiting(), "nothing to be pending")

    def waiting(self) -> set[str]:
        """The paths that wait, as `ckptd status` lists them."""

        async def ask() -> list[messages.Unstored]:
            async with connect(load(self.config)) as cluster:
                return await cluster.watched()

        return {unstored.path for unstored in run_on_loop(ask())}

    def traces(self) -> tuple[dict[str, set[str]], set[str], float]:
        """What a store leaves: all shards and all manifests on the disks of the workers, and how
        many shard bytes these got from the coordinator."""
        manifests: set[str] = set()
        for number in range(1, self.count + 1):
            manifests |= self.manifests(f"node{number}")
        return self.all_shards(), manifests, self.received()


def samples_of(metrics_url: str) -> dict[str, float]:
    """The samples of a node's metrics, by name with labels."""
    with urllib.request.urlopen(metrics_url, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def put(source: Path, target: Path) -> None:
    """Appears whole, as by a rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)


@contextmanager
def watched_cluster(directory: Path, **options: Any) -> Iterator[Watched]:
    """A running cluster with a coordinator, killed and removed at the end."""
    settings = {"settings": SETTINGS, **options}
    with kept_up(Watched(directory, coordinator=True, **settings)) as cluster:
        yield cluster
