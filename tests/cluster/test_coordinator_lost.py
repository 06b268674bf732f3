"""The machine that watches is lost with everything on it: another one goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tests.cluster.kill_fixtures import kill_process, make_checkpoint, wait_until
from tests.cluster.watched import SETTLE_S, Watched, put, watched_cluster

from ckptd.client.local_cluster import COORDINATOR

NEW = "desk"
_LISTED = ("name", "version", "created", "bytes", "files", "state", "min_copies", "step", "metrics")


def listed(cluster: Watched) -> list[dict[str, Any]]:
    """What `ckptd ls --all-versions` says of what is stored."""
    rows = cluster.command("ls", "--all-versions").document["checkpoints"]
    return [{key: row[key] for key in _LISTED} for row in rows]


def belonging(cluster: Watched) -> set[str]:
    """The nodes that belong to the cluster."""
    rows = cluster.command("nodes").document["nodes"]
    return {row["id"] for row in rows if row["state"] != "forgotten"}


@contextmanager
def new_machine(cluster: Watched, place: Path) -> Iterator[None]:
    """Runs a coordinator that has a certificate, the address of one worker, an empty disk, and the
    directory that is watched."""
    pki = cluster.directory / "pki"
    keys = place / "keys"
    issue = ["pki", "issue", COORDINATOR, NEW, "--dir", pki, "--out", keys]
    assert cluster.command(*issue).code == 0
    described = cluster.node("node2").describe()
    config = {
        "cluster": cluster.local.cluster,
        "node": {
            "id": NEW,
            "roles": ["coordinator"],
            "listen": f"127.0.0.1:{_free_port()}",
            "state": str(place / "state"),
        },
        "tls": {
            "ca": str(keys / "ca.pem"),
            "cert": str(keys / f"{NEW}.pem"),
            "key": str(keys / f"{NEW}.key"),
        },
        "discovery": {"mdns": False, "peers": [described["address"]]},
        "observe": {"listen": f"127.0.0.1:{_free_port()}", "tls": False},
        "replication": {"shard_size": "256KiB"},
        "repair": {"after": "3s"},
        "retention": [{"runs": "run", "keep_last": 2}],
        "watch": [{"root": str(cluster.root), "settle": f"{int(SETTLE_S * 1000)}ms"}],
    }
    (place / "desk.yml").write_text(yaml.safe_dump(config))
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
        open(place / "desk.log", "wb") as log,
    ):
        ready.bind(str(place / "ready"))
        ready.settimeout(30)
        process = subprocess.Popen(
            [sys.executable, "-m", "ckptd", "serve", "--config", str(place / "desk.yml")],
            stdout=log,
            stderr=log,
            env={**os.environ, "NOTIFY_SOCKET": str(place / "ready")},
        )
        try:
            assert ready.recv(100).startswith(b"READY=1"), (place / "desk.log").read_text()
            yield
        finally:
            kill_process(process.pid)
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_new_machine_with_a_certificate_knows_everything(tmp_path: Path) -> None:
    with watched_cluster(tmp_path / "local", count=3) as cluster:
        for number in (1, 2):
            latest = make_checkpoint(tmp_path / f"latest-{number}", number, size=400_000)
            shutil.copytree(latest, cluster.root / "run" / "latest", dirs_exist_ok=True)
            wait_until(
                lambda count=number: len(cluster.versions("run/latest")) == count,  # type: ignore[misc]
                "a version",
            )
        step = make_checkpoint(tmp_path / "step", "step", size=400_000)
        shutil.copytree(step, cluster.root / "run" / "step-1")
        cluster.wait_protected("run/step-1")
        cluster.wait_protected("run/latest")
        before, traces = listed(cluster), cluster.traces()
        assert len(before) == 3
        versions = cluster.versions("run/latest")
        cluster.kill(COORDINATOR)
        shutil.rmtree(cluster.directory / COORDINATOR)
        for path in (cluster.directory / "pki").glob(f"{COORDINATOR}.*"):
            path.unlink()
        with new_machine(cluster, tmp_path):
            wait_until(lambda: cluster.status()["steward"] == NEW, "the new one to be seen")
            cluster.rest()
            assert listed(cluster) == before
            assert cluster.traces() == traces, "what is known was stored or sent again"
            for version, source in zip(versions, ("latest-2", "latest-1"), strict=True):
                assert cluster.comes_back(f"run/latest@{version}", tmp_path / source)
            assert cluster.comes_back("run/step-1", step)
            fresh = make_checkpoint(tmp_path / "next", "next", size=400_000)
            put(fresh, cluster.root / "next" / "step-2")
            cluster.wait_protected("next/step-2")
            assert cluster.comes_back("next/step-2", cluster.root / "next" / "step-2")
            assert cluster.command("forget", COORDINATOR, "--yes").code == 0
            wait_until(lambda: COORDINATOR not in belonging(cluster), "the old one to be gone")
            assert belonging(cluster) == {NEW, "node1", "node2", "node3"}
            retention_goes_on(cluster, tmp_path, versions)
            repair_goes_on(cluster)
            for version in cluster.versions("run/latest"):
                assert cluster.command("verify", f"run/latest@{version}").code == 0


def retention_goes_on(cluster: Watched, work: Path, versions: list[str]) -> None:
    """A third version of what is overwritten takes the place of the first."""
    newest = make_checkpoint(work / "latest-3", 3, size=400_000)
    shutil.copytree(newest, cluster.root / "run" / "latest", dirs_exist_ok=True)
    first = versions[-1]
    wait_until(
        lambda: (
            len(now := cluster.versions("run/latest")) == 2
            and first not in now
            and versions[0] in now
        ),
        "the first version to be dropped",
    )
    cluster.wait_protected("run/latest")
    assert cluster.comes_back("run/latest", newest)


def repair_goes_on(cluster: Watched) -> None:
    """A worker dies for good, and everything has its copies again on those that are left."""
    rows = listed(cluster)
    catalogue = cluster.store_path("node1") / "catalogue"
    named = {
        shard
        for row in rows
        for shard, _ in json.loads((catalogue / f"{row['version']}.json").read_bytes())["shards"]
    }

    def holders() -> list[set[str]]:
        held = cluster.all_shards()
        return [held[shard] for shard in named]

    assert any("node3" in nodes for nodes in holders())
    cluster.kill("node3")
    wait_until(
        lambda: all({"node1", "node2"} <= nodes for nodes in holders()),
        "two copies of everything on those that are left",
        timeout_s=60,
    )
    for row in rows:
        cluster.wait_protected(row["name"])
    assert cluster.status()["steward"] == NEW


def test_an_emptied_directory_is_filled_again_by_local_up(tmp_path: Path) -> None:
    with watched_cluster(tmp_path / "local", count=2) as cluster:
        put(make_checkpoint(tmp_path / "model", 1, size=400_000), cluster.root / "run" / "step-1")
        cluster.wait_protected("run/step-1")
        before, copies = listed(cluster), cluster.all_shards()
        cluster.kill(COORDINATOR)
        shutil.rmtree(cluster.directory / COORDINATOR)
        cluster.up()
        cluster.rest()
        assert listed(cluster) == before
        assert cluster.all_shards() == copies
        assert cluster.comes_back("run/step-1", cluster.root / "run" / "step-1")
