"""Whose documents a node knows, and until when: garbage collection waits for that."""

from __future__ import annotations

from tests.cluster.kill_fixtures import wait_until
from tests.unit.node.running_nodes import RunningNode
from tests.unit.node.test_forgotten import introduce


def test_a_node_whose_disk_has_failed_is_heard_of_no_more(two_nodes: list[RunningNode]) -> None:
    node, other = two_nodes
    introduce(node, other)
    peers = node.node.peers
    assert peers is not None

    def heard_s() -> float:
        return peers.known_until_s(other.node_id) or 0.0

    def answered_s() -> float:
        link = peers._links.get(other.node_id)
        return link.answered_s if link is not None else 0.0

    wait_until(lambda: heard_s() > 0.0, "an exchange")
    other.node._directory.medium.fail("for this test")
    failed_s = answered_s()
    wait_until(lambda: answered_s() > failed_s + 1.0, "one more that began since then")
    heard_last_s = heard_s()
    again_s = answered_s()
    wait_until(lambda: answered_s() > again_s + 1.0, "another")
    assert heard_s() == heard_last_s
