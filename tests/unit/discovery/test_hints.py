"""What is kept of announcements: enough to find a node, and not more than the bounds."""

import random

import pytest

from ckptd.core import limits
from ckptd.core.quantities import Address
from ckptd.discovery.hints import Hints
from ckptd.discovery.records import Announcement

A, B, C = (Address(f"10.0.0.{number}", 7701) for number in (1, 2, 3))
LINGER_S = limits.ANNOUNCEMENT_LINGER_S


def says(
    node: str, *addresses: Address, cluster: str = "home", software: str = "1"
) -> Announcement:
    return Announcement(node, cluster, software, ("worker",), addresses)


@pytest.fixture
def hints() -> Hints:
    return Hints("home", "me", is_member=lambda node: node.startswith("pi"))


def test_an_announced_node_is_worth_a_try_at_its_addresses_in_their_order(hints: Hints) -> None:
    assert hints.hear(says("pi1", B, A, software="0.2"), 10.0)
    assert hints.nodes(10.0) == ["pi1"]
    assert hints.addresses("pi1", 10.0) == hints.announced("pi1", 10.0) == [B, A]
    assert hints.software("pi1") == "0.2"
    assert (hints.addresses("pi2", 10.0), hints.announced("pi2", 10.0)) == ([], [])
    assert hints.software("pi2") == ""


def test_the_same_again_is_no_news(hints: Hints) -> None:
    assert hints.hear(says("pi1", A), 10.0)
    assert not hints.hear(says("pi1", A), 11.0)
    assert hints.hear(says("pi1", A, B), 12.0)


def test_other_clusters_are_only_noted_and_of_these_not_too_many(hints: Hints) -> None:
    for number in range(1000):
        assert not hints.hear(says("pi1", A, cluster=f"c{number}"), 10.0)
    assert hints.nodes(10.0) == []
    assert len(hints.other_clusters) == limits.ANNOUNCED_NODES_MAX


def test_the_own_id_is_no_hint_but_who_else_claims_it_is_noted(hints: Hints) -> None:
    hints.own_addresses.add(A.host)
    assert not hints.hear(says("me", A), 10.0)
    assert hints.claimants == set()
    assert not hints.hear(says("me", A, B), 10.0)
    assert hints.nodes(10.0) == []
    assert hints.claimants == {B.host}
    for number in range(100):
        hints.hear(says("me", Address(f"10.1.0.{number}", 1)), 10.0)
    assert len(hints.claimants) == limits.ANNOUNCED_ADDRESSES_MAX


def test_what_is_taken_back_is_tried_for_a_while_and_then_forgotten(hints: Hints) -> None:
    hints.hear(says("pi1", A), 10.0)
    hints.withdraw("pi1", 20.0)
    hints.withdraw("pi1", 30.0)  # said twice: it counts from the first time
    hints.withdraw("pi9", 30.0)
    assert hints.announced("pi1", 21.0) == []
    assert hints.addresses("pi1", 20.0 + LINGER_S - 0.1) == [A]
    assert hints.addresses("pi1", 20.0 + LINGER_S) == []
    assert hints.nodes(20.0 + LINGER_S) == []


def test_a_node_that_flaps_every_second_is_one_hint_all_the_time(hints: Hints) -> None:
    for second in range(0, 600, 2):
        hints.hear(says("pi1", A), float(second))
        assert hints.addresses("pi1", float(second)) == [A]
        hints.withdraw("pi1", second + 1.0)
        assert hints.addresses("pi1", second + 1.0) == [A]


def test_a_new_address_comes_first_and_the_old_one_lingers(hints: Hints) -> None:
    hints.hear(says("pi1", A), 10.0)
    hints.prove("pi1", A, 11.0)
    assert hints.hear(says("pi1", B), 20.0)
    assert hints.announced("pi1", 20.0) == [B]
    assert hints.addresses("pi1", 20.0) == [B, A]
    assert hints.addresses("pi1", 20.0 + LINGER_S) == [B]
    hints.hear(says("pi1", A), 20.0 + LINGER_S)
    assert hints.announced("pi1", 20.0 + LINGER_S) == [A]


