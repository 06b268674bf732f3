"""The last look of a store at its source, before a manifest is made of it."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from ckptd.client.source import scan
from ckptd.client.store import _check_still
from ckptd.errors import SourceChanged


def test_a_source_that_held_still_passes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    _check_still(scan(tmp_path), [sha256(b"one").hexdigest()])


def test_what_came_or_changed_since_it_was_hashed_makes_no_version(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    source = scan(tmp_path)
    (tmp_path / "b").touch()
    with pytest.raises(SourceChanged):
        _check_still(source, [sha256(b"one").hexdigest()])
    source = scan(tmp_path)
    (tmp_path / "a").write_bytes(b"longer")
    with pytest.raises(SourceChanged):
        _check_still(source, [sha256(b"one").hexdigest(), sha256(b"").hexdigest()])


def test_a_file_written_a_moment_ago_is_hashed_once_more(tmp_path: Path) -> None:
    """Its times cannot tell a second write within one tick of the file system's clock."""
    (tmp_path / "a").write_bytes(b"two")
    with pytest.raises(SourceChanged, match="changed while it was being stored"):
        _check_still(scan(tmp_path), [sha256(b"one").hexdigest()])
