"""Up, suspect, down and absent, on virtual time."""

from __future__ import annotations

import pytest

from ckptd.core import limits
from ckptd.core.membership import Change, Membership, PeerState, peer_state, shown_state

SUSPECT_S, DOWN_S = 5.0, 20.0
WALL_S = 1_700_000_000.0


class Watching:
    """A membership with clocks, looked at every second."""

    def __init__(self, *nodes: str, suspect_s: float = SUSPECT_S, down_s: float = DOWN_S) -> None:
        self.nodes = nodes or ("pi1",)
        self.now_s = 100.0
        self.wall_s = WALL_S
        self.membership = Membership(
            suspect_s=suspect_s, down_s=down_s, now_s=self.now_s, wall_s=self.wall_s
        )
        self.changes: list[Change] = []
        self.tick()

    def tick(self) -> None:
        self.changes += self.membership.tick(self.nodes, self.now_s, self.wall_s)

    def wait(self, seconds: float, *, hearing: str = "") -> None:
        """Lets time pass in steps of at most a second, with a heartbeat in each if `hearing`."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            step_s = min(1.0, end_s - self.now_s)
            self.now_s += step_s
            self.wall_s += step_s
            if hearing:
                self.hear(hearing)
            self.tick()

    def hear(self, node: str = "pi1") -> None:
        change = self.membership.heard(node, self.now_s)
        if change is not None:
            self.changes.append(change)

    def state(self, node: str = "pi1") -> str:
        return self.membership.state(node)

    def absent_s(self, node: str = "pi1") -> float | None:
        since_s = self.membership.absent_since(node, self.now_s)
        return None if since_s is None else self.now_s - since_s


@pytest.mark.parametrize(
    ("silent_s", "state"),
    [(None, "down"), (0.0, "up"), (4.9, "up"), (5.0, "suspect"), (19.9, "suspect"), (20.0, "down")],
)
def test_the_state_by_silence_alone(silent_s: float | None, state: str) -> None:
    assert peer_state(silent_s, suspect_s=SUSPECT_S, down_s=DOWN_S) == state


def test_a_node_is_down_and_absent_until_it_is_heard() -> None:
    watching = Watching()
    watching.wait(7.0)
    assert watching.state() == "down" and watching.absent_s() == 7.0
    assert watching.membership.silent_s("pi1", watching.now_s) is None
    watching.hear()
    assert watching.state() == "up" and watching.absent_s() is None
    assert watching.membership.silent_s("pi1", watching.now_s) == 0.0
    assert watching.changes == [Change("pi1", "down", "up")]


def test_silence_makes_suspect_and_then_down_and_absent_from_then_on() -> None:
    watching = Watching()
    watching.hear()
    watching.wait(4.0)
    assert watching.state() == "up"
    watching.wait(1.0)
    assert watching.state() == "suspect" and watching.absent_s() is None
    watching.wait(14.0)
    assert watching.state() == "suspect" and watching.absent_s() is None
    watching.wait(1.0)
    assert watching.state() == "down" and watching.absent_s() == 0.0
    watching.wait(600.0)
    assert watching.absent_s() == 600.0
    assert watching.changes[1:] == [
        Change("pi1", "up", "suspect"),
        Change("pi1", "suspect", "down"),
    ]


def test_a_node_that_reboots_now_and_then_is_up_at_once() -> None:
    watching = Watching()
    for _ in range(10):
        watching.hear()
        assert watching.state() == "up" and watching.absent_s() is None
        watching.wait(240.0)
        assert watching.state() == "down"


def flap(watching: Watching, times: int) -> None:
    for _ in range(times):
        watching.wait(2.0, hearing="pi1")
        watching.wait(25.0)


def test_a_node_that_flaps_must_prove_itself_before_it_is_up() -> None:
    watching = Watching()
    flap(watching, limits.FLAPS_FREE + 1)
    assert watching.state() == "down"
    absent_s = watching.absent_s()
    assert absent_s is not None
    watching.hear()
    # Heard, and so not down; absent all the same, and no steward.
    assert watching.state() == "suspect" and watching.absent_s() == absent_s
    watching.wait(4.0, hearing="pi1")
    assert watching.state() == "suspect"
    watching.wait(1.0, hearing="pi1")
    assert watching.state() == "up" and watching.absent_s() is None


@pytest.mark.parametrize(
    ("lapses", "proof_s"), [(3, 0.0), (4, 5.0), (5, 10.0), (6, 20.0), (7, 30.0), (12, 30.0)]
)
def test_the_more_it_flaps_the_longer_it_must_be_heard_but_not_for_ever(
    lapses: int, proof_s: float
) -> None:
    watching = Watching()
    for _ in range(lapses):
        watching.hear()
        while watching.state() != "up":
            watching.wait(1.0, hearing="pi1")
        watching.wait(SUSPECT_S)
    watching.hear()
    heard_from_s = watching.now_s
    while watching.state() != "up":
        watching.wait(1.0, hearing="pi1")
    assert watching.now_s - heard_from_s == proof_s


def test_a_gap_while_it_proves_itself_begins_the_proof_anew() -> None:
    watching = Watching()
    flap(watching, limits.FLAPS_FREE + 1)
    watching.wait(4.0, hearing="pi1")
    watching.wait(SUSPECT_S)
    watching.wait(4.0, hearing="pi1")
    assert watching.state() == "suspect"


def test_flapping_is_forgotten_after_a_while() -> None:
    watching = Watching()
    flap(watching, limits.FLAPS_FREE + 1)
    watching.wait(10.0, hearing="pi1")
    assert watching.state() == "up"
    watching.wait(limits.FLAP_WINDOW_S, hearing="pi1")
    watching.wait(DOWN_S)
    watching.hear()
    assert watching.state() == "up"


def test_a_node_that_flaps_without_end_stays_absent() -> None:
    watching = Watching()
    flap(watching, 10)
    absent_s = watching.absent_s()
    assert absent_s is not None and absent_s > 100.0


def test_silence_that_nobody_looked_at_counts_too() -> None:
    watching = Watching()
    watching.hear()
    watching.now_s += 30.0  # no tick in between, as when the loop was busy
    watching.wall_s += 30.0
    watching.hear()
    assert watching.state() == "up"
    assert watching.membership.silent_s("pi1", watching.now_s) == 0.0


def test_after_sleep_nobody_is_blamed() -> None:
    watching = Watching("pi1", "pi2")
    watching.hear("pi1")
    watching.wait(600.0, hearing="pi1")
    assert watching.absent_s("pi2") == 600.0
    watching.wall_s += 8 * 3600.0  # the monotonic clock stood still
    watching.tick()
    assert watching.state("pi1") == "up" and watching.absent_s("pi1") is None
    assert watching.absent_s("pi2") == 0.0
    watching.wait(DOWN_S - 1.0)
    assert watching.state("pi1") == "suspect"
    watching.wait(1.0)
    assert watching.state("pi1") == "down"


def test_after_the_process_was_stopped_nobody_is_blamed() -> None:
    watching = Watching("pi1", "pi2")
    watching.hear("pi1")
    watching.wait(600.0, hearing="pi1")
    watching.now_s += 3600.0
    watching.wall_s += 3600.0
    watching.tick()
    assert watching.state("pi1") == "up" and watching.absent_s("pi1") is None
    assert watching.absent_s("pi2") == 0.0


def test_sleep_forgives_flapping() -> None:
    watching = Watching()
    flap(watching, limits.FLAPS_FREE + 3)
    watching.wall_s += 3600.0
    watching.tick()
    watching.hear()
    assert watching.state() == "up"


@pytest.mark.parametrize("jump_s", [-10 * 365 * 86_400.0, -3600.0, limits.SLEEP_GAP_S - 1.5])
def test_a_wall_clock_that_steps_back_or_a_little_is_no_sleep(jump_s: float) -> None:
    watching = Watching()
    watching.wait(600.0)
    watching.wall_s += jump_s
    watching.wait(1.0)
    assert watching.absent_s() == 601.0


def test_a_slow_tick_is_no_stop() -> None:
    watching = Watching()
    watching.wait(60.0)
    watching.now_s += 2 * SUSPECT_S - 0.1
    watching.wall_s += 2 * SUSPECT_S - 0.1
    watching.tick()
    assert watching.absent_s() == pytest.approx(60.0 + 2 * SUSPECT_S - 0.1)


def test_who_is_no_member_any_more_is_dropped() -> None:
    watching = Watching("pi1", "pi2")
    watching.hear("pi1")
    watching.hear("pi2")
    assert sorted(watching.membership) == ["pi1", "pi2"]
    watching.nodes = ("pi2",)
    watching.tick()
    assert list(watching.membership) == ["pi2"]
    assert watching.state("pi1") == "down" and watching.absent_s("pi1") == 0.0
    assert watching.membership.silent_s("pi1", watching.now_s) is None


@pytest.mark.parametrize(
    ("state", "failed", "draining", "maintenance", "word"),
    [
        ("up", False, False, False, "up"),
        ("up", False, False, True, "maintenance"),
        ("up", False, True, True, "draining"),
        ("up", True, True, True, "failed"),
        ("suspect", True, True, False, "suspect"),
        ("suspect", False, False, True, "maintenance"),
        ("down", True, True, False, "down"),
        ("down", False, False, True, "maintenance"),
    ],
)
def test_the_word_that_is_shown_is_what_keeps_a_node_from_its_work(
    state: PeerState, failed: bool, draining: bool, maintenance: bool, word: str
) -> None:
    assert shown_state(state, failed=failed, draining=draining, maintenance=maintenance) == word
