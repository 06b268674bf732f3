"""The names that monitoring relies on, and what is counted under them."""

import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from ckptd import errors
from ckptd.core.job_names import JOB_NAMES
from ckptd.core.limits import CLUSTER_NODES_MAX
from ckptd.observe import metrics as module
from ckptd.observe.metrics import DEFINITIONS, Metrics

# Dashboards and alerts are written against exactly these.
PUBLISHED = {
    "ckptd_node_up": ("gauge", {"node"}),
    "ckptd_store_bytes": ("gauge", set()),
    "ckptd_store_capacity_bytes": ("gauge", set()),
    "ckptd_store_free_bytes": ("gauge", set()),
    "ckptd_store_read_only": ("gauge", set()),
    "ckptd_shard_transfer_bytes_total": ("counter", {"direction", "peer"}),
    "ckptd_shard_transfer_seconds": ("histogram", {"direction"}),
    "ckptd_shard_transfer_speed_bytes_per_second": ("gauge", {"direction", "peer"}),
    "ckptd_transfer_errors_total": ("counter", {"kind"}),
    "ckptd_retries_total": ("counter", {"kind"}),
    "ckptd_store_failures_total": ("counter", {"kind"}),
    "ckptd_shards_corrupt_total": ("counter", set()),
    "ckptd_scrub_oldest_verified_timestamp_seconds": ("gauge", set()),
    "ckptd_scrub_bytes_total": ("counter", set()),
    "ckptd_job_failures_total": ("counter", {"job"}),
    "ckptd_bytes_written_total": ("counter", set()),
    "ckptd_clock_skew_seconds": ("gauge", set()),
    "ckptd_certificate_expiry_timestamp_seconds": ("gauge", set()),
    "ckptd_pending_checkpoints": ("gauge", set()),
    "ckptd_checkpoint_time_to_protected_seconds": ("histogram", set()),
    "ckptd_unprotected_seconds": ("gauge", set()),
    "ckptd_unprotected_steps": ("gauge", set()),
    "ckptd_checkpoints": ("gauge", {"state"}),
    "ckptd_shards_under_replicated": ("gauge", set()),
    "ckptd_shards_unrecoverable": ("gauge", set()),
    "ckptd_repair_queue_bytes": ("gauge", set()),
    "ckptd_build_info": ("gauge", {"version", "python"}),
}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry(), version="1.2.3")


def samples(metrics: Metrics) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} is exported twice"
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((f"ckptd_{name}", frozenset(labels.items())))


def use_everything(metrics: Metrics) -> None:
    metrics.node_up("pi2", True)
    metrics.transfer("sent", "pi2", 1000, 0.5)
    metrics.sample_store(used_bytes=1, capacity_bytes=9, free_bytes=5, read_only=False)
    metrics.clock_skew("pi2", 0.25)
    metrics.expect_protection()
    metrics.sample_pending(2, 12.5, 500)
    metrics.checkpoints({"protected": 3, "pending": 1})
    metrics.repair(7, 2, 1)
    metrics.certificate_expiry(2e9)
    metrics.scrub_oldest(1e9)


def test_what_is_exported_is_exactly_what_is_published(metrics: Metrics) -> None:
    use_everything(metrics)
    text = metrics.text().decode()
    # Read from the text itself: the parser takes `_total` off the names of counters.
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert types == {name: kind for name, (kind, _) in PUBLISHED.items()}
    for (name, labels), _ in samples(metrics).items():
        family = re.sub(r"_(bucket|sum|count)$", "", name)
        assert {label for label, _ in labels} - {"le"} == PUBLISHED[family][1]
    assert {each.name: (each.type, set(each.labels)) for each in DEFINITIONS} == PUBLISHED


def test_the_registry_of_the_process_stays_untouched(metrics: Metrics) -> None:
    use_everything(metrics)
    assert not any(family.name.startswith("ckptd") for family in REGISTRY.collect())


def test_two_nodes_in_one_process_do_not_mix(metrics: Metrics) -> None:
    other = Metrics(CollectorRegistry(), version="1")
    metrics.written(7)
    assert value(metrics, "bytes_written_total") == 7
    assert value(other, "bytes_written_total") == 0


