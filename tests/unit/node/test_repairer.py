"""Repair as a whole: what is missing is made again, within its rate, and nothing else moves."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from tests.unit.node.loop_cluster import SIZE, LoopCluster, RunInCluster

from ckptd.config import RepairConfig
from ckptd.core import limits
from ckptd.errors import StoreOperationFailed
from ckptd.node.repairer import Repairer
from ckptd.wire import messages

PAIRS = ["ab", "bc", "cd", "ad"] * 3


def live_copies(cluster: LoopCluster, data: bytes) -> int:
    return sum(cluster.nodes[node].up for node in cluster.holders(data))


def all_safe(cluster: LoopCluster, datas: list[bytes], copies: int = 2) -> bool:
    return all(live_copies(cluster, data) >= copies for data in datas)


def exactly(cluster: LoopCluster, datas: list[bytes], copies: int = 2) -> bool:
    return all(len(cluster.holders(data)) == copies for data in datas)


def inventories(cluster: LoopCluster) -> int:
    return sum(isinstance(message, messages.Inventory) for _, _, message in cluster.asked)


# -- nodes that leave and return


def test_a_dead_node_is_replaced_after_its_time(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(PAIRS)
        await cluster.run(20)
        cluster.kill("b")
        await cluster.run(59)
        assert cluster.moved == []
        assert await cluster.until(lambda: all_safe(cluster, datas), 30) < 20
        await cluster.run(100)
        assert len(cluster.moved) == 6
        assert len({source for source, _, _ in cluster.moved}) > 1

    in_cluster(body)


def test_the_steward_itself_may_be_the_one_that_died(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(PAIRS)
        await cluster.run(20)
        assert cluster.nodes["a"].repairer.view() is not None
        cluster.kill("a")
        assert await cluster.until(lambda: all_safe(cluster, datas), 90) >= 60
        view = cluster.nodes["b"].repairer.view()
        assert view is not None

    in_cluster(body)


def test_a_short_absence_moves_no_shard(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(PAIRS)
        await cluster.run(20)
        cluster.kill("b")
        await cluster.run(50)
        cluster.start("b")
        await cluster.run(200)
        assert cluster.moved == []
        assert exactly(cluster, datas)

    in_cluster(body)


def test_a_long_absence_is_paid_once_and_the_surplus_goes(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(PAIRS)
        await cluster.run(20)
        cluster.kill("b")
        await cluster.until(lambda: all_safe(cluster, datas), 100)
        await cluster.run(60)
        paid = len(cluster.moved)
        assert paid == 6
        cluster.start("b")
        await cluster.until(lambda: exactly(cluster, datas), 120)
        await cluster.run(200)
        assert len(cluster.moved) == paid
        assert exactly(cluster, datas)
        shards = [len(node.shards) for node in cluster.nodes.values()]
        assert max(shards) - min(shards) <= 2  # those drop that have most

    in_cluster(body)


def test_a_wiped_card_under_its_old_identity_is_refilled(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(PAIRS)
        await cluster.run(20)
        cluster.kill("b")
        await cluster.run(10)
        cluster.nodes["b"].wipe()
        cluster.start("b")
        assert await cluster.until(lambda: all_safe(cluster, datas), 40) < 30
        # As full as the others were on average; what is beyond goes where it is done soonest.
        assert Counter(target for _, target, _ in cluster.moved)["b"] >= 5
        assert len(cluster.moved) == 6

    in_cluster(body)


def test_a_wait_is_told_only_once_it_lasts(in_cluster: RunInCluster) -> None:
    """A steward that has just started has not heard of anybody; nor has it lost anybody."""

    async def body(cluster: LoopCluster) -> None:
        cluster.store(PAIRS)
        await cluster.run(20)
        repairer = cluster.nodes["a"].repairer
        cluster.kill("b")
        cluster.kill("c")

        def waits() -> bool:
            return bool(repairer._absences.waiting)

        await cluster.until(waits, 60)
        view = repairer.view()
        assert view is not None and view.waiting == ""
        await cluster.run(limits.REPAIR_WAIT_SHOWN_S)
        view = repairer.view()
        assert view is not None and "of 4 workers are up" in view.waiting

    in_cluster(body)


def test_only_while_more_than_half_are_up(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(PAIRS)
        await cluster.run(20)
        cluster.kill("b")
        cluster.kill("c")
        await cluster.run(300)
        assert cluster.moved == []
        view = cluster.nodes["a"].repairer.view()
        assert view is not None
        assert view.waiting.startswith("only 2 of 4 workers are up")
        assert (view.queued_shards, view.under_replicated) == (0, 0)
        cluster.start("c")
        await cluster.until(lambda: all_safe(cluster, datas), 60)

    in_cluster(body)


def test_maintenance_holds_it_back(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(PAIRS)
        await cluster.run(20)
        cluster.maintenance_s["b"] = 1000.0
        cluster.kill("b")
        await cluster.run(200)
        assert cluster.moved == []
        view = cluster.nodes["a"].repairer.view()
        assert view is not None and "maintenance" in view.waiting
        cluster.maintenance_s["b"] = 0.0
        await cluster.until(lambda: all_safe(cluster, datas), 60)

    in_cluster(body)


def test_a_failed_disk_is_an_absent_node(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(["ad", "cd"])
        await cluster.run(20)
        cluster.nodes["d"].failed = True
        await cluster.run(55)
        assert cluster.moved == []
        await cluster.until(
            lambda: all(
                "bc" in h or "ab" in h or "ac" in h or "b" in h for h in map(cluster.holders, datas)
            ),
            60,
        )
        assert all(target != "d" for _, target, _ in cluster.moved)

    in_cluster(body)


# -- bad copies, other shortages


def test_a_corrupt_copy_is_made_anew_at_once(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(["ab", "cd"])
        await cluster.run(20)
        node = cluster.nodes["d"]
        node.rot(datas[1])
        assert node.shards.verify(hashlib.sha256(datas[1]).digest(), pause_s=0) == "corrupt"
        assert await cluster.until(lambda: all_safe(cluster, datas), 60) < 20
        ((source, _, _),) = cluster.moved
        assert source == "c"

    in_cluster(body)


def test_a_rotten_copy_is_not_spread(in_cluster: RunInCluster, no_pause: None) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(["abc"], copies=4)
        cluster.nodes["a"].rot(datas[0])
        cluster.nodes["a"].restart()
        await cluster.until(lambda: len(cluster.moved) >= 2, 300)
        assert exactly(cluster, datas, copies=4)
        assert all(source != "a" for source, _, _ in cluster.moved)
        for node in cluster.nodes.values():
            for data in datas:
                digest = hashlib.sha256(data).digest()
                assert node.shards.verify(digest, pause_s=0) == "ok"

    in_cluster(body)


def test_the_most_endangered_come_first(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        config = RepairConfig(after_s=60.0, rate_bytes_per_s=SIZE, promise_s=30.0)
        assert cluster.config == config
        _, two_left = cluster.store(["abc"] * 4, name="run/a", copies=4)
        _, one_left = cluster.store(["b"] * 4, name="run/b", copies=4)
        await cluster.until(lambda: len(cluster.moved) >= 6, 120)
        endangered = {hashlib.sha256(data).digest() for data in one_left}
        assert all(shard in endangered for _, _, shard in cluster.moved[:6])
        await cluster.until(lambda: all_safe(cluster, two_left + one_left, 4), 300)

    slow = RepairConfig(after_s=60.0, rate_bytes_per_s=SIZE, promise_s=30.0)
    in_cluster(body, config=slow)


def test_it_stays_within_its_rate(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(["a"] * 30)
        await cluster.run(10)
        began = len(cluster.moved)
        await cluster.run(10)
        assert 5 <= len(cluster.moved) - began <= 11
        await cluster.until(lambda: all_safe(cluster, datas), 100)

    slow = RepairConfig(after_s=60.0, rate_bytes_per_s=SIZE, promise_s=30.0)
    in_cluster(body, config=slow)


def test_what_is_being_stored_is_left_alone_for_a_moment(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        await cluster.run(20)
        _, datas = cluster.store(["a", "b"], age_s=0.5)
        await cluster.run(25)
        assert cluster.moved == []
        await cluster.until(lambda: all_safe(cluster, datas), 30)

    in_cluster(body)


def test_a_clock_that_runs_ahead_keeps_nothing_from_repair(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        await cluster.run(20)
        _, datas = cluster.store(["a", "b"], age_s=-86_400.0)
        assert await cluster.until(lambda: all_safe(cluster, datas), 30) < 20

    in_cluster(body)


def test_who_gives_no_answer_is_not_repaired_for_until_it_takes_too_long(
    in_cluster: RunInCluster,
) -> None:
    """It is up, and says so, and might go on like this for ever."""

    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(PAIRS)
        node = cluster.nodes["c"]
        handlers = node.requests._handlers
        inventory = handlers[messages.Inventory]

        async def no_inventory(*_: object) -> tuple[messages.Message, bytes]:
            raise StoreOperationFailed("not now")

        handlers[messages.Inventory] = no_inventory
        steward = cluster.nodes["a"].repairer
        await cluster.run(50)
        assert cluster.moved == []
        view = steward.view()
        assert view is not None and view.waiting.startswith("c does not tell what it holds, and")

        def safe_without_c() -> bool:
            return all(len(set(cluster.holders(data)) - {"c"}) >= 2 for data in datas)

        await cluster.until(safe_without_c, 60)
        _, more = cluster.store(["a"], copies=4)  # c would be the fourth
        await cluster.until(lambda: all_safe(cluster, more, 3), 60)
        await cluster.run(60)
        assert not any(target == "c" for _, target, _ in cluster.moved)
        view = steward.view()
        assert view is not None and "c does not tell what it holds: others get" in view.waiting
        handlers[messages.Inventory] = inventory
        await cluster.until(lambda: exactly(cluster, datas), 300)
        await cluster.until(lambda: (v := steward.view()) is not None and not v.waiting, 60)

    in_cluster(body)


def test_who_has_not_answered_once_is_asked_again_soon(in_cluster: RunInCluster) -> None:
    """It has just come back, say, and is not connected with all others yet."""

    async def body(cluster: LoopCluster) -> None:
        cluster.store(PAIRS)
        handlers = cluster.nodes["c"].requests._handlers
        inventory = handlers[messages.Inventory]

        async def fail_once(*_: object) -> tuple[messages.Message, bytes]:
            handlers[messages.Inventory] = inventory
            raise StoreOperationFailed("not now")

        handlers[messages.Inventory] = fail_once
        await cluster.run(20)
        assert handlers[messages.Inventory] is inventory
        view = cluster.nodes["a"].repairer.view()
        assert view is not None and view.waiting == ""

    in_cluster(body)


@pytest.mark.parametrize("silent", ["c", "cd"])
def test_who_goes_on_not_to_answer_is_asked_more_and_more_seldom(
    in_cluster: RunInCluster, silent: str
) -> None:
    """A node of which every answer fails at once; or two, each of which fails every other time."""

    async def body(cluster: LoopCluster) -> None:
        cluster.store(PAIRS)
        rounds: list[str] = []

        def failing(node: str, turn: int) -> None:
            handlers = cluster.nodes[node].requests._handlers
            answer = handlers[messages.Inventory]

            async def inventory(*question: Any) -> Any:
                rounds.append(node)
                if len(silent) == 1 or rounds.count(node) % 2 == turn:
                    raise StoreOperationFailed("not now")
                return await answer(*question)

            handlers[messages.Inventory] = inventory

        for turn, node in enumerate(silent):
            failing(node, turn)
        await cluster.run(55)
        asked = rounds.count("c")
        assert 4 <= asked <= 8
        await cluster.run(300)
        assert 8 <= rounds.count("c") - asked <= 20

    in_cluster(body)


def silence(cluster: LoopCluster, node: str, when: Callable[[], bool]) -> None:
    """Lets a node that is up leave the question for its inventory unanswered, for 30 s each."""
    handlers = cluster.nodes[node].requests._handlers
    answer = handlers[messages.Inventory]

    async def inventory(*question: Any) -> Any:
        if when():
            await asyncio.sleep(30.0)
            raise StoreOperationFailed("not now")
        return await answer(*question)

    handlers[messages.Inventory] = inventory


def test_who_answers_when_nothing_is_planned_is_silent_all_the_same(
    in_cluster: RunInCluster,
) -> None:
    """A busy node might answer in each round, and never when copies are planned."""

    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(["a", "a"])
        steward = cluster.nodes["a"].repairer
        silence(cluster, "c", lambda: bool(steward._queue))
        await cluster.until(lambda: all_safe(cluster, datas), 400)

    in_cluster(body)


def test_who_comes_and_goes_and_never_tells_is_silent_all_the_time(
    in_cluster: RunInCluster,
) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(["ac", "bc"])
        for _ in range(8):
            silence(cluster, "c", lambda: True)
            await cluster.run(50)
            cluster.kill("c")
            await cluster.run(5)
            cluster.start("c")
        assert all(len(set(cluster.holders(data)) - {"c"}) >= 2 for data in datas)

    in_cluster(body)


def test_one_that_is_silent_does_not_make_repair_slow(
    in_cluster: RunInCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(cluster: LoopCluster) -> None:
        for _ in range(6):
            cluster.store(PAIRS[:2])
        silence(cluster, "d", lambda: True)
        await cluster.run(200)
        _, datas = cluster.store(["a", "b"])
        assert await cluster.until(lambda: all_safe(cluster, datas), 600) < 300

    monkeypatch.setattr(limits, "VERSIONS_PER_QUESTION", 1)
    in_cluster(body)


def test_a_slow_target_does_not_hold_up_the_others(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(["ab", "ac", "ad", "be", "bd", "ae"] * 3)
        await cluster.run(20)
        cluster.slow_s["c"] = 150.0
        cluster.kill("b")
        assert await cluster.until(lambda: all_safe(cluster, datas), 2000) < 150

    in_cluster(body, nodes="abcde")


def test_a_removed_version_is_not_repaired(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        version, _ = cluster.store(["a", "b"])
        cluster.remove(version)
        await cluster.run(60)
        assert cluster.moved == []

    in_cluster(body)


def _store_alone(cluster: LoopCluster, *, copies: int) -> None:
    """Two shards on "a", which alone has their manifest: the others take copies of them, and
    cannot say that they have them."""
    others = [cluster.nodes[node] for node in "bcd"]
    for node in others:
        node.up = False
    cluster.store(["a", "a"], name="run/alone", copies=copies)
    for node in others:
        node.up = True


def test_copies_that_nobody_tells_of_are_not_sent_without_end(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _store_alone(cluster, copies=2)
        await cluster.run(120)
        assert cluster.moved, "there is something to repair"
        looks = 120 / limits.REPAIR_LOOK_S
        assert inventories(cluster) < 4 * 3 * looks
        cluster.share_documents()
        await cluster.run(limits.REPAIR_SCAN_INTERVAL_S)
        assert cluster.nodes["a"].repairer.is_idle()

    in_cluster(body)


def test_copies_that_nobody_tells_of_keep_no_other_version_waiting(
    in_cluster: RunInCluster,
) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(["ab"] * 4, name="run/z", copies=3)  # not as urgent
        _store_alone(cluster, copies=3)
        await cluster.until(lambda: all_safe(cluster, datas, 3), 120)

    in_cluster(body)


def test_it_goes_on_at_once_while_copies_are_made(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(["a"] * 2000)
        assert await cluster.until(lambda: all_safe(cluster, datas), 300) < 20

    in_cluster(body)


def test_shards_without_any_copy_are_told(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(["ab", "", "a"])
        await cluster.run(3)
        await cluster.until(lambda: len(cluster.moved) == 1, 20)
        await cluster.run(60)
        node = cluster.nodes["a"]
        view = node.repairer.view()
        assert view is not None
        assert (view.unrecoverable, view.under_replicated, view.queued_bytes) == (1, 0, 0)
        text = node.metrics.text().decode()
        assert "ckptd_shards_unrecoverable 1.0" in text
        assert "ckptd_shards_under_replicated 0.0" in text
        assert "ckptd_repair_queue_bytes 0.0" in text
        assert "ckptd_repair_queue_bytes" not in cluster.nodes["b"].metrics.text().decode()
        assert len(datas) == 3

    in_cluster(body)


def test_shards_of_several_versions_are_counted_and_copied_once(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(["a", "a"], name="run/a")
        cluster.manifest(datas, name="run/b")
        slow = cluster.nodes["a"].repairer
        await cluster.until(lambda: slow.view() is not None, 10)
        view = slow.view()
        assert view is not None
        assert (view.queued_shards, view.queued_bytes) == (2, 2 * SIZE)
        await cluster.run(60)
        assert len(cluster.moved) == 2

    in_cluster(body, config=RepairConfig(after_s=60.0, rate_bytes_per_s=8, promise_s=30.0))


def test_a_node_that_cannot_take_copies_is_passed_over(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        cluster.refuse_copies_on = "b"
        _, datas = cluster.store(["a"] * 6)
        await cluster.until(lambda: all_safe(cluster, datas), 120)
        assert {target for _, target, _ in cluster.moved} <= {"c", "d"}

    in_cluster(body)


def test_when_nobody_has_room_that_is_said_and_tried_again(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        for node in "bcd":
            cluster.nodes[node].capacity_bytes = SIZE // 2
        _, datas = cluster.store(["a"])
        await cluster.run(60)
        view = cluster.nodes["a"].repairer.view()
        assert view is not None
        assert "room" in view.waiting
        assert cluster.nodes["a"].repairer.progress().last_error == view.waiting
        assert not cluster.nodes["a"].repairer.is_idle()
        cluster.nodes["d"].capacity_bytes = 10 * SIZE
        await cluster.until(lambda: all_safe(cluster, datas), 60)
        await cluster.run(40)
        view = cluster.nodes["a"].repairer.view()
        assert view is not None and view.waiting == ""

    in_cluster(body)


# -- drain


def test_a_draining_node_is_emptied(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(PAIRS)
        await cluster.run(40)
        cluster.nodes["b"].draining = True
        await cluster.until(lambda: all("b" not in cluster.holders(data) for data in datas), 200)
        assert exactly(cluster, datas)
        assert all(target != "b" for _, target, _ in cluster.moved)
        view = cluster.nodes["a"].repairer.view()
        assert view is not None and view.under_replicated == 0

    in_cluster(body)


# -- several stewards, none, and what a quiet cluster costs


def test_two_stewards_at_once_do_no_harm(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        _, datas = cluster.store(PAIRS)
        real = Repairer.step
        for node in cluster.nodes.values():
            fleet = node.repairer._fleet
            fleet.__class__ = type("Everybody", (type(fleet),), {"is_steward": True})
        assert Repairer.step is real
        cluster.kill("b")
        await cluster.until(lambda: all_safe(cluster, datas), 200)
        cluster.start("b")
        await cluster.until(lambda: exactly(cluster, datas), 600)
        await cluster.run(200)
        assert exactly(cluster, datas)

    in_cluster(body)


def test_who_is_not_the_steward_any_more_forgets(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        cluster.store(PAIRS)
        cluster.kill("a")
        await cluster.run(20)
        assert cluster.nodes["b"].repairer.view() is not None
        assert "ckptd_repair_queue_bytes" in cluster.nodes["b"].metrics.text().decode()
        cluster.start("a")
        await cluster.run(20)
        assert cluster.nodes["b"].repairer.view() is None
        assert "ckptd_repair_queue_bytes" not in cluster.nodes["b"].metrics.text().decode()

    in_cluster(body)


def test_a_quiet_cluster_is_asked_rarely(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        cluster.store(PAIRS)
        await cluster.run(30)
        assert cluster.nodes["a"].repairer.is_idle()
        before = inventories(cluster)
        await cluster.run(limits.REPAIR_SCAN_INTERVAL_S - 60)
        assert inventories(cluster) == before
        await cluster.run(120)
        assert inventories(cluster) > before

    in_cluster(body)


def test_a_new_version_is_asked_about_alone(in_cluster: RunInCluster) -> None:
    async def body(cluster: LoopCluster) -> None:
        cluster.store(PAIRS)
        await cluster.run(30)
        cluster.asked.clear()
        version, _ = cluster.store(["ab"], name="run/new")
        await cluster.run(30)
        questions = [m.versions for _, _, m in cluster.asked if isinstance(m, messages.Inventory)]
        assert questions and set(questions) == {(bytes.fromhex(version),)}

    in_cluster(body)
