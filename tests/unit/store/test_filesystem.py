"""The port on the real system: room is set aside without writing, and errors come through."""

from __future__ import annotations

import ast
import ctypes
import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.store.call_hooks import Call, Hooked

import ckptd
from ckptd.store import filesystem
from ckptd.store.durable import NewFile, make_directory, read_file
from ckptd.store.filesystem import BLOCK_BYTES, OPERATING_SYSTEM, aligned_buffer

SOURCE = Path(ckptd.__file__).parent


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    opened = OPERATING_SYSTEM.open(str(tmp_path / "file"), os.O_RDWR | os.O_CREAT)
    yield opened
    OPERATING_SYSTEM.close(opened)


def test_reserving_changes_neither_size_nor_bytes(descriptor: int) -> None:
    os.pwrite(descriptor, b"abc", 0)
    OPERATING_SYSTEM.fallocate(descriptor, 1 << 20)
    # The emulation of glibc writes into every block and so makes the file this long.
    assert OPERATING_SYSTEM.identify(descriptor).size_bytes == 3
    assert os.pread(descriptor, 10, 0) == b"abc"
    assert OPERATING_SYSTEM.fallocate(descriptor, 0) is True


def answers(monkeypatch: pytest.MonkeyPatch, codes: list[int]) -> None:
    """Let fallocate(2) fail with these numbers, one after the other; 0 is success."""
    left = iter(codes)

    def fallocate(descriptor: int, mode: int, offset: int, length: int) -> int:
        assert mode == 1 and offset == 0, "FALLOC_FL_KEEP_SIZE from the start"
        code = next(left)
        ctypes.set_errno(code)
        return -1 if code else 0

    monkeypatch.setattr(filesystem, "_fallocate", fallocate, raising=False)


def test_a_file_system_that_cannot_reserve_says_so(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code in (errno.EOPNOTSUPP, errno.ENOSYS):
        answers(monkeypatch, [code])
        assert OPERATING_SYSTEM.fallocate(descriptor, 10) is False
    answers(monkeypatch, [errno.EINTR, 0])
    assert OPERATING_SYSTEM.fallocate(descriptor, 10) is True


def test_no_room_to_reserve_is_an_error(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, [errno.ENOSPC])
    with pytest.raises(OSError) as caught:
        OPERATING_SYSTEM.fallocate(descriptor, 10)
    assert caught.value.errno == errno.ENOSPC


def test_symlinks_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError):
        OPERATING_SYSTEM.open(str(tmp_path / "link"), os.O_RDONLY)
    for name in ("link", "directory"):
        with pytest.raises(OSError):
            OPERATING_SYSTEM.identify_path(str(tmp_path / name))
    entries = {entry.name: entry for entry in OPERATING_SYSTEM.list_directory(str(tmp_path))}
    assert entries["real"].is_file and entries["real"].size_bytes == 1
    assert not entries["link"].is_file and not entries["directory"].is_file


def test_the_volume_is_that_of_the_path(tmp_path: Path) -> None:
    volume = OPERATING_SYSTEM.volume(str(tmp_path))
    assert 0 <= volume.free_bytes <= volume.total_bytes and volume.block_bytes > 0


def attributes_used(path: Path) -> set[str]:
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }


def test_the_emulating_call_is_used_nowhere() -> None:
    modules = list(SOURCE.rglob("*.py"))
    assert len(modules) > 10
    for module in modules:
        assert "posix_fallocate" not in attributes_used(module), module


def test_the_store_reaches_its_disk_through_the_port_alone() -> None:
    allowed = {"path", "fspath", "O_RDONLY", "O_RDWR", "O_CREAT", "O_EXCL", "strerror"}
    for module in (SOURCE / "store").glob("*.py"):
        if module.name == "filesystem.py":
            continue
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "os":
                    assert node.attr in allowed, f"{module.name}: os.{node.attr}"
                assert node.value.id not in ("shutil", "pathlib", "fcntl"), module.name
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "open", module.name


def test_only_durable_and_filesystem_flush_files() -> None:
    for module in (SOURCE / "store").glob("*.py"):
        if module.name not in ("filesystem.py", "durable.py"):
            assert "fsync" not in attributes_used(module), module.name


