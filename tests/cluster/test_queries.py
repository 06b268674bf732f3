"""What the commands say about real clusters: each key of their JSON, each state, each exit code."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog
from msgspec import structs
from tests.cluster.kill_fixtures import (
    BreakableCluster,
    breakable_cluster,
    make_checkpoint,
    wait_until,
)

from ckptd.cli import main
from ckptd.client.connect import connect
from ckptd.config import load
from ckptd.core import documents
from ckptd.core.signing import Signer
from ckptd.net.loop import run as run_on_loop
from ckptd.store import layout

NewName = Callable[[], str]

HEX_64 = re.compile(r"[0-9a-f]{64}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
NODES = [f"node{number}" for number in range(1, 5)]
CHECKPOINT_KEYS = {
    *("name", "version", "created", "bytes", "files", "state", "min_copies", "verified_at"),
    *("step", "metrics", "pinned"),
}
NODE_KEYS = {
    *("id", "address", "roles", "state", "bytes_total", "bytes_used", "bytes_free"),
    *("write_bytes_per_s", "version", "last_seen_s"),
}
SETTINGS = ("replication.shard_size=256KiB",)


class Answer(NamedTuple):
    """What a command printed as JSON, and its exit code."""

    code: int
    document: dict[str, Any]
    stderr: str


def ask(cluster: BreakableCluster, *arguments: object) -> Answer:
    """Runs `ckptd --json ARGUMENTS` through the function of the console script, in this process:
    a new one for each of hundreds of questions would take minutes."""
    out, err = io.StringIO(), io.StringIO()
    root, config = logging.getLogger(), structlog.get_config()
    handlers, level = list(root.handlers), root.level
    typed = ["--json", "--config", str(cluster.config), *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.run(typed)
    finally:  # the command has set up logging for a process of its own
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
        structlog.configure(**config)
    lines = out.getvalue().splitlines()
    assert len(lines) == 1, f"ckptd {typed} printed {len(lines)} lines: {lines} {err.getvalue()}"
    return Answer(code, json.loads(lines[0]), err.getvalue())


def names_in(found: dict[str, Any]) -> list[str]:
    return [row["name"] for row in found["checkpoints"]]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def wait_until_heard_after(cluster: BreakableCluster, moment: float) -> None:
    """Until every node has heard each other one later than `moment` (seconds since the epoch)."""

    async def oldest() -> float:
        async with connect(load(cluster.config)) as connected:
            ages = [
                view.last_seen_s if view.last_seen_s >= 0 else time.time()
                for node in connected.nodes.values()
                for view in node.status.peers
            ]
            return time.time() - max(ages)

    wait_until(lambda: run_on_loop(oldest()) > moment, "all nodes to hear of each other")


# -- ls and show


def test_ls_lists_names_with_their_newest_version(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    run = name.partition("/")[0]
    first = cluster.store(make_checkpoint(tmp_path / "a", f"{name} a"), name)
    second = cluster.store(make_checkpoint(tmp_path / "b", f"{name} b"), name)
    sibling = cluster.store(make_checkpoint(tmp_path / "c", f"{name} c"), f"{run}/checkpoint-2")

    found = ask(cluster, "ls", run)
    assert (found.code, found.stderr) == (0, "")
    rows = found.document["checkpoints"]
    assert [(row["name"], row["version"]) for row in rows] == [
        (name, second.version),
        (f"{run}/checkpoint-2", sibling.version),
    ]
    for row in rows:
        assert set(row) >= CHECKPOINT_KEYS
        assert HEX_64.fullmatch(row["version"])
        assert TIME.fullmatch(row["created"]) and TIME.fullmatch(row["verified_at"])
        assert (row["state"], row["min_copies"], row["pinned"]) == ("protected", 2, False)
        assert (row["step"], row["metrics"], row["files"]) == (None, {}, 3)
    size = sum(path.stat().st_size for path in (tmp_path / "b").iterdir())
    assert rows[0]["bytes"] == size

    everything = ask(cluster, "ls", run, "--all-versions").document["checkpoints"]
    assert [row["version"] for row in everything] == [
        second.version,
        first.version,
        sibling.version,
    ]
    assert names_in(ask(cluster, "ls", name).document) == [name]
    assert set(names_in(ask(cluster, "ls").document)) >= {name, f"{run}/checkpoint-2"}


def test_ls_of_a_run_that_is_not_there_names_the_nearest(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    cluster.store(make_checkpoint(tmp_path / "a", name, size=4096), name)
    found = ask(cluster, "ls", name.partition("/")[0] + "x")
    assert (found.code, found.document["error"]["kind"]) == (1, "not_found")
    assert name.partition("/")[0] in found.document["error"]["message"]
    assert found.document["error"]["next"] == "ckptd ls"
    assert ask(cluster, "ls", "not@allowed").code == 2


def test_show_tells_files_tensors_and_where_each_copy_is(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_checkpoint(tmp_path / "a", name)
    stored = cluster.store(source, name)
    found = ask(cluster, "show", name)
    assert found.code == 0
    shown = found.document
    assert shown["name"] == name
    (version,) = shown["versions"]
    assert set(version) >= {
        *("version", "created", "bytes", "state", "pinned", "step", "metrics", "shards")
    }
    assert (version["version"], version["state"]) == (stored.version, "protected")
    assert len(version["shards"]) == stored.shards
    for shard in version["shards"]:
        assert set(shard) >= {"shard", "bytes", "nodes"}
        holders = [node for node in NODES if cluster.shard_file(node, shard["shard"]).exists()]
        assert shard["nodes"] == holders and len(holders) == 2
        assert cluster.shard_file(holders[0], shard["shard"]).stat().st_size == shard["bytes"]
    assert {file["path"] for file in shown["files"]} == {path.name for path in source.iterdir()}
    for file in shown["files"]:
        path = source / file["path"]
        assert set(file) == {"path", "bytes", "sha256", "mode"}
        assert (file["bytes"], file["mode"]) == (path.stat().st_size, path.stat().st_mode & 0o777)
        assert HEX_64.fullmatch(file["sha256"])
    assert [set(tensor) for tensor in shown["tensors"]] == [{"name", "file", "dtype", "shape"}] * 8
    assert {tensor["name"] for tensor in shown["tensors"]} == {
        f"{name}.{number}.weight" for number in range(8)
    }
    assert {(t["file"], t["dtype"]) for t in shown["tensors"]} == {("model.safetensors", "U8")}

    older = ask(cluster, "show", f"{name}@{stored.version[:8]}").document
    assert [v["version"] for v in older["versions"]] == [stored.version]
    latest = ask(cluster, "show", f"{name.partition('/')[0]}@latest").document
    assert latest["name"] == name


def test_text_for_people_has_no_control_characters(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    source = make_checkpoint(tmp_path / "a", name, size=4096)
    (source / "with \x1b[31m escape\r").write_text("x")
    cluster.store(source, name)
    for command in (
        *(["ls"], ["show", name], ["verify", name], ["status"], ["nodes"], ["doctor"]),
        *(["what-if"], ["what-if", "node1", "node2"], ["rm", name, "--dry-run"]),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ckptd", "--config", str(cluster.config), *command],
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done
        assert done.stdout and done.stderr == b""
        assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", done.stdout), command


# -- rm, undelete, pin


def test_rm_asks_first_and_undelete_brings_the_content_back(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    run = name.partition("/")[0]
    first = cluster.store(make_checkpoint(tmp_path / "a", f"{name} a"), name)
    second = cluster.store(make_checkpoint(tmp_path / "b", f"{name} b"), name)
    both = {f"{name}@{first.version}", f"{name}@{second.version}"}

    unasked = ask(cluster, "rm", name)
    assert (unasked.code, unasked.document["error"]["kind"]) == (2, "usage")
    assert unasked.document["error"]["next"] == f"ckptd rm --yes {name}"
    dry = ask(cluster, "rm", name, "--dry-run")
    assert (dry.code, set(dry.document["deleted"]), dry.document["dry_run"]) == (0, both, True)
    assert names_in(ask(cluster, "ls", run).document) == [name]

    one = ask(cluster, "rm", f"{name}@{second.version[:8]}", "--yes")
    assert (one.code, one.document["deleted"]) == (0, [f"{name}@{second.version}"])
    (left,) = ask(cluster, "ls", run).document["checkpoints"]
    assert left["version"] == first.version
    rest = ask(cluster, "rm", name, "--yes")
    assert rest.document["deleted"] == [f"{name}@{first.version}"]
    gone = ask(cluster, "show", name)
    assert gone.code == 1 and gone.document["error"]["next"].startswith(f"ckptd undelete {name}@")
    assert ask(cluster, "rm", name, "--yes").code == 1

    back = ask(cluster, "undelete", f"{name}@{first.version[:12]}")
    assert back.code == 0
    assert (back.document["name"], back.document["state"]) == (name, "protected")
    assert back.document["restored_from"] == first.version
    assert back.document["version"] not in (first.version, second.version)
    restored = ask(cluster, "restore", name, "--to", tmp_path / "out")
    assert (restored.code, restored.document["version"]) == (0, back.document["version"])
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()

    again = ask(cluster, "undelete", f"{name}@{first.version}")
    assert (again.code, again.document["error"]["kind"]) == (1, "refused")
    newest_removed = ask(cluster, "undelete", name)
    assert newest_removed.document["restored_from"] == second.version
    (row,) = ask(cluster, "ls", run).document["checkpoints"]
    assert row["version"] == newest_removed.document["version"]


def test_undelete_refuses_when_a_shard_is_gone(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    cluster = fresh_cluster
    stored = cluster.store(make_checkpoint(tmp_path / "a", 1), "run/a")
    assert ask(cluster, "rm", "run/a", "--yes").code == 0
    shard, holders = next(iter(cluster.all_shards().items()))
    cluster.kill(*holders)
    away = ask(cluster, "undelete", "run/a")
    assert (away.code, away.document["error"]["kind"]) == (5, "not_enough_nodes")
    for node in holders:
        cluster.shard_file(node, shard).unlink()
    cluster.up()
    gone = ask(cluster, "undelete", f"run/a@{stored.version[:8]}")
    assert (gone.code, gone.document["error"]["kind"]) == (4, "no_good_copy")


def test_pins_are_set_and_taken_back(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    first = cluster.store(make_checkpoint(tmp_path / "a", f"{name} a", size=4096), name)
    assert ask(cluster, "pin", name).document == {
        "name": name,
        "version": first.version,
        "pinned": True,
        "changed": True,
    }
    assert ask(cluster, "pin", name).document["changed"] is False
    second = cluster.store(make_checkpoint(tmp_path / "b", f"{name} b", size=4096), name)

    def pinned() -> dict[str, bool]:
        rows = ask(cluster, "ls", name, "--all-versions").document["checkpoints"]
        return {row["version"]: row["pinned"] for row in rows}

    assert pinned() == {first.version: True, second.version: False}
    by_version = ask(cluster, "unpin", f"{name}@{second.version[:8]}")
    assert by_version.document["changed"] is False
    taken_back = ask(cluster, "unpin", name)
    assert (taken_back.code, taken_back.document["versions"]) == (0, [first.version])
    assert pinned() == {first.version: False, second.version: False}
    ask(cluster, "pin", f"{name}@{first.version}")
    assert pinned() == {first.version: True, second.version: False}
    assert ask(cluster, "pin", "no-such-name").code == 1


# -- nodes, what-if, doctor


def test_nodes_tells_of_every_node(cluster: BreakableCluster) -> None:
    found = ask(cluster, "nodes")
    assert found.code == 0
    rows = found.document["nodes"]
    assert [row["id"] for row in rows] == NODES
    for row in rows:
        assert set(row) >= NODE_KEYS
        assert (row["state"], row["roles"], row["last_seen_s"]) == ("up", ["worker"], 0.0)
        assert row["bytes_total"] > row["bytes_free"] > 0
        assert row["address"].startswith("127.0.0.1:")


def test_what_if_tells_what_the_death_of_each_pair_would_cost(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    stored = cluster.store(make_checkpoint(tmp_path / "a", name), name)
    reference = f"{name}@{stored.version}"
    shards = ask(cluster, "show", name).document["versions"][0]["shards"]
    holders = [frozenset(shard["nodes"]) for shard in shards]
    manifest = cluster.manifests("node1") and {
        node for node in NODES if stored.version in cluster.manifests(node)
    }
    assert manifest == set(NODES)
    everything = ask(cluster, "what-if")
    assert everything.code == 0
    forecasts = {tuple(f["nodes"]): f for f in everything.document["forecasts"]}
    groups = [*itertools.combinations(NODES, 1), *itertools.combinations(NODES, 2)]
    assert set(forecasts) == set(groups)
    for group in groups:
        found = ask(cluster, "what-if", *group) if len(group) == 2 else None
        document = found.document if found else forecasts[group]
        assert document == forecasts[group]
        assert set(document) == {"nodes", "lost", "degraded", "survives"}
        dead = set(group)
        loses = any(nodes <= dead for nodes in holders)
        suffers = any(nodes & dead for nodes in holders)
        assert (reference in document["lost"]) == loses, group
        assert (reference in document["degraded"]) == (suffers and not loses), group
        assert document["survives"] == (not document["lost"])
    unknown = ask(cluster, "what-if", "node9")
    assert (unknown.code, unknown.document["error"]["next"]) == (1, "ckptd nodes")


def test_doctor_finds_nothing_wrong_and_then_what_is(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    cluster = fresh_cluster
    cluster.meet()
    well = ask(cluster, "doctor")
    assert (well.code, well.document["ok"]) == (0, True)
    assert {finding["state"] for finding in well.document["findings"]} == {"ok"}
    ports = [finding for finding in well.document["findings"] if finding["check"] == "ports"]
    assert len(ports) == 4
    cluster.kill("node3")
    key = cluster.directory / "pki" / "owner.key"
    key.chmod(0o644)
    ill = ask(cluster, "doctor")
    assert (ill.code, ill.document["ok"]) == (1, False)
    wrong = {f["check"]: f for f in ill.document["findings"] if f["state"] != "ok"}
    assert set(wrong) == {"peers", "key"}
    assert "node3" in wrong["peers"]["message"] and "systemctl" in wrong["peers"]["next"]
    assert wrong["key"]["next"] == f"chmod 600 {key}"
    for finding in ill.document["findings"]:
        assert set(finding) == {"check", "state", "message", "next"}
        assert bool(finding["next"]) == (finding["state"] != "ok")


# -- status


STATUS_KEYS = {
    *("state", "nodes", "checkpoints", "shards", "pending", "repair", "scrub", "room", "steward"),
}


@pytest.fixture
def patient_cluster(tmp_path: Path) -> Iterator[BreakableCluster]:
    """Nodes that are down count for an hour."""
    settings = (*SETTINGS, "repair.after=1h")
    with breakable_cluster(tmp_path / "local", settings=settings) as running:
        yield running


@pytest.fixture
def impatient_cluster(tmp_path: Path) -> Iterator[BreakableCluster]:
    """Nodes that are down do not count for longer than 100 ms."""
    settings = (*SETTINGS, "repair.after=100ms")
    with breakable_cluster(tmp_path / "local", settings=settings) as running:
        yield running


def test_status_of_a_healthy_cluster(cluster: BreakableCluster, tmp_path: Path) -> None:
    cluster.store(make_checkpoint(tmp_path / "a", "status"), "status/a")
    found = ask(cluster, "status")
    assert found.code == 0
    document = found.document
    assert set(document) >= STATUS_KEYS
    assert document["state"] == "protected"
    assert set(document["checkpoints"]) == {
        *("pending", "storing", "degraded", "protected", "unavailable", "unrecoverable")
    }
    assert document["checkpoints"]["protected"] == sum(document["checkpoints"].values()) >= 1
    named = {
        shard["shard"]
        for row in ask(cluster, "ls", "--all-versions").document["checkpoints"]
        for version in ask(cluster, "show", f"{row['name']}@{row['version']}").document["versions"]
        for shard in version["shards"]
    }
    assert document["shards"] == {
        "total": len(named),
        "under_replicated": 0,
        "corrupt": 0,
        "unrecoverable": 0,
    }
    assert document["pending"] == []
    assert document["repair"] == {"queued_shards": 0, "queued_bytes": 0, "waiting": ""}
    assert set(document["scrub"]) == {"oldest_verified_at"}
    assert document["room"]["bytes_free"] > 0 and document["room"]["checkpoints_fit"] > 0
    assert document["steward"] == "node1"
    assert [row["id"] for row in document["nodes"]] == NODES
    assert all(set(row) >= NODE_KEYS for row in document["nodes"])


def test_status_of_an_empty_cluster_is_protected(fresh_cluster: BreakableCluster) -> None:
    found = ask(fresh_cluster, "status")
    assert (found.code, found.document["state"]) == (0, "protected")
    assert found.document["room"]["checkpoints_fit"] is None
    assert ask(fresh_cluster, "ls").document == {"checkpoints": []}
    assert ask(fresh_cluster, "verify", "--all").document["ok"] is True


def test_status_while_nodes_die_one_after_the_other(
    impatient_cluster: BreakableCluster, tmp_path: Path
) -> None:
    cluster = impatient_cluster
    stored = cluster.store(make_checkpoint(tmp_path / "a", 1), "run/a")
    holders = [set(nodes) for nodes in cluster.all_shards().values()]
    first = sorted(holders[0])[0]
    assert ask(cluster, "jobs", "pause", "repair").code == 0  # else it is soon protected again
    cluster.kill(first)
    wait_until(lambda: ask(cluster, "status").code != 0, "the dead node not to count any more")
    degraded = ask(cluster, "status")
    assert (degraded.code, degraded.document["state"]) == (3, "degraded")
    affected = sum(first in nodes for nodes in holders)
    assert degraded.document["shards"]["under_replicated"] == affected
    assert degraded.document["checkpoints"]["degraded"] == 1
    (row,) = ask(cluster, "ls").document["checkpoints"]
    assert (row["state"], row["min_copies"]) == ("degraded", 1)
    down = next(r for r in ask(cluster, "nodes").document["nodes"] if r["id"] == first)
    assert down["state"] in ("suspect", "down") and down["last_seen_s"] > 0

    (second,) = holders[0] - {first}
    cluster.kill(second)
    unavailable = ask(cluster, "status")
    assert (unavailable.code, unavailable.document["state"]) == (5, "unavailable")
    assert unavailable.document["shards"]["unrecoverable"] == 0
    lost = ask(cluster, "verify", "run/a")
    assert (lost.code, lost.document["unrecoverable"]) == (5, [])
    assert lost.document["unavailable"] == [f"run/a@{stored.version}"]
    assert set(lost.document["silent"]) == {first, second}

    cluster.kill(*cluster.running())
    unreachable = ask(cluster, "status")
    assert (unreachable.code, unreachable.document["state"]) == (5, "unreachable")
    assert set(unreachable.document) >= STATUS_KEYS
    for command in (["ls"], ["show", "run/a"], ["verify", "--all"], ["pin", "run/a"]):
        refused = ask(cluster, *command)
        assert (refused.code, refused.document["error"]["kind"]) == (5, "not_enough_nodes")
        assert refused.document["error"]["next"] == "ckptd doctor"


def test_a_reboot_raises_no_alarm(patient_cluster: BreakableCluster, tmp_path: Path) -> None:
    cluster = patient_cluster
    cluster.store(make_checkpoint(tmp_path / "a", 1), "run/a")
    wait_until_heard_after(cluster, time.time())
    holders = [set(nodes) for nodes in cluster.all_shards().values()]
    first = sorted(holders[0])[0]
    cluster.kill(first)
    calm = ask(cluster, "status")
    assert (calm.code, calm.document["state"]) == (0, "protected")
    assert calm.document["shards"]["under_replicated"] == 0
    (row,) = ask(cluster, "ls").document["checkpoints"]
    assert (row["state"], row["min_copies"]) == ("protected", 1)

    # What is stored without a node is never presumed to be on it.
    others = sorted(set(NODES) - {first})
    cluster.kill(*others[:2])
    late = cluster.store(make_checkpoint(tmp_path / "b", 2), "run/b")
    assert late.state == "degraded"
    states = {row["name"]: row["state"] for row in ask(cluster, "ls").document["checkpoints"]}
    assert states["run/b"] == "degraded"
    assert ask(cluster, "status").code in (3, 5)
    # And what cannot be read now is never called protected.
    if any(nodes.isdisjoint(others[2:]) for nodes in holders):
        assert states["run/a"] == "unavailable"


def test_a_wiped_node_makes_what_only_it_had_unrecoverable(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    cluster = fresh_cluster
    stored = cluster.store(make_checkpoint(tmp_path / "a", 1), "run/a")
    shard, holders = next(iter(cluster.all_shards().items()))
    cluster.kill(*holders)
    for node in holders:
        cluster.shard_file(node, shard).unlink()
    cluster.up()
    status = ask(cluster, "status")
    assert (status.code, status.document["state"]) == (4, "unrecoverable")
    assert status.document["shards"]["unrecoverable"] == 1
    verified = ask(cluster, "verify", "--all")
    assert verified.code == 4
    assert verified.document["missing"] == [{"shard": shard, "node": None}] * 2
    assert verified.document["unrecoverable"] == [f"run/a@{stored.version}"]


# -- verify


VERIFY_KEYS = {"ok", "shards", "copies_checked", "corrupt", "missing", "unrecoverable"}


def test_verify_names_bad_and_missing_copies(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    cluster = fresh_cluster
    assert ask(cluster, "jobs", "pause", "repair").code == 0  # else all is soon well again
    stored = cluster.store(make_checkpoint(tmp_path / "a", 1), "run/a")
    well = ask(cluster, "verify", "run/a")
    assert (well.code, well.stderr) == (0, "")
    assert set(well.document) >= VERIFY_KEYS
    assert well.document["ok"] is True
    assert well.document["shards"] == stored.shards
    assert well.document["copies_checked"] == 2 * stored.shards

    # A shard of the weights: a whole restore needs no index of the tensors.
    manifest = cluster.manifest("node1", stored.version)
    named = [shard for shard, _ in manifest["shards"]]
    bad = next(shard for n, shard in enumerate(named) if n != manifest["tensor_index"])
    node, other = sorted(cluster.all_shards()[bad])
    flip(cluster.shard_file(node, bad))
    found = ask(cluster, "verify", "--all")
    assert (found.code, found.document["ok"]) == (3, False)
    assert found.document["corrupt"] == [{"shard": bad, "node": node}]
    assert (found.document["missing"], found.document["unrecoverable"]) == ([], [])
    assert not cluster.shard_file(node, bad).exists()
    assert list((cluster.store_path(node) / "quarantine").glob(f"{bad}*"))

    later = ask(cluster, "verify", "--all")
    assert later.code == 3
    assert later.document["corrupt"] == []
    assert later.document["missing"] == [{"shard": bad, "node": None}]
    status = ask(cluster, "status")
    assert (status.code, status.document["shards"]["corrupt"]) == (3, 1)
    assert status.document["shards"]["under_replicated"] == 1
    restored = ask(cluster, "restore", "run/a", "--to", tmp_path / "out")
    assert restored.code == 0

    # A copy that is claimed, and whose file went away behind the node's back.
    another = next(shard for shard in sorted(cluster.shards(other)) if shard != bad)
    cluster.shard_file(other, another).unlink()
    missing = ask(cluster, "verify", "--all")
    assert missing.code == 3
    assert {"shard": another, "node": other} in missing.document["missing"]

    flip(cluster.shard_file(other, bad))
    lost = ask(cluster, "verify", "--all")
    assert lost.code == 4
    assert lost.document["corrupt"] == [{"shard": bad, "node": other}]
    assert lost.document["unrecoverable"] == [f"run/a@{stored.version}"]
    assert ask(cluster, "status").code == 4
    assert ask(cluster, "restore", "run/a", "--to", tmp_path / "no").code == 4
    assert not (tmp_path / "no").exists()


def test_verify_reads_what_answers_when_a_node_is_down(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    cluster = fresh_cluster
    cluster.store(make_checkpoint(tmp_path / "a", 1), "run/a")
    shards = cluster.all_shards()
    dead = sorted(next(iter(shards.values())))[0]
    cluster.kill(dead)
    found = ask(cluster, "verify", "--all")
    affected = sorted(shard for shard, nodes in shards.items() if dead in nodes)
    assert found.code == 3
    assert sorted(copy["shard"] for copy in found.document["missing"]) == affected
    assert {copy["node"] for copy in found.document["missing"]} == {None}
    assert found.document["silent"] == [dead]


# -- many versions


def test_ls_and_status_with_a_thousand_versions(tmp_path: Path) -> None:
    count = 1000
    with breakable_cluster(tmp_path / "local", count=2, settings=SETTINGS) as cluster:
        stored = cluster.store(make_checkpoint(tmp_path / "a", 1), "many/step-0000")
        raw = (cluster.store_path("node1") / "catalogue" / f"{stored.version}.json").read_bytes()
        cluster.local.down()
        write_versions(cluster, raw, count - 1)
        cluster.up()
        taken_s = []
        for _ in range(3):
            started_s = time.monotonic()
            listed = cluster.command("ls")
            taken_s.append(time.monotonic() - started_s)
        print(f"ls of {count} versions on two nodes: {min(taken_s):.2f} s, start-up included")
        assert listed.code == 0
        rows = listed.document["checkpoints"]
        assert names_in(listed.document) == [f"many/step-{i:04}" for i in range(count)]
        assert {(row["state"], row["min_copies"]) for row in rows} == {("protected", 2)}
        status = ask(cluster, "status")
        assert (status.code, status.document["checkpoints"]["protected"]) == (0, count)
        assert status.document["shards"]["total"] == stored.shards
        removed = ask(cluster, "rm", "--yes", *[f"many/step-{i:04}" for i in range(500)])
        assert len(removed.document["deleted"]) == 500
        assert len(ask(cluster, "ls").document["checkpoints"]) == count - 500


def write_versions(cluster: BreakableCluster, raw: bytes, count: int) -> None:
    """Puts `count` more versions with the shards of the manifest `raw` into the stores of stopped
    nodes, as if each had been published."""
    pki = cluster.directory / "pki"
    signer = Signer.from_pem((pki / "client.pem").read_bytes(), (pki / "client.key").read_bytes())
    manifest = documents.decode(raw, cluster="local")
    assert isinstance(manifest, documents.Manifest)
    stores = [str(cluster.store_path(node.id)) for node in cluster.local.nodes()]
    for number in range(1, count + 1):
        version = documents.encode(
            structs.replace(
                manifest,
                name=f"many/step-{number:04}",
                order=manifest.order + number,
                nonce=secrets.token_hex(16),
            )
        )
        version_id, signature = documents.document_id(version), signer.sign(version)
        for store in stores:
            Path(layout.signature_path(store, version_id)).write_bytes(signature)
            Path(layout.document_path(store, version_id)).write_bytes(version)
