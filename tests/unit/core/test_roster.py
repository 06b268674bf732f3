"""Who belongs to the cluster: the same answer whatever the order in which documents arrive."""

from __future__ import annotations

import itertools
import random
from typing import Literal

import pytest

from ckptd.core.catalogue import Catalogue
from ckptd.core.documents import Document, Drain, Forget, Maintenance, Member, Undrain
from ckptd.core.identity import Identity, Role
from ckptd.core.roster import MaintenanceMark, Roster

CLUSTER = "home"
TIME = "2026-01-02T03:04:05Z"
NONCE = "0" * 32
CREATED_S = 1_767_323_045.0
ADMIN = Identity(CLUSTER, frozenset({Role.ADMIN}), "me", "ff" * 20)
FIRST, SECOND = "01" * 20, "02" * 20


def member(
    node: str = "pi1",
    *,
    order: int = 1,
    address: str = "10.0.0.1:7701",
    roles: tuple[Literal["worker", "coordinator"], ...] = ("worker",),
) -> Member:
    return Member(
        format=1,
        cluster=CLUSTER,
        order=order,
        created=TIME,
        node=node,
        roles=roles,
        address=address,
        bulk_port=7702,
    )


def by(node: str = "pi1", serial: str = FIRST) -> Identity:
    return Identity(CLUSTER, frozenset({Role.WORKER}), node, serial)


def drain(node: str = "pi1") -> Drain:
    return Drain(format=1, cluster=CLUSTER, order=5, created=TIME, nonce=NONCE, node=node)


def undrain(*drains: str) -> Undrain:
    return Undrain(format=1, cluster=CLUSTER, order=6, created=TIME, nonce=NONCE, drains=drains)


def forget(node: str, *serials: str, drains: tuple[str, ...] = ()) -> Forget:
    return Forget(
        format=1,
        cluster=CLUSTER,
        order=7,
        created=TIME,
        nonce=NONCE,
        node=node,
        serials=serials,
        drains=drains,
    )


def maintenance(seconds: int, *, order: int = 8) -> Maintenance:
    return Maintenance(
        format=1,
        cluster=CLUSTER,
        order=order,
        created=TIME,
        nonce=NONCE,
        node="pi1",
        seconds=seconds,
    )


def test_what_a_node_said_last_counts() -> None:
    roster = Roster()
    roster.add_member("b", member(order=2, address="10.0.0.2:1"), author=by())
    roster.add_member("a", member(order=1), author=by())
    assert roster.members()["pi1"].address == "10.0.0.2:1"
    roster.add_member("c", member(order=2, address="10.0.0.3:1"), author=by())  # the higher id
    assert roster.members()["pi1"].address == "10.0.0.3:1"


def test_members_are_sorted_and_workers_are_those_who_keep_copies() -> None:
    roster = Roster()
    roster.add_member("c", member("pi2"), author=by("pi2"))
    roster.add_member("b", member("mac", roles=("coordinator",)), author=by("mac"))
    roster.add_member("a", member("box", roles=("worker", "coordinator")), author=by("box"))
    assert list(roster.members()) == ["box", "mac", "pi2"]
    assert roster.workers() == {"box", "pi2"}


def test_a_forgotten_node_is_no_member_and_its_certificate_is_refused() -> None:
    roster = Roster()
    roster.add_member("a", member(), author=by())
    assert not roster.refuses(FIRST) and roster.serials("pi1") == (FIRST,)
    roster.add_mark("f", forget("pi1", FIRST))
    assert roster.members() == {} and roster.workers() == frozenset()
    assert roster.forgotten() == {"pi1"} and roster.forgotten_serials == {FIRST}
    assert roster.refuses(FIRST) and roster.serials("pi1") == ()
    assert roster.newest_serial("pi1") is None
    said = roster.last_said("pi1")
    assert said is not None and said.address == "10.0.0.1:7701"


def test_a_new_machine_under_the_old_id_is_a_member_again() -> None:
    roster = Roster()
    roster.add_member("a", member(order=9), author=by())
    roster.add_mark("f", forget("pi1", FIRST))
    roster.add_member("b", member(order=1, address="10.0.0.9:1"), author=by(serial=SECOND))
    # What the forgotten certificate said does not count, however high its order is.
    assert roster.members()["pi1"].address == "10.0.0.9:1"
    assert roster.forgotten() == frozenset() and roster.refuses(FIRST)
    assert roster.newest_serial("pi1") == SECOND and roster.serials("pi1") == (SECOND,)
    roster.add_member("c", member(order=10), author=by())  # the stolen key goes on talking
    assert roster.members()["pi1"].address == "10.0.0.9:1"


def test_a_renewed_certificate_is_known_next_to_the_old_one() -> None:
    roster = Roster()
    roster.add_member("a", member(order=1), author=by())
    roster.add_member("b", member(order=2), author=by(serial=SECOND))
    assert roster.serials("pi1") == (FIRST, SECOND) and roster.newest_serial("pi1") == SECOND


