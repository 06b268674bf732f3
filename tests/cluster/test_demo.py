"""The demo is a promise to a newcomer: it must hold with its own checkpoint and with theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ckptd", "demo", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_two_nodes_die_and_every_byte_comes_back() -> None:
    before = set(os.listdir(tempfile.gettempdir()))
    done = run_demo()
    assert done.returncode == 0, done.stderr
    assert "byte-identical, although 2 of 4 nodes" in done.stdout
    assert done.stdout.count("kill -9") == 2
    assert "Nobody stores it" in done.stdout
    assert "kill -9" in done.stdout.split("protected")[0], "no node died before it was protected"
    assert "will not come back" in done.stdout.split("healed")[0]
    assert "lies on the living ones again" in done.stdout
    assert "\x1b" not in done.stdout
    left = {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("ckptd-demo-")}
    assert left <= before


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_with_the_users_own_checkpoint(tmp_path: Path, size: int) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_bytes(os.urandom(size))
    done = run_demo("--json", "--checkpoint", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["byte_identical"] is True
    assert len(set(result["killed"])) == 2
    assert result["bytes"] == size
    assert result["healed"] is True
