"""All commands together: what is there, how it is documented, how errors come out."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from ckptd.cli import main

ROOT = Path(__file__).parents[3]

# What people and scripts rely on: a command of this list may not go away or change its name.
PUBLIC = (
    "serve",
    "store",
    "restore",
    "ls",
    "show",
    "verify",
    "status",
    "doctor",
    "nodes",
    "jobs",
    "what-if",
    "rm",
    "undelete",
    "pin",
    "unpin",
    "pki init",
    "pki issue",
    "local up",
    "local down",
    "config check",
    "completion",
)


class Result(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def run(*arguments: str) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        exit_code = main.run(list(arguments))
    return Result(exit_code, out.getvalue(), err.getvalue())


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


ALL = dict(commands(main.cli))


@pytest.fixture(autouse=True)
def no_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CKPTD_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_every_public_command_is_there() -> None:
    assert set(PUBLIC) <= set(ALL)


def test_the_top_level_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    listed = {line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")}
    assert {path.split()[0] for path in ALL} <= listed


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_explains_itself(path: str, flag: str) -> None:
    result = run(*path.split(), flag)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"ckptd {path}" in result.stdout
    assert "--json" in result.stdout and "--config FILE" in result.stdout
    summary = result.stdout.split("\n\n")[1].strip()
    assert summary.rstrip().endswith((".", ".:", ":")) and len(summary) > 20, summary


def cluster_commands() -> list[tuple[str, ...]]:
    return [
        ("ls",),
        ("show", "name"),
        ("verify", "--all"),
        ("status",),
        ("nodes",),
        ("jobs",),
        ("jobs", "pause", "scrub"),
        ("what-if", "node1"),
        ("rm", "name"),
        ("undelete", "name"),
        ("pin", "name"),
        ("unpin", "name"),
        ("store", "name"),
        ("config", "check"),
    ]


@pytest.mark.parametrize("command", cluster_commands(), ids=" ".join)
def test_config_and_json_are_taken_before_and_after_the_command(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    missing = str(tmp_path / "no-such.yml")
    before = run("--json", "--config", missing, *command)
    after = run(*command, "--config", missing, "--json")
    assert before == after
    assert (before.exit_code, before.stderr) == (2, "")
    assert missing in before.stdout
    json.loads(before.stdout)


@pytest.mark.parametrize("command", cluster_commands(), ids=" ".join)
def test_an_error_is_one_message_with_the_next_command(command: tuple[str, ...]) -> None:
    in_words = run(*command)
    assert (in_words.exit_code, in_words.stdout) == (2, "")
    message, following = in_words.stderr.splitlines()
    assert message.startswith("ckptd: ") and following.startswith("  next: ckptd ")
    as_json = run(*command, "--json")
    assert (as_json.exit_code, as_json.stderr) == (2, "")
    error = json.loads(as_json.stdout)["error"]
    assert set(error) == {"code", "kind", "message", "next"}
    assert (error["code"], error["kind"]) == (2, "config")
    assert error["message"] == message.removeprefix("ckptd: ")
    assert error["next"] == following.removeprefix("  next: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("ls", "--no-such-option"),
        ("ls", "one", "two"),
        ("show",),
        ("rm",),
        ("verify",),
        ("verify", "--all", "name"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["code"], error["kind"]) == (2, 2, "usage")
    assert error["next"].startswith("ckptd")


def test_doctor_reports_a_missing_config_as_a_finding() -> None:
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["ok"]) == (1, False)
    assert [finding["check"] for finding in found["findings"]] == ["config"]
    assert found["findings"][0]["next"].startswith("ckptd local up")


def test_long_output_is_never_cut_off_where_python_is_told_not_to_buffer() -> None:
    program = (
        "import sys; from ckptd.cli import main; before = type(sys.stdout.buffer).__name__; "
        "main.write_whole_texts(); print(before, type(sys.stdout.buffer).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-u", "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["FileIO", "BufferedWriter"]


def test_the_version_is_printed() -> None:
    assert run("--version").stdout.startswith("ckptd, version ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell: str) -> None:
    assert "_CKPTD_COMPLETE" in run("completion", shell).stdout


def test_the_reference_is_what_the_commands_say() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "cli-reference"), "--print"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    written = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert written == made, "docs/reference/cli.md is old: run scripts/cli-reference"
    for path in ALL:
        assert f"\n## ckptd {path}\n" in written


def test_listing_commands_import_nothing_that_they_do_not_need() -> None:
    """`ckptd ls` is typed often: what takes long to import must not slow down its start."""
    program = (
        "import sys; from ckptd.cli import main; main.run(['ls', '--help']); "
        "import ckptd.client.listing, ckptd.observe.logs; print(*sys.modules); "
        "import rich.progress, structlog.dev"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    heavy = {"numpy", "safetensors", "torch", "prometheus_client", "h11", "rich", "rich.console"}
    assert heavy.isdisjoint(loaded), heavy & set(loaded)
