"""What a node does follows from its roles."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.cluster.hostile import RawPeer
from tests.unit.node.running_nodes import RunningNode, identity, make_pki

from ckptd.client.pki import issue
from ckptd.config import Config, check
from ckptd.coordinator.part import coordinator
from ckptd.core.identity import Role
from ckptd.errors import ConfigError
from ckptd.net.loop import event_loop_factory
from ckptd.node.daemon import Node
from ckptd.wire import messages

SHARD = bytes(32)


def config_of(directory: Path, pki: Path, *roles: str, name: str = "desk") -> Config:
    document = {
        "cluster": "home",
        "node": {
            "id": "desk",
            "roles": list(roles),
            "listen": "127.0.0.1:0",
            "bulk_port": 0,
        },
        "tls": {
            "ca": str(pki / "ca.pem"),
            "cert": str(pki / f"{name}.pem"),
            "key": str(pki / f"{name}.key"),
        },
        "observe": {"listen": "127.0.0.1:0", "tls": False},
    }
    if "coordinator" in roles:
        document["node"]["state"] = str(directory / "state")  # type: ignore[index]
    found, errors = check(yaml.safe_dump(document))
    assert found is not None, errors
    return found


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    directory = make_pki(tmp_path / "pki")
    issue(directory, [Role.COORDINATOR], "desk")
    return directory


@pytest.fixture
def desk(loop_name: str, tmp_path: Path, pki: Path) -> Iterator[Node]:
    """A coordinator without a store, in a thread of its own."""
    started = threading.Event()
    nodes: list[Node] = []

    def run() -> None:
        with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
            loop = runner.get_loop()
            node = Node(config_of(tmp_path, pki, "coordinator"), None, [coordinator])
            nodes.append(node)
            stops.append(lambda: loop.call_soon_threadsafe(node.request_stop))
            runner.run(node.run(started.set))

    stops: list[object] = []
    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(20)
    try:
        yield nodes[0]
    finally:
        stop = stops[0]
        assert callable(stop)
        stop()
        thread.join(30)
        assert not thread.is_alive()


def test_a_coordinator_keeps_no_shards_and_tells_what_it_watches(desk: Node, pki: Path) -> None:
    hello = desk.hello()
    port = int(hello.address.rpartition(":")[2])
    assert (hello.roles, hello.bulk_port) == (("coordinator",), 0)
    with RawPeer("127.0.0.1", port, identity(pki, "client")) as peer:
        peer.greet()
        watched = peer.ask(messages.GetWatched())
        assert isinstance(watched, messages.Watched)
        assert (watched.unstored, watched.count) == ((), 0)
        refused = peer.ask(messages.Have((SHARD,)))
        assert isinstance(refused, messages.Error) and refused.code == "refused"
        assert peer.ask(messages.Inventory((SHARD,))) == messages.InventoryReply((None,), (-1.0,))
        status = peer.ask(messages.GetStatus())
        assert isinstance(status, messages.NodeStatus)
        assert (status.state, status.bytes_total, status.shards) == ("up", 0, 0)


def test_a_worker_watches_nothing(node: RunningNode) -> None:
    with node.connect("client") as peer:
        peer.greet()
        refused = peer.ask(messages.GetWatched())
    assert isinstance(refused, messages.Error)
    assert refused.code == "refused"
    assert "role" in refused.message


def test_a_worker_may_not_ask_what_is_watched(desk: Node, tmp_path: Path, pki: Path) -> None:
    issue(pki, [Role.WORKER], "pi9")
    port = int(desk.hello().address.rpartition(":")[2])
    with RawPeer("127.0.0.1", port, identity(pki, "pi9")) as peer:
        peer.greet()
        refused = peer.ask(messages.GetWatched())
    assert isinstance(refused, messages.Error)
    assert refused.code == "not_authorized"


def test_the_certificate_must_have_all_roles(tmp_path: Path, pki: Path) -> None:
    issue(pki, [Role.WORKER], "pi1")
    with pytest.raises(ConfigError, match="coordinator desk"):
        Node(config_of(tmp_path, pki, "coordinator", name="pi1"))
