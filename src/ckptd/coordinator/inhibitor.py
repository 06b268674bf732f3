"""Keeping the machine awake while a checkpoint waits to be protected.

A laptop that falls asleep after the training has ended would leave its last checkpoint on one disk.
The lock belongs to a process of the operating system's own tool, which ends when this one does,
however that comes about.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Final

import structlog

_log = structlog.get_logger(__name__)

_WHY: Final = "--why=checkpoints are being protected"
_STOP_TIMEOUT_S: Final = 5.0
RETRY_S: Final = 60.0
"""After the tool ended by itself (no permission, no such service), it is tried again so late."""


def command(platform: str = sys.platform) -> list[str] | None:
    """What keeps this machine awake as long as its standard input is open or this process lives;
    None when the system has no such tool."""
    if platform == "darwin":
        found = shutil.which("caffeinate")
        return [found, "-i", "-w", str(os.getpid())] if found else None
    found = shutil.which("systemd-inhibit")
    # cat ends with its input: the other end of the pipe is this process, even if it is killed.
    return (
        [found, "--what=sleep:idle", "--who=ckptd", _WHY, "--mode=block", "cat"] if found else None
    )


class SleepInhibitor:
    """Holds the machine awake between `hold` and `release`; both may be called at any time."""

    def __init__(self, arguments: Sequence[str] | None) -> None:
        self._arguments = arguments
        self._process: asyncio.subprocess.Process | None = None
        self._failed_at_s: float | None = None
        self._told = False

    @property
    def held(self) -> bool:
        """Whether the tool runs."""
        return self._process is not None and self._process.returncode is None

    async def hold(self) -> None:
        """Starts the tool unless it runs. That there is none, or that it fails, is no error."""
        if self._arguments is None:
            return
        if self.held:
            if not self._told:
                self._told = True  # now that it did not end at once
                _log.info("sleep_inhibited")
            return
        now_s = asyncio.get_running_loop().time()
        if self._process is not None:
            _log.warning(
                "sleep_not_inhibited",
                command=self._arguments[0],
                exit_code=self._process.returncode,
                next="systemd-inhibit --list",
            )
            self._process = None
            self._failed_at_s = now_s
        if self._failed_at_s is not None and now_s - self._failed_at_s < RETRY_S:
            return
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:
            self._failed_at_s = now_s
            _log.warning("sleep_not_inhibited", reason=error.strerror)
        self._told = False

    async def release(self) -> None:
        """Lets the machine sleep again; waits until the tool has ended."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is not None:
            self._failed_at_s = asyncio.get_running_loop().time()
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.terminate()
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await process.wait()
        except ProcessLookupError:
            pass  # it ended in this moment
        except TimeoutError:
            process.kill()
            await process.wait()
        if self._told:
            _log.info("sleep_allowed")