def test_a_node_that_never_said_anything_can_be_forgotten() -> None:
    roster = Roster()
    roster.add_mark("f", forget("pi7"))
    assert roster.forgotten() == {"pi7"} and roster.last_said("pi7") is None
    assert roster.serials("pi7") == () and roster.newest_serial("pi7") is None


def test_drains_are_in_force_until_an_undrain_names_them() -> None:
    roster = Roster()
    roster.add_member("a", member(), author=by())
    assert not roster.is_draining("pi1")
    roster.add_mark("d2", drain())
    roster.add_mark("d1", drain())
    assert roster.drains("pi1") == ("d1", "d2") and roster.draining() == {"pi1"}
    roster.add_mark("u", undrain("d1"))
    assert roster.is_draining("pi1")  # somebody else asked for it as well
    roster.add_mark("v", undrain("d2"))
    assert not roster.is_draining("pi1") and roster.draining() == frozenset()


def test_an_undrain_that_comes_first_counts_too() -> None:
    roster = Roster()
    roster.add_mark("u", undrain("d"))
    roster.add_mark("d", drain())
    assert not roster.is_draining("pi1")


def test_a_forget_ends_drains_so_that_the_next_machine_takes_copies() -> None:
    roster = Roster()
    roster.add_member("a", member(), author=by())
    roster.add_mark("d", drain())
    roster.add_mark("f", forget("pi1", FIRST, drains=("d",)))
    roster.add_member("b", member(order=2), author=by(serial=SECOND))
    assert not roster.is_draining("pi1")


def test_a_forgotten_node_is_not_listed_as_draining() -> None:
    roster = Roster()
    roster.add_member("a", member(), author=by())
    roster.add_mark("d", drain())
    roster.add_mark("f", forget("pi1", FIRST))
    assert roster.draining() == frozenset()


def test_the_newest_word_on_maintenance_counts() -> None:
    roster = Roster()
    assert roster.maintenance("pi1") is None
    roster.add_mark("n", maintenance(60, order=9))
    roster.add_mark("m", maintenance(7200, order=8))
    assert roster.maintenance("pi1") == MaintenanceMark("n", CREATED_S, 60)
    roster.add_mark("o", maintenance(0, order=9))  # the higher id
    assert roster.maintenance("pi1") == MaintenanceMark("o", CREATED_S, 0)


DOCUMENTS: list[tuple[str, Document, Identity]] = [
    ("01" * 32, member(order=1), by()),
    ("02" * 32, member(order=3, address="10.0.0.7:1"), by(serial=SECOND)),
    ("03" * 32, member("pi2"), by("pi2", "03" * 20)),
    ("04" * 32, drain(), ADMIN),
    ("05" * 32, drain("pi2"), ADMIN),
    ("06" * 32, undrain("05" * 32), ADMIN),
    ("07" * 32, forget("pi1", FIRST, drains=("04" * 32,)), ADMIN),
    ("08" * 32, forget("pi2", "03" * 20), ADMIN),
    ("09" * 32, maintenance(60), ADMIN),
    ("0a" * 32, maintenance(30, order=9), ADMIN),
]


def answers(documents: list[tuple[str, Document, Identity]]) -> object:
    catalogue = Catalogue(CLUSTER)
    for document_id, document, author in documents:
        catalogue.add(document_id, document, author=author)
        catalogue.add(document_id, document, author=author)
    roster = catalogue.roster
    headers = [catalogue.header(each) for each in catalogue.ids()]
    return (
        headers,
        catalogue.members(),
        roster.workers(),
        roster.forgotten(),
        roster.forgotten_serials,
        roster.draining(),
        [
            (roster.serials(n), roster.drains(n), roster.maintenance(n), roster.newest_serial(n))
            for n in ("pi1", "pi2")
        ],
    )


def test_the_order_of_arrival_plays_no_part() -> None:
    expected = answers(DOCUMENTS)
    rng = random.Random(1)
    for _ in range(300):
        shuffled = list(DOCUMENTS)
        rng.shuffle(shuffled)
        assert answers(shuffled) == expected
    for pair in itertools.permutations(DOCUMENTS[:4] + DOCUMENTS[6:7]):
        assert answers(list(pair)) == answers(DOCUMENTS[:4] + DOCUMENTS[6:7])


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        (member(), "member"),
        (drain(), "drain"),
        (undrain("d"), "undrain"),
        (forget("pi1"), "forget"),
        (maintenance(5), "maintenance"),
    ],
)
def test_each_kind_has_its_header(document: Document, kind: str) -> None:
    catalogue = Catalogue(CLUSTER)
    assert catalogue.add("ab" * 32, document, author=ADMIN)
    header = catalogue.header("ab" * 32)
    assert header is not None
    assert (header.kind, header.order, header.created) == (kind, document.order, TIME)
    assert not catalogue.has_unknown
