"""Commands that are run and measured, and what processes use, as Linux's /proc tells it.

The time of a leg is from before the first command is started until the last one has ended. CPU time
is that of the commands, of the daemons, and of the children that either of them waited for.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

PROC: Final = Path("/proc")
LEG_TIMEOUT_S: Final = 300.0
_SAMPLE_INTERVAL_S: Final = 0.05
_CHILDREN_TIMEOUT_S: Final = 10.0
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


class MeasurementFailed(Exception):
    """A command failed, took too long or did not do what it was timed for."""


class Cpu(msgspec.Struct, frozen=True):
    """CPU seconds in the process's own code and in the kernel on its behalf."""

    user: float = 0.0
    system: float = 0.0

    @property
    def total(self) -> float:
        return self.user + self.system

    def __add__(self, other: Cpu) -> Cpu:
        return Cpu(self.user + other.user, self.system + other.system)

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(self.user - other.user, self.system - other.system)


class Leg(msgspec.Struct, frozen=True):
    """One measured leg; `cpu` and `peak_bytes` (VmHWM) are by process.

    `other_cpu_seconds` is what everybody else on the machine used meanwhile, the kernel's own
    threads and time stolen by a hypervisor included: the measure of how disturbed the leg was.
    """

    seconds: float
    cpu: dict[str, Cpu]
    peak_bytes: dict[str, int]
    other_cpu_seconds: float

    @property
    def cpu_total(self) -> float:
        return sum(used.total for used in self.cpu.values())


@dataclass(frozen=True)
class Command:
    """A command of a leg, under the name that the results give it."""

    label: str
    arguments: Sequence[str]
    environment: Mapping[str, str]


@dataclass
class _Running:
    command: Command
    process: subprocess.Popen[bytes]
    pidfd: int


# -- what /proc says


def parse_stat(text: str) -> Cpu:
    """CPU time of a process and of the children it waited for, from /proc/PID/stat (proc(5))."""
    # The name in parentheses may itself hold spaces and parentheses: count from the last one.
    fields = text.rpartition(")")[2].split()
    user, system, children_user, children_system = (int(field) for field in fields[11:15])
    return Cpu((user + children_user) / _TICKS_PER_S, (system + children_system) / _TICKS_PER_S)


def parse_peak_bytes(text: str) -> int:
    """VmHWM from /proc/PID/status; 0 for a process that has no memory any more."""
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def parse_busy_seconds(text: str) -> float:
    """The time that all cores together were not idle, from the first line of /proc/stat."""
    fields = [int(field) for field in text.partition("\n")[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def _cpu(pid: int) -> Cpu:
    try:
        return parse_stat((PROC / str(pid) / "stat").read_text())
    except (FileNotFoundError, ProcessLookupError) as error:
        raise MeasurementFailed(f"a daemon (pid {pid}) ended during the measurement") from error


def _peak_bytes(pid: int) -> int:
    try:
        return parse_peak_bytes((PROC / str(pid) / "status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has just ended


def _descendants(pid: int) -> list[int]:
    try:
        text = (PROC / str(pid) / "task" / str(pid) / "children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    children = [int(field) for field in text.split()]
    return children + [further for child in children for further in _descendants(child)]


def _busy_seconds() -> float:
    return parse_busy_seconds((PROC / "stat").read_text())


def _own_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# -- running


def measure(commands: Sequence[Command], daemons: Mapping[str, int], output_directory: Path) -> Leg:
    """Runs `commands` at once, after os.sync(), and waits for all of them.

    `daemons` are the pids of running processes that work for the commands. Standard output of a
    command goes to `output_directory`/LABEL.out. Raises MeasurementFailed with the last lines of a
    command that failed.
    """
    cpu: dict[str, Cpu] = {}
    peaks: dict[str, int] = {}
    os.sync()
    before = {label: _cpu(pid) for label, pid in daemons.items()}
    busy_s, own_s = _busy_seconds(), _own_seconds()
    started_s = time.monotonic()
    with _started(commands, output_directory) as running:
        finished_s = _wait(running, daemons, started_s + LEG_TIMEOUT_S, cpu, peaks)
    _wait_for_children(daemons)
    for label, pid in daemons.items():
        cpu[label] = _cpu(pid) - before[label]
        peaks[label] = max(peaks.get(label, 0), _peak_bytes(pid))
    others_s = _busy_seconds() - busy_s - (_own_seconds() - own_s)
    others_s -= sum(used.total for used in cpu.values())
    for item in running:
        if item.process.returncode:
            raise MeasurementFailed(_complaint(item, output_directory))
    labels = [*(command.label for command in commands), *daemons]
    return Leg(
        seconds=finished_s - started_s,
        cpu={label: cpu[label] for label in labels},
        peak_bytes={label: peaks.get(label, 0) for label in labels},
        other_cpu_seconds=max(0.0, others_s),
    )


@contextlib.contextmanager
def _started(commands: Sequence[Command], output_directory: Path) -> Iterator[list[_Running]]:
    running: list[_Running] = []
    try:
        for command in commands:
            with (
                open(output_directory / f"{command.label}.out", "wb") as output,
                open(output_directory / f"{command.label}.err", "wb") as errors,
            ):
                process = subprocess.Popen(
                    command.arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    env=dict(command.environment),
                )
            running.append(_Running(command, process, os.pidfd_open(process.pid)))
        yield running
    finally:
        for item in running:
            os.close(item.pidfd)
            if item.process.returncode is None:
                item.process.kill()
                item.process.wait()


def _wait(
    running: Sequence[_Running],
    daemons: Mapping[str, int],
    deadline_s: float,
    cpu: dict[str, Cpu],
    peaks: dict[str, int],
) -> float:
    """Waits for all, sampling peaks; the moment at which the last one had ended."""
    poll = select.poll()
    left = {item.pidfd: item for item in running}
    for pidfd in left:
        poll.register(pidfd, select.POLLIN)
    finished_s = time.monotonic()
    while left:
        ended = poll.poll(_SAMPLE_INTERVAL_S * 1000)
        finished_s = time.monotonic()
        for pidfd, _ in ended:
            poll.unregister(pidfd)
            item = left.pop(pidfd)
            cpu[item.command.label] = _reap(item.process)
        if finished_s > deadline_s:
            labels = ", ".join(item.command.label for item in left.values())
            raise MeasurementFailed(f"not done after {LEG_TIMEOUT_S:.0f} s: {labels}")
        roots = {item.command.label: item.process.pid for item in left.values()} | dict(daemons)
        for label, root in roots.items():
            for pid in (root, *_descendants(root)):
                peaks[label] = max(peaks.get(label, 0), _peak_bytes(pid))
    return finished_s


def _reap(process: subprocess.Popen[bytes]) -> Cpu:
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Cpu(used.ru_utime, used.ru_stime)


def _wait_for_children(daemons: Mapping[str, int]) -> None:
    """A daemon's CPU time has that of its children only once they have ended."""
    deadline_s = time.monotonic() + _CHILDREN_TIMEOUT_S
    while any(_descendants(pid) for pid in daemons.values()):
        if time.monotonic() > deadline_s:
            raise MeasurementFailed("a daemon's child goes on after its client has ended")
        time.sleep(0.01)


def _complaint(item: _Running, output_directory: Path) -> str:
    text = ""
    for suffix in ("err", "out"):
        path = output_directory / f"{item.command.label}.{suffix}"
        text = text or path.read_text(errors="replace").strip()
    last = " | ".join(text.splitlines()[-3:])
    return f"{item.command.label} ended with {item.process.returncode}: {last}"
