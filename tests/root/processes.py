"""Commands and conditions: run to the end or fail with what was said, wait without guessing."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

_POLL_S: Final = 0.05


def run(*command: str | Path, timeout_s: float = 60.0, stdin: str | None = None) -> str:
    """Standard output of `command`. AssertionError with both outputs unless it ends with 0."""
    done = subprocess.run(
        [str(part) for part in command],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    shown = " ".join(str(part) for part in command)
    assert done.returncode == 0, f"{shown}: exit {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Returns as soon as `condition` holds; AssertionError after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:.0f} s: {what}"
        time.sleep(_POLL_S)


def end(process: subprocess.Popen[bytes], timeout_s: float = 10.0) -> None:
    """SIGTERM, SIGKILL after `timeout_s`, and no zombie. Nothing for one that has ended."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def missing_packages(tools: Sequence[tuple[str, str]], found: Callable[[str], object]) -> list[str]:
    """The packages of those tools, given as (command, package), that `found` does not find."""
    return sorted({package for command, package in tools if not found(command)})
