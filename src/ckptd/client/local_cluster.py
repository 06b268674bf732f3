"""An embedded cluster on loopback: real daemons, real TCP, real TLS, a CA of its own.

    DIR/pki/                 the CA, the client's certificate, one for each node
    DIR/ckptd.yml            the client's config
    DIR/settings.yml         what `--set` was given
    DIR/NODE/ckptd.yml       a worker's config; DIR/NODE/store its store, DIR/NODE/node.log its log
    DIR/coordinator/         the same of the coordinator, with its state in place of a store
    DIR/watch/               what lies here is found and stored by itself

The daemons outlive whoever started them. `up` starts whatever is not running, with its data.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from ckptd.client import pki
from ckptd.client.local_node import (
    LocalNode,
    has_current_config,
    read_node,
    running_pid,
    start,
    stop,
)
from ckptd.config import check
from ckptd.core.identity import Role
from ckptd.errors import CkptdError, ConfigError, NotFound, UsageError

CLUSTER: Final = "local"
DEFAULT_DIRECTORY: Final = "~/.local/share/ckptd/local"
LOCAL_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "repair": {"after": "10s", "promise": "10s"},
    "gc": {"grace": "60s"},
    "membership": {"heartbeat": "500ms", "suspect": "2s", "down": "5s"},
}
WATCH_DEFAULTS: Final[Mapping[str, Any]] = {"settle_max": "5s"}
"""Whoever tries things out overwrites a checkpoint in a loop, and wants to see it stored."""
COORDINATOR: Final = "coordinator"
OWNER: Final = "owner"
"""Whose certificate the client's config names: it may do what a client and an admin may."""
NODES_MAX: Final = 16
PORTS: Final = range(20_000, 32_000)
"""Where the nodes listen, at random."""
_PORT_TRIES_MAX: Final = 1000


