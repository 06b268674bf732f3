"""Bad bytes stay until they are known to be good elsewhere, for a while, in the wanted number."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from tests.unit.store.workload import (
    DOCUMENT,
    DOCUMENT_ID,
    FIRST,
    SAME_DIRECTORY,
    digest_of,
    make_store,
    put_shard,
)
from tests.virtual_time import run_virtual

from ckptd.core import bitmaps, limits
from ckptd.core.scrubbing import Pace
from ckptd.errors import PeerError, PeerUnreachable
from ckptd.node.quarantine_keeper import QuarantineKeeper
from ckptd.store import layout
from ckptd.store.copy_reader import VerifyResult
from ckptd.store.filesystem import OPERATING_SYSTEM
from ckptd.store.shards import ShardStore
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport, Message

_T = TypeVar("_T")
_A = TypeVar("_A", bound=Message)

DIGEST = digest_of(FIRST)
GRACE_S = 100.0
NEVER = -1.0


async def on_disk(work: Callable[[], _T]) -> _T:
    return work()


class LoopClock:
    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        return 0.0


class Others:
    """Other workers: of each shard, when each of them says that it hashed its copy."""

    def __init__(self) -> None:
        self.ages_s: dict[str, dict[bytes, float]] = {}
        self.errors: dict[str, PeerError] = {}
        self.extra_ages = 0
        self.asked = 0

    async def request(
        self,
        node: str,
        message: Message,
        answer: type[_A],
        *,
        payload: bytes = b"",
        timeout_s: float,
    ) -> tuple[_A, bytes]:
        self.asked += 1
        if node in self.errors:
            raise self.errors[node]
        assert isinstance(message, messages.Have)
        assert not message.touch, "a question must not keep what nobody wants"
        held = self.ages_s[node]
        reply = messages.HaveReply(
            bitmaps.pack([shard in held for shard in message.shards]),
            tuple(held.get(shard, NEVER) for shard in message.shards) + (0.0,) * self.extra_ages,
        )
        assert isinstance(reply, answer)
        return reply, b""

    async def push(
        self, shard: bytes, size: int, target: str, *, rate_bytes_per_s: float | None = None
    ) -> CopyReport:
        raise AssertionError("nothing is pushed")


class Kept:
    """A store with one bad copy of FIRST in quarantine, and its keeper."""

    def __init__(self, path: Path, others: Others, copies: int = 2) -> None:
        self.directory = make_store(str(path), OPERATING_SYSTEM)
        self.store = ShardStore(self.directory, reserve=0)
        put_shard(self.store, FIRST)
        self.spoil()
        self.keeper = QuarantineKeeper(
            store=self.store,
            network=others,
            workers=lambda: sorted(others.ages_s),
            copies=copies,
            grace_s=GRACE_S,
            pace=Pace(interval_s=1e6, rate_bytes_per_s=1e6),
            clock=LoopClock(),
            on_disk=on_disk,
        )

    def spoil(self) -> None:
        Path(layout.shard_path(self.directory.path, DIGEST)).write_bytes(b"?" * len(FIRST))
        assert self.store.verify(DIGEST, pause_s=0) is VerifyResult.CORRUPT

    @staticmethod
    def mend(path: str) -> None:
        Path(path).write_bytes(FIRST)

    async def run_for(self, seconds: float) -> None:
        for _ in range(int(seconds / 5)):
            await self.keeper.step()
            await asyncio.sleep(5)

    @property
    def quarantined(self) -> int:
        return len(self.store.quarantined())


@pytest.fixture
def others() -> Others:
    return Others()


def test_healed_bytes_go_after_the_grace_and_not_before(tmp_path: Path, others: Others) -> None:
    kept = Kept(tmp_path / "store", others)
    others.ages_s = {"pi2": {DIGEST: 5.0}, "pi3": {DIGEST: 0.0}}

    async def work() -> None:
        await kept.run_for(GRACE_S)
        assert kept.quarantined == 1
        await kept.run_for(10)
        assert kept.quarantined == 0

    run_virtual(work())


@pytest.mark.parametrize(
    "ages_s",
    [
        {},
        {"pi2": {DIGEST: 5.0}},
        {"pi2": {DIGEST: 5.0}, "pi3": {}},
        {"pi2": {DIGEST: 5.0}, "pi3": {DIGEST: NEVER}},
        {"pi2": {DIGEST: 5.0}, "pi3": {digest_of(SAME_DIRECTORY): 5.0}},
    ],
)
def test_bytes_without_enough_good_copies_elsewhere_stay(
    tmp_path: Path, others: Others, ages_s: dict[str, dict[bytes, float]]
) -> None:
    kept = Kept(tmp_path / "store", others)
    others.ages_s = ages_s

    async def work() -> None:
        await kept.run_for(10 * GRACE_S)
        assert kept.quarantined == 1

    run_virtual(work())


def test_an_own_good_copy_counts_once_it_is_hashed(tmp_path: Path, others: Others) -> None:
    kept = Kept(tmp_path / "store", others)
    others.ages_s = {"pi2": {DIGEST: 5.0}}

    async def work() -> None:
        put_shard(kept.store, FIRST)
        kept.spoil()
        put_shard(kept.store, FIRST)
        assert kept.quarantined == 2
        await kept.run_for(GRACE_S + 20)
        assert kept.quarantined == 0
        assert kept.store.has(DIGEST)

    run_virtual(work())


def test_the_grace_begins_anew_when_a_copy_is_lost_meanwhile(
    tmp_path: Path, others: Others
) -> None:
    kept = Kept(tmp_path / "store", others)
    both = {"pi2": {DIGEST: 5.0}, "pi3": {DIGEST: 0.0}}

    async def work() -> None:
        others.ages_s = dict(both)
        await kept.run_for(80)
        others.errors["pi3"] = PeerUnreachable("pi3", "down")
        await kept.run_for(50)
        assert kept.quarantined == 1
        others.errors.clear()
        await kept.run_for(80)
        assert kept.quarantined == 1
        await kept.run_for(60)
        assert kept.quarantined == 0

    run_virtual(work())


def test_the_grace_begins_anew_when_a_second_copy_is_bad(tmp_path: Path, others: Others) -> None:
    kept = Kept(tmp_path / "store", others)
    others.ages_s = {"pi2": {DIGEST: 5.0}, "pi3": {DIGEST: 0.0}}

    async def work() -> None:
        await kept.run_for(80)
        put_shard(kept.store, FIRST)
        kept.spoil()
        assert kept.quarantined == 2
        await kept.run_for(90)
        assert kept.quarantined == 2
        await kept.run_for(50)
        assert kept.quarantined == 0

    run_virtual(work())


def test_it_is_asked_once_more_before_bytes_go(tmp_path: Path, others: Others) -> None:
    kept = Kept(tmp_path / "store", others)

    async def work() -> None:
        others.ages_s = {"pi2": {DIGEST: 5.0}, "pi3": {DIGEST: 0.0}}
        kept.keeper._asked_s = 1e9  # no other question but the first and the last
        await kept.keeper._ask({DIGEST.hex()})
        await kept.keeper.step()
        await asyncio.sleep(GRACE_S)
        others.ages_s["pi3"] = {}
        await kept.keeper.step()
        assert kept.quarantined == 1

    run_virtual(work())


def test_an_answer_that_is_too_long_counts_for_nothing(tmp_path: Path, others: Others) -> None:
    kept = Kept(tmp_path / "store", others, copies=1)
    others.ages_s = {"pi2": {DIGEST: 5.0}}
    others.extra_ages = 1

    async def work() -> None:
        await kept.run_for(2 * GRACE_S)
        assert kept.quarantined == 1

    run_virtual(work())


def test_many_are_asked_about_in_several_questions(
    tmp_path: Path, others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SHARDS_PER_QUESTION", 1)
    kept = Kept(tmp_path / "store", others)
    others.ages_s = {"pi2": {DIGEST: 5.0}}

    async def work() -> None:
        await kept.keeper._ask({DIGEST.hex(), digest_of(SAME_DIRECTORY).hex()})
        assert others.asked == 2

    run_virtual(work())


def test_nobody_is_asked_while_nothing_lies_there(tmp_path: Path, others: Others) -> None:
    kept = Kept(tmp_path / "store", others)
    others.ages_s = {"pi2": {DIGEST: 5.0}, "pi3": {DIGEST: 0.0}}

    async def work() -> None:
        await kept.run_for(200)
        asked = others.asked
        assert 0 < asked < 20
        await kept.run_for(200)
        assert others.asked == asked

    run_virtual(work())


def test_bytes_that_read_well_by_now_are_a_copy_again(tmp_path: Path, others: Others) -> None:
    kept = Kept(tmp_path / "store", others)

    async def work() -> None:
        (file,) = kept.store.quarantined()
        await kept.run_for(10)
        kept.mend(file.path)
        await kept.run_for(7000)
        assert kept.quarantined == 1, "it is not read all the time"
        await kept.run_for(21_600)
        assert kept.quarantined == 0 and kept.store.has(DIGEST)

    run_virtual(work())


def test_documents_that_lie_there_are_left_alone(tmp_path: Path, others: Others) -> None:
    kept = Kept(tmp_path / "store", others, copies=0)
    document = Path(kept.directory.path, "quarantine", f"{DOCUMENT_ID}.json.0")
    document.write_bytes(DOCUMENT)

    async def work() -> None:
        await kept.run_for(3 * GRACE_S)

    run_virtual(work())
    assert [file.suffix for file in kept.store.quarantined()] == [".json"]
    assert document.read_bytes() == DOCUMENT