def test_of_two_claims_the_one_that_proved_itself_comes_first(hints: Hints) -> None:
    hints.hear(says("pi1", A), 10.0)
    hints.prove("pi1", A, 10.0)
    hints.hear(says("pi1", B, A), 11.0)
    assert hints.addresses("pi1", 11.0) == [A, B]
    hints.disprove("pi1", A)
    hints.prove("pi1", B, 12.0)
    assert hints.addresses("pi1", 12.0) == [B, A]


def test_an_answer_keeps_an_address_that_was_taken_back(hints: Hints) -> None:
    """Whoever says goodbye for a node that is there takes nothing from it."""
    hints.hear(says("pi1", A), 10.0)
    hints.withdraw("pi1", 20.0)
    hints.prove("pi1", A, 70.0)
    assert hints.addresses("pi1", 20.0 + LINGER_S) == [A]
    assert hints.addresses("pi1", 70.0 + LINGER_S) == []


def test_answers_about_unknown_nodes_or_addresses_change_nothing(hints: Hints) -> None:
    hints.hear(says("pi1", A), 10.0)
    hints.prove("pi1", B, 10.0)
    hints.prove("pi2", B, 10.0)
    hints.disprove("pi1", B)
    hints.disprove("pi2", B)
    assert hints.addresses("pi1", 10.0) == [A]


def test_a_flood_of_addresses_drives_out_no_address_that_was_right(hints: Hints) -> None:
    hints.hear(says("pi1", A), 10.0)
    hints.prove("pi1", A, 10.0)
    for number in range(1000):
        hints.hear(says("pi1", Address(f"10.9.{number // 250}.{number % 250}", 1)), 11.0)
        assert len(hints.addresses("pi1", 11.0)) <= limits.ANNOUNCED_ADDRESSES_MAX
    assert A in hints.addresses("pi1", 11.0)


def test_a_flood_of_inventions_drives_out_no_member_and_no_node_that_answered(
    hints: Hints,
) -> None:
    hints.hear(says("pi1", A), 10.0)
    hints.hear(says("guest", B), 10.0)
    hints.prove("guest", B, 10.0)
    for number in range(1000):
        hints.hear(says(f"ghost{number}", C), 11.0)
    assert len(hints.nodes(11.0)) == limits.ANNOUNCED_NODES_MAX
    assert hints.hear(says("pi2", C), 12.0)  # a member finds room
    assert len(hints.nodes(12.0)) == limits.ANNOUNCED_NODES_MAX
    assert {"pi1", "pi2", "guest"} <= set(hints.nodes(12.0))


def test_with_members_alone_nobody_is_driven_out(hints: Hints) -> None:
    for number in range(limits.ANNOUNCED_NODES_MAX):
        assert hints.hear(says(f"pi{number}", A), 10.0)
    assert not hints.hear(says("pi-new", A), 11.0)
    assert len(hints.nodes(11.0)) == limits.ANNOUNCED_NODES_MAX


@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_said_the_bounds_hold_and_nothing_stays_for_ever(seed: int) -> None:
    chance = random.Random(seed)
    hints = Hints("home", "me", is_member=lambda node: node < "n05")
    now_s = 0.0
    for _ in range(300):
        now_s += chance.random() * 3
        node = f"n{chance.randrange(200):02d}"
        addresses = [Address(f"10.0.{chance.randrange(3)}.{chance.randrange(30)}", 1)]
        match chance.randrange(5):
            case 0 | 1:
                hints.hear(says(node, *addresses * chance.randrange(1, 3)), now_s)
                assert hints.announced(node, now_s) == addresses or node not in hints.nodes(now_s)
            case 2:
                hints.withdraw(node, now_s)
            case 3:
                hints.prove(node, addresses[0], now_s)
            case _:
                hints.disprove(node, addresses[0])
        for known in (node, *hints.nodes(now_s)[:3]):
            found = hints.addresses(known, now_s)
            assert len(found) <= limits.ANNOUNCED_ADDRESSES_MAX
            assert hints.announced(known, now_s) == found[: len(hints.announced(known, now_s))]
        assert len(hints.nodes(now_s)) <= limits.ANNOUNCED_NODES_MAX
    for node in hints.nodes(now_s):
        hints.withdraw(node, now_s)
    assert hints.nodes(now_s + LINGER_S + 1.0) == []
