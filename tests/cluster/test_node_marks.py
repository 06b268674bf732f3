"""Draining, maintaining and forgetting nodes, with real daemons."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster.hostile import Place, RawPeer, files_of, is_refused
from tests.cluster.kill_fixtures import (
    BreakableCluster,
    breakable_cluster,
    make_checkpoint,
    wait_until,
)

from ckptd.client import pki
from ckptd.config import load
from ckptd.core.identity import Role
from ckptd.wire import messages


def states(cluster: BreakableCluster) -> dict[str, str]:
    rows: list[dict[str, Any]] = cluster.command("nodes").document["nodes"]
    return {row["id"]: row["state"] for row in rows}


def place(cluster: BreakableCluster, node_id: str) -> Place:
    settings = cluster.node(node_id).config.node
    assert settings is not None
    return Place(node_id, settings.listen.host, settings.listen.port, settings.bulk_port)


def test_a_draining_node_takes_nothing_new_and_its_copies_do_not_count(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    cluster = fresh_cluster
    assert cluster.command("jobs", "pause", "repair").code == 0  # only what is stored moves
    first = make_checkpoint(tmp_path / "first", 1)
    assert cluster.store(first, "run/step-1").state == "protected"
    before = cluster.shards("node1")
    drained = cluster.command("drain", "node1")
    assert drained.code == 0 and drained.document["changed"]
    assert (drained.document["node"], drained.document["state"]) == ("node1", "draining")
    assert drained.document["copies_left"] == len(before) > 0
    assert not cluster.command("drain", "node1").document["changed"]
    assert states(cluster)["node1"] == "draining"
    # Nothing is degraded by that: the copies are there.
    assert cluster.command("status").document["state"] == "protected"

    stored = cluster.store(make_checkpoint(tmp_path / "second", 2), "run/step-2")
    assert stored.state == "protected" and cluster.shards("node1") == before
    # The same content under another name: what lies on node1 does not count for it.
    again = cluster.store(first, "run/step-3")
    assert again.state == "protected" and again.bytes_sent == 0 and again.bytes_written > 0
    holders = cluster.all_shards()
    assert all(len(holders[shard] - {"node1"}) >= 2 for shard in before)
    assert cluster.command("drain", "node1").document["copies_left"] == 0
    assert cluster.command("forget", "node1", "--dry-run").document["what_if"]["survives"]

    with RawPeer(
        "127.0.0.1", place(cluster, "node1").bulk, files_of(cluster.directory / "pki", "client")
    ) as peer:
        assert isinstance(peer.greet(cluster="local"), messages.Hello)
        ready = peer.ask(messages.PutShard(b"\1" * 32, 1000))
    assert isinstance(ready, messages.Ready) and ready.reports[0].code == "draining"

    undrained = cluster.command("undrain", "node1").document
    assert (undrained["state"], undrained["changed"]) == ("up", True)
    assert not cluster.command("undrain", "node1").document["changed"]


def test_a_forgotten_node_is_out_for_good_and_a_new_machine_may_bear_its_id(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    cluster = fresh_cluster
    source = make_checkpoint(tmp_path / "source", 1)
    cluster.store(source, "run/step-1")
    cluster.command("drain", "node2")  # which ends with it
    dry = cluster.command("forget", "node2", "--dry-run")
    assert dry.code == 0 and dry.document["dry_run"] and dry.document["state"] == "draining"
    assert states(cluster)["node2"] == "draining"
    cluster.kill("node2")
    done = cluster.command("forget", "node2")
    assert done.code == 0 and done.document["state"] == "forgotten", done.stderr
    assert states(cluster)["node2"] == "forgotten"
    assert not cluster.command("forget", "node2").code

    # The old machine comes back, with everything that it had.
    cluster.up()
    old = files_of(cluster.directory / "pki", "node2")
    others = ("node1", "node3", "node4")
    for node_id in others:
        where = place(cluster, node_id)
        assert is_refused(where.host, where.control, old), node_id
        assert is_refused(where.host, where.bulk, old), node_id
    assert states(cluster)["node2"] == "forgotten"
    assert cluster.command("ls").document["checkpoints"][0]["min_copies"] >= 1
    assert cluster.comes_back("run/step-1", source)

    # A new machine under the old id: a new certificate.
    cluster.kill("node2")
    for path in (old.cert, old.key):
        path.unlink()
    pki.issue(cluster.directory / "pki", [Role.WORKER], "node2")
    cluster.up()
    wait_until(lambda: states(cluster)["node2"] == "up", "node2 to be a member again")
    for node_id in others:
        assert not is_refused_in(cluster, node_id)


def test_a_coordinator_knows_at_once_who_was_forgotten(tmp_path: Path) -> None:
    """It says so in the next moment, although it hears of the others only now and then."""
    settings = ("membership.heartbeat=20s", "membership.suspect=40s", "membership.down=60s")
    options = {"count": 3, "coordinator": True, "settings": settings}
    with breakable_cluster(tmp_path / "local", **options) as cluster:
        cluster.meet()  # whom nobody knows cannot be forgotten
        cluster.kill("node2")
        assert states(cluster)["node2"] != "forgotten"
        assert cluster.command("forget", "node2", "--yes").code == 0
        assert states(cluster)["node2"] == "forgotten"


def is_refused_in(cluster: BreakableCluster, node_id: str) -> bool:
    where = place(cluster, node_id)
    with RawPeer(where.host, where.control, files_of(cluster.directory / "pki", "node2")) as peer:
        return not isinstance(peer.greet(cluster="local"), messages.Hello)


def test_forgetting_a_node_that_has_the_only_copies_must_be_meant(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    cluster = fresh_cluster
    cluster.store(make_checkpoint(tmp_path / "source", 1), "run/step-1")
    first, second = sorted(next(iter(cluster.all_shards().values())))
    cluster.kill(first, second)
    assert cluster.command("status").code == 5
    refused = cluster.command("forget", first)
    assert refused.code == 1 and "drain it first" in refused.document["error"]["message"]
    assert states(cluster)[first] != "forgotten"
    done = cluster.command("forget", "--yes", first)
    assert done.code == 0 and done.document["unreadable"]
    assert cluster.command("status").code == 5  # the other one may come back
    assert cluster.command("forget", "--yes", second).code == 0
    # Now there is nobody who could be waited for.
    assert cluster.command("status").code == 4


def test_maintenance_raises_no_alarm_and_ends(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    cluster = fresh_cluster
    cluster.store(make_checkpoint(tmp_path / "source", 1), "run/step-1")
    stored_s = time.time()
    told = cluster.command("maintenance", "node3", "--for", "2h").document
    assert (told["state"], told["seconds"]) == ("maintenance", 7200)
    # What was stored since the others last heard of node3 would be taken not to be on it.
    heartbeat_s = load(cluster.config).membership.heartbeat_s
    wait_until(lambda: time.time() - stored_s > 3 * heartbeat_s, "heartbeats")
    cluster.kill("node3")
    wait_until(
        lambda: any(
            row["id"] == "node3" and row["state"] == "maintenance" and row["last_seen_s"] >= 1
            for row in cluster.command("nodes").document["nodes"]
        ),
        "node3 to be missed",
    )
    assert cluster.command("status").document["state"] == "protected"
    ended = cluster.command("maintenance", "node3", "--for", "0s").document
    assert ended["state"] in ("suspect", "down")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("maintenance", "node1", "--for", "25h"), 2, "at most"),
        (("maintenance", "node1", "--for", "soon"), 2, "not a duration"),
        (("drain", "node9"), 1, "there is no node node9"),
        (("undrain", "node9"), 1, "there is no node node9"),
        (("forget", "node9"), 1, "there is no node node9"),
    ],
)
def test_what_cannot_be_is_refused(
    cluster: BreakableCluster, arguments: tuple[str, ...], code: int, message: str
) -> None:
    found = cluster.command(*arguments)
    assert found.code == code
    assert message in found.document["error"]["message"]


def test_only_an_admin_decides_about_nodes(cluster: BreakableCluster, tmp_path: Path) -> None:
    settings = yaml.safe_load(cluster.config.read_text())
    for kind in ("cert", "key"):
        settings["tls"][kind] = settings["tls"][kind].replace("owner", "client")
    config = tmp_path / "client.yml"
    config.write_text(yaml.safe_dump(settings))
    for command in (
        ("drain", "node1"),
        ("forget", "node1", "--yes"),
        ("maintenance", "node1", "--for", "1m"),
    ):
        found = cluster.command("--config", config, *command)
        error = found.document["error"]
        assert (found.code, error["kind"]) == (1, "not_authorized"), command
        assert "ckptd pki issue admin" in error["next"]
    assert set(states(cluster).values()) == {"up"}
