"""Garbage collection of a worker: what goes, when, and all that keeps it from going."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.unit.node.small_cluster import GRACE_S, SmallCluster, small_cluster

from ckptd.core import limits
from ckptd.errors import DocumentRefused
from ckptd.store.durable import NewFile

ONE, TWO, SHARED, NEW = (letter * 1000 for letter in (b"1", b"2", b"s", b"n"))
SOON_S = 1.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SmallCluster]:
    with small_cluster(tmp_path) as made:
        yield made


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def outlive_the_grace(cluster: SmallCluster, node: str = "pi1") -> None:
    """The grace goes by after the node has noted what died, and half of the others are heard."""
    cluster[node].collect()
    cluster.clock.advance(GRACE_S)
    cluster[node].hear()
    cluster.clock.advance(SOON_S)


# -- what goes


def test_shards_of_a_removed_version_go_after_the_grace_and_shared_ones_stay(
    cluster: SmallCluster,
) -> None:
    removed = cluster.store("run/latest", ONE, SHARED)
    kept = cluster.store("run/latest", TWO, SHARED)
    cluster.remove(removed)
    pi1 = cluster["pi1"]
    outlive_the_grace(cluster)
    assert pi1.has(ONE), "nothing happens without a pass"
    assert pi1.collect() == ""
    assert not pi1.has(ONE)
    assert pi1.has(TWO) and pi1.has(SHARED)
    assert pi1.collector.progress().done_bytes == len(ONE)
    assert not Path(
        cluster.path, "pi1", "shards", digest(ONE).hex()[:2], digest(ONE).hex()
    ).exists()
    assert [version.id for version in cluster.live("pi1")] == [kept]


def test_the_manifest_of_a_dead_version_goes_with_its_shards_and_never_comes_back(
    cluster: SmallCluster,
) -> None:
    raw = cluster.manifest("run/latest", ONE)
    removed = cluster.write(raw)
    cluster.store("run/latest", TWO)
    tombstone = cluster.remove(removed)
    outlive_the_grace(cluster)
    pi1 = cluster["pi1"]
    pi1.collect()
    assert pi1.records.catalogue.version(removed) is None
    assert not Path(cluster.path, "pi1", "catalogue", f"{removed}.json").exists()
    with pytest.raises(DocumentRefused, match="collected"):
        pi1.records.put(raw, cluster.client.sign(raw))
    pi1.restart()
    assert removed not in pi1.records.catalogue and tombstone in pi1.records.catalogue
    with pytest.raises(DocumentRefused, match="collected"):
        pi1.records.put(raw, cluster.client.sign(raw))


def test_nodes_that_have_dropped_a_manifest_and_those_that_have_not_have_equal_catalogues(
    cluster: SmallCluster,
) -> None:
    removed = cluster.store("run/latest", ONE)
    cluster.store("run/latest", TWO)
    cluster.remove(removed)
    outlive_the_grace(cluster)
    cluster["pi1"].collect()
    assert removed not in cluster["pi1"].records.catalogue
    assert removed in cluster["pi2"].records.catalogue
    assert cluster["pi1"].records.digest() == cluster["pi2"].records.digest()


def test_shards_that_no_manifest_ever_named_go_after_the_grace(cluster: SmallCluster) -> None:
    cluster["pi1"].put(ONE)  # a store that was broken off
    cluster.store("run/latest", TWO)
    outlive_the_grace(cluster)
    cluster["pi1"].collect()
    assert not cluster["pi1"].has(ONE) and cluster["pi1"].has(TWO)


def test_a_node_without_shards_drops_manifests_alone(cluster: SmallCluster) -> None:
    removed = cluster.store("run/latest", ONE)
    cluster.store("run/latest", TWO)
    cluster.remove(removed)
    outlive_the_grace(cluster, "mac")
    cluster.mac.collect()
    assert removed not in cluster.mac.records.catalogue


def test_of_versions_that_die_one_after_the_other_several_go_in_one_pass(
    cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.store("run/latest", NEW)
    removed = [cluster.store("run/latest", f"old {n}".encode() * 100) for n in range(20)]
    pi1 = cluster["pi1"]
    for version in removed:
        cluster.remove(version)
        pi1.collect()
        cluster.clock.advance(SOON_S)
    cluster.clock.advance(GRACE_S - len(removed) * SOON_S)
    passes: list[int] = []
    drop = pi1.records.drop

    def counted(version_ids: Collection[str], protected: Collection[str]) -> list[str]:
        passes.append(len(version_ids))
        return drop(version_ids, protected)

    monkeypatch.setattr(pi1.records, "drop", counted)
    for _ in range(2 * len(removed)):
        pi1.hear()
        pi1.collect()
        cluster.clock.advance(SOON_S)
    assert sum(passes) == len(removed)
    assert len(passes) <= 2 * len(removed) * SOON_S / (GRACE_S / 16) + 1
    assert pi1.has(NEW) and len(pi1.shards) == 1


# -- the grace


def test_nothing_goes_within_the_grace_so_that_undelete_works(cluster: SmallCluster) -> None:
    removed = cluster.store("run/latest", ONE)
    cluster.store("run/latest", TWO)
    cluster.clock.advance(10 * GRACE_S)  # it was stored long ago
    cluster.remove(removed)
    pi1 = cluster["pi1"]
    pi1.collect()
    cluster.clock.advance(GRACE_S - SOON_S)
    pi1.hear()
    pi1.collect()
    assert pi1.has(ONE) and removed in pi1.records.catalogue


def test_a_shard_that_a_store_wants_again_stays_another_grace(cluster: SmallCluster) -> None:
    removed = cluster.store("run/latest", ONE)
    cluster.store("run/latest", TWO)
    cluster.remove(removed)
    pi1 = cluster["pi1"]
    pi1.collect()
    cluster.clock.advance(GRACE_S / 2)
    assert pi1.shards.touch(digest(ONE))
    cluster.clock.advance(GRACE_S / 2)
    pi1.hear()
    cluster.clock.advance(SOON_S)
    pi1.collect()
    assert removed not in pi1.records.catalogue
    assert pi1.has(ONE)
    cluster.clock.advance(GRACE_S)
    pi1.hear()
    cluster.clock.advance(SOON_S)
    pi1.collect()
    assert not pi1.has(ONE)


def test_a_restart_begins_the_grace_anew(cluster: SmallCluster) -> None:
    removed = cluster.store("run/latest", ONE)
    cluster.store("run/latest", TWO)
    cluster.remove(removed)
    outlive_the_grace(cluster)
    pi1 = cluster["pi1"]
    pi1.restart()
    pi1.hear()
    pi1.collect()
    assert pi1.has(ONE)
    outlive_the_grace(cluster)
    pi1.collect()
    assert not pi1.has(ONE)


# -- hearing the others


def test_nothing_goes_before_half_of_the_others_were_heard_after_the_grace(
    cluster: SmallCluster,
) -> None:
    removed = cluster.store("run/latest", ONE)
    cluster.store("run/latest", TWO)
    cluster.remove(removed)
    pi1 = cluster["pi1"]
    assert pi1.collect() == "half of the other workers must have been heard first"
    pi1.hear()
    cluster.clock.advance(GRACE_S + SOON_S)
    pi1.collect()
    assert pi1.has(ONE), "what was heard before the grace was over does not count"
    pi1.hear("mac")
    pi1.collect()
    assert pi1.has(ONE), "a coordinator is no worker"
    pi1.hear("pi3")
    pi1.collect()
    assert not pi1.has(ONE)


def test_a_node_that_never_heard_another_one_removes_nothing(cluster: SmallCluster) -> None:
    pi1 = cluster["pi1"]
    pi1.put(ONE)
    cluster.clock.advance(3 * GRACE_S)
    assert pi1.collect() == "half of the other workers must have been heard first"
    assert pi1.has(ONE)


def test_a_shard_waits_for_its_own_grace_to_be_followed_by_an_exchange(
    cluster: SmallCluster,
) -> None:
    removed = cluster.store("run/latest", ONE)
    cluster.store("run/latest", TWO)
    cluster.remove(removed)
    outlive_the_grace(cluster)
    pi1 = cluster["pi1"]
    assert pi1.shards.touch(digest(ONE))
    cluster.clock.advance(GRACE_S + SOON_S)
    pi1.collect()
    assert pi1.has(ONE), "its grace is over, and nobody was heard since"


# -- what is needed


def test_a_live_manifest_that_becomes_known_late_keeps_its_shards(cluster: SmallCluster) -> None:
    pi1 = cluster["pi1"]
    pi1.put(ONE)
    outlive_the_grace(cluster)
    cluster.store("run/latest", ONE, on=(), manifest_on=("pi1",))
    pi1.collect()
    assert pi1.has(ONE)


def test_a_manifest_that_arrives_in_the_middle_of_a_pass_keeps_its_shards(
    cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    pi1 = cluster["pi1"]
    pi1.put(ONE)
    outlive_the_grace(cluster)
    remove = pi1.shards.remove

    def late(shard: bytes, *, untouched_since: float) -> int:
        cluster.store("run/latest", ONE, on=(), manifest_on=("pi1",))
        return remove(shard, untouched_since=untouched_since)

    monkeypatch.setattr(pi1.shards, "remove", late)
    pi1.collect()
    assert pi1.has(ONE)


def test_whoever_is_told_that_a_shard_is_here_finds_it_after_the_pass(
    cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = cluster.store("run/latest", ONE)
    cluster.store("run/latest", TWO)
    cluster.remove(version)
    outlive_the_grace(cluster)
    pi1 = cluster["pi1"]
    remove = pi1.shards.remove

    def confirmed_first(shard: bytes, *, untouched_since: float) -> int:
        assert pi1.shards.confirm([(digest(ONE), len(ONE))]) == [True]
        return remove(shard, untouched_since=untouched_since)

    monkeypatch.setattr(pi1.shards, "remove", confirmed_first)
    pi1.collect()
    assert pi1.has(ONE)


def test_a_commit_touches_what_it_confirms(cluster: SmallCluster) -> None:
    version = cluster.store("run/latest", ONE)
    cluster.clock.advance(7)
    pi1 = cluster["pi1"]
    assert pi1.records.confirm(version) == b"\x01"
    assert pi1.shards.touched_at(digest(ONE)) == cluster.clock.now_s


def test_a_shard_that_is_coming_in_anew_is_left_alone(
    cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    pi1 = cluster["pi1"]
    pi1.put(ONE)
    outlive_the_grace(cluster)
    incoming = pi1.shards.begin(digest(ONE), len(ONE))
    incoming.write(memoryview(ONE))
    publish = NewFile.publish

    def collected_afterwards(*arguments: Any, **named: Any) -> None:
        monkeypatch.undo()
        publish(*arguments, **named)  # the file has its name, and the index has the old entry
        pi1.collect()

    monkeypatch.setattr(NewFile, "publish", collected_afterwards)
    incoming.commit()
    assert pi1.has(ONE)
    with pi1.shards.open_read(digest(ONE)) as reader:
        assert reader.read(len(ONE), 0) == ONE


# -- doubt


def test_a_document_of_a_newer_version_stops_it(cluster: SmallCluster) -> None:
    removed = cluster.store("run/latest", ONE)
    cluster.store("run/latest", TWO)
    cluster.remove(removed)
    raw = b'{"cluster":"home","format":7,"kind":"lease","order":3}'
    cluster["pi1"].records.put(raw, cluster.client.sign(raw))
    outlive_the_grace(cluster)
    assert "newer version" in cluster["pi1"].collect()
    assert cluster["pi1"].has(ONE)


def test_a_document_that_was_not_admitted_at_the_start_stops_it(cluster: SmallCluster) -> None:
    removed = cluster.store("run/latest", ONE)
    live = cluster.store("run/latest", TWO)
    cluster.remove(removed)
    path = Path(cluster.path, "pi1", "catalogue", f"{live}.sig")
    path.write_bytes(b"not signed by anybody")
    pi1 = cluster["pi1"]
    pi1.restart()
    outlive_the_grace(cluster)
    assert "1 documents cannot be read" in pi1.collect()
    assert pi1.has(ONE) and pi1.has(TWO)


def test_a_full_catalogue_stops_it(cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = cluster.store("run/latest", ONE)
    cluster.store("run/latest", TWO)
    cluster.remove(removed)
    outlive_the_grace(cluster)
    pi1 = cluster["pi1"]
    monkeypatch.setattr(limits, "CATALOGUE_DOCUMENTS_MAX", len(pi1.records.catalogue))
    assert "catalogue is full" in pi1.collect()
    assert pi1.has(ONE)


def test_a_live_manifest_that_cannot_be_read_stops_it(cluster: SmallCluster) -> None:
    removed = cluster.store("run/latest", ONE)
    live = cluster.store("run/latest", TWO)
    cluster.remove(removed)
    outlive_the_grace(cluster)
    path = Path(cluster.path, "pi1", "catalogue", f"{live}.json")
    path.write_bytes(b"{}")
    pi1 = cluster["pi1"]
    assert "cannot be read" in pi1.collect()
    assert "damaged" in pi1.collect()
    assert pi1.has(ONE) and pi1.has(TWO)
    pi1.restart()
    outlive_the_grace(cluster)
    assert "damaged" in pi1.collect(), "a restart does not make it forget what it has lost"
    assert pi1.has(TWO)
    raw, signature = cluster["pi2"].records.get(live) or (b"", b"")
    pi1.records.put(raw, signature)
    outlive_the_grace(cluster)
    assert pi1.collect() == ""
    assert pi1.has(TWO) and not pi1.has(ONE)


def test_a_manifest_that_only_was_read_wrong_stops_it_until_it_is_read_again(
    cluster: SmallCluster,
) -> None:
    removed = cluster.store("run/latest", ONE)
    live = cluster.store("run/latest", TWO)
    cluster.remove(removed)
    outlive_the_grace(cluster)
    pi1 = cluster["pi1"]
    path = Path(cluster.path, "pi1", "catalogue", f"{live}.json")
    right = path.read_bytes()
    path.write_bytes(b"as it was read")
    assert "cannot be read" in pi1.collect()
    Path(cluster.path, "pi1", "quarantine", f"{live}.json.0").write_bytes(right)
    outlive_the_grace(cluster)  # nobody brings it
    assert pi1.collect() == ""
    assert path.read_bytes() == right
    assert pi1.has(TWO) and not pi1.has(ONE)


def test_a_dead_manifest_that_must_be_kept_and_cannot_be_read_stops_it(
    cluster: SmallCluster,
) -> None:
    old = cluster.store("run/latest", ONE)
    new = cluster.store("run/latest", NEW)
    cluster.drop(old, by=new)
    cluster.down.add("pi2")  # so that it waits for what justifies it
    Path(cluster.path, "pi1", "catalogue", f"{old}.json").write_bytes(b"{}")
    outlive_the_grace(cluster)
    pi1 = cluster["pi1"]
    assert "cannot be read" in pi1.collect()
    assert pi1.has(ONE)
    cluster.down.clear()
    pi1.collect()
    assert not pi1.has(ONE), "it need not be kept any more"


# -- what a policy dropped


def test_what_a_policy_dropped_goes_once_what_justifies_it_is_confirmed_protected(
    cluster: SmallCluster,
) -> None:
    old = cluster.store("run/latest", ONE)
    new = cluster.store("run/latest", NEW)
    cluster.drop(old, by=new)
    outlive_the_grace(cluster)
    pi1 = cluster["pi1"]
    cluster.down.add("pi2")
    pi1.collect()
    assert pi1.has(ONE), "the other copy of what justifies it is on a node that does not answer"
    cluster.down.clear()
    pi1.collect()
    assert not pi1.has(ONE) and pi1.has(NEW)


def test_what_is_presumed_of_absent_nodes_justifies_nothing(cluster: SmallCluster) -> None:
    old = cluster.store("run/latest", ONE, on=("pi1", "pi2"))
    new = cluster.store("run/latest", NEW, on=("pi2",))
    cluster.drop(old, by=new)
    outlive_the_grace(cluster)
    cluster["pi1"].collect()
    assert cluster["pi1"].has(ONE)


def test_a_pin_that_a_policy_did_not_know_stops_it(cluster: SmallCluster) -> None:
    old = cluster.store("run/latest", ONE)
    new = cluster.store("run/latest", NEW)
    cluster.drop(old, by=new)
    cluster.pin(old)
    outlive_the_grace(cluster)
    cluster["pi1"].collect()
    assert cluster["pi1"].has(ONE)


def test_a_pin_that_arrives_during_the_pass_stops_it(
    cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = cluster.store("run/latest", ONE)
    new = cluster.store("run/latest", NEW)
    cluster.drop(old, by=new)
    outlive_the_grace(cluster)
    pi1 = cluster["pi1"]
    monkeypatch.setattr(pi1.records, "doubt", lambda: cluster.pin(old) and "")
    pi1.collect()
    assert pi1.has(ONE)


def test_a_removal_that_arrives_while_shards_are_marked_stops_the_pass(
    cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what justified the end of an old version: then the old one is wanted again."""
    old = cluster.store("run/latest", ONE)
    new = cluster.store("run/latest", NEW)
    cluster.store("run/latest", TWO, on=("pi1",))
    cluster.drop(old, by=new)
    outlive_the_grace(cluster)
    pi1 = cluster["pi1"]
    digests = pi1.shards.digests

    def removed_meanwhile() -> Iterator[bytes]:
        cluster.remove(new)
        return digests()

    monkeypatch.setattr(pi1.shards, "digests", removed_meanwhile)
    pi1.collect()
    assert pi1.has(ONE) and old in pi1.records.catalogue