class LocalCluster:
    """The embedded cluster in one directory. `cluster` is its name when it is made."""

    def __init__(self, directory: Path, cluster: str = CLUSTER) -> None:
        self.cluster = cluster
        self.directory = directory.expanduser().absolute()

    @property
    def client_config(self) -> Path:
        return self.directory / "ckptd.yml"

    @property
    def watch_root(self) -> Path:
        return self.directory / "watch"

    def up(
        self, count: int, settings: Sequence[str] = (), *, coordinator: bool = True
    ) -> list[LocalNode]:
        """Makes what is missing, starts what is not running, and waits until all serve. Returns the
        workers.

        `settings` are KEY=VALUE, with dotted keys of the config, for every node and the client;
        they are kept for later calls, and nodes whose config they change are restarted. Without
        `coordinator` none is made, and nothing watches. Raises UsageError, ConfigError, or
        CkptdError with the last lines of the log of a node that does not start.
        """
        if not 1 <= count <= NODES_MAX:
            raise UsageError(f"--nodes takes 1 to {NODES_MAX}, not {count}")
        overrides = _merged(self._kept_settings(), parse_settings(settings))
        existing = self._node_ids()
        if existing and len(existing) > count:
            count = len(existing)
        self._make(count, overrides, coordinator or self.coordinator() is not None)
        self._settings.write_text(yaml.safe_dump(overrides), encoding="utf-8")
        starting = []
        for node in [*self.nodes(), *self._coordinators()]:
            if node.pid and not has_current_config(node):
                stop([node.pid])
            if not running_pid(node.directory):
                starting.append(start(node))
        for started in starting:
            started.wait()
        return self.nodes()

    @property
    def _settings(self) -> Path:
        return self.directory / "settings.yml"

    def _kept_settings(self) -> dict[str, Any]:
        """What earlier calls of `up` were given."""
        if not self._settings.exists():
            return {}
        kept = yaml.safe_load(self._settings.read_text(encoding="utf-8"))
        return kept if isinstance(kept, dict) else {}

    def down(self) -> list[str]:
        """Stops all daemons gracefully; their data stays. Returns the ids of those that ran."""
        if not self._node_ids():
            raise NotFound(f"no local cluster in {self.directory}", next="ckptd local up")
        running = [node for node in [*self._coordinators(), *self.nodes()] if node.pid]
        stop([node.pid for node in running])
        return [node.id for node in running]

    def nodes(self) -> list[LocalNode]:
        """The workers as they are now."""
        return [read_node(self.directory / node_id) for node_id in self._node_ids()]

    def coordinator(self) -> LocalNode | None:
        """The coordinator as it is now; None in a cluster that an earlier version made."""
        directory = self.directory / COORDINATOR
        return read_node(directory) if (directory / "ckptd.yml").exists() else None

    def _coordinators(self) -> list[LocalNode]:
        found = self.coordinator()
        return [] if found is None else [found]

    def describe(self) -> dict[str, Any]:
        """As `ckptd local up --json` prints it."""
        coordinator = self.coordinator()
        return {
            "config": str(self.client_config),
            "coordinator": None if coordinator is None else coordinator.describe(),
            "nodes": [node.describe() for node in self.nodes()],
        }

    # -- making

    def _node_ids(self) -> list[str]:
        if not self.directory.is_dir():
            return []
        found = [entry.parent.name for entry in self.directory.glob("node*/ckptd.yml")]
        return sorted(found, key=lambda name: int(name.removeprefix("node")))

    def _make(self, count: int, overrides: dict[str, Any], coordinator: bool) -> None:
        pki_directory = self.directory / "pki"
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (pki_directory / "ca.pem").exists():
            code = pki.init_cluster(pki_directory, self.cluster)
            # An embedded cluster protects nothing from its own user: the code may lie beside it.
            (self.directory / "recovery-code").write_text(code + "\n", encoding="ascii")
        if not (pki_directory / f"{OWNER}.pem").exists():
            pki.issue(pki_directory, [Role.CLIENT, Role.ADMIN], OWNER)
        self.watch_root.mkdir(exist_ok=True)
        ids = [f"node{number}" for number in range(1, count + 1)]
        addresses = self._addresses([*ids, COORDINATOR] if coordinator else ids)
        for node_id in addresses:
            role = Role.COORDINATOR if node_id == COORDINATOR else Role.WORKER
            if not (pki_directory / f"{node_id}.pem").exists():
                pki.issue(pki_directory, [role], node_id)
            self._write_node(node_id, role, addresses, overrides)
        client = {
            "cluster": self.cluster,
            "tls": _tls(pki_directory, OWNER),
            "discovery": {
                "mdns": False,
                "peers": [address["listen"] for address in addresses.values()],
            },
            "watch": self._watch(overrides),
        }
        # A client has no store and is no node: what is set for these concerns the nodes alone.
        # What is set for the watched root is in the client's config already.
        shared = {k: v for k, v in overrides.items() if k not in ("node", "store", "watch")}
        _write_config(self.client_config, _merged(client, LOCAL_DEFAULTS, shared))

    def _addresses(self, ids: list[str]) -> dict[str, dict[str, Any]]:
        """For each node its addresses: those of its config, or free ports for a new one."""
        found: dict[str, dict[str, Any]] = {}
        with contextlib.ExitStack() as held:
            for node_id in ids:
                path = self.directory / node_id / "ckptd.yml"
                if path.exists():
                    old = yaml.safe_load(path.read_text(encoding="utf-8"))
                    found[node_id] = {
                        "listen": old["node"]["listen"],
                        "bulk_port": old["node"]["bulk_port"],
                        "observe": old["observe"]["listen"],
                    }
                    continue
                ports = [_free_port(held) for _ in range(3)]
                found[node_id] = {
                    "listen": f"127.0.0.1:{ports[0]}",
                    "bulk_port": ports[1],
                    "observe": f"127.0.0.1:{ports[2]}",
                }
        return found

    def _write_node(
        self,
        node_id: str,
        role: Role,
        addresses: dict[str, dict[str, Any]],
        overrides: dict[str, Any],
    ) -> None:
        directory = self.directory / node_id
        directory.mkdir(exist_ok=True, mode=0o700)
        own = addresses[node_id]
        node: dict[str, Any] = {
            "cluster": self.cluster,
            # Zones of their own: one machine plays several here, and copies must be apart.
            "node": {
                "id": node_id,
                "roles": [role.value],
                "listen": own["listen"],
                "bulk_port": own["bulk_port"],
                "zone": node_id,
            },
            "tls": _tls(self.directory / "pki", node_id),
            "discovery": {
                "mdns": False,
                "peers": [a["listen"] for other, a in addresses.items() if other != node_id],
            },
            "observe": {"listen": own["observe"], "tls": False},
        }
        unused = {"watch"}
        if role is Role.COORDINATOR:
            node["node"]["state"] = str(directory / "state")
            node["watch"] = self._watch(overrides)
            unused.add("store")
        else:
            node["store"] = {"path": str(directory / "store")}
        shared = {key: value for key, value in overrides.items() if key not in unused}
        _write_config(directory / "ckptd.yml", _merged(node, LOCAL_DEFAULTS, shared))

    def _watch(self, overrides: dict[str, Any]) -> list[dict[str, Any]]:
        """The one watched root. `watch.KEY=VALUE` sets a key of it."""
        settings = overrides.get("watch", {})
        if not isinstance(settings, dict):
            return list(settings) if isinstance(settings, list) else [settings]
        return [{"root": str(self.watch_root), **WATCH_DEFAULTS, **settings}]


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE with dotted keys as nested mappings; values are YAML. Raises UsageError."""
    nested: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise UsageError(f"--set takes KEY=VALUE, not {setting!r}")
        place = nested
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        place[parts[-1]] = yaml.safe_load(value)
    return nested


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
                result[key] = _merged(result[key], value)
            else:
                result[key] = value
    return result


def _write_config(path: Path, document: dict[str, Any]) -> None:
    text = yaml.safe_dump(document, sort_keys=False)
    _, errors = check(text)
    if errors:
        raise ConfigError(errors[0].key, errors[0].reason, next="ckptd local up --help")
    temporary = path.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _tls(directory: Path, name: str) -> dict[str, str]:
    return {
        "ca": str(directory / "ca.pem"),
        "cert": str(directory / f"{name}.pem"),
        "key": str(directory / f"{name}.key"),
    }


def _free_port(held: contextlib.ExitStack) -> int:
    """A port that is free now; held until all are chosen, so that none is chosen twice.

    Below the range that systems give to outgoing connections: one of these would take it before
    the daemon does, or while the daemon is down.
    """
    for _ in range(_PORT_TRIES_MAX):
        probe = held.enter_context(socket.socket())
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.choice(PORTS)))
            return int(probe.getsockname()[1])
    raise CkptdError("no free port on 127.0.0.1", next="ss -ltn")
