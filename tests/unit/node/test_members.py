"""Who belongs and how they are, as one node sees it: documents and heartbeats on virtual time."""

from __future__ import annotations

from typing import Literal

from msgspec import structs
from prometheus_client import CollectorRegistry

from ckptd.config import MembershipConfig
from ckptd.core.documents import Drain, Forget, Maintenance, Member
from ckptd.core.identity import Identity, Role
from ckptd.core.roster import Roster
from ckptd.node.members import Members
from ckptd.observe.metrics import Metrics
from ckptd.wire.messages import Hello, NodeStatus

CLUSTER = "home"
CREATED_S = 1_767_323_045.0
TIME = "2026-01-02T03:04:05Z"
NONCE = "0" * 32
CONFIG = MembershipConfig(heartbeat_s=1.0, suspect_s=5.0, down_s=20.0)
Roles = tuple[Literal["worker", "coordinator"], ...]
STATUS = NodeStatus("", "up", 0, 0, 0, 0.0, 0, 0, 0, 0, 0, bytes(32), 0, "0", 0, 0.0)


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0
        self.lag_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return CREATED_S + self.now_s - 1000.0 - self.lag_s


def serial(node: str) -> str:
    return f"{ord(node[-1]):040x}"


class Cluster:
    """What node b knows of a cluster."""

    def __init__(self, **roles: Roles) -> None:
        self.clock = FakeClock()
        self.roster = Roster()
        self.roles = roles or dict.fromkeys("abcd", ("worker",))
        self.failed = False
        self.metrics = Metrics(CollectorRegistry(), version="0")
        self.members = Members(
            roster=self.roster,
            hello=lambda: self.hello("b"),
            failed=lambda: self.failed,
            config=CONFIG,
            clock=self.clock,
            metrics=self.metrics,
        )
        for node in self.roles:
            self.remember(node)
        self.members.tick()

    def remember(self, node: str) -> None:
        member = Member(
            format=1,
            cluster=CLUSTER,
            order=1,
            created=TIME,
            node=node,
            roles=self.roles[node],
            address=f"{node}:7701",
            bulk_port=7702,
            zone="shelf",
        )
        self.roster.add_member(f"member {node}", member, author=self.identity(node))

    def identity(self, node: str) -> Identity:
        return Identity(CLUSTER, frozenset(map(Role, self.roles[node])), node, serial(node))

    def hello(self, node: str) -> Hello:
        roles = self.roles[node]
        return Hello(CLUSTER, node, roles, "0", 0, 0, f"kernel {node}", "", f"{node}:1", 2)

    def hear(self, *nodes: str) -> None:
        for node in nodes:
            self.members.heard(self.identity(node), self.hello(node))

    def wait(self, seconds: float, *, hearing: str = "") -> None:
        for _ in range(round(seconds)):
            self.clock.now_s += 1.0
            self.hear(*hearing)
            self.members.tick()

    def drain(self, node: str) -> None:
        document = Drain(format=1, cluster=CLUSTER, order=2, created=TIME, nonce=NONCE, node=node)
        self.roster.add_mark(f"drain {node}", document)

    def forget(self, node: str) -> None:
        document = Forget(
            format=1,
            cluster=CLUSTER,
            order=3,
            created=TIME,
            nonce=NONCE,
            node=node,
            serials=(serial(node),),
        )
        self.roster.add_mark(f"forget {node}", document)

    def maintain(self, node: str, seconds: int) -> None:
        document = Maintenance(
            format=1,
            cluster=CLUSTER,
            order=4,
            created=TIME,
            nonce=NONCE,
            node=node,
            seconds=seconds,
        )
        self.roster.add_mark(f"maintenance {node} {seconds}", document)

    def states(self) -> dict[str, str]:
        return {view.node: view.state for view in self.members.views()}


def test_who_was_not_heard_since_the_start_is_absent_since_then() -> None:
    cluster = Cluster()
    cluster.wait(30.0, hearing="a")
    standings = cluster.members.standings()
    assert sorted(standings) == ["a", "b", "c", "d"]
    assert {node: s.absent_s for node, s in standings.items()} == {
        "a": None,
        "b": None,
        "c": 30.0,
        "d": 30.0,
    }
    assert cluster.members.absent_since("c") == 1000.0
    assert cluster.members.absent_since("b") is None
    assert cluster.states() == {"a": "up", "c": "down", "d": "down"}


