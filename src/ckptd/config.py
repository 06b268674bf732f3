"""The config: one YAML file, read into frozen structures, every key and its unit checked.

`check` is a pure function of the text and finds all faults at once; `load` reads a file and raises.
The keys as written in YAML are the structures' encoded field names (`heartbeat` for `heartbeat_s`).
docs/reference/config.md describes each of them. A config never holds a secret: keys are named by
path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final, Literal

import msgspec

from ckptd.config_reader import Section
from ckptd.core.limits import (
    CONFIG_MAX_BYTES,
    COPIES_MAX,
    QUANTITY_MAX_BYTES,
    QUANTITY_MAX_S,
    SHARD_SIZE_DEFAULT_BYTES,
    SHARD_SIZE_MAX_BYTES,
    SHARD_SIZE_MIN_BYTES,
)
from ckptd.core.quantities import (
    Address,
    format_duration,
    format_percent,
    format_rate,
    format_size,
)
from ckptd.core.retention import BestMode, KeepBest, RetentionRule
from ckptd.errors import ConfigError
from ckptd.strict_yaml import YamlRefused, parse_yaml

Role = Literal["worker", "coordinator"]
LogLevel = Literal["debug", "info", "warning", "error"]

ROLES: Final[tuple[Role, ...]] = ("worker", "coordinator")
LOG_LEVELS: Final[tuple[LogLevel, ...]] = ("debug", "info", "warning", "error")
BEST_MODES: Final[tuple[BestMode, ...]] = ("min", "max")
SYSTEM_CONFIG: Final = Path("/etc/ckptd/ckptd.yml")
_STATE_BELOW_HOME: Final = (".local", "state", "ckptd")
_PRIVATE_MACOS_DIRECTORIES: Final = ("Desktop", "Documents", "Downloads")


class NodeConfig(msgspec.Struct, frozen=True):
    """This machine as a node of the cluster."""

    id: str
    roles: tuple[Role, ...]
    listen: Address
    bulk_port: int
    """Port of the bulk connections; 0 means any free one, told to peers in the hello."""
    zone: str = ""
    state: Path | None = None
    """Where a coordinator remembers what spares it work. Its loss costs nothing but time."""


class Reserve(msgspec.Struct, frozen=True):
    """Room of a disk that shards never use: a share of the capacity or a number of bytes."""

    percent: float = 0.0
    size_bytes: int = 0

    def of_capacity(self, capacity_bytes: int) -> int:
        """Bytes to leave free on a disk of `capacity_bytes`."""
        return min(capacity_bytes, max(self.size_bytes, int(capacity_bytes * self.percent / 100)))

    def __str__(self) -> str:
        return format_size(self.size_bytes) if self.size_bytes else format_percent(self.percent)


class StoreConfig(msgspec.Struct, frozen=True):
    path: Path
    reserve: Reserve = Reserve(percent=5.0)


class ReplicationConfig(msgspec.Struct, frozen=True):
    copies: int = 2
    shard_size_bytes: int = msgspec.field(default=SHARD_SIZE_DEFAULT_BYTES, name="shard_size")


class TlsConfig(msgspec.Struct, frozen=True):
    ca: Path
    cert: Path
    key: Path


class DiscoveryConfig(msgspec.Struct, frozen=True):
    mdns: bool = True
    peers: tuple[Address, ...] = ()
    interfaces: tuple[str, ...] = ()


class MembershipConfig(msgspec.Struct, frozen=True):
    heartbeat_s: float = msgspec.field(default=1.0, name="heartbeat")
    suspect_s: float = msgspec.field(default=5.0, name="suspect")
    down_s: float = msgspec.field(default=20.0, name="down")


class WatchRoot(msgspec.Struct, frozen=True):
    """One watched directory."""

    root: Path
    prefix: str = ""
    pattern: str = ""
    settle_s: float = msgspec.field(default=2.0, name="settle")
    settle_max_s: float = msgspec.field(default=60.0, name="settle_max")
    retry_s: float = msgspec.field(default=10.0, name="retry")


class RepairConfig(msgspec.Struct, frozen=True):
    after_s: float = msgspec.field(default=600.0, name="after")
    rate_bytes_per_s: int = msgspec.field(default=20_000_000, name="rate")
    promise_s: float = msgspec.field(default=600.0, name="promise")


class GcConfig(msgspec.Struct, frozen=True):
    grace_s: float = msgspec.field(default=86_400.0, name="grace")


class ScrubConfig(msgspec.Struct, frozen=True):
    interval_s: float = msgspec.field(default=14 * 86_400.0, name="interval")
    rate_bytes_per_s: int = msgspec.field(default=10_000_000, name="rate")


class ObserveConfig(msgspec.Struct, frozen=True):
    listen: Address = Address("127.0.0.1", 9701)
    tls: bool = True
    log_level: LogLevel = "info"


class Config(msgspec.Struct, frozen=True):
    """A whole valid config. `node` and `store` are None in a config that serves only clients."""

    cluster: str
    tls: TlsConfig
    node: NodeConfig | None = None
    store: StoreConfig | None = None
    replication: ReplicationConfig = ReplicationConfig()
    discovery: DiscoveryConfig = DiscoveryConfig()
    membership: MembershipConfig = MembershipConfig()
    watch: tuple[WatchRoot, ...] = ()
    retention: tuple[RetentionRule, ...] = ()
    repair: RepairConfig = RepairConfig()
    gc: GcConfig = GcConfig()
    scrub: ScrubConfig = ScrubConfig()
    observe: ObserveConfig = ObserveConfig()

    @property
    def is_worker(self) -> bool:
        """Whether this machine is a node that keeps shards."""
        return self.node is not None and "worker" in self.node.roles

    @property
    def is_coordinator(self) -> bool:
        """Whether this machine is a node that watches directories and stores."""
        return self.node is not None and "coordinator" in self.node.roles


def check(
    text: str, *, home: Path | None = None, platform: str = sys.platform
) -> tuple[Config | None, list[ConfigError]]:
    """Read the YAML in `text`.

    `home` is what `~` stands for (default: the user's), `platform` a value of `sys.platform`.
    Returns the config and no errors, or None and every error found, each with the key's path.
    """
    errors: list[ConfigError] = []
    if len(text.encode()) > CONFIG_MAX_BYTES:
        return None, [ConfigError("", f"larger than {format_size(CONFIG_MAX_BYTES)}")]
    try:
        document = parse_yaml(text)
    except YamlRefused as error:
        return None, [ConfigError("", str(error))]
    top = Section(document, "", errors, home=home or Path.home())
    config = _config(top, platform)
    top.close()
    return (None, errors) if errors else (config, [])


def load(path: Path) -> Config:
    """The config in the file `path`.

    Raises `ConfigError` of the first fault; its message says how many more there are.
    """
    config, errors = check_file(path)
    if config is not None:
        return config
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    raise ConfigError(
        first.key, f"{first.reason}{more}, in {path}", next=f"ckptd --config {path} config check"
    )


def check_file(path: Path) -> tuple[Config | None, list[ConfigError]]:
    """As `check`, for the text in the file `path`; a file that cannot be read is an error too."""
    try:
        with path.open("rb") as file:
            raw = file.read(CONFIG_MAX_BYTES + 1)
        return check(raw.decode())
    except OSError as error:
        return None, [ConfigError("", f"{path}: {error.strerror}")]
    except UnicodeDecodeError as error:
        return None, [ConfigError("", f"{path}: not UTF-8 text at byte {error.start}")]


def check_roots(config: Config) -> list[ConfigError]:
    """Errors for watched roots that are not directories which this process can read.

    Kept apart from `check`: a client that restores must not fail because a watched disk is gone.
    """
    errors = []
    for index, watched in enumerate(config.watch):
        key = f"watch[{index}].root"
        if not watched.root.is_dir():
            errors.append(ConfigError(key, f"{watched.root} is not a directory"))
        elif not os.access(watched.root, os.R_OK | os.X_OK):
            errors.append(ConfigError(key, f"{watched.root} is not readable by this user"))
    return errors


def find_config(
    flag: str | None, environ: Mapping[str, str], home: Path, *, system: Path = SYSTEM_CONFIG
) -> Path | None:
    """The config file to use: `--config`, then `CKPTD_CONFIG`, then the user's, then the system's.

    The first two are taken as given, whether they exist or not, so that a mistyped path is an error
    and not another cluster. None when nothing is named and neither default file exists.
    """
    named = flag or environ.get("CKPTD_CONFIG")
    if named:
        return Path(named)
    for candidate in (home / ".config" / "ckptd" / "ckptd.yml", system):
        if candidate.is_file():
            return candidate
    return None


def inactive_keys(config: Config) -> list[str]:
    """Keys that are checked but that this version does not act on, for `config check` to say so."""
    inactive = []
    if config.store is not None and config.node is not None and not config.is_worker:
        inactive.append("store")
    if config.node is not None and not config.is_coordinator:
        inactive += [f"watch[{index}]" for index in range(len(config.watch))]
        inactive += [f"retention[{index}]" for index in range(len(config.retention))]
    return inactive


def effective(config: Config) -> dict[str, object]:
    """The config with all defaults filled in, in the form of the YAML file.

    `check` reads it back to an equal config. It holds no secret: keys and certificates are named
    by their paths.
    """
    document = _plain(config)
    assert isinstance(document, dict)
    return document


def _plain(value: object, name: str = "") -> object:
    if isinstance(value, Address | Reserve | Path):
        return str(value)
    if isinstance(value, msgspec.Struct):
        written = {
            field.encode_name: _plain(getattr(value, field.name), field.name)
            for field in msgspec.structs.fields(value)
        }
        return {key: part for key, part in written.items() if part is not None}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if name.endswith("_bytes_per_s") and isinstance(value, int):
        return format_rate(value)
    if name.endswith("_bytes") and isinstance(value, int):
        return format_size(value)
    if name.endswith("_s") and isinstance(value, float):
        return format_duration(value)
    return value


def _config(top: Section, platform: str) -> Config:
    cluster = top.identifier("cluster")
    node = _node(top.section("node")) if top.has("node") else None
    store = _store(top.section("store")) if top.has("store") else None
    if node is not None and "worker" in node.roles and store is None:
        top.fault("store", "missing: a worker needs the directory that it keeps shards in")
    return Config(
        cluster=cluster,
        node=node,
        store=store,
        replication=_replication(top.section("replication")),
        tls=_tls(top.section("tls")),
        discovery=_discovery(top.section("discovery")),
        membership=_membership(top.section("membership")),
        watch=_watch(top.sections("watch"), platform),
        retention=tuple(_retention(rule) for rule in top.sections("retention")),
        repair=_repair(top.section("repair")),
        gc=_gc(top.section("gc")),
        scrub=_scrub(top.section("scrub")),
        observe=_observe(top.section("observe")),
    )


def _node(section: Section) -> NodeConfig:
    listen = section.address("listen", Address("0.0.0.0", 7701), any_port=True)
    if listen.port == 65535 and not section.has("bulk_port"):
        section.fault("listen", "no port is left above 65535 for bulk: set node.bulk_port")
    after_listen = min(listen.port + 1, 65535) if listen.port else 0
    node_id = section.identifier("id")
    roles = section.choices("roles", ROLES)
    node = NodeConfig(
        id=node_id,
        roles=roles,
        listen=listen,
        bulk_port=section.whole("bulk_port", after_listen, 0, 65535),
        zone=section.identifier("zone", ""),
        state=_state(section, node_id, roles),
    )
    if section.has("bulk_port") and node.bulk_port and node.bulk_port == listen.port:
        section.fault("bulk_port", "must differ from the port of node.listen")
    section.close()
    return node


def _state(section: Section, node_id: str, roles: tuple[Role, ...]) -> Path | None:
    path = section.absolute_path("state") if section.has("state") else None
    if "coordinator" not in roles:
        if path is not None:
            section.fault("state", "only a coordinator has one")
        return None
    return path or Path(section.home, *_STATE_BELOW_HOME, node_id)


def _store(section: Section) -> StoreConfig:
    percent, size_bytes = section.share_or_size("reserve", (5.0, 0))
    store = StoreConfig(
        path=section.absolute_path("path"),
        reserve=Reserve(percent=percent, size_bytes=size_bytes),
    )
    section.close()
    return store


def _replication(section: Section) -> ReplicationConfig:
    replication = ReplicationConfig(
        copies=section.whole("copies", 2, 1, COPIES_MAX),
        shard_size_bytes=section.size(
            "shard_size", SHARD_SIZE_DEFAULT_BYTES, SHARD_SIZE_MIN_BYTES, SHARD_SIZE_MAX_BYTES
        ),
    )
    section.close()
    return replication


def _tls(section: Section) -> TlsConfig:
    tls = TlsConfig(
        ca=section.absolute_path("ca"),
        cert=section.absolute_path("cert"),
        key=section.absolute_path("key"),
    )
    section.close()
    return tls


def _discovery(section: Section) -> DiscoveryConfig:
    discovery = DiscoveryConfig(
        mdns=section.flag("mdns", True),
        peers=section.addresses("peers"),
        interfaces=section.texts("interfaces"),
    )
    section.close()
    return discovery


def _membership(section: Section) -> MembershipConfig:
    membership = MembershipConfig(
        heartbeat_s=section.duration("heartbeat", 1.0, 0.05, 60),
        suspect_s=section.duration("suspect", 5.0, 0.1, 3600),
        down_s=section.duration("down", 20.0, 0.2, 86_400),
    )
    if not membership.heartbeat_s < membership.suspect_s < membership.down_s:
        section.fault("down", "must hold: heartbeat < suspect < down")
    section.close()
    return membership


def _watch(sections: list[Section], platform: str) -> tuple[WatchRoot, ...]:
    roots: dict[Path, WatchRoot] = {}
    for section in sections:
        watched = WatchRoot(
            root=section.absolute_path("root"),
            prefix=section.name_prefix("prefix"),
            pattern=section.text("pattern", ""),
            settle_s=section.duration("settle", 2.0, 0.0, 3600),
            settle_max_s=section.duration("settle_max", 60.0, 0.0, 86_400),
            retry_s=section.duration("retry", 10.0, 0.1, 3600),
        )
        if watched.settle_s > watched.settle_max_s:
            section.fault("settle_max", "must not be shorter than settle")
        if watched.root in roots:
            section.fault("root", f"{watched.root} is watched twice")
        if platform == "darwin" and (private := _private_directory(watched.root, section.home)):
            section.fault(
                "root", f"macOS lets no daemon read {private}: move the checkpoints elsewhere"
            )
        section.close()
        roots[watched.root] = watched
    return tuple(roots.values())


def _private_directory(root: Path, home: Path) -> PurePosixPath | None:
    # Compared without case: the file system of macOS seldom distinguishes it.
    folded = PurePosixPath(str(root).casefold())
    for name in _PRIVATE_MACOS_DIRECTORIES:
        if folded.is_relative_to(str(home / name).casefold()):
            return PurePosixPath("~") / name
    return None


def _retention(section: Section) -> RetentionRule:
    best = section.section("keep_best") if section.has("keep_best") else None
    rule = RetentionRule(
        runs=section.text("runs", "*"),
        keep_last=section.optional_whole("keep_last", 1, 1_000_000),
        keep_every_steps=section.optional_whole("keep_every_steps", 1, 10**12),
        keep_every_s=section.optional_duration("keep_every", 1.0, QUANTITY_MAX_S),
        keep_within_s=section.optional_duration("keep_within", 1.0, QUANTITY_MAX_S),
        keep_best=_keep_best(best) if best else None,
    )
    section.close()
    if rule == RetentionRule(runs=rule.runs):
        section.fault("", "keeps nothing: set keep_last or another keep_… key")
    return rule


def _keep_best(section: Section) -> KeepBest:
    best = KeepBest(metric=section.text("metric"), mode=section.choice("mode", None, BEST_MODES))
    section.close()
    return best


def _repair(section: Section) -> RepairConfig:
    repair = RepairConfig(
        after_s=section.duration("after", 600.0, 0.1, QUANTITY_MAX_S),
        rate_bytes_per_s=section.rate("rate", 20_000_000, 1000, QUANTITY_MAX_BYTES),
        promise_s=section.duration("promise", 600.0, 1.0, 86_400.0),
    )
    section.close()
    return repair


def _gc(section: Section) -> GcConfig:
    gc = GcConfig(grace_s=section.duration("grace", 86_400.0, 1.0, QUANTITY_MAX_S))
    section.close()
    return gc


def _scrub(section: Section) -> ScrubConfig:
    scrub = ScrubConfig(
        interval_s=section.duration("interval", 14 * 86_400.0, 1.0, QUANTITY_MAX_S),
        rate_bytes_per_s=section.rate("rate", 10_000_000, 1000, QUANTITY_MAX_BYTES),
    )
    section.close()
    return scrub


def _observe(section: Section) -> ObserveConfig:
    observe = ObserveConfig(
        listen=section.address("listen", Address("127.0.0.1", 9701), any_port=True),
        tls=section.flag("tls", True),
        log_level=section.choice("log_level", "info", LOG_LEVELS),
    )
    section.close()
    return observe
