"""The reference pages say what the code says: errors, exit codes, the Python interface."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import msgspec

import ckptd
from ckptd import errors
from ckptd.cli.main import COMMANDS
from ckptd.client.listing import Checkpoint
from ckptd.client.pull import Stopped
from ckptd.client.restore import RestoreResult
from ckptd.client.store import StoreResult
from ckptd.client.verification import Verification
from ckptd.core.availability import EXIT_CODES

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
ERRORS = (REFERENCE / "errors.md").read_text()
PYTHON = (REFERENCE / "python.md").read_text()


def error_classes() -> set[type[errors.CkptdError]]:
    return {
        found
        for _, found in inspect.getmembers(errors, inspect.isclass)
        if issubclass(found, errors.CkptdError)
    }


def test_every_error_is_listed_with_its_kind_and_its_exit_code() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \| (\d) \| `(\w+)` \|", ERRORS, re.MULTILINE))
    classes: set[type[errors.CkptdError]] = {*error_classes(), Stopped}
    known = {(found.kind, str(found.exit_code), found.__name__) for found in classes}
    assert listed == known


def test_no_two_errors_share_a_kind() -> None:
    kinds = [found.kind for found in error_classes()]
    assert len(set(kinds)) == len(kinds)


def test_every_exit_code_has_a_meaning() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \| [a-z]", ERRORS, re.MULTILINE)}
    used = {found.exit_code for found in error_classes()} | set(EXIT_CODES.values())
    assert used <= listed
    assert listed - used == {130, 141}


def test_the_methods_are_those_of_both_clients() -> None:
    listed = re.findall(r"^\| `(\w+)\((.*?)\)` \|", PYTHON, re.MULTILINE)
    assert [name for name, _ in listed] == ["store", "restore", "ls", "verify", "load_tensors"]
    for client in (ckptd.Client, ckptd.SyncClient):
        methods = {
            name
            for name, _ in inspect.getmembers(client, inspect.isfunction)
            if not name.startswith("_")
        }
        assert methods == {name for name, _ in listed}
        for name, arguments in listed:
            assert arguments == _arguments(inspect.signature(getattr(client, name)))


def _arguments(signature: inspect.Signature) -> str:
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in signature.parameters.items()
        if name != "self"
    ]
    text = str(inspect.Signature(bare)).strip("()")
    return re.sub(r"'(.*?)'", r'"\1"', text) if not text.endswith("(") else text


def test_the_fields_of_results_are_listed() -> None:
    listed = {
        name: set(re.findall(r"`(\w+)`", fields))
        for name, fields in re.findall(r"^\| `([A-Z]\w+)` \| (.*) \|$", PYTHON, re.MULTILINE)
    }
    assert listed == {
        "StoreResult": {field.name for field in dataclasses.fields(StoreResult)},
        "RestoreResult": {field.name for field in dataclasses.fields(RestoreResult)},
        "Checkpoint": {field.name for field in msgspec.structs.fields(Checkpoint)},
        "Verification": {field.name for field in msgspec.structs.fields(Verification)}
        | {"exit_code"},
    }


def test_every_command_that_a_page_names_exists() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    unknown = {
        f"{page}: {command}"
        for page in pages
        for command in re.findall(r"`ckptd ([a-z][a-z-]*)", page.read_text())
        if command not in COMMANDS
    }
    assert unknown == set()
