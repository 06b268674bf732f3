"""Garbage collection: which dead versions may go, and what a shard must have outlived."""

from __future__ import annotations

import random

from ckptd.core.catalogue import Catalogue
from ckptd.core.collection import Fate, Marks, census, fate_of, heard_by_half_s, is_over
from ckptd.core.documents import Document, Manifest, Pin, Tombstone, Unpin, content_id, encode
from ckptd.core.documents import document_id as id_of
from ckptd.core.identity import Identity, Role

CLUSTER = "home"
TIME = "2026-01-02T03:04:05Z"
AUTHOR = Identity(CLUSTER, frozenset({Role.CLIENT, Role.COORDINATOR}), "mac", "00" * 20)


class World:
    """A catalogue, with versions by short names."""

    def __init__(self) -> None:
        self.catalogue = Catalogue(CLUSTER)
        self._order = 0

    def add(self, document: Document) -> str:
        document_id = id_of(encode(document))
        self.catalogue.add(document_id, document, author=AUTHOR)
        return document_id

    def store(self, name: str = "run/latest") -> str:
        self._order += 1
        return self.add(
            Manifest(
                format=1,
                cluster=CLUSTER,
                name=name,
                order=self._order,
                created=TIME,
                host="mac",
                nonce="0" * 32,
                unit="directory",
                content_id=content_id(()),
                copies=2,
                redundancy="copies",
                mode=0o755,
                entries=(),
                shards=(),
            )
        )

    def drop(self, *versions: str, by: str) -> None:
        self._tombstone(versions, by)

    def remove(self, *versions: str) -> None:
        self._tombstone(versions, None)

    def _tombstone(self, versions: tuple[str, ...], by: str | None) -> None:
        self._order += 1
        self.add(
            Tombstone(
                format=1,
                cluster=CLUSTER,
                order=self._order,
                created=TIME,
                nonce="0" * 32,
                reason="rm" if by is None else "retention",
                versions=versions,
                justified_by=by,
            )
        )

    def pin(self, version: str) -> str:
        return self.add(
            Pin(format=1, cluster=CLUSTER, order=1, created=TIME, nonce="0" * 32, version=version)
        )

    def unpin(self, pin: str) -> None:
        self.add(
            Unpin(format=1, cluster=CLUSTER, order=1, created=TIME, nonce="0" * 32, pins=(pin,))
        )

    def fate(self, version: str) -> Fate:
        return fate_of(self.catalogue, version)


def test_what_somebody_removed_may_go_pinned_or_not() -> None:
    world = World()
    version = world.store()
    world.pin(version)
    world.remove(version)
    assert world.fate(version).may_go(())
    assert not world.fate(version).waits_in_vain


def test_what_a_policy_dropped_waits_until_what_justifies_it_is_protected() -> None:
    world = World()
    old, new = world.store(), world.store()
    world.drop(old, by=new)
    assert not world.fate(old).may_go({old})
    assert world.fate(old).may_go({new})


def test_a_version_that_nobody_knows_justifies_nothing() -> None:
    world = World()
    old = world.store()
    world.drop(old, by="ee" * 32)
    assert not world.fate(old).may_go({old})


def test_a_pin_stops_a_policy_until_it_is_taken_back() -> None:
    world = World()
    old, new = world.store(), world.store()
    world.drop(old, by=new)
    pin = world.pin(old)
    assert not world.fate(old).may_go({new})
    assert not world.fate(old).waits_in_vain
    world.unpin(pin)
    assert world.fate(old).may_go({new})


def test_what_justifies_may_have_been_dropped_in_its_turn() -> None:
    world = World()
    one, two, three = world.store(), world.store(), world.store()
    world.drop(one, by=two)
    world.drop(two, by=three)
    assert world.fate(one).may_go({three})
    assert not world.fate(one).may_go({two})


def test_one_of_several_that_justify_is_enough() -> None:
    world = World()
    old, a, b = world.store(), world.store("run/a"), world.store("run/b")
    world.drop(old, by=a)
    world.drop(old, by=b)
    assert world.fate(old).if_any == {a, b}


def test_tombstones_that_justify_each_other_justify_nothing() -> None:
    world = World()
    one, two = world.store(), world.store()
    world.drop(one, by=two)
    world.drop(two, by=one)
    assert world.fate(one) == Fate()


def test_when_somebody_removes_what_justified_it_waits_as_long_as_anything_of_the_run_is_left() -> (
    None
):
    world = World()
    old, new, other = world.store(), world.store(), world.store("run/best")
    world.drop(old, by=new)
    world.remove(new)
    assert world.fate(old) == Fate()
    assert world.fate(old).waits_in_vain
    world.remove(other)
    assert world.fate(old).is_final


def test_a_live_version_of_another_run_that_justifies_counts_though_the_run_is_gone() -> None:
    world = World()
    old, new, elsewhere = world.store(), world.store(), world.store("other/latest")
    world.drop(old, by=new)
    world.drop(old, by=elsewhere)
    world.remove(new)
    assert not world.fate(old).may_go(())
    assert world.fate(old).may_go({elsewhere})


def test_a_version_whose_manifest_is_not_known_waits() -> None:
    world = World()
    new = world.store()
    world.drop("aa" * 32, by=new)
    world.remove(new)
    assert world.fate("aa" * 32) == Fate()


def test_a_census_is_of_what_is_live_and_of_what_is_dead_and_still_here() -> None:
    world = World()
    old, new = world.store(), world.store()
    world.remove(old, "aa" * 32)
    found = census(world.catalogue, 7.5)
    assert found.at_s == 7.5 and found.live == {new}
    assert found.dead == {old: Fate(is_final=True)}


def test_half_of_the_others_and_never_fewer_than_one() -> None:
    heard = {"a": 5.0, "b": 7.0, "c": 3.0, "gone": 9.0, "never": None}
    assert heard_by_half_s(heard, []) is None
    assert heard_by_half_s(heard, ["a"]) == 5
    assert heard_by_half_s(heard, ["a", "b"]) == 7
    assert heard_by_half_s(heard, ["a", "b", "c"]) == 5
    assert heard_by_half_s(heard, ["a", "never", "unheard"]) is None
    assert heard_by_half_s(heard, ["a", "b", "never", "unheard"]) == 5


def test_the_grace_is_over_and_half_were_heard_after_it() -> None:
    assert is_over(10, grace_s=5, now_s=15, heard_s=15)
    assert not is_over(10, grace_s=5, now_s=14.9, heard_s=20)
    assert not is_over(10, grace_s=5, now_s=20, heard_s=14.9)
    assert not is_over(10, grace_s=5, now_s=20, heard_s=None)


def test_marks_are_of_the_shards_that_are_named() -> None:
    random_ = random.Random(1)
    here = sorted(random_.randbytes(32) for _ in range(1000))
    marks = Marks(here)
    assert len(marks) == 1000
    assert list(marks.unmarked()) == here
    named = set(random_.sample(here, 400))
    for digest in [*named, random_.randbytes(32), bytes(32), b"\xff" * 32]:
        marks.mark(digest)
    assert list(marks.unmarked()) == [digest for digest in here if digest not in named]


def test_no_shards_no_marks() -> None:
    marks = Marks([])
    marks.mark(bytes(32))
    assert list(marks.unmarked()) == []
