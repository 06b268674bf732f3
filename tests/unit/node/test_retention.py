"""The job that applies retention rules: what it asks, what it writes, what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.node.small_cluster import SmallCluster, small_cluster

from ckptd.core import limits
from ckptd.core.retention import RetentionRule
from ckptd.node.retention import answer
from ckptd.wire import messages

LAST_3 = RetentionRule(keep_last=3)
DAY_S = 86_400.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SmallCluster]:
    with small_cluster(tmp_path) as made:
        yield made


def overwritten(cluster: SmallCluster, count: int) -> list[str]:
    """So many protected versions of one name."""
    return [
        cluster.store("run/latest", f"content {cluster.next_order()}".encode() * 50)
        for _ in range(count)
    ]


def live_ids(cluster: SmallCluster, node: str = "pi1") -> list[str]:
    return [version.id for version in cluster.live(node)]


def test_versions_beyond_the_rule_are_dropped_on_all_nodes_at_once(cluster: SmallCluster) -> None:
    job = cluster.retention(LAST_3)
    versions = overwritten(cluster, 4)
    cluster.run(job.step())
    for node in ("pi1", "pi2", "pi3", "mac"):
        assert live_ids(cluster, node) == versions[1:]
    (tombstone,) = cluster["pi1"].records.catalogue.tombstones_of(versions[0])
    assert (tombstone.reason, tombstone.justified_by) == ("retention", versions[-1])
    header = cluster["pi1"].records.catalogue.version(versions[0])
    assert header is not None
    assert cluster["pi1"].records.catalogue.is_dead_content("run/latest", header.content_id)
    assert job.progress().last_error == ""


def test_a_node_that_does_not_answer_is_not_waited_for(cluster: SmallCluster) -> None:
    versions = overwritten(cluster, 4)
    cluster.down.add("pi3")
    cluster.run(cluster.retention(LAST_3).step())
    assert live_ids(cluster, "pi2") == versions[1:]
    assert live_ids(cluster, "pi3") == versions


def test_two_hundred_overwrites_with_the_rules_applied_now_and_then(cluster: SmallCluster) -> None:
    job = cluster.retention(LAST_3)
    cluster.run(job.step())
    versions: list[str] = []
    for burst in (1, 7, 2, 30, 3):  # also far more than half of what is live at once
        versions += overwritten(cluster, burst)
        cluster.clock.advance(1)
        cluster.run(job.step())
        assert live_ids(cluster) == versions[-3:]


def test_what_is_kept_is_not_protected_then_nothing_goes(cluster: SmallCluster) -> None:
    versions = overwritten(cluster, 3)
    cluster.down.add("pi2")
    versions.append(cluster.store("run/latest", b"new" * 50, on=("pi1",)))
    job = cluster.retention(LAST_3)
    cluster.run(job.step())
    assert live_ids(cluster) == versions
    cluster.down.clear()
    cluster.clock.advance(limits.QUANTITY_MAX_S)
    cluster.run(job.step())
    assert live_ids(cluster) == versions, "three are protected, the newest is not"
    cluster["pi3"].put(b"new" * 50)
    cluster.clock.advance(limits.QUANTITY_MAX_S)
    cluster.run(job.step())
    assert live_ids(cluster) == versions[1:]


def test_nobody_is_asked_as_long_as_nothing_would_go(cluster: SmallCluster) -> None:
    overwritten(cluster, 3)
    cluster.asked.clear()
    cluster.run(cluster.retention(LAST_3).step())
    assert cluster.asked == []


def test_only_the_kept_are_asked_about_when_they_are_protected(cluster: SmallCluster) -> None:
    versions = overwritten(cluster, 6)
    cluster.asked.clear()
    cluster.run(cluster.retention(LAST_3).step())
    asked = [message for _, message in cluster.asked if isinstance(message, messages.Inventory)]
    wanted = {bytes.fromhex(version) for version in versions[3:]}
    assert asked and all(set(message.versions) == wanted for message in asked)


def test_a_coordinator_that_is_not_the_steward_does_nothing(cluster: SmallCluster) -> None:
    versions = overwritten(cluster, 5)
    cluster.run(cluster.retention(LAST_3, is_steward=lambda: False).step())
    cluster.run(cluster.retention().step())
    assert live_ids(cluster) == versions


def test_more_than_half_of_what_was_there_before_waits_for_a_confirmation(
    cluster: SmallCluster,
) -> None:
    versions = overwritten(cluster, 7)
    job = cluster.retention(LAST_3)
    cluster.run(job.step())
    assert live_ids(cluster) == versions
    assert job.progress().last_error.startswith("the rules drop 4 of 7 live versions")
    assert not cluster.run(job.apply()).done
    told = cluster.run(job.apply(confirmed=True))
    assert told.done and not told.waits
    assert live_ids(cluster) == versions[4:]
    assert job.progress().last_error == ""


def test_what_came_while_another_coordinator_applied_its_rules_is_not_taken_for_new(
    cluster: SmallCluster,
) -> None:
    steward = True
    job = cluster.retention(LAST_3, is_steward=lambda: steward)
    cluster.run(job.step())
    steward = False
    cluster.run(job.step())
    versions = overwritten(cluster, 7)
    steward = True
    cluster.run(job.step())
    assert live_ids(cluster) == versions
    assert "more than half" in job.progress().last_error


def test_a_dry_run_changes_nothing_and_says_why(cluster: SmallCluster) -> None:
    versions = overwritten(cluster, 4)
    job = cluster.retention(LAST_3)
    told = answer(cluster.run(job.apply(dry_run=True)))
    assert live_ids(cluster) == versions
    assert [(row.version.hex(), row.reason) for row in told.delete] == [
        (versions[0], "not among the newest 3")
    ]
    assert [row.version.hex() for row in told.keep] == versions[:0:-1]
    assert (told.delete_count, told.keep_count, told.waits) == (1, 3, False)


def test_answers_have_a_limit(cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PRUNE_ROWS_MAX", 2)
    monkeypatch.setattr(limits, "PRUNE_REASON_MAX", 5)
    overwritten(cluster, 7)
    told = answer(cluster.run(cluster.retention(LAST_3).apply(dry_run=True)))
    assert len(told.delete) == len(told.keep) == 2
    assert (told.delete_count, told.keep_count, told.waits) == (4, 3, True)
    assert {row.reason for row in told.keep} == {"among"}


def test_pins_are_heeded(cluster: SmallCluster) -> None:
    versions = overwritten(cluster, 4)
    cluster.pin(versions[0])
    cluster.run(cluster.retention(LAST_3).step())
    assert live_ids(cluster) == versions


def test_ages_are_measured_by_the_clocks_of_most(cluster: SmallCluster) -> None:
    versions = [
        cluster.store("run/a", b"1" * 9, created="2026-12-30T00:00:00Z"),
        cluster.store("run/b", b"2" * 9, created="2027-01-14T00:00:00Z"),
    ]  # the wall clock says 2027-01-15
    rule = RetentionRule(keep_within_s=30 * DAY_S)
    cluster.clock.wall += 3650 * DAY_S
    for node in ("pi1", "pi2", "pi3"):
        cluster.skew_s[node] = -3650 * DAY_S
    cluster.run(cluster.retention(rule).step())
    assert live_ids(cluster) == versions
    cluster.skew_s.clear()
    cluster.run(cluster.retention(rule).step())
    assert live_ids(cluster) == versions[1:]


def test_what_a_policy_dropped_is_justified_anew_when_somebody_removes_what_justified_it(
    cluster: SmallCluster,
) -> None:
    versions = overwritten(cluster, 4)
    job = cluster.retention(LAST_3)
    cluster.run(job.step())
    cluster.remove(versions[3])
    fate = cluster.fate(versions[0])
    assert fate is not None and fate.waits_in_vain
    cluster.run(job.step())
    assert cluster.fate(versions[0], "pi2") is not None
    fate = cluster.fate(versions[0])
    assert fate is not None and fate.if_any == {versions[2]}