def test_a_standing_says_where_a_node_is_and_what_it_is() -> None:
    cluster = Cluster()
    before = cluster.members.standings()["a"]  # from its document alone
    assert (before.address, before.bulk_port, before.zone) == ("a:7701", 7702, "shelf")
    assert before.roles == {"worker"} and before.boot_id == ""
    cluster.hear("a")
    heard = cluster.members.standings()["a"]
    assert (heard.address, heard.bulk_port, heard.boot_id) == ("a:1", 2, "kernel a")
    own = cluster.members.standings()["b"]
    assert (own.address, own.bulk_port, own.boot_id) == ("b:1", 2, "kernel b")
    assert own.roles == {"worker"} and own.is_live
    cluster.failed = True
    assert cluster.members.standings()["b"].failed


def test_what_is_said_of_a_node_that_is_up_does_not_move_it() -> None:
    cluster = Cluster()
    assert cluster.members.at("a", "elsewhere:1").address == "elsewhere:1"
    cluster.hear("a")
    assert cluster.members.at("a", "third:1").address == "a:1"
    assert cluster.members.at("a", "").address == "a:1"
    peer = cluster.members.peer("a")
    assert peer is not None and peer.address == "a:1"
    assert cluster.members.peer("z") is None
    assert cluster.members.knows("a") and not cluster.members.knows("z")


def test_the_steward_follows_who_is_live() -> None:
    cluster = Cluster(a=("worker",), b=("worker",), x=("coordinator",), y=("coordinator",))
    cluster.wait(1.0, hearing="axy")
    assert cluster.members.steward() == "x" and not cluster.members.is_steward()
    cluster.wait(10.0, hearing="ay")
    assert cluster.members.steward() == "x"  # suspect, and no reason to change anything
    cluster.wait(10.0, hearing="ay")
    assert cluster.members.steward() == "y"
    cluster.members.answered("y", structs.replace(STATUS, state="failed"))
    assert cluster.members.steward() == "a"
    cluster.members.answered("y", STATUS)
    assert cluster.members.steward() == "y"
    cluster.wait(21.0)
    assert cluster.members.steward() == "b" and cluster.members.is_steward()
    cluster.members.answered("z", STATUS)  # nobody knows it


def test_a_forgotten_node_is_dropped_and_told_of() -> None:
    cluster = Cluster()
    cluster.wait(1.0, hearing="ac")
    assert not cluster.members.forgotten(serial("c"))
    cluster.forget("c")
    # At once, and only so: whoever asks is not told of it under two states.
    assert [view.state for view in cluster.members.views() if view.node == "c"] == ["forgotten"]
    cluster.members.tick()
    assert cluster.members.forgotten(serial("c"))
    assert not cluster.members.knows("c") and "c" not in cluster.members.standings()
    assert cluster.states() == {"a": "up", "d": "down", "c": "forgotten"}
    views = {view.node: view for view in cluster.members.views()}
    assert (views["c"].address, views["c"].roles) == ("c:7701", ("worker",))
    assert b'node_up{node="c"}' not in cluster.metrics.text()
    assert b'node_up{node="a"} 1.0' in cluster.metrics.text()


def test_a_node_that_only_its_forget_names_is_told_of_too() -> None:
    cluster = Cluster()
    cluster.forget("z")
    assert cluster.states()["z"] == "forgotten"


def test_draining_and_maintenance_show_in_states_and_standings() -> None:
    cluster = Cluster()
    cluster.wait(1.0, hearing="acd")
    cluster.drain("a")
    cluster.maintain("c", 600)
    assert cluster.states() == {"a": "draining", "c": "maintenance", "d": "up"}
    standings = cluster.members.standings()
    assert standings["a"].draining and not standings["a"].takes_copies
    assert standings["c"].maintenance_s == 599.0 and standings["c"].takes_copies
    cluster.wait(30.0, hearing="d")
    assert cluster.states() == {"a": "down", "c": "maintenance", "d": "up"}
    cluster.wait(600.0, hearing="d")
    assert cluster.states()["c"] == "down"


def test_a_nodes_own_state() -> None:
    cluster = Cluster()
    assert cluster.members.own_state() == "up" and not cluster.members.is_draining()
    cluster.maintain("b", 60)
    assert cluster.members.own_state() == "maintenance"
    cluster.drain("b")
    assert cluster.members.own_state() == "draining" and cluster.members.is_draining()
    assert cluster.members.standings()["b"].draining
    cluster.failed = True
    assert cluster.members.own_state() == "failed"


def test_maintenance_is_over_for_a_node_whose_clock_is_far_behind_after_its_own_length() -> None:
    cluster = Cluster()
    cluster.clock.lag_s = 10 * 365 * 86_400.0
    cluster.maintain("c", 60)
    assert cluster.members.maintenance_s("c") == 60.0
    cluster.clock.now_s += 60.0
    assert cluster.members.maintenance_s("c") == 0.0
