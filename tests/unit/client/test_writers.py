"""Whether somebody has a file open for writing."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.client.writers import nobody_writes

LINUX = sys.platform == "linux"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(bytes(8192))
    return tmp_path / "weights"


@pytest.fixture
def descriptor(path: Path) -> Iterator[int]:
    opened = os.open(path, os.O_RDONLY)
    yield opened
    os.close(opened)


def test_one_that_is_only_read_has_no_writer(path: Path, descriptor: int) -> None:
    assert nobody_writes(descriptor) is LINUX
    with path.open("rb"):
        assert nobody_writes(descriptor) is LINUX


def test_who_has_it_open_or_mapped_may_write(path: Path, descriptor: int) -> None:
    with path.open("r+b") as writer:
        assert not nobody_writes(descriptor)
        mapping = mmap.mmap(writer.fileno(), 8192)
    assert not nobody_writes(descriptor)
    mapping.close()
    assert nobody_writes(descriptor) is LINUX


def test_a_writer_in_another_process_is_seen(path: Path, descriptor: int) -> None:
    code = f"file = open({str(path)!r}, 'r+b'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert not nobody_writes(descriptor)
        other.communicate(b"\n")


def test_whoever_opens_it_meanwhile_harms_nobody(path: Path, descriptor: int) -> None:
    """The lease is broken again and again: no signal ends us, and no writer waits for long."""
    code = f"import os\nfor _ in range(20_000): os.close(os.open({str(path)!r}, os.O_RDWR))"
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        while other.poll() is None:
            nobody_writes(descriptor)
    assert other.returncode == 0
    assert nobody_writes(descriptor) is LINUX


def test_a_descriptor_that_is_none_is_no_error() -> None:
    reading, writing = os.pipe()
    assert not nobody_writes(reading)
    os.close(reading)
    os.close(writing)
    assert not nobody_writes(reading)
