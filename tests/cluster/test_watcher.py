"""Watching: real daemons, files written as trainers and copying tools write them.

What a test may say of a cluster stands in `tests.cluster.watched`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.kill_fixtures import (
    DEADLINE_S,
    breakable_cluster,
    make_checkpoint,
    wait_until,
    write_safetensors,
)
from tests.cluster.slow_copy import slow_copy
from tests.cluster.watched import PROTECTED_S, Watched, put, watched_cluster
from tests.layouts import weight_index


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Three workers and a coordinator for this module; who kills, brings back."""
    with watched_cluster(tmp_path_factory.mktemp("watched") / "local", count=3) as running:
        yield running


# -- copied slowly


def numbered_checkpoint(directory: Path) -> Path:
    """One that shows at every point of a copy in the order of its names that something is missing:
    of any other the time of quiet tells, and a copy may rest for longer on a busy machine."""
    directory.mkdir()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        content = random.Random(f"{directory}{name}").randbytes(3_000_000)
        write_safetensors(directory / name, {name: content})
    (directory / "model.safetensors.index.json").write_bytes(weight_index(names))
    return directory


@pytest.mark.parametrize("in_place", [False, True], ids=["plain", "inplace"])
def test_nothing_is_stored_before_a_slow_copy_is_whole(
    watched: Watched, tmp_path: Path, in_place: bool
) -> None:
    run = f"copied{in_place:d}"
    source = numbered_checkpoint(tmp_path / "model")
    target = watched.root / run / "step-1"
    target.parent.mkdir()

    def is_whole() -> bool:
        copied = {path: target / path.name for path in source.iterdir()}
        return all(c.is_file() and c.stat().st_size == p.stat().st_size for p, c in copied.items())

    before = watched.traces()

    def is_seen_in_part() -> bool:
        waiting = watched.pending(target)
        return waiting is not None and "safetensors" in waiting["reason"]

    with slow_copy(source, target, in_place=in_place) as copy:
        wait_until(lambda: target.is_dir() and any(target.iterdir()), "the copy to begin")
        copy.send_signal(signal.SIGSTOP)  # as long as a busy machine needs to look
        try:
            wait_until(is_seen_in_part, "the part to be seen")
        finally:
            copy.send_signal(signal.SIGCONT)
        while copy.poll() is None:
            waiting = watched.pending(target)
            now = watched.traces()
            if not is_whole():  # what was seen before was seen of a part
                assert now == before, "something was stored before the copy was whole"
                if waiting is not None:
                    assert waiting["since"] and waiting["state"] == "pending"
    assert copy.returncode == 0
    ended_s = time.monotonic()
    watched.wait_protected(f"{run}/step-1")
    assert time.monotonic() - ended_s < PROTECTED_S
    assert watched.comes_back(f"{run}/step-1", source)
    assert len(watched.versions(f"{run}/step-1")) == 1


def test_the_reason_tells_file_and_size(watched: Watched, tmp_path: Path) -> None:
    target = watched.root / "reason" / "step-5"
    target.mkdir(parents=True)
    write_safetensors(tmp_path / "whole", {"weight": random.Random(1).randbytes(2_000_000)})
    whole = (tmp_path / "whole").read_bytes()
    (target / "model.safetensors").write_bytes(whole[:1_200_000])
    wait_until(lambda: watched.pending(target) is not None, "the checkpoint to be seen")
    wait_until(
        lambda: "model.safetensors has 1.2 of 2.0 MB" in (watched.pending(target) or {})["reason"],
        "the reason to be told",
    )
    assert watched.status()["checkpoints"]["pending"] == 1
    row = watched.rows("reason")["reason/step-5"]
    assert (row["state"], row["version"], row["step"]) == ("pending", "", 5)
    assert watched.metrics()["ckptd_pending_checkpoints"] == 1
    assert watched.metrics()["ckptd_unprotected_seconds"] > 0
    (target / "model.safetensors").write_bytes(whole)
    watched.wait_protected("reason/step-5")
    assert watched.rows("reason")["reason/step-5"]["step"] == 5
    # The coordinator is told by the same nodes, and may hear it a moment later.
    wait_until(lambda: watched.metrics()["ckptd_pending_checkpoints"] == 0, "it to be at rest")
    assert watched.metrics()["ckptd_unprotected_seconds"] == 0
    assert watched.metrics()["ckptd_checkpoint_time_to_protected_seconds_count"] >= 1


