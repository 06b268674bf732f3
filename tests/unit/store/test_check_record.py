"""The file that keeps when copies were checked: small, and whole or of no use."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.store.workload import (
    FIRST,
    LATER,
    OTHER_DIRECTORY,
    SAME_DIRECTORY,
    digest_of,
    make_store,
    put_shard,
)

from ckptd.core import limits
from ckptd.store import check_record
from ckptd.store.copy_reader import VerifyResult
from ckptd.store.filesystem import OPERATING_SYSTEM
from ckptd.store.marker import open_store
from ckptd.store.shards import ShardStore

HELD = sorted(digest_of(data) for data in (FIRST, SAME_DIRECTORY, OTHER_DIRECTORY))


@given(
    st.lists(
        st.tuples(st.binary(min_size=32, max_size=32), st.floats(allow_nan=False)), max_size=20
    )
)
def test_what_is_written_is_read_to_the_second(checks: list[tuple[bytes, float]]) -> None:
    data = check_record.encode(checks)
    found = check_record.decode(data)
    assert found is not None
    assert list(found) == [
        (digest[:8], int(at)) for digest, at in checks if 0 < at <= check_record.LATEST_S
    ]
    assert len(data) <= check_record.max_bytes(len(checks))


def test_a_million_shards_fit() -> None:
    assert check_record.max_bytes(1_000_000) <= limits.CHECK_RECORD_MAX_BYTES


def test_the_format_does_not_change_unnoticed() -> None:
    data = check_record.encode([(bytes(range(32)), 1_767_323_045.75)])
    assert data == (
        b"ckptd-checks-1\n"
        + bytes.fromhex("0001020304050607 695735a5")
        + hashlib.sha256(bytes.fromhex("0001020304050607 695735a5")).digest()
    )


WHOLE = check_record.encode([(bytes(range(32)), 5.0), (bytes(range(1, 33)), 6.0)])


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        WHOLE[:-1],
        WHOLE[:20],
        WHOLE + b"\0" * 12,
        b"ckptd-checks-2\n" + WHOLE[15:],
        WHOLE[:20] + bytes([WHOLE[20] ^ 1]) + WHOLE[21:],
        WHOLE[:-5] + bytes([WHOLE[-5] ^ 1]) + WHOLE[-4:],
    ],
)
def test_a_damaged_file_says_nothing(damaged: bytes) -> None:
    assert check_record.decode(damaged) is None


class Times:
    """Two clocks: of the process, and on the wall."""

    def __init__(self, running_s: float, wall_s: float) -> None:
        self.running_s = running_s
        self.wall_s = wall_s


def ages(store: ShardStore, wall_s: float) -> list[float]:
    survey = store.survey_checks(10, wall_s, within_s=1e9)
    return [{check.digest: check.age_s for check in survey.oldest}[digest] for digest in HELD]


def test_checks_are_remembered_over_a_restart_but_do_not_count(tmp_path: Path) -> None:
    times = Times(50.0, 1_000_000.0)
    with make_store(str(tmp_path / "store"), OPERATING_SYSTEM) as directory:
        store = ShardStore(directory, reserve=0, clock=lambda: times.running_s)
        for data in (FIRST, SAME_DIRECTORY, OTHER_DIRECTORY):
            put_shard(store, data)
            times.running_s += 10
        record = store.check_record(times.wall_s + 30)
    with open_store(str(tmp_path / "store")) as directory:
        again = ShardStore(directory, reserve=0, clock=lambda: 3.0)
        assert ages(again, 1_000_100.0) == [math.inf] * 3
        assert again.recall_checks(record)
        by_digest = dict(zip(HELD, ages(again, 1_000_100.0), strict=True))
        assert [
            by_digest[digest_of(data)] for data in (FIRST, SAME_DIRECTORY, OTHER_DIRECTORY)
        ] == [100.0, 90.0, 80.0]
        assert [again.verified_at(digest) for digest in HELD] == [None] * 3
        # A record of a record keeps them, and what was hashed meanwhile takes its place.
        assert again.verify(digest_of(FIRST), pause_s=0) is VerifyResult.OK
        put_shard(again, LATER)
        record = again.check_record(1_000_100.0)
    with open_store(str(tmp_path / "store")) as directory:
        third = ShardStore(directory, reserve=0)
        assert third.recall_checks(record)
        assert [
            check.age_s for check in third.survey_checks(10, 1_000_200.0, within_s=1).oldest
        ] == [
            190.0,
            180.0,
            100.0,
            100.0,
        ]
        assert not third.recall_checks(record[:-1])


def test_a_survey_finds_the_oldest_and_counts_all(tmp_path: Path) -> None:
    times = Times(0.0, 0.0)
    with make_store(str(tmp_path / "store"), OPERATING_SYSTEM) as directory:
        store = ShardStore(directory, reserve=0, clock=lambda: times.running_s)
        assert store.survey_checks(2, 0.0, within_s=5.0) == ([], 0, 0)
        for data in (OTHER_DIRECTORY, FIRST, SAME_DIRECTORY):
            put_shard(store, data)
            times.running_s += 10
        found = store.survey_checks(2, 0.0, within_s=10.0)
        assert [check.digest for check in found.oldest] == [
            digest_of(OTHER_DIRECTORY),
            digest_of(FIRST),
        ]
        assert (found.total_bytes, found.checked_bytes) == (
            len(FIRST + SAME_DIRECTORY + OTHER_DIRECTORY),
            len(SAME_DIRECTORY),
        )
        # A bad reading takes away what was known of the copy: it comes first.
        path = tmp_path / "store" / "shards" / "5a" / digest_of(SAME_DIRECTORY).hex()
        path.write_bytes(b"?" * len(SAME_DIRECTORY))
        assert store.look(digest_of(SAME_DIRECTORY)).result is VerifyResult.CORRUPT
        assert store.verified_at(digest_of(SAME_DIRECTORY)) is None
        assert store.survey_checks(1, 0.0, within_s=10.0).oldest[0].age_s == math.inf
