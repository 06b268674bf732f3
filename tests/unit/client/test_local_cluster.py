"""Settings of an embedded cluster reach those that they concern."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.client.local_cluster import LocalCluster, parse_settings
from ckptd.config import load
from ckptd.errors import ConfigError, UsageError


def test_settings_are_nested_by_their_dots_and_read_as_yaml() -> None:
    settings = ["gc.grace=60s", "replication.copies=3", "replication.shard_size=4MiB"]
    assert parse_settings(settings) == {
        "gc": {"grace": "60s"},
        "replication": {"copies": 3, "shard_size": "4MiB"},
    }


@pytest.mark.parametrize("setting", ["copies", "=3", "replication..copies=3"])
def test_a_setting_without_key_or_value_is_refused(setting: str) -> None:
    with pytest.raises(UsageError):
        parse_settings([setting])


def test_a_setting_of_nodes_stays_out_of_the_clients_config(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "local")
    try:
        (node,) = cluster.up(1, ["store.reserve=8MiB", "replication.copies=1"])
        assert node.config.store is not None
        assert node.config.store.reserve.size_bytes == 8 * 1024 * 1024
        client = load(cluster.client_config)
        assert client.store is None
        assert client.replication.copies == 1
    finally:
        cluster.down()


def test_settings_are_kept_and_nothing_is_restarted_without_need(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "local")
    try:
        (first,) = cluster.up(1, ["replication.shard_size=4MiB"])
        (again,) = cluster.up(1)
        assert again.config.replication.shard_size_bytes == 4 * 1024 * 1024
        assert again.pid == first.pid
        (changed,) = cluster.up(1, ["replication.copies=1"])
        assert changed.config.replication.shard_size_bytes == 4 * 1024 * 1024
        assert changed.config.replication.copies == 1
        assert changed.pid != first.pid
    finally:
        cluster.down()


def test_a_wrong_setting_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such"):
        LocalCluster(tmp_path / "local").up(1, ["replication.no_such=1"])