def test_one_that_waits_blocks_no_other(watched: Watched, tmp_path: Path) -> None:
    broken = watched.root / "aside" / "step-1"
    broken.mkdir(parents=True)
    (broken / "model.safetensors").write_bytes(b"\x10")
    wait_until(lambda: watched.pending(broken) is not None, "the broken one to be seen")
    put(make_checkpoint(tmp_path / "good", "aside"), watched.root / "aside" / "step-2")
    watched.wait_protected("aside/step-2")
    assert watched.pending(broken) is not None
    shutil.rmtree(broken)
    wait_until(lambda: watched.pending(broken) is None, "the broken one to be forgotten")


# -- overwritten, deleted, brought back


def test_the_last_of_many_overwrites_is_never_skipped(watched: Watched, tmp_path: Path) -> None:
    name, latest = "often/latest", watched.root / "often" / "latest"
    for number in range(15):
        fresh = make_checkpoint(tmp_path / "fresh", f"often-{number}", size=200_000)
        if number % 2:  # in place, file by file
            shutil.copytree(fresh, latest, dirs_exist_ok=True)
            shutil.rmtree(fresh)
        else:  # renamed into place
            if latest.exists():
                os.rename(latest, tmp_path / "old")
                shutil.rmtree(tmp_path / "old")
            put(fresh, latest)
    expected = make_checkpoint(tmp_path / "last", "often-14", size=200_000)
    watched.wait_protected(name)
    # That nothing is pending may be so because the last change was not seen yet.
    wait_until(
        lambda: not watched.status()["pending"] and watched.comes_back(name, expected),
        "the last one to be stored",
    )
    watched.wait_protected(name)
    before = watched.traces()
    watched.rest()
    assert watched.traces() == before


def test_modified_in_place_with_old_times_only_what_changed_is_sent(
    watched: Watched, tmp_path: Path
) -> None:
    name, target = "inplace/step-1", watched.root / "inplace" / "step-1"
    put(make_checkpoint(tmp_path / "model", "inplace", size=4_000_000), target)
    watched.wait_protected(name)
    sent = watched.received()
    assert sent >= 4_000_000
    seen = (target / "optimizer.pt").stat()
    with open(target / "optimizer.pt", "r+b") as file:
        file.write(b"other bytes")
    os.utime(target / "optimizer.pt", ns=(seen.st_atime_ns, seen.st_mtime_ns))
    wait_until(lambda: len(watched.versions(name)) == 2, "a new version", timeout_s=PROTECTED_S)
    watched.wait_protected(name)
    assert watched.comes_back(name, target)
    assert 0 < watched.received() - sent <= 256 * 1024
    before = watched.traces()
    watched.rest()
    assert watched.traces() == before


def test_renamed_it_is_a_checkpoint_of_the_new_name_and_no_byte_is_sent(
    watched: Watched, tmp_path: Path
) -> None:
    run = watched.root / "renamed"
    put(make_checkpoint(tmp_path / "model", "renamed", size=400_000), run / "step-1")
    watched.wait_protected("renamed/step-1")
    old, sent = watched.versions("renamed/step-1"), watched.received()
    os.rename(run / "step-1", run / "step-2")
    watched.wait_protected("renamed/step-2")
    assert watched.comes_back("renamed/step-2", run / "step-2")
    before = watched.traces()
    watched.rest()
    assert watched.traces() == before
    assert before[2] == sent
    assert watched.versions("renamed/step-1") == old
    assert watched.is_protected("renamed/step-1")


def test_constant_change_is_read_consistently_after_settle_max(tmp_path: Path) -> None:
    # Its own cluster: what changes must hold still for as long as a store takes, and not settle.
    settings = ("watch.settle=3s", "watch.settle_max=4s", "watch.retry=1s")
    cluster = Watched(tmp_path / "local", count=2, settings=settings, coordinator=True)
    target = cluster.root / "restless" / "step-1"
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            write_safetensors(target / "next", {"weight": f"{number:08}".encode() * 1000})
            os.rename(target / "next", target / "model.safetensors")
            stop.wait(1.5)

    writer = threading.Thread(target=write)
    try:
        cluster.up()
        target.mkdir(parents=True)
        writer.start()
        cluster.wait_protected("restless/step-1", timeout_s=DEADLINE_S)
        assert writer.is_alive()
        stop.set()
        writer.join()
        # That nothing is pending may be so because the last change was not seen yet.
        wait_until(
            lambda: (
                not cluster.status()["pending"] and cluster.comes_back("restless/step-1", target)
            ),
            "the last one to be stored",
        )
    finally:
        stop.set()
        cluster.kill("coordinator", *cluster.running())


