"""What fits: exact where it can be counted, and what placement then does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.placement import Candidate, Placement
from ckptd.core.room import homeless_bytes, possible_copies, storable_bytes, surely_fit


def nodes(*rooms: int, machines: str = "", speed: float = 1e6) -> list[Candidate]:
    return [
        Candidate(
            f"n{index}",
            machines[index] if machines else "",
            room_bytes=room,
            write_bytes_per_s=speed,
        )
        for index, room in enumerate(rooms)
    ]


def test_the_forecast_is_what_fits_with_all_copies() -> None:
    assert storable_bytes(nodes(64, 64, 64, 64), 2) == 128
    assert storable_bytes(nodes(1000, 10, 10), 2) == 20, "a large disk alone does not help"
    assert storable_bytes(nodes(7, 5), 2) == 5
    assert storable_bytes(nodes(7), 2) == 0
    assert storable_bytes([], 2) == 0
    assert storable_bytes(nodes(4, 4, 4), 3) == 4


def test_nodes_of_one_machine_share_its_fate() -> None:
    assert storable_bytes(nodes(50, 50, 8, machines="aab"), 2) == 8
    assert possible_copies(nodes(50, 50, 8, machines="aab"), 3) == 2
    assert possible_copies(nodes(50, 50, 8), 2) == 2
    assert possible_copies([], 2) == 0


def test_a_shard_needs_a_whole_place() -> None:
    assert surely_fit(4, 10, nodes(20, 20, 20, 20), 2)
    assert not surely_fit(5, 10, nodes(20, 20, 20, 20), 2)
    assert not surely_fit(3, 10, nodes(15, 15, 15, 15), 2), "60 bytes, but four places"
    assert surely_fit(2, 10, nodes(15, 15, 15, 15), 2)


def test_fewer_machines_than_copies_are_no_reason_to_refuse() -> None:
    assert surely_fit(2, 10, nodes(20), 2)
    assert not surely_fit(3, 10, nodes(20), 2)
    assert not surely_fit(0, 10, [], 2)
    assert homeless_bytes([(10, ()), (10, ())], nodes(20), 2) == 0
    assert homeless_bytes([(10, ())], [], 2) == 0


def test_a_machine_that_is_full_is_one() -> None:
    assert homeless_bytes([(10, ())], nodes(20, 0), 2) == 10
    assert homeless_bytes([(10, ())], nodes(20, 0, machines="aa"), 2) == 0


def test_copies_that_are_there_need_no_room() -> None:
    assert homeless_bytes([(10, ("n0", "n1")), (10, ())], nodes(10, 10), 2) == 0
    assert homeless_bytes([(10, ("n0",)), (10, ())], nodes(10, 20), 2) == 0
    assert homeless_bytes([(10, ("n1",)), (10, ())], nodes(10, 20), 2) == 10
    assert homeless_bytes([(10, ("n0", "gone"))], nodes(10, 5), 2) == 10
    assert homeless_bytes([(10, ("n0", "n1"))], nodes(9, 9, 0, machines="aab"), 2) == 10


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(0, 40),
)
def test_what_surely_fits_is_placed(rooms: list[int], copies: int, shards: int) -> None:
    places = nodes(*rooms)
    fits = surely_fit(shards, 3, places, copies)
    assert (homeless_bytes([(3, ())] * shards, places, copies) == 0) == fits
    if fits:
        placement = Placement(places, min(copies, len(rooms)))
        assert all(len(placement.choose(3)) == min(copies, len(rooms)) for _ in range(shards))
