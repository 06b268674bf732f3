"""What tests that need root need: tools, a directory, disks and clusters that go away again."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

_ROOT = str(Path(__file__).resolve().parents[2])
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)

from tests.root.clusters import DaemonCluster  # noqa: E402 (after the path is set)
from tests.root.devices import Disk, loops_below, mounts_below  # noqa: E402
from tests.root.namespaces import PREFIX, Network, namespaces  # noqa: E402
from tests.root.network_cluster import CLIENT, WORKERS  # noqa: E402
from tests.root.processes import missing_packages  # noqa: E402

TOOLS = (
    ("nbdkit", "nbdkit"),
    ("nbdfuse", "libnbd-bin"),
    ("fusermount3", "fuse3"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("losetup", "mount"),
    ("mount", "mount"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("nft", "nftables"),
    ("diff", "diffutils"),
    ("ps", "procps"),
)


@pytest.fixture(scope="session", autouse=True)
def ground() -> Iterator[Path]:
    """The directory that everything of this suite lies in; nothing of it may be left at the end."""
    if os.geteuid() != 0:
        pytest.exit("the tests marked root need root: sudo make test-root", returncode=1)
    missing = missing_packages(TOOLS, shutil.which)
    if missing:
        command = f"apt-get install --no-install-recommends {' '.join(missing)}"
        pytest.exit(f"the tests marked root need tools that are missing: {command}", returncode=1)
    # Below /tmp itself: paths of sockets have at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="ckptd-root-"))
    yield directory
    left = [
        *mounts_below(directory),
        *loops_below(directory),
        *_processes_below(directory),
        *(name for name in namespaces() if name.startswith(PREFIX)),
    ]
    assert not left, f"left behind: {left}"
    shutil.rmtree(directory)


@pytest.fixture
def place(ground: Path) -> Iterator[Path]:
    """A directory of one test."""
    directory = Path(tempfile.mkdtemp(dir=ground))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def undo(place: Path) -> Iterator[ExitStack]:
    """What is pushed here runs in reverse order when the test ends, however it ends."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def keep(undo: ExitStack) -> Callable[[Disk], Disk]:
    """Takes care that a disk is removed."""

    def remember(disk: Disk) -> Disk:
        undo.callback(disk.remove)
        return disk

    return remember


@pytest.fixture
def make_cluster(place: Path, undo: ExitStack) -> Iterator[Callable[..., DaemonCluster]]:
    """Makes a cluster whose daemons are stopped at the end, before the disks are removed."""
    with ExitStack() as stack:

        def make(count: int, *settings: str) -> DaemonCluster:
            cluster = DaemonCluster(place / "cluster", count, *settings)
            stack.callback(cluster.down)
            return cluster

        yield make


@pytest.fixture
def network(undo: ExitStack) -> Network:
    """Four workers and a client on a switch."""
    network = Network([*WORKERS, CLIENT])
    undo.callback(network.remove)
    return network


def _processes_below(directory: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if f"{directory}/" in command:
            found.append(command)
    return found