def test_counters_start_at_zero_with_every_kind(metrics: Metrics) -> None:
    for name, kinds in (
        ("transfer_errors_total", module.TRANSFER_ERROR_KINDS),
        ("retries_total", module.RETRY_KINDS),
        ("store_failures_total", module.STORE_FAILURE_KINDS),
    ):
        exported = {
            dict(labels)["kind"]: count
            for (found, labels), count in samples(metrics).items()
            if found == f"ckptd_{name}"
        }
        assert exported == dict.fromkeys(kinds, 0.0)
        assert len(kinds) == len(set(kinds))
    assert value(metrics, "shards_corrupt_total") == 0
    assert {name: value(metrics, "job_failures_total", job=name) for name in JOB_NAMES} == (
        dict.fromkeys(JOB_NAMES, 0.0)
    )
    assert value(metrics, "shard_transfer_seconds_count", direction="received") == 0


def test_every_fault_of_a_peer_or_a_store_has_a_kind_of_its_own() -> None:
    def below(parent: type[errors.CkptdError]) -> set[str]:
        return {parent.kind}.union(*(below(child) for child in parent.__subclasses__()))

    expected = below(errors.PeerError) | below(errors.NotAuthorized) | {"no_room", "medium_failed"}
    assert expected <= set(module.TRANSFER_ERROR_KINDS)
    assert expected <= set(module.RETRY_KINDS)


def test_gauges_are_absent_until_they_are_known(metrics: Metrics) -> None:
    text = metrics.text().decode()
    for name in ("store_bytes", "store_read_only", "clock_skew", "certificate_expiry"):
        assert f"ckptd_{name}" not in text


def test_errors_count_by_kind_and_strange_ones_as_other(metrics: Metrics) -> None:
    metrics.transfer_error("peer_stalled")
    metrics.transfer_error("x" * 1000)
    metrics.retry("peer_busy")
    metrics.retry("?")
    metrics.store_failure("no_room")
    metrics.store_failure("?")
    metrics.job_failure("gc")
    metrics.shard_corrupt()
    assert value(metrics, "transfer_errors_total", kind="peer_stalled") == 1
    assert value(metrics, "transfer_errors_total", kind="other") == 1
    assert value(metrics, "retries_total", kind="peer_busy") == 1
    assert value(metrics, "retries_total", kind="other") == 1
    assert value(metrics, "store_failures_total", kind="no_room") == 1
    assert value(metrics, "store_failures_total", kind="other") == 1
    assert value(metrics, "shards_corrupt_total") == 1
    assert value(metrics, "job_failures_total", job="gc") == 1


def test_a_transfer_counts_bytes_time_and_speed(metrics: Metrics) -> None:
    metrics.transfer("sent", "pi2", 1000, 0.5)
    metrics.transfer("sent", "pi2", 1000, 0.25)
    metrics.transfer("sent", "pi2", 10, 0.0)
    sent = {"direction": "sent", "peer": "pi2"}
    assert value(metrics, "shard_transfer_bytes_total", **sent) == 2010
    assert value(metrics, "shard_transfer_bytes_total", direction="received", peer="pi2") == 0
    assert value(metrics, "shard_transfer_seconds_sum", direction="sent") == 0.75
    assert value(metrics, "shard_transfer_seconds_count", direction="sent") == 3
    # 2000, then a quarter of the way to 4000; a time of zero says nothing about speed.
    assert value(metrics, "shard_transfer_speed_bytes_per_second", **sent) == 2500


def test_the_store_is_sampled_as_a_whole(metrics: Metrics) -> None:
    metrics.sample_store(used_bytes=10, capacity_bytes=100, free_bytes=-5, read_only=False)
    assert value(metrics, "store_free_bytes") == 0  # the reserve is already eaten into
    metrics.sample_store(used_bytes=11, capacity_bytes=100, free_bytes=7, read_only=True)
    assert value(metrics, "store_bytes") == 11
    assert value(metrics, "store_capacity_bytes") == 100
    assert value(metrics, "store_free_bytes") == 7
    assert value(metrics, "store_read_only") == 1


