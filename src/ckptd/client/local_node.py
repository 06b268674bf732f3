"""One daemon of an embedded cluster: what it is, and its process: started, awaited, stopped.

DIR/ckptd.yml            its config
DIR/running.yml          the config that the running daemon was started with
DIR/pid, DIR/node.log    its process, and what that says
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ckptd.config import Config, check
from ckptd.errors import CkptdError

_START_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 15.0


@dataclass(frozen=True)
class LocalNode:
    """One daemon of an embedded cluster. `pid` is 0 while it does not run."""

    id: str
    directory: Path
    config: Config
    pid: int

    @property
    def config_path(self) -> Path:
        return self.directory / "ckptd.yml"

    def describe(self) -> dict[str, Any]:
        """As `ckptd local up --json` lists it."""
        assert self.config.node is not None
        scheme = "https" if self.config.observe.tls else "http"
        described = {
            "id": self.id,
            "pid": self.pid,
            "config": str(self.config_path),
            "address": str(self.config.node.listen),
            "data_dir": str(self.data_directory),
            "metrics_url": f"{scheme}://{self.config.observe.listen}/metrics",
        }
        if self.config.is_coordinator:
            described["watch_root"] = str(self.config.watch[0].root)
        return described

    @property
    def data_directory(self) -> Path:
        """A worker's store, or a coordinator's state."""
        assert self.config.node is not None
        if self.config.store is not None:
            return self.config.store.path
        assert self.config.node.state is not None, "it is a coordinator"
        return self.config.node.state


def read_node(directory: Path) -> LocalNode:
    """The daemon in `directory`, whose name is its id, as it is now. Raises ConfigError."""
    config, errors = check((directory / "ckptd.yml").read_text(encoding="utf-8"))
    if config is None:
        raise errors[0]
    return LocalNode(directory.name, directory, config, running_pid(directory))


@dataclass(frozen=True)
class Starting:
    """A daemon that was started and may not serve yet. It says on the socket when it does."""

    node: LocalNode
    process: subprocess.Popen[bytes]
    ready: socket.socket

    def wait(self) -> None:
        """Returns when it serves. Raises CkptdError with the last lines of its log when it ends
        instead, or takes longer than _START_TIMEOUT_S."""
        place = os.path.dirname(self.ready.getsockname())
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        try:
            self.ready.settimeout(0.1)
            while time.monotonic() < deadline_s:
                with contextlib.suppress(TimeoutError):
                    if self.ready.recv(100).startswith(b"READY=1"):
                        return
                if self.process.poll() is not None:
                    break
        finally:
            self.ready.close()
            shutil.rmtree(place, ignore_errors=True)
        path = self.node.directory / "node.log"
        log = path.read_text(encoding="utf-8", errors="replace")
        last = " | ".join(log.strip().splitlines()[-3:])
        raise CkptdError(f"{self.node.id} does not start: {last}", next=f"tail {path}")


def start(node: LocalNode) -> Starting:
    """Starts a daemon in a session of its own."""
    place = tempfile.mkdtemp(prefix="ckptd-")
    ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        ready.bind(os.path.join(place, "ready"))
        environment = {**os.environ, "NOTIFY_SOCKET": os.path.join(place, "ready")}
        command = [sys.executable, "-m", "ckptd", "serve", "--init", "--config"]
        with open(node.directory / "node.log", "ab") as log:
            process = subprocess.Popen(
                [*command, str(node.config_path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
                cwd="/",
            )
    except BaseException:
        ready.close()
        shutil.rmtree(place, ignore_errors=True)
        raise
    (node.directory / "pid").write_text(f"{process.pid}\n", encoding="ascii")
    shutil.copyfile(node.config_path, node.directory / "running.yml")
    return Starting(node, process, ready)


def has_current_config(node: LocalNode) -> bool:
    """Whether a running daemon was started with the config as it is now."""
    try:
        started_with = (node.directory / "running.yml").read_bytes()
    except OSError:
        return False
    return started_with == node.config_path.read_bytes()


def running_pid(directory: Path) -> int:
    """The pid of the daemon of a node, 0 when it does not run.

    A pid alone proves nothing, as it may be somebody else's by now: the command line must name
    the node's config.
    """
    try:
        pid = int((directory / "pid").read_text(encoding="ascii"))
        shown = subprocess.run(
            ["ps", "-ww", "-o", "stat=,args=", "-p", str(pid)],
            capture_output=True,
            check=False,
            text=True,
        ).stdout
    except (OSError, ValueError):
        return 0
    zombie = shown.lstrip().startswith("Z")
    return pid if str(directory / "ckptd.yml") in shown and not zombie else 0


def stop(pids: list[int]) -> None:
    """SIGTERM, then SIGKILL for whoever takes longer than _STOP_TIMEOUT_S."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    left = [pid for pid in pids if _alive(pid)]
    while left and time.monotonic() < deadline_s:
        time.sleep(0.02)
        left = [pid for pid in left if _alive(pid)]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0] == pid:  # our own child: take its end
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
