"""The lock: everything by hash from the public index, for every Python and system supported."""

import hashlib
import re
import tomllib
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
CHECKED = ROOT / "requirements.platforms"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKED_GROUPS = ("build", "test", "lint", "types", "bench")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin")
SYSTEMS = (
    ("linux", "Linux", "x86_64"),
    ("linux", "Linux", "aarch64"),
    ("darwin", "Darwin", "arm64"),
)

PIN = re.compile(
    r"(?P<name>[a-z0-9]+(?:-[a-z0-9]+)*)==(?P<version>[0-9][0-9a-z.]*)"
    r"(?: ; (?P<marker>[^\\]+?))?"
    r"(?P<hashes>(?: \\\n {4}--hash=sha256:[0-9a-f]{64})+)"
)


def pins() -> list[re.Match[str]]:
    """Every pin of the lock. What is no pin with hashes fails: there is nothing else in it."""
    found = []
    for entry in re.split(r"\n(?=\S)", LOCK.read_text().rstrip("\n")):
        match = PIN.fullmatch(entry)
        assert match is not None, f"not a pin with sha256 hashes alone: {entry[:200]}"
        found.append(match)
    return found


def requirements() -> list[Requirement]:
    """Everything that the project asks for itself and that the lock has to hold."""
    project = PROJECT["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["client"]]
    texts += PROJECT["build-system"]["requires"]
    for group in LOCKED_GROUPS:
        texts += PROJECT["dependency-groups"][group]
    return [Requirement(text) for text in texts]


def environment(python: str, system: tuple[str, str, str]) -> dict[str, str]:
    """The marker variables of a supported machine."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "sys_platform": system[0],
        "platform_system": system[1],
        "platform_machine": system[2],
    }


def test_the_lock_holds_pins_with_hashes_and_nothing_else() -> None:
    assert len(pins()) >= 30
    for pin in pins():
        hashes = re.findall(r"sha256:([0-9a-f]{64})", pin["hashes"])
        assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("path", [LOCK, CHECKED], ids=lambda path: path.name)
def test_no_address_of_any_index_or_file_is_named(path: Path) -> None:
    text = path.read_text()
    for sign in ("://", "file:", " @ ", "--index", "--extra-index", "--find-links", "-e ", "-i "):
        assert sign not in text


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: "-".join(system[1:]))
def test_every_dependency_is_pinned_once_to_a_version_that_fits(
    python: str, system: tuple[str, str, str]
) -> None:
    here = environment(python, system)
    locked: dict[str, Version] = {}
    for pin in pins():
        if pin["marker"] is None or Marker(pin["marker"]).evaluate(here):
            assert pin["name"] not in locked
            locked[pin["name"]] = Version(pin["version"])
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in locked
        assert locked[name] in requirement.specifier


def test_the_lock_was_checked_to_install_without_a_compiler_everywhere() -> None:
    """Hashes do not tell a wheel from a source archive. `make lock` therefore ends with a dry run
    from wheels alone for each Python and system, and writes down for which lock that went well."""
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    lines = [line for line in CHECKED.read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == f"requirements.lock {digest}", "run `make lock`"
    assert lines[1:] == [" ".join(pair) for pair in product(PYTHONS, PLATFORMS)]


def test_the_supported_pythons_are_the_checked_ones() -> None:
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]},<3.15"
    named = [text.rpartition(" ")[2] for text in PROJECT["project"]["classifiers"] if "3." in text]
    assert tuple(named) == PYTHONS
