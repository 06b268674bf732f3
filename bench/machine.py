"""The machine that was measured, so that figures are only compared with their like."""

from __future__ import annotations

import os
import platform
import ssl
import subprocess
from pathlib import Path

import msgspec


class Machine(msgspec.Struct, frozen=True):
    """What decides the figures, besides the code. `load` is the load average at the start."""

    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    filesystem: str
    python: str
    openssl: str
    rsync: str
    load: float


def describe(directory: Path) -> Machine:
    """This machine; the file system is that of `directory`."""
    mounts = Path("/proc/mounts").read_text()
    return Machine(
        cpu=parse_cpu(Path("/proc/cpuinfo").read_text()) or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        kernel=f"{platform.system()} {platform.release()}",
        filesystem=parse_filesystem(mounts, directory.resolve()),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        openssl=ssl.OPENSSL_VERSION,
        rsync=_rsync_version(),
        load=os.getloadavg()[0],
    )


def parse_cpu(cpuinfo: str) -> str:
    """The name of the processor, from /proc/cpuinfo; arm names the board instead."""
    values: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key.strip(), value.strip())
    return values.get("model name") or values.get("Model") or ""


def parse_filesystem(mounts: str, directory: Path) -> str:
    """The type of the file system that `directory` lies on, from /proc/mounts."""
    best, found = -1, "unknown"
    for line in mounts.splitlines():
        _, place, kind, *_ = line.split(" ")
        # The kernel writes spaces in paths as octal numbers; of equal mounts the last one counts.
        point = Path(place.replace("\\040", " "))
        if directory.is_relative_to(point) and len(point.parts) >= best:
            best, found = len(point.parts), kind
    return found


def _rsync_version() -> str:
    try:
        shown = subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "none"
    return parse_rsync_version(shown.stdout)


def parse_rsync_version(text: str) -> str:
    """Name and number from what `rsync --version` prints."""
    words = text.partition("\n")[0].split()
    return " ".join(words[: words.index("protocol")] if "protocol" in words else words).replace(
        " version", ""
    )
