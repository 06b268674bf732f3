"""The pool that bounds what control connections hold, and that nobody can keep to themselves."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from ckptd.net.memory import Claim, MemoryPool


def test_a_claim_waits_for_room_and_is_told() -> None:
    pool, told = MemoryPool(100), []
    first, second = Claim(pool, "a"), Claim(pool, "b", lambda: told.append("b"))
    assert first.want(70)
    assert not second.want(40)
    assert (pool.held_bytes, told) == (70, [])
    assert first.want(60)
    assert (pool.held_bytes, second.held_bytes, told) == (100, 40, ["b"])


def test_one_owner_gets_over_half_only_with_its_sole_claim() -> None:
    pool = MemoryPool(100)
    whole, more, other = Claim(pool, "a"), Claim(pool, "a"), Claim(pool, "b")
    assert whole.want(90)
    assert not more.want(10)
    assert other.want(10)
    assert whole.want(40)
    assert more.held_bytes == 10
    assert not more.want(20)
    assert whole.want(0)
    assert more.held_bytes == 20


def test_owners_take_turns_however_often_one_asks() -> None:
    pool, order = MemoryPool(100), []
    claims = [Claim(pool, "greedy", lambda n=n: order.append(n)) for n in range(5)]  # type: ignore[misc]
    modest = Claim(pool, "modest", lambda: order.append("modest"))
    for claim in claims:
        claim.want(90)
    modest.want(90)
    claims[0].want(0)
    assert order == ["modest"]
    modest.want(0)
    assert order == ["modest", 1]


def test_whoever_came_first_is_not_overtaken_by_small_wishes() -> None:
    pool = MemoryPool(100)
    first, large, small = Claim(pool, "a"), Claim(pool, "b"), Claim(pool, "c")
    assert first.want(60)
    assert not large.want(80)
    assert not small.want(10)
    first.want(0)
    assert (large.held_bytes, small.held_bytes) == (80, 10)


def test_more_than_all_is_granted_alone_and_what_is_there_already_counts() -> None:
    pool = MemoryPool(100)
    first, second = Claim(pool, "a"), Claim(pool, "b")
    assert first.want(300)
    assert not second.want(1)
    first.want(0)
    assert second.held_bytes == 1
    second.take(500)
    assert not first.want(1)
    second.want(0)
    assert (first.held_bytes, pool.held_bytes) == (1, 1)


def test_a_wish_that_is_taken_back_is_not_granted_later() -> None:
    pool, told = MemoryPool(100), []
    first, second = Claim(pool, "a"), Claim(pool, "b", lambda: told.append("b"))
    first.want(100)
    second.want(50)
    second.want(0)
    first.want(0)
    assert (pool.held_bytes, told) == (0, [])


def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    async def main() -> None:
        pool = MemoryPool(100)
        async with pool.claimed("a", 100):
            waiting = asyncio.create_task(pool.claimed("b", 50).__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
        assert pool.held_bytes == 0
        async with pool.claimed("c", 100) as claim:
            assert claim.held_bytes == 100

    asyncio.run(main())


@given(
    st.lists(
        st.tuples(st.integers(0, 7), st.integers(0, 120)),
        max_size=60,
    )
)
def test_the_pool_is_never_exceeded_and_ends_empty(wishes: list[tuple[int, int]]) -> None:
    pool = MemoryPool(100)
    claims = [Claim(pool, owner) for owner in "aabbccdd"]
    for index, size in wishes:
        claims[index].want(size)
        held = [claim.held_bytes for claim in claims if claim.held_bytes]
        assert pool.held_bytes == sum(held)
        assert pool.held_bytes <= 100 or len(held) == 1
        # What is held belongs to requests that are being answered, and comes back by itself: it
        # is enough that nobody waits when nothing is held.
        assert held or not any(claim.wanted_bytes for claim in claims)
    for claim in claims:
        claim.want(0)
    assert pool.held_bytes == 0
