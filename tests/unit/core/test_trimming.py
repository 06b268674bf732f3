"""Promises, and that no order of questions, delays and restarts ever drops too much."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from functools import partial

import pytest
from msgspec import structs

from ckptd.core import limits
from ckptd.core.trimming import (
    ACT_WITHIN,
    Claim,
    Promises,
    droppers,
    fullest,
    is_surplus,
    proof_of_possession,
)
from ckptd.core.workers import Worker

SHARD = b"s" * 32
OTHER = b"o" * 32
LASTS_S = 600.0


def ledger(started_s: float = -1000.0) -> Promises:
    return Promises(lasts_s=LASTS_S, started_s=started_s)


def test_what_is_promised_is_not_asked_about_until_it_is_over() -> None:
    promises = ledger()
    assert not promises.promised(SHARD, 0.0)
    assert promises.give(SHARD, LASTS_S, 0.0)
    assert promises.promised(SHARD, 599.0)
    assert not promises.begin(SHARD, 599.0)
    assert promises.begin(OTHER, 599.0)
    assert not promises.promised(SHARD, 600.0)
    assert promises.begin(SHARD, 600.0)


def test_a_promise_given_again_lasts_from_then() -> None:
    promises = ledger()
    assert promises.give(SHARD, LASTS_S, 0.0)
    assert promises.give(OTHER, LASTS_S, 1.0)
    assert promises.give(SHARD, LASTS_S, 500.0)
    assert promises.give(OTHER, LASTS_S, 700.0)
    assert len(promises) == 2
    assert promises.promised(SHARD, 1099.0)


def test_who_asks_promises_nothing_meanwhile() -> None:
    promises = ledger()
    assert promises.begin(SHARD, 0.0)
    assert not promises.begin(SHARD, 0.0)
    assert not promises.give(SHARD, 1.0, 0.0)
    assert promises.give(OTHER, 1.0, 0.0)
    promises.end(SHARD)
    promises.end(SHARD)
    assert promises.give(SHARD, 1.0, 0.0)


def test_a_restarted_node_drops_nothing_for_as_long_as_promises_last() -> None:
    promises = ledger(started_s=100.0)
    assert promises.wait_s(100.0) == LASTS_S
    assert not promises.begin(SHARD, 699.0)
    assert promises.wait_s(700.0) == 0
    assert promises.begin(SHARD, 700.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, LASTS_S + 1, float("nan")])
def test_no_promise_for_longer_than_a_restart_would_keep(seconds: float) -> None:
    assert not ledger().give(SHARD, seconds, 0.0)


def test_promises_are_acted_on_well_before_they_end() -> None:
    promises = ledger()
    assert not promises.may_drop(SHARD, 0.0)
    assert promises.begin(SHARD, 0.0)
    assert promises.may_drop(SHARD, LASTS_S * ACT_WITHIN - 1)
    assert not promises.may_drop(SHARD, LASTS_S * ACT_WITHIN)
    assert not promises.may_drop(SHARD, -1.0)


def test_the_count_of_promises_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROMISES_MAX", 1)
    promises = ledger()
    assert promises.give(SHARD, 1.0, 0.0)
    assert not promises.give(OTHER, 1.0, 0.0)
    assert promises.give(SHARD, 1.0, 1.0)
    assert promises.give(OTHER, 1.0, 601.0)


# -- whether a copy is one too many


MACHINES = {node: (f"node {node}", "") for node in "abcd"}


def claim(copies: int, promised_by: str) -> Claim:
    return Claim(copies, frozenset(promised_by))


@pytest.mark.parametrize(
    ("claims", "surplus"),
    [
        ([], False),
        ([claim(2, "bc")], True),
        ([claim(2, "b")], False),
        ([claim(2, "ab")], False),  # one's own copy is the one that goes
        ([claim(2, "bx")], False),  # x is not known, or drains
        ([claim(2, "bc"), claim(3, "bc")], False),
        ([claim(2, "bc"), claim(3, "bcd")], True),
    ],
)
def test_every_version_needs_its_copies_elsewhere(claims: list[Claim], surplus: bool) -> None:
    assert is_surplus("a", claims, MACHINES) is surplus


def test_promises_of_one_machine_are_one() -> None:
    machines = {**MACHINES, "c": MACHINES["b"]}
    assert not is_surplus("a", [claim(2, "bc")], machines)
    assert is_surplus("a", [claim(2, "bcd")], machines)


# -- who should drop


def worker(node: str, used: int = 10, **changes: object) -> Worker:
    return structs.replace(Worker(node, bytes_used=used, bytes_free=100 - used), **changes)


def dropping(holders: str, workers: list[Worker], copies: int = 2) -> str:
    return "".join(droppers(holders, copies, {each.node: each for each in workers}))


def test_any_of_too_many_may_drop() -> None:
    workers = [worker(node) for node in "abcd"]
    assert dropping("abc", workers) == "abc"
    assert dropping("ab", workers) == ""
    assert dropping("a", workers) == ""
    assert dropping("abx", workers) == ""


def test_it_is_the_fullest_after_what_it_drops_already() -> None:
    workers = {n: worker(n, used) for n, used in zip("abcd", (10, 30, 20, 90), strict=True)}
    assert fullest("abc", workers, {}) == "b"
    assert fullest("abc", workers, {"b": 11}) == "c"
    assert fullest("ab", workers, {"b": 20}) == "b"
    workers["a"] = structs.replace(workers["a"], bytes_used=0, bytes_free=0)
    assert fullest("abcd", workers, {}) == "a"  # no room at all


def test_a_node_that_is_away_counts_for_nothing() -> None:
    workers = [worker("a"), worker("b"), worker("c", absent_s=1.0)]
    assert dropping("abc", workers) == ""


def test_a_draining_node_drops_first_once_all_is_elsewhere() -> None:
    workers = [worker("a", draining=True), worker("b", 90), worker("c"), worker("d")]
    assert dropping("ab", workers) == ""
    assert dropping("abc", workers) == "a"
    assert dropping("abcd", workers) == "a"


def test_of_two_on_one_machine_one_drops() -> None:
    workers = [worker("a", 5, boot_id="x"), worker("b", 3, boot_id="x"), worker("c", 90)]
    assert dropping("abc", workers) == "ab"
    assert dropping("abc", workers, copies=3) == ""


def test_zones_stay_apart() -> None:
    workers = [worker("a", 90, zone="x"), worker("b", 5, zone="y"), worker("c", 6, zone="y")]
    assert dropping("abc", workers) == "bc"


# -- the protocol as a whole


class _Node:
    """A node as far as one shard is concerned. Its clock runs from its start."""

    def __init__(self, name: str, now_s: float) -> None:
        self.name = name
        self.holds = True
        self.promises = Promises(lasts_s=10.0, started_s=now_s)
        self.asked: set[str] = set()


class _World:
    """Four holders of one shard of which two copies are wanted. Messages are delayed and lost."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.nodes = {name: _Node(name, -100.0) for name in "abcd"}
        self.under_way: list[Callable[[], None]] = []
        self.drops = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.now_s += self.rng.choice([0.0, 0.1, 0.5, 3.0])
            node = self.nodes[self.rng.choice("abcd")]
            roll = self.rng.random()
            if roll < 0.55 and self.under_way:
                self.under_way.pop(self.rng.randrange(len(self.under_way)))()
            elif roll < 0.58:
                node.promises = Promises(lasts_s=10.0, started_s=self.now_s)
                node.asked = set()
            elif roll < 0.62 and self.under_way:
                self.under_way.pop(self.rng.randrange(len(self.under_way)))
            elif roll < 0.70:
                node.promises.end(SHARD)
            elif node.holds and node.promises.begin(SHARD, self.now_s):
                self._ask(node)
            assert sum(each.holds for each in self.nodes.values()) >= 2

    def _ask(self, asker: _Node) -> None:
        asker.asked = set()
        ledger = asker.promises
        for other in self.nodes.values():
            if other is not asker:
                self.under_way.append(partial(self._receive, asker, ledger, other, self.now_s))

    def _receive(self, asker: _Node, ledger: Promises, other: _Node, asked_s: float) -> None:
        if other.holds and other.promises.give(SHARD, 10.0, self.now_s):
            answer = partial(self._answer, asker, ledger, other.name, asked_s)
            self.under_way.append(answer)

    def _answer(self, asker: _Node, ledger: Promises, name: str, asked_s: float) -> None:
        if asker.promises is not ledger or self._since(asker) != asked_s:
            return  # an answer to an earlier question: its connection is gone
        asker.asked.add(name)
        claims = [Claim(2, frozenset(asker.asked))]
        if ledger.may_drop(SHARD, self.now_s) and is_surplus(asker.name, claims, MACHINES):
            asker.holds = False
            self.drops += 1
            ledger.end(SHARD)

    @staticmethod
    def _since(node: _Node) -> float | None:
        return node.promises._asking.get(SHARD)


def test_whatever_is_delayed_lost_or_restarted_two_copies_stay() -> None:
    drops = 0
    for seed in range(400):
        world = _World(seed)
        world.run(150)
        drops += world.drops
    assert drops > 200  # it is not safe because nothing ever happens


def test_a_proof_of_possession_is_of_one_node_one_question_and_the_whole_shard() -> None:
    def salted(nonce: bytes, shard: bytes) -> bytes:
        return hashlib.sha256(nonce + shard).digest()

    proof = proof_of_possession(salted(b"n", SHARD), "pi1")
    assert proof == hashlib.sha256(salted(b"n", SHARD) + b"pi1").digest()
    others = {
        proof_of_possession(salted(b"n", SHARD), "pi2"),
        proof_of_possession(salted(b"m", SHARD), "pi1"),
        proof_of_possession(salted(b"n", SHARD[:-1]), "pi1"),
    }
    assert len(others | {proof}) == 4
