"""The packed index: the same answers as a dictionary, in a fraction of its room."""

from __future__ import annotations

import hashlib
import math
from array import array

from hypothesis import given
from hypothesis import strategies as st

from ckptd.store.index import NEVER, ShardIndex

# Few first bytes and few last ones, so that examples meet in the same bucket and repeat.
digests = st.builds(
    lambda first, last: bytes([first]) + bytes(30) + bytes([last]),
    st.sampled_from([0, 1, 255]),
    st.integers(0, 9),
)
steps = st.lists(
    st.tuples(st.sampled_from(["set", "remove", "touch", "verified"]), digests, st.integers(0, 9))
)


@given(steps)
def test_it_answers_like_a_dictionary(done: list[tuple[str, bytes, int]]) -> None:
    index = ShardIndex()
    model: dict[bytes, list[float]] = {}
    for number, (step, digest, before) in enumerate(done):
        if step == "set":
            index.set(digest, number, verified_at=NEVER, touched_at=number)
            model[digest] = [number, NEVER, number]
        elif step == "remove":
            assert index.remove(digest) == (model.pop(digest, None) is not None)
        elif step == "touch":
            at = number - before
            assert index.touch(digest, at) == (digest in model)
            if digest in model:
                model[digest][2] = max(model[digest][2], at)
        else:
            index.set_verified(digest, number, number)
            if digest in model:
                model[digest][:2] = [number, number]
    assert len(index) == len(model)
    assert index.total_bytes == sum(size for size, _, _ in model.values())
    found = [each for first in range(256) for each in index.bucket_digests(first)]
    assert found == sorted(model)
    for _, digest, _ in done:
        size, verified, touched = model.get(digest, (None, NEVER, None))
        assert index.size(digest) == size and index.touched_at(digest) == touched
        assert index.verified_at(digest) == (None if verified == NEVER else verified)


def test_a_touch_never_goes_back() -> None:
    index = ShardIndex()
    index.set(bytes(32), 1, verified_at=NEVER, touched_at=5.0)
    assert index.touch(bytes(32), 4.0) and index.touched_at(bytes(32)) == 5.0
    assert index.touch(bytes(32), 6.0) and index.touched_at(bytes(32)) == 6.0


def test_100000_shards_stay_small() -> None:
    index = ShardIndex()
    shards = [(hashlib.sha256(number.to_bytes(4, "big")).digest(), 1) for number in range(100_000)]
    index.load(shards, now=5.0)
    assert len(index) == 100_000 and all(index.size(digest) == 1 for digest, _ in shards[::1000])
    assert 100_000 * 64 <= index.memory_bytes() <= 9 << 20
    # Nothing else grows with the count: no Python object a shard.
    for bucket in index._buckets:
        held = [getattr(bucket, name) for name in bucket.__slots__]
        assert all(type(each) in (bytearray, array) for each in held)


def test_a_check_is_told_only_for_the_right_size() -> None:
    index = ShardIndex()
    checked, unchecked, absent = (bytes([number]) * 32 for number in (1, 2, 3))
    index.set(checked, 10, verified_at=5.0, touched_at=1.0)
    index.set(unchecked, 10, verified_at=NEVER, touched_at=1.0)
    ages = [index.last_check(digest, 10, 8.0, 100.0) for digest in (checked, unchecked, absent)]
    assert ages == [3.0, math.inf, None]
    assert index.last_check(checked, 11, 8.0, 100.0) is None


def test_what_is_recalled_counts_until_the_shard_is_hashed_and_never_as_verified() -> None:
    index = ShardIndex()
    digest, neighbour = bytes([7]) * 32, bytes([7]) * 8 + bytes([8]) * 24
    for each in (digest, neighbour):
        index.set(each, 10, verified_at=NEVER, touched_at=1.0)
    for prefix in (b"\6" * 8, b"\7" * 8, b"\7" * 7 + b"\x08", b"\xff" * 8):
        index.recall(prefix, 60.0)
    found = {check.digest: check.age_s for check in index.last_checks(7, 5.0, 100.0)}
    # Whoever shares the prefix: one of them. Nothing but the order of scrubbing hangs on it.
    assert sorted(found.values()) == [40.0, math.inf]
    assert index.verified_at(digest) is None and index.verified_at(neighbour) is None
    assert index.last_checks(6, 5.0, 100.0) == []
    # A time ahead of the clock is not believed, by a clock that was set right it is.
    assert index.last_check(digest, 10, 5.0, 59.0) == math.inf
    assert index.last_check(digest, 10, 5.0, 60.0) == 0.0
    index.set_verified(digest, 10, 5.0)
    assert index.last_check(digest, 10, 7.0, 100.0) == 2.0
    index.set_unverified(digest)
    assert index.verified_at(digest) is None
    assert index.last_check(digest, 10, 7.0, 100.0) == math.inf
    index.set_unverified(b"\1" * 32)  # not here: nothing
