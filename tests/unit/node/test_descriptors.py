"""A node may have as many connections as it allows others to make."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from ckptd.core import limits


def _after(soft: int, hard: int) -> tuple[int, int]:
    """What `allow_descriptors` returns and what holds then, in a process with these limits."""
    code = (
        "import resource; from ckptd.node.descriptors import allow_descriptors as allow;"
        "print(allow(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )
    told, held = map(int, done.stdout.split())
    return told, held


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (256, 8192, limits.DESCRIPTORS_WANTED),
        (256, 512, 512),
        (6000, 8192, 6000),
    ],
)
def test_the_soft_limit_is_raised_as_far_as_the_hard_one_goes(
    soft: int, hard: int, expected: int
) -> None:
    assert _after(soft, hard) == (expected, expected)


def test_all_connections_of_a_node_fit() -> None:
    connections = (
        2 * limits.UNAUTHENTICATED_CONNECTIONS_MAX
        + limits.CONTROL_CONNECTIONS_MAX
        + limits.BULK_CONNECTIONS_MAX
        + limits.HTTP_CONNECTIONS_MAX
    )
    assert connections < 600 < limits.DESCRIPTORS_WANTED / 4
