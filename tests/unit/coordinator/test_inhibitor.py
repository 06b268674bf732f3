"""The tool that keeps the machine awake runs exactly as long as it is wanted."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
import structlog
from tests.cluster.kill_fixtures import wait_until
from tests.unit.node.running_nodes import LOOPS

from ckptd.coordinator import inhibitor
from ckptd.coordinator.inhibitor import SleepInhibitor, command
from ckptd.net.loop import event_loop_factory

Work = Callable[[], Coroutine[None, None, None]]


@pytest.fixture(params=LOOPS)
def play(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], None]:
    """Runs a coroutine on each event loop."""
    monkeypatch.setenv("CKPTD_LOOP", request.param)

    def run(work: Work) -> None:
        with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
            runner.run(work())

    return run


def tool(directory: Path, name: str, script: str) -> str:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition, "what the tool is to do")


def holds(held: SleepInhibitor) -> bool:
    return held.held


def test_it_runs_between_hold_and_release(play: Callable[[Work], None], tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    wanted = [tool(tmp_path, "tool", f'echo "$$ $*" >> {calls}; exec cat'), "--what=sleep", "cat"]

    async def work() -> None:
        held = SleepInhibitor(wanted)
        await held.release()
        await held.hold()
        await held.hold()
        await until(lambda: calls.exists() and calls.read_text().endswith("\n"))
        assert holds(held)
        (call,) = calls.read_text().splitlines()
        pid, _, arguments = call.partition(" ")
        assert arguments == "--what=sleep cat"
        await held.release()
        assert not holds(held)
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
        await held.hold()
        await until(lambda: len(calls.read_text().splitlines()) == 2)
        await held.release()

    play(work)


def test_one_that_ignores_the_end_is_killed(
    play: Callable[[Work], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inhibitor, "_STOP_TIMEOUT_S", 0.2)
    started = tmp_path / "started"
    stubborn = tool(
        tmp_path, "tool", f"trap '' TERM; touch {started}; while :; do sleep 0.05; done"
    )

    async def work() -> None:
        held = SleepInhibitor([stubborn])
        await held.hold()
        await until(started.exists)
        await held.release()
        assert not holds(held)

    play(work)


def test_one_that_fails_is_told_once_and_tried_again_later(
    play: Callable[[Work], None], tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    denied = tool(tmp_path, "tool", f"echo called >> {calls}; exit 1")

    async def work() -> None:
        held = SleepInhibitor([denied])
        await held.hold()
        await until(lambda: not held.held)
        with structlog.testing.capture_logs() as logs:
            await held.hold()
            await held.hold()
            await held.release()
            await held.hold()
        assert [log["event"] for log in logs] == ["sleep_not_inhibited"]
        assert calls.read_text() == "called\n"

    play(work)


def test_no_tool_is_no_error(play: Callable[[Work], None], tmp_path: Path) -> None:
    async def work() -> None:
        for arguments in (None, [str(tmp_path / "nothing")]):
            held = SleepInhibitor(arguments)
            await held.hold()
            assert not holds(held)
            await held.release()

    play(work)


def test_the_tool_of_the_system_is_found_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command("linux") is None
    assert command("darwin") is None
    mac = tool(tmp_path, "caffeinate", "exit 0")
    linux = tool(tmp_path, "systemd-inhibit", "exit 0")
    assert command("darwin") == [mac, "-i", "-w", str(os.getpid())]
    found = command("linux")
    assert found is not None
    assert (found[0], found[-1]) == (linux, "cat")
    assert command(sys.platform) is not None
