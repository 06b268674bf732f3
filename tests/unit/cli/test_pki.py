"""`ckptd pki` as it is typed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from ckptd.cli import main
from ckptd.client.recovery import new_code, read_code
from ckptd.core.identity import Role, identity_of
from ckptd.core.signing import Signer

DEADLINE_S = 30.0
PROGRAM = "from ckptd.cli.main import main; main()"


class Result(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def run(*arguments: str | Path) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        exit_code = main.run(["pki", *map(str, arguments)])
    return Result(exit_code, out.getvalue(), err.getvalue())


def last_word_of(output: str, before: str) -> str:
    line = next(line for line in output.splitlines() if before in line)
    return line.split()[-1]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    assert run("init", "--dir", tmp_path / "home", "--cluster", "home").exit_code == 0
    return tmp_path / "home"


def test_init_prints_the_code_once_with_what_to_do(tmp_path: Path) -> None:
    result = run("init", "--dir", tmp_path / "home", "--cluster", "home")
    assert (result.exit_code, result.stderr) == (0, "")
    code = last_word_of(result.stdout, "Recovery code:")
    assert read_code(code) == code
    assert result.stdout.count(code) == 1
    assert str(tmp_path / "home" / "recovery.bundle") in result.stdout
    assert "paper" in result.stdout
    assert "PRIVATE" not in result.stdout
    again = run("init", "--dir", tmp_path / "home", "--cluster", "home")
    assert (again.exit_code, again.stdout) == (1, "")
    assert "never overwritten" in again.stderr


def test_init_as_json(tmp_path: Path) -> None:
    result = run("init", "--dir", tmp_path / "home", "--cluster", "home", "--json")
    printed = json.loads(result.stdout)
    code = printed.pop("recovery_code")
    assert read_code(code) == code
    assert printed == {
        "cluster": "home",
        "dir": str(tmp_path / "home"),
        "recovery_bundle": str(tmp_path / "home" / "recovery.bundle"),
    }


def test_issue_for_a_machine_with_two_roles(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "pi1"
    result = run("issue", "worker,coordinator", "pi1", "--dir", home, "--out", out, "--json")
    printed = json.loads(result.stdout)
    assert printed == {
        "id": "pi1",
        "roles": ["coordinator", "worker"],
        "ca": str(out / "ca.pem"),
        "cert": str(out / "pi1.pem"),
        "key": str(out / "pi1.key"),
    }
    signer = Signer.from_pem(Path(printed["cert"]).read_bytes(), Path(printed["key"]).read_bytes())
    identity = identity_of(signer.certificate_der, cluster="home")
    assert identity.roles == {Role.WORKER, Role.COORDINATOR}


def test_issue_says_what_belongs_into_the_config(home: Path) -> None:
    result = run("issue", "client", "me", "--dir", home)
    assert result.exit_code == 0
    assert f"cert: {home / 'me.pem'}, key: {home / 'me.key'}" in result.stdout


@pytest.mark.parametrize(
    ("role", "node_id", "reason"),
    [
        ("root", "pi1", "'root' is not a role: worker, coordinator, client, admin, monitor"),
        ("worker,", "pi1", "'' is not a role"),
        ("worker,worker", "pi1", "names a role twice"),
        ("worker,client", "pi1", "cannot carry the roles"),
        ("worker", "pi/1", "node id"),
    ],
)
def test_issue_refuses_with_exit_2(home: Path, role: str, node_id: str, reason: str) -> None:
    result = run("issue", role, node_id, "--dir", home)
    assert (result.exit_code, result.stdout) == (2, "")
    assert reason in result.stderr


def test_issue_without_a_ca_says_how_to_make_one(tmp_path: Path) -> None:
    result = run("issue", "worker", "pi1", "--dir", tmp_path)
    assert result.exit_code == 1
    assert "next: ckptd pki init --cluster NAME" in result.stderr
    as_json = run("issue", "worker", "pi1", "--dir", tmp_path, "--json")
    assert (as_json.exit_code, as_json.stderr) == (1, "")
    assert json.loads(as_json.stdout) == {
        "error": {
            "code": 1,
            "kind": "not_found",
            "message": f"{tmp_path / 'ca.pem'} is not there",
            "next": "ckptd pki init --cluster NAME",
        }
    }


def test_recover_with_a_file_that_holds_the_code(tmp_path: Path) -> None:
    made = run("init", "--dir", tmp_path / "lost", "--cluster", "home", "--json")
    code_file = tmp_path / "code"
    code_file.write_text(json.loads(made.stdout)["recovery_code"].lower() + "\n")
    bundle = tmp_path / "lost" / "recovery.bundle"
    arguments = ("recover", "--bundle", bundle, "--code-file", code_file)
    result = run(*arguments, "--dir", tmp_path / "found", "--json")
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["dir"] == str(tmp_path / "found")
    assert {Path(path).name for path in printed["files"]} == {
        "ca.pem",
        "ca.key",
        "client.pem",
        "client.key",
        "recovery.bundle",
    }
    in_words = run(*arguments, "--dir", tmp_path / "again")
    assert str(tmp_path / "again" / "ca.key") in in_words.stdout
    assert "ckptd pki issue admin" in in_words.stdout


def test_recover_refuses_unusable_code_files(home: Path, tmp_path: Path) -> None:
    for name, content, exit_code, reason in [
        ("empty", b"", 2, "this one has 0"),
        ("binary", b"\xff\xfe", 2, "holds no recovery code"),
        ("long", b"0" * 5000, 2, "this one has 4097"),
        ("other", new_code().encode(), 1, "does not open this bundle"),
        ("missing", None, 1, "cannot be read"),
    ]:
        code_file = tmp_path / name
        if content is not None:
            code_file.write_bytes(content)
        bundle = home / "recovery.bundle"
        result = run(
            "recover", "--bundle", bundle, "--code-file", code_file, "--dir", tmp_path / "found"
        )
        assert (result.exit_code, reason in result.stderr) == (exit_code, True), result.stderr
    assert not (tmp_path / "found").exists()


def test_recover_without_a_terminal_asks_for_a_code_file(home: Path, tmp_path: Path) -> None:
    bundle = home / "recovery.bundle"
    result = run("recover", "--bundle", bundle, "--dir", tmp_path / "found")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--code-file" in result.stderr


def recover_on_a_terminal(bundle: Path, directory: Path, typed: str) -> tuple[int, str, str]:
    arguments = ["pki", "recover", "--bundle", str(bundle), "--dir", str(directory), "--json"]
    terminal, their_end = os.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdin=their_end,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        ) as process:
            os.write(terminal, typed.encode())
            printed, asked = process.communicate(timeout=DEADLINE_S)
    finally:
        os.close(terminal)
        os.close(their_end)
    return process.returncode, printed, asked


def test_recover_asks_on_a_terminal_until_the_code_is_typed_right(tmp_path: Path) -> None:
    made = run("init", "--dir", tmp_path / "lost", "--cluster", "home", "--json")
    code = json.loads(made.stdout)["recovery_code"]
    slip = ("1" if code[0] != "1" else "2") + code[1:]
    exit_code, printed, asked = recover_on_a_terminal(
        tmp_path / "lost" / "recovery.bundle", tmp_path / "found", f"{slip}\n{code}\n"
    )
    assert exit_code == 0
    assert (tmp_path / "found" / "ca.key").exists()
    assert json.loads(printed)["dir"] == str(tmp_path / "found")
    assert asked.count("Recovery code") == 2
    assert asked.count("typing error") == 1


def test_recover_gives_up_after_three_mistyped_codes(home: Path, tmp_path: Path) -> None:
    exit_code, printed, asked = recover_on_a_terminal(
        home / "recovery.bundle", tmp_path / "found", "a\nb\nc\n"
    )
    assert exit_code == 2
    assert asked.count("Recovery code") == 3
    assert json.loads(printed)["error"]["kind"] == "usage"
    assert not (tmp_path / "found").exists()
