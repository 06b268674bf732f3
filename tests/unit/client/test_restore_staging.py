"""The staging directory: nothing in it is trusted, nothing outside of it is touched."""

from __future__ import annotations

import os
import stat
import threading
from hashlib import sha256
from pathlib import Path

import pytest

from ckptd.client.output_files import WRITEBACK_BYTES, OutputFile, OutputFiles
from ckptd.client.pull_threads import WantedShard, _ShardWriter
from ckptd.client.range_writer import PlainRange
from ckptd.client.restore_plan import RestorePlan
from ckptd.client.staging import Staging
from ckptd.core.layout import Write
from ckptd.errors import NoRoom, Refused
from ckptd.store.filesystem import OperatingSystem

ONE, TWO = os.urandom(300_000), os.urandom(50_000)


def plan(*, sizes: tuple[int, int] = (len(ONE), len(TWO))) -> RestorePlan:
    """Two files, `d/one` and `two`, each a shard of its own, and a link."""
    files = (
        OutputFile("d/one", sizes[0], 0o640),
        OutputFile("two", sizes[1], 0o444),
    )
    return RestorePlan(
        files=files,
        directories=(("d", 0o511),),
        symlinks=(("link", "two"),),
        shards=(
            WantedShard(sha256(ONE).digest(), len(ONE), [Write(0, 0, 0, len(ONE))]),
            WantedShard(sha256(TWO).digest(), len(TWO), [Write(1, 0, 0, len(TWO))]),
        ),
        root_mode=0o750,
        heads={},
    )


def filled(path: Path) -> Staging:
    staging = Staging(str(path), plan())
    staging.prepare()
    staging.files.write(0, memoryview(ONE), 0)
    staging.files.write(1, memoryview(TWO), 0)
    return staging


def test_files_have_their_size_before_anything_arrives(tmp_path: Path) -> None:
    staging = Staging(str(tmp_path / "s"), plan())
    staging.prepare()
    assert (tmp_path / "s" / "d" / "one").stat().st_size == len(ONE)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert not staging.resumed
    staging.discard()
    assert os.listdir(tmp_path) == []


def test_finish_gives_modes_and_links(tmp_path: Path) -> None:
    staging = filled(tmp_path / "s")
    staging.finish()
    staging.close()
    root = tmp_path / "s"
    modes = [(root / name).stat().st_mode & 0o777 for name in (".", "d", "d/one", "two")]
    assert modes == [0o750, 0o511, 0o640, 0o444]
    assert os.readlink(root / "link") == "two"
    assert (root / "d" / "one").read_bytes() == ONE


def test_finish_returns_when_every_file_and_every_name_is_on_the_medium(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: dict[int, object] = {}
    flush = OperatingSystem.fsync

    def noting(self: OperatingSystem, descriptor: int) -> None:
        flush(self, descriptor)
        found = os.fstat(descriptor)
        names = sorted(os.listdir(descriptor)) if stat.S_ISDIR(found.st_mode) else None
        flushed[found.st_ino] = (names, found.st_mode)

    monkeypatch.setattr(OperatingSystem, "fsync", noting)
    staging = filled(tmp_path / "s")
    flushed.clear()
    staging.finish()
    staging.close()
    root = tmp_path / "s"
    for path in (root / "d" / "one", root / "two", root / "d", root):
        found = path.stat()
        names = sorted(os.listdir(path)) if path.is_dir() else None
        assert flushed.get(found.st_ino) == (names, found.st_mode), path


def test_only_what_has_its_hash_is_not_fetched_again(tmp_path: Path) -> None:
    first = filled(tmp_path / "s")
    first.finish()  # modes that forbid writing do not stop the next one
    first.close()
    path = tmp_path / "s" / "two"
    path.chmod(0o600)
    path.write_bytes(TWO[:-1])
    second = Staging(str(tmp_path / "s"), plan())
    second.prepare()
    assert second.resumed
    assert second.present(threading.Event()) == {0}
    assert path.stat().st_size == len(TWO)
    second.close()


def test_what_does_not_belong_there_is_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    filled(tmp_path / "s").close()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "one").write_text("keep")
    (tmp_path / "outside").write_text("keep")
    root = tmp_path / "s"
    (root / "d" / "one").unlink()
    (root / "d").rmdir()
    (root / "d").symlink_to(victim)
    (root / "two").unlink()
    os.link(tmp_path / "outside", root / "two")
    (root / "foreign" / "deep").mkdir(parents=True)
    staging = Staging(str(root), plan())
    staging.prepare()
    staging.files.write(0, memoryview(ONE), 0)
    staging.files.write(1, memoryview(TWO), 0)
    staging.close()
    assert (victim / "one").read_text() == (tmp_path / "outside").read_text() == "keep"
    assert sorted(os.listdir(root)) == ["d", "two"]
    assert not (root / "d").is_symlink()


