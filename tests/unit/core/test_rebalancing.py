"""When copies are moved, from where to where, and which."""

from __future__ import annotations

import pytest
from msgspec import structs

from ckptd.core import bitmaps
from ckptd.core.rebalancing import Move, next_move, shards_to_move
from ckptd.core.repair import VersionCopies
from ckptd.core.workers import Worker

SIZE = 10


def worker(node: str, used: int, **changes: object) -> Worker:
    return structs.replace(Worker(node, bytes_used=used, bytes_free=1024 - used), **changes)


def moved(*workers: Worker, moving: bool = False, spare_bytes: int = 0) -> Move | None:
    return next_move(workers, moving=moving, spare_bytes=spare_bytes)


def test_a_new_node_gets_its_part() -> None:
    joined = [worker("a", 512), worker("b", 512), worker("c", 512), worker("d", 0)]
    assert moved(*joined) == Move("c", "d", 128)


@pytest.mark.parametrize(("apart", "fresh", "going_on"), [(154, 77, 77), (152, 0, 76), (50, 0, 0)])
def test_moving_begins_when_far_apart_and_ends_when_close(
    apart: int, fresh: int, going_on: int
) -> None:
    pair = [worker("a", 256 + apart), worker("b", 256)]
    for moving, size in ((False, fresh), (True, going_on)):
        expected = Move("a", "b", size) if size else None
        assert moved(*pair, moving=moving) == expected


def test_nothing_moves_while_a_node_is_away_or_alone() -> None:
    pair = [worker("a", 900), worker("b", 0)]
    assert moved(*pair, worker("c", 500, absent_s=1.0)) is None
    assert moved(pair[0]) is None
    assert moved(*pair) is not None


def test_a_draining_node_neither_gives_nor_takes_here() -> None:
    assert moved(worker("a", 900), worker("b", 0, draining=True)) is None
    assert moved(worker("a", 900, draining=True), worker("b", 0)) is None


def test_room_for_the_next_checkpoint_is_left() -> None:
    pair = [worker("a", 900), worker("b", 0)]
    assert moved(*pair, spare_bytes=900) == Move("a", "b", 124)
    assert moved(*pair, spare_bytes=1024) is None


def test_not_more_than_the_fuller_has_too_much() -> None:
    small = structs.replace(worker("a", 0), bytes_used=90, bytes_free=10)
    assert moved(small, worker("b", 0)) == Move("a", "b", 45)


# -- which shards


def version(*holders: str, asked: str = "abcd", no_manifest: str = "") -> VersionCopies:
    return VersionCopies(
        version="v" * 64,
        order=1,
        copies=2,
        shards=[(bytes([index]) * 32, SIZE) for index in range(len(holders))],
        bitmaps={
            node: None if node in no_manifest else bitmaps.pack(node in each for each in holders)
            for node in asked
        },
    )


def chosen(copies: VersionCopies, *workers: Worker, size_bytes: int = 1000) -> list[int]:
    found = shards_to_move(
        Move("a", "d", size_bytes),
        copies,
        {each.node: each for each in workers},
        size_bytes=size_bytes,
    )
    assert all((copy.source, copy.target, copy.size) == ("a", "d", SIZE) for copy in found)
    return [copy.shard[0] for copy in found]


FOUR = [worker(node, 100) for node in "abcd"]


def test_only_shards_that_the_source_has_and_the_target_lacks() -> None:
    assert chosen(version("ab", "ad", "bc", "ac"), *FOUR) == [0, 3]


def test_short_and_surplus_shards_are_left_to_repair_and_trimming() -> None:
    assert chosen(version("a", "abc", "ac"), *FOUR) == [2]
    assert chosen(version("ab"), *FOUR[:1], *FOUR[2:]) == []


def test_up_to_the_size() -> None:
    assert chosen(version("ab", "ab", "ac"), *FOUR, size_bytes=25) == [0, 1]


def test_a_target_without_the_manifest_waits_for_it() -> None:
    assert chosen(version("ab", no_manifest="d"), *FOUR) == []
    assert chosen(version("ab", asked="abc"), *FOUR) == []


def test_no_two_copies_on_one_machine_or_in_one_zone() -> None:
    twin = [*FOUR[:1], worker("b", 1, boot_id="x"), FOUR[2], worker("d", 1, boot_id="x")]
    assert chosen(version("ab", "ac"), *twin) == [1]
    zones = [worker(n, 1, zone=zone) for n, zone in zip("abcd", "uvwv", strict=True)]
    assert chosen(version("ab", "ac"), *zones) == [1]
