"""Which versions are protected at this moment: what counts, and what is only hoped for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.node.small_cluster import SmallCluster, small_cluster

from ckptd.core import limits
from ckptd.wire import messages

ONE, TWO = b"1" * 1000, b"2" * 1000


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SmallCluster]:
    with small_cluster(tmp_path) as made:
        yield made


def protected(cluster: SmallCluster, *versions: str, by: str = "pi1", copies: int = 2) -> list[str]:
    """Those of `versions` that are confirmed to this node."""
    known = [cluster["mac"].records.catalogue.version(version) for version in versions]
    asked = [version for version in known if version is not None]
    found = cluster.run(cluster[by].confirmation(copies=copies).protected(asked))
    return [version for version in versions if version in found]


def test_every_shard_on_two_nodes_that_have_the_manifest(cluster: SmallCluster) -> None:
    whole = cluster.store("run/whole", ONE, TWO)
    half = cluster.store("run/half", b"3" * 1000, on=("pi1",))
    unnamed = cluster.store("run/unnamed", ONE, manifest_on=("pi1", "mac"))
    for node in ("pi1", "pi3", "mac"):
        assert protected(cluster, whole, half, unnamed, by=node) == [whole]


@pytest.mark.parametrize("wanted", ["by the manifest", "by the cluster"])
def test_the_larger_of_the_copies_wanted_counts(cluster: SmallCluster, wanted: str) -> None:
    in_manifest, in_cluster = (3, 2) if wanted == "by the manifest" else (2, 3)
    version = cluster.store("run/latest", ONE, copies=in_manifest)
    assert protected(cluster, version, copies=in_cluster) == []
    cluster["pi3"].put(ONE)
    assert protected(cluster, version, copies=in_cluster) == [version]


@pytest.mark.parametrize("asking", ["pi1", "pi2", "mac"])
def test_a_node_that_is_to_be_emptied_confirms_nothing(cluster: SmallCluster, asking: str) -> None:
    """Its copies are good, and will be gone tomorrow."""
    version = cluster.store("run/latest", ONE)
    cluster.draining.add("pi2")
    assert protected(cluster, version, by=asking) == []
    cluster["pi3"].put(ONE)
    assert protected(cluster, version, by=asking) == [version]


def test_a_node_that_does_not_answer_confirms_nothing(cluster: SmallCluster) -> None:
    version = cluster.store("run/latest", ONE)
    cluster.silent.add("pi2")
    assert protected(cluster, version) == []
    cluster["pi3"].put(ONE)
    assert protected(cluster, version) == [version]


def test_a_node_that_answers_about_fewer_than_it_was_asked_is_asked_again(
    cluster: SmallCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [cluster.store(f"run/{n}", str(n).encode() * 100) for n in range(5)]
    monkeypatch.setattr(limits, "VERSIONS_PER_QUESTION", 2)
    cluster.asked.clear()
    assert protected(cluster, *versions) == versions
    asked = [message for _, message in cluster.asked if isinstance(message, messages.Inventory)]
    assert {len(message.versions) for message in asked} == {1, 2}
