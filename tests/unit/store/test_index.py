"""The packed index: the same answers as a dictionary, in a fraction of its room."""

from __future__ import annotations

import hashlib
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
steps = st.lists(st.tuples(st.sampled_from(["set", "remove", "touch", "verified"]), digests))


@given(steps)
def test_it_answers_like_a_dictionary(done: list[tuple[str, bytes]]) -> None:
    index = ShardIndex()
    model: dict[bytes, list[float]] = {}
    for number, (step, digest) in enumerate(done):
        if step == "set":
            index.set(digest, number, verified_at=NEVER, touched_at=number)
            model[digest] = [number, NEVER, number]
        elif step == "remove":
            assert index.remove(digest) == (model.pop(digest, None) is not None)
        elif step == "touch":
            assert index.touch(digest, number) == (digest in model)
            if digest in model:
                model[digest][2] = number
        else:
            index.set_verified(digest, number, number)
            if digest in model:
                model[digest][:2] = [number, number]
    assert len(index) == len(model)
    assert index.total_bytes == sum(size for size, _, _ in model.values())
    found = [each for first in range(256) for each in index.bucket_digests(first)]
    assert found == sorted(model)
    for _, digest in done:
        size, verified, touched = model.get(digest, (None, NEVER, None))
        assert index.size(digest) == size and index.touched_at(digest) == touched
        assert index.verified_at(digest) == (None if verified == NEVER else verified)


def test_100000_shards_stay_small() -> None:
    index = ShardIndex()
    shards = [(hashlib.sha256(number.to_bytes(4, "big")).digest(), 1) for number in range(100_000)]
    index.load(shards, now=5.0)
    assert len(index) == 100_000 and all(index.size(digest) == 1 for digest, _ in shards[::1000])
    assert 100_000 * 56 <= index.memory_bytes() <= 8 << 20
    # Nothing else grows with the count: no Python object a shard.
    for bucket in index._buckets:
        held = [getattr(bucket, name) for name in bucket.__slots__]
        assert all(type(each) in (bytearray, array) for each in held)


def test_a_check_is_told_only_for_the_right_size() -> None:
    index = ShardIndex()
    checked, unchecked, absent = (bytes([number]) * 32 for number in (1, 2, 3))
    index.set(checked, 10, verified_at=5.0, touched_at=1.0)
    index.set(unchecked, 10, verified_at=NEVER, touched_at=1.0)
    assert [index.check(digest, 10) for digest in (checked, unchecked, absent)] == [
        5.0,
        NEVER,
        None,
    ]
    assert index.check(checked, 11) is None
