"""The config: every key read, every fault found and named, nothing unknown taken."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import ckptd.config
from ckptd.config import (
    Config,
    NodeConfig,
    Reserve,
    WatchRoot,
    check,
    check_file,
    check_roots,
    effective,
    find_config,
    inactive_keys,
    load,
)
from ckptd.core.limits import CONFIG_MAX_BYTES, SHARD_SIZE_MAX_BYTES, SHARD_SIZE_MIN_BYTES
from ckptd.core.quantities import Address
from ckptd.core.retention import KeepBest, RetentionRule
from ckptd.errors import ConfigError

HOME = Path("/home/me")
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "config.md"
CLIENT: dict[str, Any] = {"cluster": "home", "tls": {"ca": "/c", "cert": "~/x", "key": "/k"}}
FULL = """
cluster: home
node: {id: pi1, roles: [worker], listen: "0.0.0.0:7701", zone: shelf-a}
store: {path: /srv/ckptd, reserve: 5%}
replication: {copies: 2, shard_size: 32MiB}
tls: {ca: /etc/ckptd/ca.pem, cert: /etc/ckptd/node.pem, key: /etc/ckptd/node.key}
discovery: {mdns: false, peers: ["pi2:7701", "[::1]:7703"], interfaces: [eth0]}
membership: {heartbeat: 1s, suspect: 5s, down: 20s}
watch: [{root: ~/checkpoints, prefix: "", pattern: "", settle: 2s, settle_max: 60s, retry: 10s}]
retention:
  - {runs: "*", keep_last: 3, keep_every_steps: 1000, keep_every: 1d, keep_within: 2h,
     keep_best: {metric: eval_loss, mode: min}}