def test_the_clock_that_differs_most_is_shown_with_its_sign(metrics: Metrics) -> None:
    metrics.clock_skew("pi2", 1.5)
    metrics.clock_skew("pi3", -4.0)
    assert value(metrics, "clock_skew_seconds") == -4.0
    metrics.node_up("pi3", False)  # nothing is known about the clock of a node that is silent
    assert value(metrics, "clock_skew_seconds") == 1.5
    metrics.forget_node("pi2")
    assert value(metrics, "clock_skew_seconds") is None
    metrics.clock_skew("pi2", 0.5)
    assert value(metrics, "clock_skew_seconds") == 0.5


def test_the_number_of_peers_is_bounded(metrics: Metrics) -> None:
    for number in range(CLUSTER_NODES_MAX + 50):
        metrics.transfer("received", f"n{number}", 1, 1.0)
        metrics.node_up(f"n{number}", True)
        metrics.clock_skew(f"n{number}", float(number))
    found = samples(metrics)
    peers = {dict(labels).get("peer") for _, labels in found} - {None}
    nodes = {dict(labels).get("node") for _, labels in found} - {None}
    assert len(peers) == CLUSTER_NODES_MAX + 1
    assert len(nodes) == CLUSTER_NODES_MAX
    overflow = {"direction": "received", "peer": "other"}
    assert value(metrics, "shard_transfer_bytes_total", **overflow) == 50
    assert value(metrics, "clock_skew_seconds") == CLUSTER_NODES_MAX - 1


def test_a_forgotten_node_disappears_and_makes_room(metrics: Metrics) -> None:
    for number in range(CLUSTER_NODES_MAX):
        metrics.node_up(f"n{number}", True)
    metrics.transfer("sent", "n0", 5, 1.0)
    metrics.forget_node("n0")
    metrics.forget_node("never-seen")
    assert '"n0"' not in metrics.text().decode()
    metrics.node_up("late", False)
    assert value(metrics, "node_up", node="late") == 0
    assert value(metrics, "node_up", node="n1") == 1


def test_build_info_names_versions(metrics: Metrics) -> None:
    [(_, labels)] = [key for key in samples(metrics) if key[0] == "ckptd_build_info"]
    assert dict(labels)["version"] == "1.2.3"
    assert re.fullmatch(r"3\.\d+\.\d+\S*", dict(labels)["python"])


def test_the_reference_lists_every_metric_as_it_is() -> None:
    reference = Path(__file__).parents[3] / "docs" / "reference" / "metrics.md"
    text = reference.read_text()
    rows = re.findall(r"^\| `(ckptd_\w+)` \| (\w+) \| (.*?) \| (.+) \|$", text, re.MULTILINE)
    documented = {
        name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows
    }
    assert documented == PUBLISHED
    kinds = set(module.TRANSFER_ERROR_KINDS + module.RETRY_KINDS + module.STORE_FAILURE_KINDS)
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) - set(PUBLISHED) == kinds


def test_what_a_coordinator_tells(metrics: Metrics) -> None:
    assert value(metrics, "checkpoint_time_to_protected_seconds_count") is None
    metrics.expect_protection()
    metrics.expect_protection()
    assert value(metrics, "checkpoint_time_to_protected_seconds_count") == 0
    metrics.protected(4.0)
    metrics.protected(-1.0)  # its clock was set back meanwhile
    assert value(metrics, "checkpoint_time_to_protected_seconds_count") == 2
    assert value(metrics, "checkpoint_time_to_protected_seconds_sum") == 4.0
    metrics.sample_pending(2, 12.5, 500)
    assert value(metrics, "pending_checkpoints") == 2
    assert value(metrics, "unprotected_seconds") == 12.5
    assert value(metrics, "unprotected_steps") == 500
    metrics.sample_pending(0, 0.0, None)
    assert value(metrics, "unprotected_steps") is None


def test_only_the_steward_tells_the_states_of_all_versions(metrics: Metrics) -> None:
    metrics.checkpoints(None)
    assert value(metrics, "checkpoints", state="protected") is None
    metrics.checkpoints({"protected": 3, "degraded": 0})
    assert value(metrics, "checkpoints", state="protected") == 3
    metrics.checkpoints({"protected": 2, "degraded": 1})
    assert value(metrics, "checkpoints", state="degraded") == 1
    metrics.checkpoints(None)
    assert value(metrics, "checkpoints", state="protected") is None
