"""Where a restore may end up, and what happens to what was there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest

from ckptd.client import target as target_module
from ckptd.client.target import (
    Target,
    check_names,
    check_replaceable,
    choose_target,
    put_in_place,
    remove_tree,
    replace_files,
)
from ckptd.errors import Refused, TargetExists
from ckptd.store.filesystem import OperatingSystem

VERSION = "abcdef0123456789" * 4


def choose(
    to: Path,
    *,
    force: bool = False,
    replaces: Literal["all", "files"] = "all",
    is_file: bool = False,
) -> Target:
    return choose_target(to, VERSION, force=force, replaces=replaces, is_file=is_file)


def staged(target: Target, content: str = "new") -> str:
    os.mkdir(target.staging)
    Path(target.staging, "file").write_text(content)
    return target.staging


def test_the_staging_directory_lies_beside_the_target(tmp_path: Path) -> None:
    target = choose(tmp_path / "out")
    assert target.staging == str(tmp_path / ".out.ckptd-restore-abcdef01")
    assert target.found == "nothing"


@pytest.mark.parametrize("letter", ["n", "\u00fc"])
def test_a_name_of_255_bytes_can_be_restored_and_replaced(tmp_path: Path, letter: str) -> None:
    name = letter * (255 // len(letter.encode())) + "x" * (255 % len(letter.encode()))
    first = choose(tmp_path / name)
    put_in_place(first, staged(first))
    again = choose(tmp_path / name, force=True)
    assert again.staging == first.staging
    put_in_place(again, staged(again, "newer"))
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name / "file").read_text() == "newer"


def test_long_names_that_differ_at_their_end_have_staging_directories_of_their_own(
    tmp_path: Path,
) -> None:
    assert choose(tmp_path / ("n" * 250 + "a")).staging != choose(tmp_path / ("n" * 250)).staging


@pytest.mark.parametrize("there", ["nothing", "empty", "something"])
def test_the_new_name_is_on_the_medium_when_it_is_in_place(
    tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there != "nothing":
        (tmp_path / "out").mkdir()
    if there == "something":
        (tmp_path / "out" / "file").write_text("old")
    target = choose(tmp_path / "out", force=True)
    seen: list[tuple[str, str]] = []
    flush = OperatingSystem.fsync_directory

    def noting(self: OperatingSystem, path: str) -> None:
        flush(self, path)
        seen.append((path, (tmp_path / "out" / "file").read_text()))

    monkeypatch.setattr(OperatingSystem, "fsync_directory", noting)
    put_in_place(target, staged(target))
    assert seen and seen[-1] == (str(tmp_path), "new")
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_to_a_directory_means_that_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert choose(tmp_path / "link").path == str(tmp_path / "real")


def test_what_is_there_is_refused_without_force(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "file.safetensors").touch()
    with pytest.raises(TargetExists, match="not empty"):
        choose(tmp_path / "full")
    with pytest.raises(TargetExists):
        choose(tmp_path / "file.safetensors", is_file=True)
    with pytest.raises(TargetExists, match="is a directory"):
        choose(tmp_path / "full", is_file=True, force=True)
    assert choose(tmp_path / "full", force=True).replaces == "all"
    assert choose(tmp_path / "full", force=True, replaces="files").replaces == "files"


def test_homes_and_the_current_directory_are_never_swapped_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    (inside / "file").touch()
    monkeypatch.chdir(inside)
    for place in (inside, tmp_path / "a"):
        with pytest.raises(Refused, match="current directory"):
            choose(place, force=True)
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(inside))
    with pytest.raises(Refused, match="home directory"):
        choose(tmp_path / "a", force=True)
    assert choose(inside, force=True, replaces="files").replaces == "files"
    with pytest.raises(Refused, match="root"):
        choose(Path("/"), force=True)


def test_a_new_directory_gets_the_name(tmp_path: Path) -> None:
    for name, before in (("new", None), ("empty", "mkdir")):
        if before:
            (tmp_path / name).mkdir()
        target = choose(tmp_path / name)
        put_in_place(target, staged(target))
        assert (tmp_path / name / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["empty", "new"]


def test_an_empty_current_directory_is_filled_and_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    target = choose(Path("."))
    put_in_place(target, staged(target))
    assert os.listdir(".") == ["file"]
    assert os.listdir(tmp_path) == ["here"]


def test_what_came_up_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = choose(tmp_path / "out")
    source = staged(target)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").write_text("other")
    with pytest.raises(TargetExists, match="meanwhile"):
        put_in_place(target, source)
    assert (tmp_path / "out" / "other").read_text() == "other"
    file = choose(tmp_path / "x.safetensors", is_file=True)
    (tmp_path / "x.safetensors").write_text("other")
    with pytest.raises(TargetExists, match="meanwhile"):
        put_in_place(file, os.path.join(source, "file"))
    assert (tmp_path / "x.safetensors").read_text() == "other"


@pytest.mark.parametrize("exchange", [True, False])
def test_force_swaps_and_removes_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:  # as on a file system that cannot exchange names
        monkeypatch.setattr(target_module, "_exchange", lambda *_: False)
    out = tmp_path / "out"
    (out / "closed").mkdir(parents=True)
    (out / "closed" / "old").touch()
    (out / "closed").chmod(0o500)
    target = choose(out, force=True)
    put_in_place(target, staged(target))
    assert os.listdir(out) == ["file"]
    assert os.listdir(tmp_path) == ["out"]


def test_force_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("old")
    target = choose(tmp_path / "x.safetensors", is_file=True, force=True)
    put_in_place(target, os.path.join(staged(target), "file"))
    assert (tmp_path / "x.safetensors").read_text() == "new"


def test_files_are_replaced_one_by_one_and_never_through_links(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "keep").write_text("keep")
    (out / "link").symlink_to(elsewhere)
    (out / "taken").mkdir()
    target = choose(out, force=True, replaces="files")
    check_replaceable(target, ["new/deep/file", "keep"])
    for path in ("link/file", "keep/file", "taken"):
        with pytest.raises(Refused):
            check_replaceable(target, [path])
    source = Path(staged(target))
    (source / "link").mkdir()
    (source / "link" / "file").write_text("evil")
    with pytest.raises(Refused):  # also when the link came up after the check
        replace_files(target, str(source), ["link/file"], {"link": 0o755})
    assert os.listdir(elsewhere) == []
    (source / "new" / "deep").mkdir(parents=True)
    (source / "new" / "deep" / "file").write_text("new")
    modes = {"new": 0o755, "new/deep": 0o711}
    replace_files(target, str(source), ["file", "new/deep/file"], modes)
    assert (out / "file").read_text() == (out / "new" / "deep" / "file").read_text() == "new"
    assert (out / "keep").read_text() == "keep"
    assert not source.exists()


def test_names_collide_only_where_the_file_system_takes_them_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = ["A/x", "a/y", "plain"]
    (tmp_path / "try-a").touch()
    if (tmp_path / "TRY-A").exists():
        with pytest.raises(Refused, match="one name"):
            check_names(str(tmp_path), paths)
    else:
        check_names(str(tmp_path), paths)
        monkeypatch.setattr(target_module, "_same", lambda *_: True)
        with pytest.raises(Refused, match="'A' and 'a'"):
            check_names(str(tmp_path), paths)
    assert os.listdir(tmp_path) == ["try-a"]


def test_trees_are_removed_whatever_their_modes(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "z").touch()
    (tmp_path / "x" / "y").chmod(0)
    (tmp_path / "x").chmod(0o500)
    remove_tree(str(tmp_path / "x"))
    assert os.listdir(tmp_path) == []