def test_two_restores_do_not_share_a_staging_directory(tmp_path: Path) -> None:
    first = filled(tmp_path / "s")
    second = Staging(str(tmp_path / "s"), plan())
    with pytest.raises(Refused, match="another restore"):
        second.prepare()
    second.close()
    assert (tmp_path / "s" / "d" / "one").read_bytes() == ONE
    first.close()


def test_too_little_room_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    staging = Staging(str(tmp_path / "s"), plan(sizes=(1 << 60, 1)))
    with pytest.raises(NoRoom, match="free"):
        staging.prepare()
    assert os.listdir(tmp_path) == []


def test_a_hole_in_what_is_wanted_of_a_shard_means_fetching_it(tmp_path: Path) -> None:
    staging = filled(tmp_path / "s")
    digest = sha256(ONE).digest()
    assert staging.matching(WantedShard(digest, len(ONE), [Write(0, 0, 0, len(ONE))]))
    assert not staging.matching(WantedShard(digest, len(ONE), [Write(0, 1, 1, len(ONE) - 1)]))
    assert not staging.matching(WantedShard(digest, len(ONE), [Write(0, 0, 0, len(ONE) - 1)]))
    staging.close()


# -- outputs


def test_outputs_are_written_at_any_place_with_few_files_open(tmp_path: Path) -> None:
    count = 200
    outputs = OutputFiles(
        str(tmp_path), [OutputFile(f"f{number}", 8, 0o600) for number in range(count)]
    )
    outputs.preallocate()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for offset in (4, 0):
        for number in range(count):
            outputs.write(number, memoryview(number.to_bytes(4, "little")), offset)
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= 64
    outputs.close()
    for number in range(count):
        assert (tmp_path / f"f{number}").read_bytes() == number.to_bytes(4, "little") * 2


def test_early_writeback_changes_no_byte(tmp_path: Path) -> None:
    size = 2 * WRITEBACK_BYTES + 5
    outputs = OutputFiles(str(tmp_path), [OutputFile("f", size, 0o600)])
    outputs.preallocate()
    content = os.urandom(1 << 20) * 17
    for offset in range(0, size, 1 << 20):
        outputs.write(0, memoryview(content)[offset : min(size, offset + (1 << 20))], offset)
    outputs.finish(0)
    outputs.close()
    assert (tmp_path / "f").read_bytes() == content[:size]


def test_a_shard_is_written_to_every_place_that_wants_it() -> None:
    written: dict[int, bytearray] = {0: bytearray(10), 1: bytearray(4), 2: bytearray(2)}

    class Outputs:
        def write(self, output: int, view: memoryview, offset: int) -> None:
            written[output][offset : offset + len(view)] = view

        def range_writer(self, output: int, offset: int, length: int) -> PlainRange:
            return PlainRange(self, output, offset)

    writes = [Write(0, 0, 0, 10), Write(1, 0, 3, 4), Write(2, 0, 8, 2)]
    for piece in (1, 3, 4, 10):
        writer = _ShardWriter(writes, Outputs())
        content = bytes(range(10))
        for start in range(0, 10, piece):
            writer.write(memoryview(content)[start : start + piece])
        assert written == {0: content, 1: content[3:7], 2: content[8:]}
        for buffer in written.values():
            buffer[:] = bytes(len(buffer))