def test_deleted_while_being_read(watched: Watched, tmp_path: Path) -> None:
    target = watched.root / "gone" / "step-1"
    put(make_checkpoint(tmp_path / "big", "gone", size=40_000_000), target)
    wait_until(
        lambda: (
            "stored" in (watched.pending(target) or {"reason": ""})["reason"]
            or watched.is_protected("gone/step-1")
        ),
        "the store to begin",
    )
    shutil.rmtree(target)
    wait_until(lambda: watched.pending(target) is None, "it to be forgotten")
    again = make_checkpoint(tmp_path / "again", "gone-again", size=400_000)
    shutil.copytree(again, target)
    wait_until(
        lambda: (
            bool(watched.stored_events("gone/step-1"))
            and watched.is_protected("gone/step-1")
            and watched.comes_back("gone/step-1", again)
        ),
        "the one that was made anew to be protected",
    )
    before = watched.traces()
    watched.rest()
    assert watched.traces() == before


def test_the_same_content_made_anew_is_not_stored_again(watched: Watched, tmp_path: Path) -> None:
    name, target = "anew/step-7", watched.root / "anew" / "step-7"
    source = make_checkpoint(tmp_path / "model", "anew", size=400_000)
    shutil.copytree(source, target)
    watched.wait_protected(name)
    before = watched.traces()
    shutil.rmtree(target)
    shutil.copytree(source, target)
    watched.rest()
    assert watched.traces() == before
    os.utime(target / "optimizer.pt")
    watched.rest()
    assert watched.traces() == before


def test_what_is_restored_into_the_root_is_not_stored_again(
    watched: Watched, tmp_path: Path
) -> None:
    name, target = "back/step-7", watched.root / "back" / "step-7"
    put(make_checkpoint(tmp_path / "model", "back", size=400_000), target)
    watched.wait_protected(name)
    before = watched.traces()
    shutil.rmtree(target)
    assert watched.restore(name, target).verified
    watched.rest()
    assert watched.traces() == before


def test_removed_on_purpose_stays_removed_until_it_is_stored_by_hand(
    watched: Watched, tmp_path: Path
) -> None:
    name, target = "removed/step-1", watched.root / "removed" / "step-1"
    put(make_checkpoint(tmp_path / "model", "removed", size=400_000), target)
    watched.wait_protected(name)
    assert watched.command("rm", name, "--yes").code == 0
    before = watched.traces()
    os.utime(target / "optimizer.pt")
    watched.rest()
    assert watched.traces() == before
    assert watched.versions(name) == []
    assert watched.command("store", target).document["name"] == name
    assert watched.is_protected(name)


def test_a_marker_skips_the_settling_and_is_no_part(watched: Watched, tmp_path: Path) -> None:
    name, target = "marked/step-1", watched.root / "marked" / "step-1"
    source = make_checkpoint(tmp_path / "model", "marked", size=400_000)
    shutil.copytree(source, target)
    (target / ".ckptd-done").touch()
    watched.wait_protected(name)
    assert watched.comes_back(name, source)


def test_steps_and_metrics_come_from_the_trainer(watched: Watched, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "told", size=400_000)
    history = [{"step": 500, "eval_loss": 0.25}]
    (source / "trainer_state.json").write_text(
        json.dumps({"global_step": 500, "log_history": history})
    )
    put(source, watched.root / "told" / "checkpoint-500")
    watched.wait_protected("told/checkpoint-500")
    row = watched.rows("told")["told/checkpoint-500"]
    assert row["step"] == 500
    assert row["metrics"]["eval_loss"] == 0.25


# -- the coordinator's own deaths


def test_a_restarted_coordinator_stores_nothing_again(watched: Watched, tmp_path: Path) -> None:
    name = "restarted/step-1"
    put(make_checkpoint(tmp_path / "model", "restarted", size=400_000), watched.root / name)
    watched.wait_protected(name)
    before = watched.traces()
    watched.kill("coordinator")
    watched.up()
    watched.rest()
    assert watched.traces() == before


