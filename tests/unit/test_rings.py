"""Imports point inward only, and the pure rings stay pure.

The inner parts decide, the outer ones touch the world. As long as nothing in `core` and `wire` can
reach a clock, a disk or a socket, whole clusters can be run in a test on virtual time.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "ckptd"
MODULES = sorted(SOURCE.rglob("*.py"))
PURE = {"core", "wire"}

# What each part may import besides itself. A new part needs a line here.
ALLOWED = {
    "errors": set[str](),
    "clock": set[str](),
    "core": {"errors"},
    "wire": {"errors", "core"},
    "strict_yaml": {"errors", "core"},
    "config_reader": {"errors", "core"},
    "config": {"errors", "core", "config_reader", "strict_yaml"},
    "store": {"errors", "core", "clock", "wire"},
    "net": {"errors", "core", "wire", "clock", "store"},
    "observe": {"errors", "core", "wire", "clock", "net", "config"},
    "discovery": {"errors", "core"},
    "node": {"errors", "core", "wire", "clock", "store", "net", "observe", "config", "discovery"},
    "client": {"errors", "core", "wire", "clock", "store", "net", "observe", "config", "discovery"},
    "watch": {"errors", "core", "clock", "config"},
    "coordinator": {
        "errors",
        "core",
        "wire",
        "clock",
        "store",
        "net",
        "observe",
        "config",
        "node",
        "client",
        "watch",
    },
    "cli": {
        "errors",
        "core",
        "wire",
        "clock",
        "store",
        "net",
        "observe",
        "config",
        "node",
        "client",
        "coordinator",
    },
    "__init__": {"errors", "core", "client", "config"},
    "__main__": {"cli"},
}

# The clock, the disk, the network, chance, other processes and the log, by any door.
IMPURE_MODULES = {
    "asyncio", "concurrent", "fcntl", "glob", "io", "logging", "mmap", "multiprocessing", "os",
    "platform", "select", "selectors", "secrets", "shutil", "signal", "socket", "ssl", "structlog",
    "subprocess", "tempfile", "threading", "time", "urllib", "uuid", "uvloop", "warnings",
}  # fmt: skip
PURE_NAMES_OF_IMPURE_MODULES = {
    "pathlib": {"PurePath", "PurePosixPath", "PureWindowsPath"},
    # A generator is handed in; drawing from the shared one, or making one, is not for a pure part.
    "random": {"Random"},
}
IMPURE_CALLS = {"open", "print", "input", "exec", "eval", "Random", "__import__", "breakpoint"}
IMPURE_ATTRIBUTES = {"now", "utcnow", "today", "stdin", "stdout", "stderr", "argv"}


def part_of(module: Path) -> str:
    """The ring-table name of a source file: its package, or its own name at the top."""
    return module.relative_to(SOURCE).with_suffix("").parts[0]


def imports_of(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Every import at any depth as (module, name), the name None for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield from ((node.module, alias.name) for alias in node.names)


def outward_imports(part: str, tree: ast.Module) -> list[str]:
    """Imports in `tree`, a module of `part`, that the table does not allow."""
    found = []
    for module, name in imports_of(tree):
        root, _, inner = module.partition(".")
        if root != "ckptd":
            continue
        target = inner.partition(".")[0] or name or "__init__"
        if target not in ALLOWED and not inner:
            continue  # a name of the package itself, such as its version
        if target != part and target not in ALLOWED[part]:
            found.append(f"{module}.{name}" if name else module)
    return found


def impurities(tree: ast.Module) -> list[str]:
    """Imports and calls in `tree` that reach outside the process or are not repeatable."""
    found = []
    for module, name in imports_of(tree):
        root = module.partition(".")[0]
        pure_names = PURE_NAMES_OF_IMPURE_MODULES.get(root)
        if root in IMPURE_MODULES or (pure_names is not None and name not in pure_names):
            found.append(f"import of {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in IMPURE_CALLS:
                found.append(f"call of {called.id}")
        elif isinstance(node, ast.Attribute) and node.attr in IMPURE_ATTRIBUTES:
            found.append(f"use of {node.attr}")
    return found


def parsed(module: Path) -> ast.Module:
    return ast.parse(module.read_text(), filename=str(module))


def test_there_is_something_to_check() -> None:
    assert {part_of(module) for module in MODULES} >= PURE | {"store", "net", "cli"}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_inward(module: Path) -> None:
    part = part_of(module)
    assert part in ALLOWED, f"{part} is a new part: give it a line in ALLOWED"
    assert outward_imports(part, parsed(module)) == []


@pytest.mark.parametrize(
    "module",
    [module for module in MODULES if part_of(module) in PURE],
    ids=lambda path: str(path.relative_to(SOURCE)),
)
def test_the_pure_parts_are_pure(module: Path) -> None:
    assert impurities(parsed(module)) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("core", "from ckptd.store.durable import write"),
        ("core", "import ckptd.wire.frames"),
        ("wire", "def late():\n    from ckptd.net import bulk"),
        ("client", "from ckptd.cli.main import main"),
        ("net", "from ckptd import node"),
        ("store", "from ckptd.client import Client"),
    ],
)
def test_an_outward_import_is_found(part: str, source: str) -> None:
    assert outward_imports(part, ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "import os.path",
        "from time import monotonic",
        "import random",
        "from random import random",
        "from pathlib import Path",
        "def late():\n    import socket",
        "open('x')",
        "datetime.now()",
        "datetime.datetime.utcnow()",
        "Random()",
        "sys.stderr.write('x')",
    ],
)
def test_an_impurity_is_found(source: str) -> None:
    assert impurities(ast.parse(source))
    assert not impurities(ast.parse("from pathlib import PurePosixPath\nfrom random import Random"))
