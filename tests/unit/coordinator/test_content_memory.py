"""What was read once is not read again; what is not sure is forgotten."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ckptd.client.source import Source, scan
from ckptd.coordinator.content_memory import ContentMemory, fingerprint_of
from ckptd.core import limits

CONTENT = "ab" * 32
OTHER = "cd" * 32


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    root = tmp_path / "step-1"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "state.json").write_text("{}")
    (root / "weights.bin").write_bytes(bytes(1000))
    (root / "last").symlink_to("weights.bin")
    return root


def settled(root: Path) -> Source:
    """A scan as it is some seconds later: the times of a file prove something by then."""
    source = scan(root)
    source.scanned_ns = time.time_ns() + 3_600_000_000_000
    return source


def test_it_is_remembered_across_restarts(tmp_path: Path, checkpoint: Path) -> None:
    memory = ContentMemory(tmp_path / "contents")
    assert memory.get(settled(checkpoint)) is None
    memory.put(settled(checkpoint), CONTENT)
    assert memory.get(settled(checkpoint)) == CONTENT
    memory.save()
    again = ContentMemory(tmp_path / "contents")
    assert again.get(settled(checkpoint)) == CONTENT
    assert len(again) == 1


def test_whoever_learns_nothing_writes_nothing(tmp_path: Path, checkpoint: Path) -> None:
    place = tmp_path / "contents"
    ContentMemory(place).save()
    assert not place.exists()
    memory = ContentMemory(place)
    memory.put(settled(checkpoint), CONTENT)
    memory.save()
    place.unlink()
    memory.put(settled(checkpoint), CONTENT)
    memory.save()
    assert not place.exists()
    memory.put(settled(checkpoint), OTHER)
    memory.save()
    assert ContentMemory(place).get(settled(checkpoint)) == OTHER


def test_a_source_with_fresh_times_is_not_remembered(tmp_path: Path, checkpoint: Path) -> None:
    memory = ContentMemory(tmp_path / "contents")
    memory.put(scan(checkpoint), CONTENT)
    assert len(memory) == 0


def test_every_change_gives_another_fingerprint(checkpoint: Path) -> None:
    seen = {fingerprint_of(scan(checkpoint))}

    def changed() -> bool:
        count = len(seen)
        seen.add(fingerprint_of(scan(checkpoint)))
        return len(seen) > count

    assert not changed()
    os.utime(checkpoint / "weights.bin", (5, 5))
    assert changed()
    (checkpoint / "weights.bin").chmod(0o600)
    assert changed()
    (checkpoint / "weights.bin").write_bytes(bytes(999))
    assert changed()
    os.rename(checkpoint / "weights.bin", checkpoint / "weights2.bin")
    (checkpoint / "last").unlink()
    assert changed()
    (checkpoint / "last").symlink_to("weights2.bin")
    assert changed()
    (checkpoint / "empty").mkdir(mode=0o755)
    assert changed()
    (checkpoint / "empty").chmod(0o700)
    assert changed()
    moved = checkpoint.with_name("step-2")
    os.rename(checkpoint, moved)
    assert fingerprint_of(scan(moved)) not in seen


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: raw[:30] + bytes([raw[30] ^ 1]) + raw[31:],
        lambda raw: b"another file altogether\n" + raw,
        lambda raw: bytes(limits.CONTENT_MEMORY_MAX_BYTES + 1),
    ],
)
def test_a_damaged_file_is_dropped_as_a_whole(
    tmp_path: Path, checkpoint: Path, damage: object
) -> None:
    memory = ContentMemory(tmp_path / "contents")
    memory.put(settled(checkpoint), CONTENT)
    memory.save()
    raw = (tmp_path / "contents").read_bytes()
    assert callable(damage)
    (tmp_path / "contents").write_bytes(damage(raw))
    assert len(ContentMemory(tmp_path / "contents")) == 0


def test_what_was_used_longest_ago_is_forgotten_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONTENT_MEMORY_ENTRIES_MAX", 2)
    sources = []
    for number in range(3):
        root = tmp_path / f"step-{number}"
        root.mkdir()
        (root / "model.bin").write_bytes(b"x")
        sources.append(settled(root))
    memory = ContentMemory(tmp_path / "contents")
    memory.put(sources[0], CONTENT)
    memory.put(sources[1], CONTENT)
    assert memory.get(sources[0]) == CONTENT
    memory.put(sources[2], CONTENT)
    assert [memory.get(source) for source in sources] == [CONTENT, None, CONTENT]


def test_a_disk_that_does_not_take_it_is_no_error(tmp_path: Path, checkpoint: Path) -> None:
    memory = ContentMemory(tmp_path / "nowhere" / "contents")
    memory.put(settled(checkpoint), CONTENT)
    memory.save()
    assert memory.get(settled(checkpoint)) == CONTENT
