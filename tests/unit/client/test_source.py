"""What belongs to a checkpoint, what is refused by name, and what counts as a change."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckptd.client import source
from ckptd.client.source import scan
from ckptd.core.names import path_from_json
from ckptd.errors import NotFound, SourceChanged, SourceRefused


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkpoint with a file, a sub-directory with another one, and an empty directory."""
    directory = tmp_path / "checkpoint"
    (directory / "sub").mkdir(parents=True)
    (directory / "empty").mkdir()
    (directory / "weights.bin").write_bytes(b"0123456789" * 100)
    (directory / "sub" / "state.json").write_text("{}")
    return directory


def _later(path: Path) -> None:
    """Makes the times of a file differ from before, however coarse the clock."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000))


# -- what is found


def test_files_directories_and_modes_are_listed_by_path(root: Path) -> None:
    os.chmod(root / "weights.bin", 0o640)
    os.chmod(root / "empty", 0o700)
    os.chmod(root, 0o750)
    found = scan(root)
    assert [(file.path, file.size) for file in found.files] == [
        ("sub/state.json", 2),
        ("weights.bin", 1000),
    ]
    assert found.files[1].mode == 0o640
    assert {(entry.path, entry.mode) for entry in found.directories} == {
        ("empty", 0o700),
        ("sub", (root / "sub").stat().st_mode & 0o777),
    }
    assert (found.unit, found.mode, found.size) == ("directory", 0o750, 1002)
    found.check()


def test_a_single_file_is_a_checkpoint(root: Path) -> None:
    found = scan(root / "weights.bin")
    assert (found.unit, [file.path for file in found.files]) == ("file", ["weights.bin"])
    found.check()


def test_setuid_and_sticky_bits_are_left_behind(root: Path) -> None:
    os.chmod(root / "weights.bin", 0o4755)
    assert scan(root).files[1].mode == 0o755


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        scan(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", [b"caf\xe9.bin", b"line\nbreak", b"back\\slash", b"\xf0\x9f\x92\xbe"]
)
def test_names_may_have_any_bytes(root: Path, name: bytes) -> None:
    with open(os.path.join(os.fsencode(root), name), "wb") as file:
        file.write(b"x")
    found = scan(root)
    assert os.fsdecode(name) in {file.path for file in found.files}
    found.check()


def test_a_directory_name_that_is_not_utf8_comes_back_from_json(root: Path) -> None:
    os.mkdir(os.path.join(os.fsencode(root), b"d\xff"))
    (entry,) = [e for e in scan(root).directories if path_from_json(e.path).startswith("d")]
    assert os.fsencode(path_from_json(entry.path)) == b"d\xff"


# -- what is refused, by name


def _make_fifo(path: Path) -> None:
    os.mkfifo(path)


def _make_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the address of a socket has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(before)


def _make_dangling_link(path: Path) -> None:
    path.symlink_to("nothing-there")


def _make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def _make_link_to_device(path: Path) -> None:
    path.symlink_to("/dev/null")


def _make_link_to_directory_outside(path: Path) -> None:
    path.symlink_to("/")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (_make_fifo, "fifo"),
        (_make_socket, "socket"),
        (_make_dangling_link, "not there"),
        (_make_loop, "not there"),
        (_make_link_to_device, "character device"),
        (_make_link_to_directory_outside, "directory outside"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(
    root: Path, make: Callable[[Path], None], word: str
) -> None:
    make(root / "sub" / "odd-one")
    with pytest.raises(SourceRefused, match=word) as refused:
        scan(root)
    assert "sub/odd-one" in refused.value.message and refused.value.next


def test_a_device_itself_is_refused() -> None:
    with pytest.raises(SourceRefused, match="/dev/null"):
        scan(Path("/dev/null"))


# -- links


def test_links_that_stay_inside_are_kept_as_links(root: Path) -> None:
    (root / "latest.bin").symlink_to("weights.bin")
    (root / "sub" / "up").symlink_to("../weights.bin")
    (root / "also").symlink_to("sub")
    found = scan(root)
    assert {(entry.path, entry.target) for entry in found.symlinks} == {
        ("latest.bin", "weights.bin"),
        ("sub/up", "../weights.bin"),
        ("also", "sub"),
    }
    assert len(found.files) == 2 and not found.warnings


def test_links_that_leave_are_stored_as_the_file_with_a_warning(root: Path) -> None:
    blob = root.parent / "blobs" / "0123"
    blob.parent.mkdir()
    blob.write_bytes(b"from the cache")
    (root / "model.bin").symlink_to("../blobs/0123")
    (root / "absolute.bin").symlink_to(blob)
    found = scan(root)
    assert {file.path: file.size for file in found.files}["model.bin"] == 14
    assert not found.symlinks
    assert any("model.bin" in warning for warning in found.warnings)
    assert any("absolute.bin" in warning for warning in found.warnings)


# -- what counts as a change


def _shrink(root: Path) -> None:
    os.truncate(root / "weights.bin", 10)


def _grow(root: Path) -> None:
    with open(root / "weights.bin", "ab") as file:
        file.write(b"more")


def _replace(root: Path) -> None:
    (root / "new").write_bytes((root / "weights.bin").read_bytes())
    os.replace(root / "new", root / "weights.bin")


def _overwrite_in_place(root: Path) -> None:
    with open(root / "weights.bin", "r+b") as file:
        file.write(b"X")
    _later(root / "weights.bin")


def _remove(root: Path) -> None:
    (root / "weights.bin").unlink()


def _add(root: Path) -> None:
    (root / "added").write_bytes(b"")


def _remove_directory(root: Path) -> None:
    (root / "empty").rmdir()


def _retarget_link(root: Path) -> None:
    (root / "link").unlink()
    (root / "link").symlink_to("sub/state.json")


def _link_becomes_directory(root: Path) -> None:
    (root / "link").unlink()
    (root / "link").mkdir()


def _directory_becomes_link(root: Path) -> None:
    (root / "empty").rmdir()
    (root / "empty").symlink_to("sub")


def _directory_becomes_file(root: Path) -> None:
    (root / "empty").rmdir()
    (root / "empty").write_bytes(b"")


def _everything_goes(root: Path) -> None:
    os.rename(root, root.with_name("elsewhere"))


CHANGES = [
    _shrink,
    _grow,
    _replace,
    _overwrite_in_place,
    _remove,
    _add,
    _remove_directory,
    _retarget_link,
    _link_becomes_directory,
    _directory_becomes_link,
    _directory_becomes_file,
    _everything_goes,
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed_at_the_end(root: Path, change: Callable[[Path], None]) -> None:
    (root / "link").symlink_to("weights.bin")
    found = scan(root)
    found.check()
    change(root)
    with pytest.raises(SourceChanged) as changed:
        found.check()
    assert str(root) in changed.value.message and changed.value.next


@pytest.mark.parametrize("change", [_shrink, _grow, _replace, _overwrite_in_place, _remove])
def test_a_changed_file_is_not_opened(root: Path, change: Callable[[Path], None]) -> None:
    found = scan(root)
    change(root)
    with pytest.raises(SourceChanged, match=r"weights\.bin"):
        found.files[1].open()


def test_a_fifo_in_the_place_of_a_file_is_not_waited_for(root: Path) -> None:
    found = scan(root)
    (root / "weights.bin").unlink()
    os.mkfifo(root / "weights.bin")
    with pytest.raises(SourceChanged, match=r"weights\.bin"):
        found.files[1].open()


def test_a_link_put_in_the_place_of_a_file_is_a_change(root: Path) -> None:
    found = scan(root)
    os.rename(root / "weights.bin", root.parent / "moved")
    (root / "weights.bin").symlink_to(root.parent / "other")
    (root.parent / "other").write_bytes(b"0123456789" * 100)
    with pytest.raises(SourceChanged):
        found.files[1].open()


def test_reading_a_checkpoint_does_not_change_it(root: Path) -> None:
    found = scan(root)
    for file in found.files:
        os.close(file.open())
    found.check()


# -- times that prove nothing


def test_a_file_changed_just_before_the_scan_is_racy(root: Path) -> None:
    found = scan(root)
    (file,) = [file for file in found.files if file.path == "weights.bin"]
    assert found.is_racy(file)
    found.scanned_ns += source.RACY_NS
    assert not found.is_racy(file)


def test_the_clock_is_read_before_the_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    walk = source._walk

    def time_ns() -> int:
        asked.append("clock")
        return time.time_ns()

    def walk_later(path: Path, excluded: frozenset[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
        asked.append("files")
        return walk(path, excluded)

    monkeypatch.setattr(source, "time", SimpleNamespace(time_ns=time_ns))
    monkeypatch.setattr(source, "_walk", walk_later)
    scan(root)
    assert asked == ["clock", "files"]


def test_a_file_dated_back_after_the_change_is_racy_all_the_same(root: Path) -> None:
    os.utime(root / "weights.bin", (1_000_000_000, 1_000_000_000))
    found = scan(root)
    (file,) = [file for file in found.files if file.path == "weights.bin"]
    assert file.fingerprint.mtime_ns == 1_000_000_000 * 10**9
    assert found.is_racy(file)


def test_a_file_from_the_future_is_racy(root: Path) -> None:
    ahead = 4_000_000_000
    os.utime(root / "weights.bin", (ahead, ahead))
    found = scan(root)
    found.scanned_ns += 10 * source.RACY_NS
    assert found.is_racy(found.files[1])


# -- safetensors headers


def _safetensors(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def test_tensors_are_found_in_every_safetensors_file(root: Path) -> None:
    for name, size in (("a.safetensors", 8), ("sub/b.safetensors", 4)):
        header = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
        (root / name).write_bytes(_safetensors(json.dumps(header).encode(), bytes(size)))
    found = scan(root)
    assert {(tensor.file, tensor.name) for tensor in found.tensors} == {
        ("a.safetensors", "w"),
        ("sub/b.safetensors", "w"),
    }
    assert len(found.cuts) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"\x01", _safetensors(b"{", b""), struct.pack("<Q", 2**63) + b"{}", b"\0" * 100],
    ids=["empty", "short", "no JSON", "absurd length", "zeros"],
)
def test_an_invalid_header_is_refused_unless_taken_as_it_is(root: Path, content: bytes) -> None:
    broken = root / "sub" / "broken.safetensors"
    broken.write_bytes(content)
    with pytest.raises(SourceRefused, match=r"broken\.safetensors.*: .+") as refused:
        scan(root)
    assert "--as-is" in refused.value.next
    found = scan(root, as_is=True)
    assert not found.tensors and not found.cuts
    assert "sub/broken.safetensors" in {file.path for file in found.files}


# -- what is no part of it


def test_the_marker_and_what_is_excluded_are_left_out(root: Path) -> None:
    (root / ".ckptd-done").touch()
    (root / "sub" / ".ckptd-done").touch()
    (root / "checkpoint-5").mkdir()
    (root / "checkpoint-5" / "model.bin").write_bytes(b"x")
    found = scan(root, excluded={"checkpoint-5", "sub/state.json"})
    assert [file.path for file in found.files] == ["sub/.ckptd-done", "weights.bin"]
    assert "checkpoint-5" not in {entry.path for entry in found.directories}
    (root / ".ckptd-done").unlink()
    (root / "checkpoint-5" / "model.bin").write_bytes(b"another")
    (root / "checkpoint-5" / "optimizer.bin").write_bytes(b"x")
    found.check()
    (root / "checkpoint-6").mkdir()
    with pytest.raises(SourceChanged):
        found.check()
