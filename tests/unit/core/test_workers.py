"""What absent workers mean: presumed for a while, waited for while too many are away."""

from __future__ import annotations

import pytest

from ckptd.core.headers import VersionHeader
from ckptd.core.workers import (
    Absences,
    Worker,
    judge_absences,
    presumed_holders,
    recent_bytes,
)

AFTER_S = 600.0


def fleet(*absent_s: float | None, maintenance: str = "") -> list[Worker]:
    """Workers a, b, …; None for one that is up."""
    return [
        Worker(node, absent_s=seconds, maintenance=node in maintenance)
        for node, seconds in zip("abcdefgh", absent_s, strict=False)
    ]


def judged(*absent_s: float | None, maintenance: str = "") -> tuple[str, str]:
    found = judge_absences(fleet(*absent_s, maintenance=maintenance), after_s=AFTER_S)
    assert not found.unheard
    return "".join(w.node for w in found.presumed), found.waiting


def test_when_all_are_up_nothing_is_presumed() -> None:
    assert judge_absences(fleet(None, None), after_s=AFTER_S) == Absences()


@pytest.mark.parametrize(("absent_s", "presumed"), [(599.0, "d"), (600.0, ""), (9000.0, "")])
def test_a_worker_keeps_its_copies_until_it_is_away_for_long(
    absent_s: float, presumed: str
) -> None:
    found, waiting = judged(None, None, None, absent_s)
    assert (found, bool(waiting)) == (presumed, bool(presumed))


def silent(*silent_s: float, absent_s: float | None = None) -> Absences:
    workers = [Worker(node, silent_s=s) for node, s in zip("abcdefgh", silent_s, strict=False)]
    return judge_absences([*workers, Worker("z", absent_s=absent_s)], after_s=AFTER_S)


def test_who_does_not_tell_what_it_holds_has_the_same_time() -> None:
    assert silent(0.0, 0.0) == Absences()
    assert silent(0.0, 599.0, 0.0) == Absences(
        waiting="b does not tell what it holds, and has 600 s for it"
    )
    assert silent(0.0, 600.0, 0.0) == Absences(
        unheard=frozenset("b"), waiting="b does not tell what it holds: others get its copies"
    )
    found = silent(0.0, 600.0, 0.0, 1.0, 0.0, absent_s=1.0)
    assert found.unheard == {"b"} and [each.node for each in found.presumed] == ["z"]
    assert found.waiting.count(";") == 2


def test_when_half_of_them_are_silent_it_is_rather_the_network() -> None:
    """They are connected, so it is rather this node that does not understand them."""
    found = silent(0.0, 600.0, 9e9)
    assert not found.unheard
    assert found.waiting == "b, c does not tell what it holds, and has 600 s for it"
    assert silent(0.0, 600.0, 0.0, 9e9).unheard == frozenset("bd")


def test_one_that_is_silent_keeps_nobody_from_being_repaired_for() -> None:
    """It is there: it does not count as absent when the majority is looked for."""
    found = silent(0.0, 600.0, 0.0, absent_s=600.0)
    assert found.unheard == {"b"} and not found.presumed


def test_in_maintenance_a_worker_is_waited_for_however_long_it_takes() -> None:
    assert judged(None, None, None, 7000.0, maintenance="d") == ("d", "d is in maintenance")


def test_each_reason_is_told() -> None:
    presumed, waiting = judged(None, None, None, None, 70.0, 7000.0, maintenance="f")
    assert presumed == "ef"
    assert waiting == "e may come back within 600 s of leaving; f is in maintenance"


@pytest.mark.parametrize(
    "absent_s", [(None, 700.0), (None, None, 700.0, 700.0), (None, 9e4, 700.0), (9e4, 700.0)]
)
def test_no_repair_unless_more_than_half_are_up(absent_s: tuple[float | None, ...]) -> None:
    presumed, waiting = judged(*absent_s)
    away = [seconds for seconds in absent_s if seconds is not None]
    assert len(presumed) == len(away)
    assert waiting.startswith(f"only {len(absent_s) - len(away)} of {len(absent_s)} workers are up")


@pytest.mark.parametrize("absent_s", [(None, None, 700.0), (None, 9e4), (None, 9e4, 9e4, 9e4)])
def test_who_is_away_for_a_day_does_not_count_for_the_majority(
    absent_s: tuple[float | None, ...],
) -> None:
    assert judged(*absent_s) == ("", "")


def test_what_was_stored_after_a_worker_left_is_not_on_it() -> None:
    away = fleet(10.0, 100.0)
    assert presumed_holders(away, 5_000, now_ms=1_000_000) == {"a", "b"}
    assert presumed_holders(away, 950_000, now_ms=1_000_000) == {"a"}
    assert presumed_holders(away, 990_000, now_ms=1_000_000) == set()


def test_properties_of_a_worker() -> None:
    assert Worker("a", boot_id="x", zone="z").machine == Worker("b", boot_id="x", zone="z").machine
    assert Worker("a").machine != Worker("b").machine
    assert Worker("a", bytes_used=1, bytes_free=3).used_fraction == 0.25
    assert Worker("a").used_fraction == 1.0
    assert Worker("a").takes_copies
    assert not Worker("a", draining=True).takes_copies
    assert not Worker("a", absent_s=0.0).takes_copies


def test_room_for_the_next_checkpoint_is_the_size_of_the_newest_that_has_any() -> None:
    assert recent_bytes([]) == 0
    assert recent_bytes([header(0), header(70), header(8)]) == 70


def header(size: int) -> VersionHeader:
    return VersionHeader(
        id="0" * 64,
        kind="manifest",
        order=1,
        created="",
        name="run/x",
        content_id="0" * 64,
        size=size,
        files=1,
        shards=1,
        copies=2,
        step=None,
        metrics={},
    )
