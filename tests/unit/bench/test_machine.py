"""The description of the machine."""

from pathlib import Path

import pytest
from bench.machine import describe, parse_cpu, parse_filesystem, parse_rsync_version

MOUNTS = """\
/dev/vda / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
/dev/sdb /srv/my\\040disk xfs rw 0 0
/dev/sdc /srv/twice ext4 rw 0 0
/dev/sdd /srv/twice btrfs rw 0 0
"""


@pytest.mark.parametrize(
    ("directory", "expected"),
    [
        ("/home/me", "ext4"),
        ("/tmp", "tmpfs"),
        ("/tmp/x/y", "tmpfs"),
        ("/tmpfile", "ext4"),
        ("/srv/my disk/x", "xfs"),
        ("/srv/twice", "btrfs"),
    ],
)
def test_the_file_system_is_that_of_the_innermost_newest_mount(
    directory: str, expected: str
) -> None:
    assert parse_filesystem(MOUNTS, Path(directory)) == expected


def test_no_mounts_is_an_unknown_file_system() -> None:
    assert parse_filesystem("", Path("/")) == "unknown"


def test_the_processor_or_on_arm_the_board() -> None:
    assert parse_cpu("processor : 0\nmodel name\t: A: B\n\nmodel name\t: C\n") == "A: B"
    assert parse_cpu("processor : 0\nModel\t\t: Raspberry Pi 5\n") == "Raspberry Pi 5"
    assert parse_cpu("") == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rsync  version 3.2.7  protocol version 31\nCopyright", "rsync 3.2.7"),
        ("rsync version v3.4.1", "rsync v3.4.1"),
        ("", ""),
    ],
)
def test_the_version_of_rsync(text: str, expected: str) -> None:
    assert parse_rsync_version(text) == expected


def test_this_machine_has_all_of_it(tmp_path: Path) -> None:
    found = describe(tmp_path)
    assert found.cores >= 1 and found.memory_gib > 0
    assert all((found.cpu, found.kernel, found.filesystem, found.python, found.openssl))
