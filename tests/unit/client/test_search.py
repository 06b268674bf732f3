"""How a client looks for nodes: what is asked first, and when it need not listen at all."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, cast
from unittest.mock import ANY

import pytest
from msgspec import structs

from ckptd.client.nodes import AbsentNode, Node
from ckptd.client.search import Search
from ckptd.config import DiscoveryConfig
from ckptd.core import limits
from ckptd.core.quantities import Address, parse_address
from ckptd.discovery import service
from ckptd.discovery.hints import Hints
from ckptd.discovery.interfaces import Choice
from ckptd.discovery.records import Announcement
from ckptd.discovery.service import Lookout
from ckptd.errors import PeerUnreachable
from ckptd.wire import messages

NOWHERE = ("no-such-interface",)  # listening there fails, and says so


class Connection:
    """Of a node: all that a search does with it is to close one too many."""

    closed = False

    async def close(self) -> None:
        self.closed = True


class Network:
    """Nodes by address; each remembers the others at the addresses that it is told."""

    def __init__(self, nodes: dict[str, str], views: dict[str, tuple[str, float]]) -> None:
        self.nodes = nodes
        self.just_started: set[str] = set()
        """Nodes that know of nobody yet."""
        self.views = [
            messages.PeerView(node, address, 1, "up", seen_s, ("worker",), "")
            for node, (address, seen_s) in views.items()
        ]
        self.asked: list[str] = []
        self.opened: list[Connection] = []

    async def reach(self, address: Address, expected: str) -> Node:
        self.asked.append(str(address))
        node = self.nodes.get(str(address))
        if node is None:
            raise PeerUnreachable(str(address), "nobody there")
        connection = Connection()
        self.opened.append(connection)
        others = tuple(view for view in self.views if view.node != node)
        uptime_s = 500.0
        if node in self.just_started:
            others, uptime_s = (), 0.5
        status: Any = type("Status", (), {"peers": others, "uptime_s": uptime_s})()
        return Node(node, cast(Any, connection), address.host, 1, status)


def search(
    network: Network, *addresses: str, mdns: bool = True
) -> tuple[dict[str, Node], dict[str, AbsentNode], str]:
    nodes: dict[str, Node] = {}
    absent: dict[str, AbsentNode] = {}
    config = DiscoveryConfig(mdns=mdns, interfaces=NOWHERE)
    looking = Search("home", config, nodes, absent, network.reach)
    asyncio.run(looking.run(addresses))
    return nodes, absent, looking.outcome


def test_peers_that_all_answer_are_enough_and_nothing_is_listened_to() -> None:
    network = Network({"a:1": "pi1", "b:1": "pi2"}, {"pi2": ("b:1", 0.1)})
    nodes, absent, outcome = search(network, "a:1")
    assert (set(nodes), absent, outcome) == ({"pi1", "pi2"}, {}, "")
    assert network.asked == ["a:1", "b:1"]


def test_one_node_under_two_addresses_is_connected_to_once() -> None:
    network = Network({"a:1": "pi1", "alias:1": "pi1"}, {})
    nodes, absent, _ = search(network, "a:1", "alias:1")
    assert (set(nodes), absent) == ({"pi1"}, {})
    assert [connection.closed for connection in network.opened].count(True) == 1


def test_without_peers_it_listens_and_says_why_it_cannot() -> None:
    nodes, absent, outcome = search(Network({}, {}))
    assert (nodes, absent) == ({}, {})
    assert "no network interface is left" in outcome


def test_without_peers_and_mdns_there_is_nothing_to_do() -> None:
    assert search(Network({}, {}), mdns=False) == ({}, {}, "no peers are known")


def test_it_listens_for_a_node_that_was_there_lately() -> None:
    network = Network({"a:1": "pi1"}, {"pi2": ("gone:1", 5.0)})
    nodes, absent, outcome = search(network, "a:1")
    assert set(nodes) == {"pi1"}
    assert absent["pi2"].reason == "nobody there"
    assert "no network interface is left" in outcome


def test_nobody_waits_for_a_node_that_is_long_gone() -> None:
    network = Network({"a:1": "pi1"}, {"pi2": ("gone:1", 5000.0), "pi3": ("", -1.0)})
    nodes, absent, outcome = search(network, "a:1")
    assert (set(nodes), set(absent), outcome) == ({"pi1"}, {"pi2", "pi3"}, "")


def test_a_peer_that_does_not_answer_is_told_by_its_address() -> None:
    nodes, absent, _ = search(Network({"a:1": "pi1"}, {}), "a:1", "b:1")
    assert set(nodes) == {"pi1"}
    assert (absent["b:1"].id, absent["b:1"].reason) == ("", "nobody there")


def test_a_second_look_finds_who_is_back() -> None:
    network = Network({"a:1": "pi1"}, {"pi2": ("b:1", 1.0)})
    nodes: dict[str, Node] = {}
    absent: dict[str, AbsentNode] = {}
    looking = Search("home", DiscoveryConfig(mdns=False), nodes, absent, network.reach)

    async def twice() -> None:
        await looking.run(["a:1"])
        assert (set(nodes), set(absent)) == ({"pi1"}, {"pi2"})
        network.nodes["b:1"] = "pi2"
        await looking.run(["b:1"])

    asyncio.run(twice())
    assert (set(nodes), absent) == ({"pi1", "pi2"}, {})


@pytest.fixture
def announcements(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str, str]]:
    """What a search hears on the network: seconds after it began to listen, node, address."""
    heard: list[tuple[float, str, str]] = []

    @contextlib.asynccontextmanager
    async def look_out(cluster: str, wanted: Any) -> AsyncIterator[Lookout]:
        lookout = Lookout(Hints(cluster), Choice(("127.0.0.1",), ()))

        async def announce() -> None:
            began_s = time.monotonic()
            for after_s, node, address in heard:
                await asyncio.sleep(began_s + after_s - time.monotonic())
                said = Announcement(node, cluster, "0", ("worker",), (parse_address(address),))
                lookout.hints.hear(said, time.monotonic())
                lookout.news.set()

        announcing = asyncio.create_task(announce())
        yield lookout
        announcing.cancel()

    monkeypatch.setattr(service, "look_out", look_out)
    return heard


@pytest.mark.parametrize("starting", [(), ("pi1",), ("pi1", "pi2")])
def test_a_node_that_has_just_started_does_not_end_the_search(
    announcements: list[tuple[float, str, str]], starting: tuple[str, ...]
) -> None:
    announcements += [(0.0, "pi1", "a:1"), (0.2, "pi2", "b:1"), (0.3, "pi3", "c:1")]
    everybody = {"pi1": ("a:1", 0.1), "pi2": ("b:1", 0.1), "pi3": ("c:1", 0.1)}
    network = Network({"a:1": "pi1", "b:1": "pi2", "c:1": "pi3"}, everybody)
    network.just_started.update(starting)
    nodes, absent, _ = search(network)
    assert (set(nodes), absent) == ({"pi1", "pi2", "pi3"}, {})


def test_one_that_knows_everybody_ends_the_search_at_once(
    announcements: list[tuple[float, str, str]],
) -> None:
    strangers = [(n * limits.DISCOVERY_QUIET_S / 2, f"px{n}", f"gone:{n}") for n in range(1, 9)]
    announcements += [(0.0, "pi1", "a:1"), *strangers]  # never quiet
    network = Network({"a:1": "pi1", "b:1": "pi2"}, {"pi2": ("b:1", 0.1)})
    nodes, _, _ = search(network)
    assert set(nodes) == {"pi1", "pi2"}
    assert "gone:6" not in network.asked


def forgotten(network: Network, *tellers: str) -> None:
    """From now on these nodes say that pi9 was forgotten; the others go on as before."""
    reach = network.reach

    async def telling(address: Address, expected: str) -> Node:
        node = await reach(address, expected)
        if node.id in tellers:
            status: Any = node.status
            status.peers = tuple(
                structs.replace(view, state="forgotten", last_seen_s=-1.0)
                if view.node == "pi9"
                else view
                for view in status.peers
            )
        return node

    network.reach = telling  # type: ignore[method-assign]


def test_a_node_that_was_forgotten_is_not_looked_for() -> None:
    network = Network({"a:1": "pi1", "b:1": "pi2"}, {"pi2": ("b:1", 0.1), "pi9": ("gone:1", 5.0)})
    forgotten(network, "pi1", "pi2")
    nodes, absent, outcome = search(network, "a:1")
    assert (set(nodes), absent, outcome) == ({"pi1", "pi2"}, {}, "")
    assert "gone:1" not in network.asked


def test_a_forgotten_node_at_a_configured_address_is_none_of_the_cluster() -> None:
    network = Network(
        {"a:1": "pi1", "gone:1": "pi9"}, {"pi1": ("a:1", 0.1), "pi9": ("gone:1", 1.0)}
    )
    forgotten(network, "pi1")
    nodes, absent, _ = search(network, "a:1", "gone:1")
    assert (set(nodes), absent) == ({"pi1"}, {})
    dead = Network({"a:1": "pi1"}, {"pi9": ("gone:1", 1.0)})
    forgotten(dead, "pi1")
    assert search(dead, "a:1", "gone:1")[:2] == ({"pi1": ANY}, {})


def test_one_node_that_says_so_makes_no_other_disappear() -> None:
    views = {"pi2": ("b:1", 0.1), "pi9": ("gone:1", 500.0)}
    for liar in ("pi1", "pi2"):
        network = Network({"a:1": "pi1", "b:1": "pi2"}, views)
        forgotten(network, liar)
        _, absent, _ = search(network, "a:1")
        assert set(absent) == {"pi9"}


def test_maintenance_is_told_of_a_node_that_does_not_answer() -> None:
    network = Network({"a:1": "pi1"}, {"pi9": ("gone:1", 500.0), "pi8": ("gone:2", 500.0)})
    network.views[0] = structs.replace(network.views[0], state="maintenance")
    _, absent, _ = search(network, "a:1")
    assert (absent["pi9"].in_maintenance, absent["pi8"].in_maintenance) == (True, False)


def test_a_known_node_that_has_just_started_does_not_end_it_either(
    announcements: list[tuple[float, str, str]],
) -> None:
    announcements += [(0.0, "pi1", "a:1"), (0.2, "pi2", "b:1"), (0.3, "pi3", "c:1")]
    everybody = {"pi1": ("a:1", 0.1), "pi2": ("b:1", 0.1), "pi3": ("c:1", 0.1)}
    network = Network({"a:1": "pi1", "b:1": "pi2", "c:1": "pi3"}, everybody)
    network.just_started.add("pi1")
    nodes, _, _ = search(network, "a:1")
    assert set(nodes) == {"pi1", "pi2", "pi3"}