def test_a_wiped_coordinator_knows_everything_again(watched: Watched, tmp_path: Path) -> None:
    name = "wiped/step-1"
    put(make_checkpoint(tmp_path / "model", "wiped", size=400_000), watched.root / name)
    watched.wait_protected(name)
    before = watched.traces()
    listed = {row["version"] for row in watched.command("ls").document["checkpoints"]}
    watched.kill("coordinator")
    shutil.rmtree(watched.directory / "coordinator" / "state")
    watched.up()
    watched.rest()
    assert watched.traces() == before
    assert {row["version"] for row in watched.command("ls").document["checkpoints"]} == listed
    put(make_checkpoint(tmp_path / "next", "wiped-2", size=400_000), watched.root / "wiped/step-2")
    watched.wait_protected("wiped/step-2")


def test_killed_in_mid_store_it_sends_only_what_is_missing(
    watched: Watched, tmp_path: Path
) -> None:
    name = "killed/step-1"
    source = make_checkpoint(tmp_path / "model", "killed", size=60_000_000)
    before = len(watched.all_shards())
    put(source, watched.root / name)
    wait_until(lambda: len(watched.all_shards()) > before + 8, "some shards to be sent")
    watched.kill("coordinator")
    sent = len(watched.all_shards()) - before
    assert not watched.rows("killed"), "it was stored before it could be killed"
    watched.up()
    watched.wait_protected(name)
    assert watched.comes_back(name, watched.root / name)
    wait_until(lambda: bool(watched.stored_events(name)), "the coordinator to note it")
    (stored,) = watched.stored_events(name)
    assert stored["bytes_sent"] <= stored["bytes"] - (sent - 4) * 256 * 1024
    assert len(watched.versions(name)) == 1


def test_nodes_that_come_back_are_used(watched: Watched, tmp_path: Path) -> None:
    name, target = "nobody/step-1", watched.root / "nobody" / "step-1"
    watched.kill(*watched.running())
    put(make_checkpoint(tmp_path / "model", "nobody", size=400_000), target)
    described = watched.local.describe()["coordinator"]

    def health() -> int:
        try:
            return int(
                urllib.request.urlopen(
                    described["metrics_url"].replace("metrics", "healthz"), timeout=5
                ).status
            )
        except urllib.error.HTTPError as error:
            return error.code

    wait_until(lambda: health() == 503, "the coordinator to notice")
    watched.up()
    # One node may have been there alone when it was tried: then repair makes the second copies.
    watched.wait_protected(name, timeout_s=60)
    assert health() == 200


# -- staying awake


def test_the_machine_is_kept_awake_as_long_as_something_is_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    tool = "caffeinate" if sys.platform == "darwin" else "systemd-inhibit"
    holds = "sleep 600" if sys.platform == "darwin" else "cat"
    (tools / tool).write_text(f'#!/bin/sh\necho "$$ $*" >> "{tmp_path}/calls"\nexec {holds}\n')
    (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    settings = ["watch.settle=100ms", "watch.retry=1s"]
    with breakable_cluster(
        tmp_path / "local", count=2, settings=settings, coordinator=True
    ) as cluster:
        calls = tmp_path / "calls"
        target = cluster.local.watch_root / "run" / "step-1"
        target.mkdir(parents=True)
        write_safetensors(tmp_path / "whole", {"weight": bytes(100_000)})
        whole = (tmp_path / "whole").read_bytes()
        (target / "model.safetensors").write_bytes(whole[:50_000])
        wait_until(calls.exists, "the tool to be started")
        pid = int(calls.read_text().split()[0])
        assert _lives(pid)
        (target / "model.safetensors").write_bytes(whole)
        wait_until(lambda: not _lives(pid), "the machine to be let sleep")
        (target / "model.safetensors").write_bytes(whole[:50_000])
        wait_until(lambda: len(calls.read_text().splitlines()) == 2, "the tool to be started")
        pid = int(calls.read_text().splitlines()[1].split()[0])
        os.kill(cluster.pid("coordinator"), signal.SIGKILL)
        if sys.platform != "darwin":
            wait_until(lambda: not _lives(pid), "the tool to end with the coordinator")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{pid}/stat").exists() or _state(pid) != "Z"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
