"""The command: what it takes, and what it says when it cannot measure."""

from pathlib import Path

import pytest
from bench import sides, store_restore
from bench.payload import require_equal, require_room, write_random
from bench.processes import MeasurementFailed

PROGRAM = "#!/bin/sh\necho '{text}'\n"


def put_program(directory: Path, name: str, text: str) -> None:
    program = directory / name
    program.write_text(PROGRAM.format(text=text))
    program.chmod(0o755)


def test_without_rsync_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_program(tmp_path, "dnf", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert store_restore.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "bench: rsync is missing; install it with: sudo dnf install -y rsync\n"


def test_an_rsync_that_cannot_fsync_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_program(tmp_path, "rsync", "--inplace")
    monkeypatch.setenv("PATH", str(tmp_path))
    complaint = sides.rsync_complaint()
    assert complaint is not None and complaint.startswith("this rsync has no --fsync")
    put_program(tmp_path, "rsync", "--inplace --fsync")
    assert sides.rsync_complaint() is None


@pytest.mark.parametrize(
    "arguments", [["--size", "0B"], ["--size", "x"], ["--turns", "0"], ["--turns", "-1"], ["more"]]
)
def test_nonsense_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        store_restore.main(arguments)
    assert caught.value.code == 2


def test_the_defaults_are_those_of_the_record() -> None:
    options = store_restore._parser().parse_args([])
    assert (options.size, options.turns >= 4, options.trial) == (2**30, True, False)


def test_a_turn_that_would_end_too_late_does_not_fit() -> None:
    assert store_restore.fits(450.0, taken=5)
    assert not store_restore.fits(451.0, taken=5)


@pytest.mark.parametrize("user", [0, 1000])
def test_a_daemon_of_root_stays_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: user)
    general, _, module = sides.daemon_config(tmp_path).partition("[data]\n")
    assert ("uid = 0" in general) is (user == 0)
    assert f"path = {tmp_path / 'data'}" in module and "read only = no" in module


def test_random_files_have_their_size_and_differ(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        write_random(path, 5_000_001)
        assert path.stat().st_size == 5_000_001
    require_equal(one, one)
    with pytest.raises(MeasurementFailed, match="differs"):
        require_equal(one, two)


def test_a_shorter_longer_or_missing_copy_is_not_equal(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"12345")
    with pytest.raises(MeasurementFailed, match="was not restored"):
        require_equal(source, copy)
    for content in (b"1234", b"123456", b""):
        copy.write_bytes(content)
        with pytest.raises(MeasurementFailed, match="differs"):
            require_equal(source, copy)


def test_a_turn_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    require_room(tmp_path, 1)
    with pytest.raises(MeasurementFailed, match="use --dir or a smaller --size"):
        require_room(tmp_path, 2**60)
