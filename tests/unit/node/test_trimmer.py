"""Dropping what is too much: on promises alone, and never what somebody needs."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable

import pytest
from tests.unit.node.loop_cluster import LoopCluster, LoopNode, RunInCluster

from ckptd.core import limits
from ckptd.core.trimming import proof_of_possession
from ckptd.errors import NotFound, PeerBusy, PeerRefused, StoreOperationFailed
from ckptd.node.jobs import JobProgress
from ckptd.store.copy_reader import Look
from ckptd.wire import messages

PROMISE_S = 30.0


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


async def hint(cluster: LoopCluster, node: str, version: str, datas: list[bytes]) -> int:
    shards = tuple(digest(data) for data in datas)
    reply, _ = await cluster.nodes["a"].network.request(
        node, messages.Surplus(bytes.fromhex(version), shards), messages.SurplusReply, timeout_s=1
    )
    return reply.noted


async def ask(
    cluster: LoopCluster, node: str, version: str, datas: list[bytes], seconds: float = PROMISE_S
) -> list[bool]:
    nonce = os.urandom(32)
    question = messages.Promise(
        bytes.fromhex(version), tuple(digest(data) for data in datas), seconds, nonce
    )
    reply, _ = await cluster.nodes["a"].network.request(
        node, question, messages.PromiseReply, timeout_s=1
    )
    for proof, data in zip(reply.proofs, datas, strict=True):
        assert proof in (b"", proof_of_possession(digest(nonce + data), node))
    return [bool(proof) for proof in reply.proofs]


async def trim(node: LoopNode) -> None:
    """One slice of the job."""
    await node.trimmer.step()


def test_a_copy_goes_when_enough_others_promise(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc", "abc", "ab", "abcd"])
        await asyncio.sleep(PROMISE_S)
        assert await hint(cluster, "a", version, [*datas, b"nothing"]) == 4
        await trim(cluster.nodes["a"])
        assert [cluster.holders(data) for data in datas] == ["bc", "bc", "ab", "bcd"]
        assert cluster.nodes["a"].trimmer.progress().done_bytes == 3 * 64

    in_cluster(body)


def test_a_restarted_node_drops_nothing_for_a_while(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"])
        await asyncio.sleep(100)
        node = cluster.nodes["a"]
        node.restart()
        await hint(cluster, "a", version, datas)
        assert await node.trimmer.step() == pytest.approx(PROMISE_S, abs=0.01)
        await asyncio.sleep(PROMISE_S - 1)
        assert await node.trimmer.step() == pytest.approx(1, abs=0.01)
        assert cluster.holders(datas[0]) == "abc"
        await asyncio.sleep(2)
        await trim(node)
        assert cluster.holders(datas[0]) == "bc"

    in_cluster(body)


def test_all_at_once_never_drop_too_much(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abcd"] * 20)
        await asyncio.sleep(PROMISE_S)
        for _ in range(6):
            for node in cluster.nodes:
                await hint(cluster, node, version, datas)
            async with asyncio.TaskGroup() as group:
                for one in cluster.nodes.values():
                    group.create_task(trim(one))
            assert all(len(cluster.holders(data)) >= 2 for data in datas)
            await asyncio.sleep(PROMISE_S)

    in_cluster(body)


def test_every_version_must_have_its_copies(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"])
        await asyncio.sleep(PROMISE_S)
        cluster.manifest(datas, name="run/three", copies=3)
        await hint(cluster, "a", version, datas)
        await trim(cluster.nodes["a"])
        assert cluster.holders(datas[0]) == "abc"

    in_cluster(body)


def test_who_lacks_a_manifest_is_no_holder(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"])
        await asyncio.sleep(PROMISE_S)
        cluster.nodes["c"].up = False
        cluster.manifest(datas, name="run/other")
        cluster.nodes["c"].up = True
        await hint(cluster, "a", version, datas)
        await trim(cluster.nodes["a"])
        assert cluster.holders(datas[0]) == "abc"

    in_cluster(body)


def test_draining_and_absent_nodes_do_not_count(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc", "abd", "abcd"])
        await asyncio.sleep(PROMISE_S)
        cluster.nodes["c"].draining = True
        cluster.kill("d")
        await hint(cluster, "a", version, datas)
        await trim(cluster.nodes["a"])
        assert [cluster.holders(data) for data in datas] == ["abc", "abd", "abcd"]
        with pytest.raises(PeerRefused, match="promises nothing"):
            await ask(cluster, "c", version, datas)

    in_cluster(body)


def test_two_on_one_machine_are_one(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"])
        for node in "bc":
            cluster.boot_ids[node] = "one"
        await asyncio.sleep(PROMISE_S)
        await hint(cluster, "a", version, datas)
        await trim(cluster.nodes["a"])
        assert cluster.holders(datas[0]) == "abc"

    in_cluster(body)


def test_a_shard_of_no_version_is_left_to_the_collection_of_garbage(
    in_cluster: RunInCluster,
) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"])
        await asyncio.sleep(PROMISE_S)
        await hint(cluster, "a", version, datas)
        cluster.remove(version)
        await trim(cluster.nodes["a"])
        assert cluster.holders(datas[0]) == "abc"
        with pytest.raises(PeerRefused, match="no manifest of a live version"):
            await ask(cluster, "b", version, datas)

    in_cluster(body)


def test_nothing_is_dropped_while_a_document_cannot_be_read(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"])
        await asyncio.sleep(PROMISE_S)
        node = cluster.nodes["a"]
        node.records.unreadable.add("0" * 64)
        await hint(cluster, "a", version, datas)
        with pytest.raises(NotFound, match="could name any shard"):
            await node.trimmer.step()
        node.records.unreadable.clear()
        (node.path / "catalogue" / f"{version}.json").write_bytes(b"rotten")
        await hint(cluster, "a", version, datas)
        with pytest.raises(NotFound, match=r"the manifest of run/x@\w+ cannot be read"):
            await node.trimmer.step()
        assert cluster.holders(datas[0]) == "abc"
        # What failed was asked about no longer: others may be promised now.
        assert not node.trimmer._promises._asking

    in_cluster(body)


def between(cluster: LoopCluster, happens: Callable[[], object]) -> None:
    """Lets something happen after the first promise was asked for, and before it is acted on."""
    real = cluster.nodes["a"].network.request

    async def request(node: str, message: object, *rest: object, **more: object) -> object:
        answer: object = await real(node, message, *rest, **more)  # type: ignore[arg-type]
        if isinstance(message, messages.Promise):
            happens()
        return answer

    cluster.nodes["a"].network.request = request  # type: ignore[method-assign,assignment]


def test_what_a_store_wants_meanwhile_stays(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc", "abc"])
        await asyncio.sleep(PROMISE_S)
        node = cluster.nodes["a"]
        between(cluster, lambda: node.shards.touch(digest(datas[1])))
        await hint(cluster, "a", version, datas)
        await trim(node)
        assert [cluster.holders(data) for data in datas] == ["bc", "abc"]

    in_cluster(body)


@pytest.mark.parametrize("jump_s", [-5.0, 5.0, 1e8])
def test_no_promise_is_acted_on_once_the_clock_was_set(
    in_cluster: RunInCluster, jump_s: float
) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"])
        await asyncio.sleep(PROMISE_S)
        node = cluster.nodes["a"]
        between(cluster, lambda: setattr(node.clock, "jump_s", jump_s))
        await hint(cluster, "a", version, datas)
        await trim(node)
        assert cluster.holders(datas[0]) == "abc"

    in_cluster(body)


def test_promises_that_came_late_are_not_acted_on(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"])
        await asyncio.sleep(PROMISE_S)
        cluster.delay_s = PROMISE_S * 0.6
        node = cluster.nodes["a"]
        await hint(cluster, "a", version, datas)
        await trim(node)
        assert cluster.holders(datas[0]) == "abc"

    in_cluster(body)


# -- promises


def test_no_promise_for_what_is_not_here_or_not_named(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc", "acd"])
        cluster.nodes["b"].put(b"stray")
        assert await ask(cluster, "b", version, [*datas, b"stray"]) == [True, False, False]
        with pytest.raises(PeerRefused, match="no manifest"):
            await ask(cluster, "b", "0" * 64, datas)

    in_cluster(body)


def test_no_promise_for_a_longer_time_than_a_restart_keeps_it(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"])
        assert await ask(cluster, "b", version, datas, PROMISE_S + 1) == [False]

    in_cluster(body)


def test_a_copy_is_read_before_it_is_promised(in_cluster: RunInCluster, no_pause: None) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc", "abc"])
        node = cluster.nodes["b"]
        node.rot(datas[0])
        assert await ask(cluster, "b", version, datas) == [False, True]
        assert len(node.shards.quarantined()) == 1

    in_cluster(body)


def test_who_has_a_bad_copy_itself_drops_none(in_cluster: RunInCluster, no_pause: None) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc", "abc"])
        await asyncio.sleep(PROMISE_S)
        node = cluster.nodes["a"]
        node.rot(datas[0])
        await hint(cluster, "a", version, datas)
        await trim(node)
        assert cluster.holders(datas[1]) == "bc"
        assert len(node.shards.quarantined()) == 1  # not as good as nothing: set aside, and healed
        assert node.trimmer.progress().done_bytes == 64

    in_cluster(body)


def answering(
    cluster: LoopCluster, liar: str, answer: Callable[[messages.Promise], tuple[bytes, ...]]
) -> None:
    """Lets a node answer every Promise with something else."""

    async def promise(
        _: str, request: messages.Promise, *__: object
    ) -> tuple[messages.Message, bytes]:
        return messages.PromiseReply(answer(request)), b""

    cluster.nodes[liar].of_nodes[messages.Promise] = promise


def test_a_promise_without_the_bytes_is_worth_nothing(in_cluster: RunInCluster) -> None:
    """What a stolen worker could say: that it has what it has not."""

    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc", "ab"])
        await asyncio.sleep(PROMISE_S)

        def invented(request: messages.Promise) -> tuple[bytes, ...]:
            return tuple(proof_of_possession(shard, "c") for shard in request.shards)

        def as_another_one(request: messages.Promise) -> tuple[bytes, ...]:
            salted = [digest(request.nonce + data) for data in datas]
            return tuple(proof_of_possession(each, "b") for each in salted)

        def of_another_nonce(request: messages.Promise) -> tuple[bytes, ...]:
            salted = [digest(bytes(32) + data) for data in datas]
            return tuple(proof_of_possession(each, "c") for each in salted)

        def too_few(request: messages.Promise) -> tuple[bytes, ...]:
            return (proof_of_possession(digest(request.nonce + datas[0]), "c"),)

        def empty(request: messages.Promise) -> tuple[bytes, ...]:
            return (b"",) * len(request.shards)

        for lie in (invented, as_another_one, of_another_nonce, too_few, empty):
            answering(cluster, "c", lie)
            await hint(cluster, "a", version, datas)
            await trim(cluster.nodes["a"])
            assert [cluster.holders(data) for data in datas] == ["abc", "ab"], lie.__name__

    in_cluster(body)


def reads(cluster: LoopCluster, node: str) -> list[bytes]:
    """The shards that a node reads from now on, as often as it does."""
    found: list[bytes] = []
    shards = cluster.nodes[node].shards
    real = shards.look

    def look(digest: bytes, *, salt: bytes = b"") -> Look:
        found.append(digest)
        return real(digest, salt=salt)

    shards.look = look  # type: ignore[method-assign]
    return found


def test_a_question_that_cannot_be_answered_reads_nothing(
    in_cluster: RunInCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stolen worker could keep a disk busy all day."""

    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc", "abc", "a"])
        found = reads(cluster, "b")
        with pytest.raises(PeerRefused, match="twice"):
            await ask(cluster, "b", version, [datas[0]] * 2)
        with pytest.raises(PeerRefused, match="192 bytes to be read"):
            await ask(cluster, "b", version, datas)
        assert await ask(cluster, "b", version, datas[:2], PROMISE_S + 1) == [False, False]
        assert await ask(cluster, "b", version, datas[2:]) == [False]
        assert found == []
        assert await ask(cluster, "b", version, datas[:1]) == [True]
        assert found == [digest(datas[0])]

    monkeypatch.setattr(limits, "SURPLUS_PER_SLICE_BYTES", 2 * 64)
    in_cluster(body)