@pytest.mark.parametrize("before", [1, 2])
def test_a_pin_that_arrives_while_shards_are_removed_keeps_what_is_left(
    cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """And the manifest: what is left is not without a name."""
    old = cluster.store("run/latest", ONE, TWO)
    new = cluster.store("run/latest", NEW)
    cluster.drop(old, by=new)
    outlive_the_grace(cluster)
    pi1 = cluster["pi1"]
    remove = pi1.shards.remove
    removals = 0

    def late(shard: bytes, *, untouched_since: float) -> int:
        nonlocal removals
        removals += 1
        if removals == before:
            cluster.pin(old)
        return remove(shard, untouched_since=untouched_since)

    monkeypatch.setattr(pi1.shards, "remove", late)
    pi1.collect()
    assert removals == 2
    assert pi1.has(ONE) + pi1.has(TWO) == 3 - before
    assert old in pi1.records.catalogue


def test_no_manifest_is_taken_in_while_it_is_dropped(
    cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be known, and be on no disk."""
    removed = cluster.store("run/latest", ONE)
    cluster.remove(removed)
    outlive_the_grace(cluster)
    records = cluster["pi1"].records
    drop, held = records._files.drop, []

    def looked_at(version_ids: Sequence[str]) -> None:
        held.append(records._parsing.locked())
        drop(version_ids)

    monkeypatch.setattr(records._files, "drop", looked_at)
    cluster["pi1"].collect()
    assert held == [True] and removed not in records.catalogue


def test_what_was_dropped_and_waits_is_kept_when_the_disk_is_swept(cluster: SmallCluster) -> None:
    old = cluster.store("run/latest", ONE)
    cluster.drop(old, by="ee" * 32)
    for _ in range(3):
        outlive_the_grace(cluster)
        cluster["pi1"].collect()
    assert cluster["pi1"].has(ONE)