repair: {after: 10m, rate: 20MB/s}
gc: {grace: 24h}
scrub: {interval: 14d, rate: 10MB/s}
observe: {listen: "127.0.0.1:9701", tls: true, log_level: info}
"""


def read(text: str) -> Config:
    config, errors = check(text, home=HOME, platform="linux")
    assert errors == []
    assert config is not None
    return config


def faults(text: str, platform: str = "linux") -> dict[str, str]:
    """Every error as key and reason; a valid config is a failure of the test."""
    config, errors = check(text, home=HOME, platform=platform)
    assert config is None
    assert errors
    return {error.key: error.reason for error in errors}


def client_with(**keys: object) -> str:
    return yaml.safe_dump({**CLIENT, **keys})


def test_every_key_is_read_into_its_structure() -> None:
    config = read(FULL)
    assert config.node == NodeConfig(
        id="pi1", roles=("worker",), listen=Address("0.0.0.0", 7701), bulk_port=7702, zone="shelf-a"
    )
    assert config.store is not None
    assert config.store.path == Path("/srv/ckptd")
    assert config.replication.shard_size_bytes == 32 * 1024**2
    assert config.discovery.peers == (Address("pi2", 7701), Address("::1", 7703))
    assert config.watch == (WatchRoot(root=HOME / "checkpoints"),)
    assert config.retention == (
        RetentionRule(
            keep_last=3,
            keep_every_steps=1000,
            keep_every_s=86_400.0,
            keep_within_s=7200.0,
            keep_best=KeepBest(metric="eval_loss", mode="min"),
        ),
    )
    assert config.repair.rate_bytes_per_s == 20_000_000
    assert config.observe.log_level == "info"


def test_a_client_needs_only_cluster_and_tls_and_gets_the_documented_defaults() -> None:
    config = read(client_with())
    assert (config.node, config.store) == (None, None)
    assert config.tls.cert == HOME / "x"
    written = effective(config)
    assert {key: written[key] for key in written.keys() - {"cluster", "tls"}} == {
        "replication": {"copies": 2, "shard_size": "32MiB"},
        "discovery": {"mdns": True, "peers": [], "interfaces": []},
        "membership": {"heartbeat": "1s", "suspect": "5s", "down": "20s"},
        "watch": [],
        "retention": [],
        "repair": {"after": "10m", "rate": "20MB/s", "promise": "10m"},
        "gc": {"grace": "1d"},
        "scrub": {"interval": "14d", "rate": "10MB/s"},
        "observe": {"listen": "127.0.0.1:9701", "tls": True, "log_level": "info"},
    }


def test_a_section_left_empty_is_its_defaults() -> None:
    text = client_with() + "replication:\nwatch:\nobserve: {}\n"
    assert read(text) == read(client_with())


def test_the_effective_config_reads_back_to_the_same() -> None:
    for text in (FULL, client_with()):
        config = read(text)
        assert check(yaml.safe_dump(effective(config)), home=HOME, platform="linux") == (config, [])


@pytest.mark.parametrize("section", list(yaml.safe_load(FULL)))
def test_an_unknown_key_is_refused_with_its_dotted_path(section: str) -> None:
    document = yaml.safe_load(FULL)
    part = document[section]
    if isinstance(part, list):
        part[0]["qqq"] = 1
        key = f"{section}[0].qqq"
    elif isinstance(part, dict):
        part["qqq"] = 1
        key = f"{section}.qqq"
    else:
        document = {**document, "qqq": 1}
        key = "qqq"
    assert faults(yaml.safe_dump(document)) == {key: "unknown key"}


def test_an_unknown_key_names_the_one_that_was_probably_meant() -> None:
    found = faults(client_with(replicaton={"copies": 2}, membership={"heartbeats": "1s"}))
    assert found == {
        "replicaton": "unknown key; did you mean replication?",
        "membership.heartbeats": "unknown key; did you mean heartbeat?",
    }


def test_all_faults_are_found_at_once() -> None:
    found = faults(
        "node: {id: 7, roles: [worker, boss], listen: here}\n"
        "tls: {ca: ca.pem, cert: /c, key: ../key}\n"
        "retention: [{}, {keep_last: 0}]\n"
        "watch: [7, {}]\n"
        "gc: []\n"
        "extra: 1\n"
    )
    assert set(found) == {
        "cluster",
        "node.id",
        "node.roles[1]",
        "node.listen",
        "store",
        "tls.ca",
        "tls.key",
        "retention[0]",
        "retention[1].keep_last",
        "watch[0]",
        "watch[1].root",
        "gc",
        "extra",
    }


@pytest.mark.parametrize(
    ("keys", "key", "reason"),
    [
        ({"cluster": "a/b"}, "cluster", "is not 1 to 63 characters"),
        ({"cluster": "x" * 64}, "cluster", "is not 1 to 63 characters"),
        ({"cluster": 7}, "cluster", "must be text, not the int 7"),
        ({"cluster": None}, "cluster", "must be text, not nothing"),
        ({"cluster": ""}, "cluster", "is empty"),
        ({"cluster": "a\u0007"}, "cluster", "control characters"),
        ({"tls": {"ca": "/c", "cert": "~you/c", "key": "/k"}}, "tls.cert", "absolute"),
        ({"tls": {"ca": "/c", "cert": "/a/../c", "key": "/k"}}, "tls.cert", "without .."),
        ({"tls": {"ca": "/c", "cert": "/" + "x" * 1024, "key": "/k"}}, "tls.cert", "longer than"),
        ({"tls": {"ca": "/c", "cert": ["/c"], "key": "/k"}}, "tls.cert", "must be text"),
        ({"tls": []}, "tls", "must be a map of keys, not a list"),
        ({"node": 7}, "node", "must be a map of keys, not the int 7"),
        ({"replication": {"copies": 0}}, "replication.copies", "out of range: 1 to"),
        ({"replication": {"copies": True}}, "replication.copies", "whole number"),
        ({"replication": {"copies": "2"}}, "replication.copies", "whole number, not text"),
        ({"replication": {"shard_size": 33554432}}, "replication.shard_size", "add its unit"),
        ({"replication": {"shard_size": "63KiB"}}, "replication.shard_size", "out of range: 64KiB"),
        (
            {"replication": {"shard_size": "257MiB"}},
            "replication.shard_size",
            "to 256MiB are taken",
        ),
        ({"store": {"path": "/s", "reserve": "91%"}}, "store.reserve", "leaves no room"),
        ({"store": {"path": "/s", "reserve": "some"}}, "store.reserve", "is not a size"),
        ({"store": {"reserve": "5%"}}, "store.path", "missing"),
        ({"discovery": {"mdns": "no"}}, "discovery.mdns", "must be true or false"),
        ({"discovery": {"peers": "pi1:1"}}, "discovery.peers", "must be a list, not text"),
        ({"discovery": {"peers": ["pi1"]}}, "discovery.peers[0]", "is not an address"),
        ({"discovery": {"peers": ["pi1:0"]}}, "discovery.peers[0]", "port 0"),
        ({"discovery": {"peers": ["a:1"] * 257}}, "discovery.peers", "at most 256"),
        ({"membership": {"suspect": "1s"}}, "membership.down", "heartbeat < suspect < down"),
        ({"membership": {"heartbeat": "1ms"}}, "membership.heartbeat", "out of range: 50ms"),
        ({"watch": [{"root": "rel"}]}, "watch[0].root", "not an absolute path"),
        ({"watch": [{"root": "/r"}, {"root": "/r/"}]}, "watch[1].root", "watched twice"),
        ({"watch": [{"root": "/r", "prefix": "a//b"}]}, "watch[0].prefix", "name 'a//b'"),
        ({"watch": [{"root": "/r", "settle": "2m"}]}, "watch[0].settle_max", "shorter than settle"),
        ({"retention": [{"runs": "*"}]}, "retention[0]", "keeps nothing"),
        (
            {"retention": [{"keep_best": {"metric": "loss", "mode": "low"}}]},
            "retention[0].keep_best.mode",
            "must be min or max",
        ),
        (
            {"retention": [{"keep_best": {"mode": "min"}}]},
            "retention[0].keep_best.metric",
            "missing",
        ),
        ({"repair": {"rate": "20MB"}}, "repair.rate", "is not a rate"),
        ({"repair": {"rate": "1B/s"}}, "repair.rate", "out of range"),
        ({"scrub": {"interval": "soon"}}, "scrub.interval", "is not a duration"),
        ({"observe": {"log_level": "loud"}}, "observe.log_level", "must be debug or info"),
    ],
)
def test_a_wrong_value_is_refused_with_key_and_reason(
    keys: dict[str, object], key: str, reason: str
) -> None:
    found = faults(client_with(**keys))
    assert list(found) == [key]
    assert reason in found[key]


def node(**keys: object) -> str:
    whole = {"id": "pi1", "roles": ["coordinator"], **keys}
    return client_with(node={key: value for key, value in whole.items() if value is not None})


def test_the_bulk_port_follows_the_listening_port_unless_it_is_set() -> None:
    def bulk_port(text: str) -> int:
        config = read(text)
        assert config.node is not None
        return config.node.bulk_port

    assert bulk_port(node()) == 7702
    assert bulk_port(node(listen="127.0.0.1:8000")) == 8001
    assert bulk_port(node(listen="127.0.0.1:0")) == 0
    assert bulk_port(node(listen="127.0.0.1:8000", bulk_port=0)) == 0
    assert bulk_port(node(listen="127.0.0.1:65535", bulk_port=9000)) == 9000


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (node(roles=None), "node.roles"),
        (node(roles=[]), "node.roles"),
        (node(roles=["coordinator", "coordinator"]), "node.roles"),
        (node(roles=["worker"]), "store"),
        (node(id=None), "node.id"),
        (node(listen="127.0.0.1:65535"), "node.listen"),
        (node(listen="127.0.0.1:8000", bulk_port=8000), "node.bulk_port"),
        (node(bulk_port=70_000), "node.bulk_port"),
        (node(zone="shelf a"), "node.zone"),
    ],
)
def test_a_node_that_cannot_run_is_refused(text: str, key: str) -> None:
    assert list(faults(text)) == [key]


@pytest.mark.parametrize(
    "root", ["~/Desktop", "~/Documents/runs", "~/Downloads/x/y", "~/desktop/x"]
)
def test_directories_that_macos_hides_from_daemons_are_refused_there_only(root: str) -> None:
    text = client_with(watch=[{"root": root}])
    assert "macOS lets no daemon read" in faults(text, platform="darwin")["watch[0].root"]
    assert read(text).watch[0].root == HOME / root.removeprefix("~/")


def test_a_directory_beside_a_hidden_one_is_taken_on_macos() -> None:
    text = client_with(watch=[{"root": "~/Documents-of-training"}])
    assert check(text, home=HOME, platform="darwin")[1] == []


@pytest.mark.parametrize("size_bytes", [SHARD_SIZE_MIN_BYTES, SHARD_SIZE_MAX_BYTES])
def test_the_shard_size_may_reach_its_limits(size_bytes: int) -> None:
    text = client_with(replication={"shard_size": f"{size_bytes}B"})
    assert read(text).replication.shard_size_bytes == size_bytes


def test_the_reserve_is_a_share_or_a_size() -> None:
    assert Reserve(percent=5).of_capacity(1000) == 50
    assert Reserve(size_bytes=300).of_capacity(1000) == 300
    assert Reserve(size_bytes=3000).of_capacity(1000) == 1000
    config = read(client_with(store={"path": "/s", "reserve": "2GiB"}))
    assert config.store is not None
    assert config.store.reserve == Reserve(size_bytes=2 * 1024**3)


def test_keys_without_effect_in_this_version_are_listed() -> None:
    assert inactive_keys(read(FULL)) == ["watch[0]", "retention[0]"]
    coordinator = client_with(
        node={"id": "desk", "roles": ["coordinator"]},
        store={"path": "/srv/ckptd"},
        watch=[{"root": "/runs"}],
    )
    assert inactive_keys(read(coordinator)) == ["store"]


def test_a_coordinator_needs_no_store_and_has_a_place_for_its_state() -> None:
    config = read(node())
    assert config.node is not None and config.store is None
    assert config.is_coordinator and not config.is_worker
    assert config.node.state == HOME / ".local/state/ckptd/pi1"
    chosen = read(node(state="~/here")).node
    assert chosen is not None and chosen.state == HOME / "here"
    assert faults(node(state="here")) == {"node.state": "'here' is not an absolute path"}


def test_a_worker_needs_a_store_and_has_no_state() -> None:
    store = {"path": "/srv/ckptd"}
    worker = {"id": "pi1", "roles": ["worker"]}
    config = read(client_with(node=worker, store=store))
    assert config.is_worker and not config.is_coordinator
    assert config.node is not None and config.node.state is None
    found = faults(client_with(node={**worker, "state": "/var/lib/ckptd"}, store=store))
    assert found == {"node.state": "only a coordinator has one"}
    assert list(faults(client_with(node={**worker, "roles": ["worker", "coordinator"]}))) == [
        "store"
    ]


def test_text_that_is_not_yaml_or_no_map_is_refused() -> None:
    assert "line 1" in faults("cluster: [")[""]
    assert "twice" in faults("cluster: a\ncluster: b")[""]
    assert faults("- a")[""] == "must be a map of keys, not a list"
    assert "larger than 256KiB" in faults("#" * (CONFIG_MAX_BYTES + 1))[""]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*yaml.safe_load(FULL), "root", "id", "x"]), inner)
        ),
        max_leaves=20,
    )
)
def test_any_document_is_checked_without_an_unexpected_error(document: object) -> None:
    config, errors = check(yaml.safe_dump(document), home=HOME, platform="darwin")
    assert (config is None) == bool(errors)


def test_a_file_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "ckptd.yml"
    path.write_text(client_with())
    assert load(path).cluster == "home"
    assert check_file(path)[1] == []


def test_a_wrong_file_names_itself_the_first_fault_and_how_many_more(tmp_path: Path) -> None:
    path = tmp_path / "ckptd.yml"
    path.write_text("tls: {ca: /c, cert: /c, key: /k, more: 1}")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.key == "cluster"
    assert "and 1 more" in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.next == f"ckptd --config {path} config check"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"cluster: \xff", "UTF-8"), (b"#" * 2**20, "larger"), (None, "No such")],
)
def test_a_file_that_cannot_be_read_is_a_config_error(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "ckptd.yml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        load(path)


def test_roots_that_are_no_readable_directories_are_reported(tmp_path: Path) -> None:
    good, absent, file = tmp_path / "good", tmp_path / "absent", tmp_path / "file"
    good.mkdir()
    file.write_text("")
    config = read(client_with(watch=[{"root": str(path)} for path in (good, absent, file)]))
    assert [(error.key, error.reason) for error in check_roots(config)] == [
        ("watch[1].root", f"{absent} is not a directory"),
        ("watch[2].root", f"{file} is not a directory"),
    ]


def test_a_root_that_this_user_may_not_read_is_reported(tmp_path: Path) -> None:
    root = tmp_path / "closed"
    root.mkdir(mode=0o000)
    config = read(client_with(watch=[{"root": str(root)}]))
    # The one that decides is the process: root may read what its owner may not.
    readable = os.access(root, os.R_OK | os.X_OK)
    assert [error.key for error in check_roots(config)] == ([] if readable else ["watch[0].root"])


def test_the_config_is_looked_for_in_the_documented_order(tmp_path: Path) -> None:
    system = tmp_path / "etc" / "ckptd.yml"
    mine = tmp_path / ".config" / "ckptd" / "ckptd.yml"
    environ = {"CKPTD_CONFIG": "/from/environment"}
    for path in (system, mine):
        assert find_config(None, {}, tmp_path, system=system) != path
        path.parent.mkdir(parents=True)
        path.write_text("")
        assert find_config(None, {}, tmp_path, system=system) == path
    assert find_config(None, environ, tmp_path, system=system) == Path("/from/environment")
    assert find_config("/from/flag", environ, tmp_path, system=system) == Path("/from/flag")


def test_without_any_config_nothing_is_found(tmp_path: Path) -> None:
    assert find_config(None, {"CKPTD_CONFIG": ""}, tmp_path, system=tmp_path / "absent") is None


def keys_of(structure: type[msgspec.Struct], prefix: str = "") -> list[str]:
    """The dotted paths of all keys below `structure`, lists without an index."""
    keys = []
    for field in msgspec.structs.fields(structure):
        key = prefix + field.encode_name
        keys.append(key)
        nested = [
            part
            for part in (field.type, *getattr(field.type, "__args__", ()))
            if isinstance(part, type) and issubclass(part, msgspec.Struct) and part is not Reserve
        ]
        for part in nested:
            keys += keys_of(part, f"{key}.")
    return keys


def test_every_key_is_in_the_reference() -> None:
    keys = keys_of(ckptd.config.Config)
    assert "retention.keep_best.metric" in keys
    assert "membership.suspect" in keys
    documented = REFERENCE.read_text()
    assert [key for key in keys if f"`{key}`" not in documented] == []
