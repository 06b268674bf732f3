"""What a node counts about itself, in the terms of Prometheus.

`DEFINITIONS` is the list of all metrics; docs/reference/metrics.md explains them. Only what this
node knows by itself is exported: numbers about the whole cluster would be guesses here. A gauge
appears when its first value is known, because a made-up zero looks like a fact. Counters start at
zero with all their kinds, so that a rate sees the first event.

All methods may be called from any thread.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator, Mapping
from typing import Final, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from ckptd import errors
from ckptd.core.job_names import JOB_NAMES
from ckptd.core.limits import CLUSTER_NODES_MAX

PREFIX: Final = "ckptd_"
OTHER: Final = "other"
"""Stands for peers beyond the size of a cluster and for kinds that are not listed, so that nobody
can make the number of series grow without bound."""

Direction = Literal["sent", "received"]
DIRECTIONS: Final[tuple[Direction, ...]] = ("sent", "received")

_PEER_FAULTS: Final = (
    errors.PeerError,
    errors.PeerUnreachable,
    errors.PeerBusy,
    errors.PeerStalled,
    errors.PeerRefused,
    errors.ProtocolError,
    errors.LimitExceeded,
    errors.NotAuthorized,
    errors.DocumentRefused,
)
_STORE_FAULTS: Final = (
    errors.NoRoom,
    errors.MediumFailed,
    errors.ShardCorrupt,
    errors.StoreMarkerMissing,
)


def _kinds(*classes: type[errors.CkptdError]) -> tuple[str, ...]:
    return (*(each.kind for each in classes), OTHER)


TRANSFER_ERROR_KINDS: Final = _kinds(
    *_PEER_FAULTS, errors.NoRoom, errors.MediumFailed, errors.ShardCorrupt, errors.SourceChanged
)
RETRY_KINDS: Final = _kinds(
    *_PEER_FAULTS, errors.NoRoom, errors.MediumFailed, errors.ShardCorrupt, errors.SourceChanged
)
STORE_FAILURE_KINDS: Final = _kinds(*_STORE_FAULTS, errors.DocumentRefused)


MetricType = Literal["counter", "gauge", "histogram"]


class Definition(NamedTuple):
    """A metric: its full name as exported, its type, its labels, and one sentence."""

    name: str
    type: MetricType
    labels: tuple[str, ...]
    help: str


DEFINITIONS: Final[tuple[Definition, ...]] = (
    Definition(
        "ckptd_node_up", "gauge", ("node",), "1 while this node hears from that node, else 0."
    ),
    Definition("ckptd_store_bytes", "gauge", (), "Bytes of shards in this node's store."),
    Definition(
        "ckptd_store_capacity_bytes", "gauge", (), "Size of the file system below the store."
    ),
    Definition("ckptd_store_free_bytes", "gauge", (), "Room for more shards, above the reserve."),
    Definition(
        "ckptd_store_read_only",
        "gauge",
        (),
        "1 while the store takes nothing because of its medium.",
    ),
    Definition(
        "ckptd_shard_transfer_bytes_total",
        "counter",
        ("direction", "peer"),
        "Bytes of shards whose transfer was completed.",
    ),
    Definition(
        "ckptd_shard_transfer_seconds",
        "histogram",
        ("direction",),
        "Time from the first byte of a shard to its confirmation.",
    ),
    Definition(
        "ckptd_shard_transfer_speed_bytes_per_second",
        "gauge",
        ("direction", "peer"),
        "Speed of recent shard transfers; the newest counts a quarter.",
    ),
    Definition(
        "ckptd_transfer_errors_total", "counter", ("kind",), "Transfers of shards that failed."
    ),
    Definition(
        "ckptd_retries_total", "counter", ("kind",), "Attempts repeated, by what had failed."
    ),
    Definition(
        "ckptd_store_failures_total",
        "counter",
        ("kind",),
        "Shards and documents that this node was to store and could not.",
    ),
    Definition(
        "ckptd_shards_corrupt_total", "counter", (), "Copies found with bytes that are not theirs."
    ),
    Definition(
        "ckptd_scrub_oldest_verified_timestamp_seconds",
        "gauge",
        (),
        "When the copy was hashed whose last check is the oldest, in seconds since 1970.",
    ),
    Definition(
        "ckptd_scrub_bytes_total", "counter", (), "Bytes of copies that the scrub has read."
    ),
    Definition(
        "ckptd_job_failures_total", "counter", ("job",), "Slices of background jobs that failed."
    ),
    Definition(
        "ckptd_bytes_written_total", "counter", (), "Bytes written to the store's medium (wear)."
    ),
    Definition(
        "ckptd_clock_skew_seconds",
        "gauge",
        (),
        "Another node's clock minus this node's, of the node that differs most.",
    ),
    Definition(
        "ckptd_certificate_expiry_timestamp_seconds",
        "gauge",
        (),
        "When this node's certificate expires, in seconds since 1970.",
    ),
    Definition(
        "ckptd_pending_checkpoints",
        "gauge",
        (),
        "Checkpoints that this coordinator sees and has not stored as they are now.",
    ),
    Definition(
        "ckptd_checkpoint_time_to_protected_seconds",
        "histogram",
        (),
        "Time from the last change of a checkpoint's files until it was protected.",
    ),
    Definition(
        "ckptd_unprotected_seconds",
        "gauge",
        (),
        "How long the checkpoint has been waiting that has waited longest; 0 if none waits.",
    ),
    Definition(
        "ckptd_unprotected_steps",
        "gauge",
        (),
        "Training steps by which the newest checkpoint of a run is ahead of its newest protected "
        "one, in the run that has most of them.",
    ),
    Definition(
        "ckptd_checkpoints",
        "gauge",
        ("state",),
        "Versions of the cluster, and checkpoints not stored yet, by state; told by the steward.",
    ),
    Definition(
        "ckptd_shards_under_replicated",
        "gauge",
        (),
        "Shards of live versions with too few copies; told by the steward.",
    ),
    Definition(
        "ckptd_shards_unrecoverable",
        "gauge",
        (),
        "Shards of live versions without any copy; told by the steward.",
    ),
    Definition(
        "ckptd_repair_queue_bytes",
        "gauge",
        (),
        "Bytes of copies that repair is to make; told by the steward.",
    ),
    Definition(
        "ckptd_build_info", "gauge", ("version", "python"), "Always 1; the labels tell what runs."
    ),
)
_BY_NAME: Final = {definition.name.removeprefix(PREFIX): definition for definition in DEFINITIONS}

# From a small shard on a fast link to 32 MiB on a bad card that is shared by several senders.
_SECONDS_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
# From a small adapter to a large model over a slow link.
_PROTECTED_BUCKETS: Final = (1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
_SPEED_SHARE_OF_NEWEST: Final = 0.25


class Metrics:
    """The numbers of one node, in `registry`; `version` is that of the running ckptd.

    `registry` belongs to the caller and must not hold these metrics yet; the process-wide one is
    never touched. Unknown kinds and peers beyond the size of a cluster are counted as "other".
    """

    def __init__(self, registry: CollectorRegistry, *, version: str) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._peers: set[str] = set()
        self._speeds: dict[tuple[str, str], float] = {}
        self._skews_s: dict[str, float] = {}
        self._known_gauges: dict[str, Gauge] = {}
        self._node_up = self._gauge("node_up")
        self._bytes = self._counter("shard_transfer_bytes_total")
        self._speed = self._gauge("shard_transfer_speed_bytes_per_second")
        seconds = _BY_NAME["shard_transfer_seconds"]
        self._seconds = Histogram(
            seconds.name, seconds.help, seconds.labels, registry=registry, buckets=_SECONDS_BUCKETS
        )
        for direction in DIRECTIONS:
            self._seconds.labels(direction)
        self._errors = self._counter("transfer_errors_total", TRANSFER_ERROR_KINDS)
        self._retries = self._counter("retries_total", RETRY_KINDS)
        self._store_failures = self._counter("store_failures_total", STORE_FAILURE_KINDS)
        self._corrupt = self._counter("shards_corrupt_total")
        self._scrubbed = self._counter("scrub_bytes_total")
        self._job_failures = self._counter("job_failures_total", JOB_NAMES)
        self._written = self._counter("bytes_written_total")
        self._protected: Histogram | None = None
        self._states: Gauge | None = None
        self._gauge("build_info").labels(version, platform.python_version()).set(1)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4."""
        return generate_latest(_WithoutCreationTimes(self._registry))

    def node_up(self, node: str, up: bool) -> None:
        """This node hears from `node`, or no longer does. Beyond 64 nodes nothing is kept."""
        with self._lock:
            if self._peer_label(node) == OTHER:
                return
            self._node_up.labels(node).set(up)
            if not up:
                self._forget_skew(node)

    def forget_node(self, node: str) -> None:
        """`node` is no member any more: its series disappear and make room for another."""
        with self._lock:
            if node not in self._peers:
                return
            self._peers.discard(node)
            self._node_up.remove_by_labels({"node": node})
            self._bytes.remove_by_labels({"peer": node})
            self._speed.remove_by_labels({"peer": node})
            for direction in DIRECTIONS:
                self._speeds.pop((direction, node), None)
            self._forget_skew(node)

    def transfer(self, direction: Direction, peer: str, size_bytes: int, seconds: float) -> None:
        """One shard of `size_bytes` was sent to or received from `peer` in `seconds`."""
        with self._lock:
            label = self._peer_label(peer)
            self._bytes.labels(direction, label).inc(size_bytes)
            self._seconds.labels(direction).observe(seconds)
            if seconds <= 0:
                return
            speed = size_bytes / seconds
            before = self._speeds.get((direction, label), speed)
            speed = before + _SPEED_SHARE_OF_NEWEST * (speed - before)
            self._speeds[direction, label] = speed
            self._speed.labels(direction, label).set(speed)

    def transfer_error(self, kind: str) -> None:
        """The transfer of a shard failed; `kind` is that of the error."""
        self._errors.labels(kind if kind in TRANSFER_ERROR_KINDS else OTHER).inc()

    def retry(self, kind: str) -> None:
        """Something is tried again after an error of this `kind`."""
        self._retries.labels(kind if kind in RETRY_KINDS else OTHER).inc()

    def store_failure(self, kind: str) -> None:
        """This node could not store a shard or a document; `kind` is that of the error."""
        self._store_failures.labels(kind if kind in STORE_FAILURE_KINDS else OTHER).inc()

    def shard_corrupt(self) -> None:
        """A copy in this node's store does not have its hash."""
        self._corrupt.inc()

    def scrubbed(self, size_bytes: int) -> None:
        """The scrub has read `size_bytes` of a copy."""
        self._scrubbed.inc(size_bytes)

    def scrub_oldest(self, timestamp_s: float | None) -> None:
        """When the copy was hashed whose last check is the oldest (seconds since 1970); None while
        of one copy nobody knows."""
        with self._lock:
            self._set("scrub_oldest_verified_timestamp_seconds", timestamp_s)

    def job_failure(self, job: str) -> None:
        """A slice of the background job `job` (one of JOB_NAMES) failed."""
        self._job_failures.labels(job).inc()

    def written(self, size_bytes: int) -> None:
        """`size_bytes` were written to the store's medium, whatever became of them."""
        self._written.inc(size_bytes)

    def sample_store(
        self, *, used_bytes: int, capacity_bytes: int, free_bytes: int, read_only: bool
    ) -> None:
        """The store's room now. `free_bytes` is what it may still take, above the reserve."""
        with self._lock:
            self._set("store_bytes", used_bytes)
            self._set("store_capacity_bytes", capacity_bytes)
            self._set("store_free_bytes", max(0, free_bytes))
            self._set("store_read_only", read_only)

    def clock_skew(self, node: str, seconds: float) -> None:
        """The clock of `node` minus this node's clock, as its last answer showed it."""
        with self._lock:
            if self._peer_label(node) != OTHER:
                self._skews_s[node] = seconds
                self._export_skew()

    def certificate_expiry(self, timestamp_s: float) -> None:
        """This node's certificate expires at `timestamp_s` (seconds since 1970)."""
        with self._lock:
            self._set("certificate_expiry_timestamp_seconds", timestamp_s)

    def expect_protection(self) -> None:
        """This node stores checkpoints by itself: their histogram is shown from now on."""
        with self._lock:
            if self._protected is None:
                definition = _BY_NAME["checkpoint_time_to_protected_seconds"]
                self._protected = Histogram(
                    definition.name,
                    definition.help,
                    registry=self._registry,
                    buckets=_PROTECTED_BUCKETS,
                )

    def protected(self, seconds: float) -> None:
        """A checkpoint became protected so long after its last change. After
        `expect_protection`."""
        assert self._protected is not None
        self._protected.observe(max(0.0, seconds))

    def sample_pending(
        self, count: int, unprotected_s: float, unprotected_steps: int | None
    ) -> None:
        """What waits to be protected: how many, for how long the longest, and how many training
        steps (None: not known)."""
        with self._lock:
            self._set("pending_checkpoints", count)
            self._set("unprotected_seconds", unprotected_s)
            self._set("unprotected_steps", unprotected_steps)

    def checkpoints(self, counts: Mapping[str, int] | None) -> None:
        """How many versions of the cluster are in each state; None: this node is not (any more)
        the one that tells."""
        with self._lock:
            if counts is None:
                if self._states is not None:
                    self._registry.unregister(self._states)
                    self._states = None
                return
            states = self._states or self._gauge("checkpoints", registered=False)
            for state, count in counts.items():
                states.labels(state).set(count)
            if self._states is None:
                self._states = states
                self._registry.register(states)

    def repair(
        self, queue_bytes: int | None, under_replicated: int | None, unrecoverable: int | None
    ) -> None:
        """What is missing in the cluster; None: this node is not (any more) the one that tells."""
        with self._lock:
            self._set("repair_queue_bytes", queue_bytes)
            self._set("shards_under_replicated", under_replicated)
            self._set("shards_unrecoverable", unrecoverable)

    def _forget_skew(self, node: str) -> None:
        if self._skews_s.pop(node, None) is not None:
            self._export_skew()

    def _export_skew(self) -> None:
        self._set("clock_skew_seconds", max(self._skews_s.values(), key=abs, default=None))

    def _peer_label(self, peer: str) -> str:
        if peer in self._peers:
            return peer
        if len(self._peers) >= CLUSTER_NODES_MAX or not peer or peer == OTHER:
            return OTHER
        self._peers.add(peer)
        for direction in DIRECTIONS:
            self._bytes.labels(direction, peer)
        return peer

    def _set(self, name: str, value: float | None) -> None:
        """Show a gauge without labels, or hide it as long as its value is unknown."""
        gauge = self._known_gauges.get(name)
        if value is None:
            if gauge is not None:
                self._registry.unregister(self._known_gauges.pop(name))
            return
        if gauge is None:
            gauge = self._known_gauges[name] = self._gauge(name, registered=False)
            gauge.set(value)
            # Registered last: a scrape in another thread never sees a gauge without its value.
            self._registry.register(gauge)
        gauge.set(value)

    def _gauge(self, name: str, *, registered: bool = True) -> Gauge:
        definition = _BY_NAME[name]
        registry = self._registry if registered else None
        return Gauge(definition.name, definition.help, definition.labels, registry=registry)

    def _counter(self, name: str, kinds: tuple[str, ...] = ()) -> Counter:
        definition = _BY_NAME[name]
        counter = Counter(
            definition.name, definition.help, definition.labels, registry=self._registry
        )
        for kind in kinds:
            counter.labels(kind)
        return counter


class _WithoutCreationTimes:
    """A view of a registry without the `_created` series of the client library.

    They belong to OpenMetrics; in the text format they would double the number of series with
    names that nobody documented. The library can only turn them off for the whole process.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            created = f"{family.name}_created"
            family.samples = [each for each in family.samples if each.name != created]
            yield family