def test_a_shard_of_several_versions_is_read_once(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"])
        for number in range(5):
            cluster.manifest(datas, name=f"run/again{number}")
        await asyncio.sleep(PROMISE_S)
        found = reads(cluster, "b")
        await hint(cluster, "a", version, datas)
        await trim(cluster.nodes["a"])
        assert cluster.holders(datas[0]) == "bc"
        assert found == [digest(datas[0])]

    in_cluster(body)


def test_one_question_of_each_and_one_reading_at_a_time(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc", "abc"])
        trimmer = cluster.nodes["b"].trimmer
        at_work = most = 0

        async def slow_read(shard: bytes, nonce: bytes) -> bytes:
            nonlocal at_work, most
            at_work += 1
            most = max(most, at_work)
            await asyncio.sleep(0.5)
            at_work -= 1
            return b""

        trimmer._read = slow_read  # type: ignore[method-assign]

        async def asked_by(node: str) -> None:
            question = messages.Promise(
                bytes.fromhex(version), (digest(datas[0]),), PROMISE_S, bytes(32)
            )
            await cluster.nodes[node].network.request(
                "b", question, messages.PromiseReply, timeout_s=9
            )

        both = [asyncio.create_task(asked_by(node)) for node in "ac"]
        await asyncio.sleep(0.1)
        with pytest.raises(PeerRefused) as refused:
            await asked_by("a")
        assert isinstance(refused.value.__cause__, PeerBusy)
        await asyncio.gather(*both)
        await asked_by("a")
        assert most == 1

    in_cluster(body)


def test_who_never_answers_holds_up_nothing_longer_than_promises_are_worth(
    in_cluster: RunInCluster,
) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abcd"])
        await asyncio.sleep(PROMISE_S)

        async def never(*_: object) -> tuple[messages.Message, bytes]:
            await asyncio.sleep(1e9)
            raise AssertionError

        cluster.nodes["c"].of_nodes[messages.Promise] = never
        await hint(cluster, "a", version, datas)
        began_s = cluster.now_s
        await trim(cluster.nodes["a"])
        assert cluster.now_s - began_s == pytest.approx(PROMISE_S / 2, abs=1)

    in_cluster(body)


def test_a_slice_is_bounded_by_what_is_read_for_it(
    in_cluster: RunInCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"] * 5)
        await asyncio.sleep(PROMISE_S)
        await hint(cluster, "a", version, datas)
        left = []
        for _ in range(3):
            await trim(cluster.nodes["a"])
            left.append(sum("a" in cluster.holders(data) for data in datas))
        assert left == [3, 1, 0]

    monkeypatch.setattr(limits, "SURPLUS_PER_SLICE_BYTES", 2 * 64)
    in_cluster(body)


def test_what_is_noted_is_told_without_the_disk(in_cluster: RunInCluster) -> None:
    """A node whose disk has failed must be able to say so."""

    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc", "abc"])
        await hint(cluster, "a", version, datas)
        node = cluster.nodes["a"]
        node.shards._medium.fail("pulled out")
        assert node.trimmer.progress() == JobProgress(0, 2 * 64)

    in_cluster(body)


def test_a_copy_that_vanishes_during_the_check_is_not_promised(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"])
        node = cluster.nodes["b"]
        real = node.trimmer._promises.give

        def give(shard: bytes, seconds: float, now_s: float) -> bool:
            node.shards.remove(shard, untouched_since=float("inf"))
            return real(shard, seconds, now_s)

        node.trimmer._promises.give = give  # type: ignore[method-assign]
        assert await ask(cluster, "b", version, datas) == [False]

    in_cluster(body)


def test_hints_are_bounded(in_cluster: RunInCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"] * 4)
        assert await hint(cluster, "a", version, datas) == 2
        assert await hint(cluster, "a", version, datas) == 2

    monkeypatch.setattr(limits, "SURPLUS_NOTED_MAX", 2)
    in_cluster(body)


def test_a_hint_wakes_the_job(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"])
        woken: list[bool] = []
        cluster.nodes["a"].trimmer.wake = lambda: woken.append(True)
        assert await hint(cluster, "a", version, [b"unknown"]) == 0
        assert not woken
        await hint(cluster, "a", version, datas)
        assert woken

    in_cluster(body)


def test_a_copy_that_cannot_be_removed_breaks_nothing(
    in_cluster: RunInCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc", "abc"])
        await asyncio.sleep(PROMISE_S)
        node = cluster.nodes["a"]
        real = node.shards.remove

        def remove(shard: bytes, *, untouched_since: float) -> int:
            if shard == digest(datas[0]):
                raise StoreOperationFailed("denied")
            return real(shard, untouched_since=untouched_since)

        monkeypatch.setattr(node.shards, "remove", remove)
        await hint(cluster, "a", version, datas)
        await trim(node)
        assert [cluster.holders(data) for data in datas] == ["abc", "bc"]

    in_cluster(body)


def test_a_promised_copy_goes_once_the_promise_is_over(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abcd"])
        await asyncio.sleep(PROMISE_S)
        node = cluster.nodes["b"]
        assert await ask(cluster, "b", version, datas) == [True]
        await hint(cluster, "b", version, datas)
        await asyncio.sleep(await node.trimmer.step())
        assert "b" in cluster.holders(datas[0])
        await asyncio.sleep(PROMISE_S)
        await trim(node)  # without another hint
        assert "b" not in cluster.holders(datas[0])

    in_cluster(body)


def test_who_begins_to_drain_meanwhile_does_not_count(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, datas = cluster.store(["abc"])
        await asyncio.sleep(PROMISE_S)
        between(cluster, lambda: setattr(cluster.nodes["c"], "draining", True))
        await hint(cluster, "a", version, datas)
        await trim(cluster.nodes["a"])
        assert cluster.holders(datas[0]) == "abc"

    in_cluster(body)