def test_a_file_whose_flush_failed_is_removed_and_not_flushed_again(tmp_path: Path) -> None:
    flushes = 0

    def before(call: Call) -> None:
        nonlocal flushes
        if call.name == "fsync":
            flushes += 1
            raise OSError(errno.EIO, "lost")

    file = NewFile(Hooked(OPERATING_SYSTEM, before).port, str(tmp_path / "new"))
    file.append(memoryview(b"bytes"))
    with pytest.raises(OSError):
        file.publish(str(tmp_path / "target"))
    assert flushes == 1 and os.listdir(tmp_path) == []
    with pytest.raises(ValueError):
        file.publish(str(tmp_path / "target"))
    assert flushes == 1


def test_a_directory_whose_parent_cannot_be_flushed_is_taken_back(tmp_path: Path) -> None:
    def before(call: Call) -> None:
        if call.name == "fsync_directory":
            raise OSError(errno.EIO, "lost")

    with pytest.raises(OSError):
        make_directory(Hooked(OPERATING_SYSTEM, before).port, str(tmp_path / "new"))
    assert os.listdir(tmp_path) == []
    (tmp_path / "new").mkdir()
    make_directory(OPERATING_SYSTEM, str(tmp_path / "new"))


def test_a_file_that_shrinks_while_it_is_read_gives_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)

    def before(call: Call) -> None:
        if call.name == "pread_into":
            os.truncate(path, 40)

    assert read_file(Hooked(OPERATING_SYSTEM, before).port, str(path), 100) == b"x" * 40


def whole_blocks(count: int) -> memoryview:
    buffer = aligned_buffer(count * BLOCK_BYTES)
    buffer[:] = bytes(range(1, 129)) * (len(buffer) // 128)
    return buffer


def appended(path: Path, pieces: list[memoryview], hooked: Hooked) -> bytes:
    """What a new file that writes past the cache holds after these pieces."""
    file = NewFile(hooked.port, str(path))
    file.bypass_cache()
    for piece in pieces:
        file.append(piece)
    file.publish(f"{path}.done")
    return Path(f"{path}.done").read_bytes()


def test_whole_blocks_go_past_the_cache_and_what_is_left_through_it(tmp_path: Path) -> None:
    hooked = Hooked(OPERATING_SYSTEM)
    pieces = [whole_blocks(2), whole_blocks(3)[: 2 * BLOCK_BYTES + 5], memoryview(b"end")]
    assert appended(tmp_path / "f", pieces, hooked) == b"".join(pieces)
    switches = [call.arguments[1] for call in hooked.calls if call.name == "bypass_cache"]
    assert switches == [True, False], "once on, and off for good before the end"
    off = next(c.number for c in hooked.calls if c.name == "bypass_cache" and not c.arguments[1])
    written = [(len(c.arguments[1]), c.number < off) for c in hooked.calls if c.name == "pwrite"]
    assert written == [(2 * BLOCK_BYTES, True), (2 * BLOCK_BYTES, True), (5, False), (3, False)]


def test_a_buffer_at_an_odd_address_or_a_medium_of_other_blocks_costs_no_byte(
    tmp_path: Path,
) -> None:
    odd = memoryview(bytearray(4 * BLOCK_BYTES + 1))[1:]  # whole blocks, somewhere in memory
    odd[:] = whole_blocks(4)
    assert appended(tmp_path / "odd", [odd, whole_blocks(1)], Hooked(OPERATING_SYSTEM)) == (
        bytes(odd) + bytes(whole_blocks(1))
    )

    def refuse(call: Call) -> None:
        if call.name == "pwrite" and not refused:
            refused.append(call)
            raise OSError(errno.EINVAL, "not my blocks")

    refused: list[Call] = []
    blocks = [whole_blocks(1), whole_blocks(2)]
    hooked = Hooked(OPERATING_SYSTEM, refuse)
    assert appended(tmp_path / "other", blocks, hooked) == b"".join(blocks)
    assert refused


def test_a_file_system_without_direct_io_says_so(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "darwin":
        assert OPERATING_SYSTEM.bypass_cache(descriptor, True)
        return

    def refuse(descriptor: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL:
            raise OSError(code, os.strerror(code))
        return os.O_RDWR

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    code = errno.EINVAL
    assert OPERATING_SYSTEM.bypass_cache(descriptor, True) is False
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        OPERATING_SYSTEM.bypass_cache(descriptor, True)


def test_a_buffer_is_the_same_memory_in_a_child() -> None:
    """So a page of it never moves to the child while the disk writes into it."""
    script = """
import os
from ckptd.store.filesystem import aligned_buffer
buffer = aligned_buffer(2 ** 20)
if os.fork() == 0:
    buffer[12345] = 7
    os._exit(0)
os.wait()
print(buffer[12345])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "7\n"
