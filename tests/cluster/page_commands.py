"""The commands of a page of the documentation: found, run in order, compared with what is printed.

Blocks marked `console` and `python` are run. In a `console` block a line that begins with `$ ` is a
command, lines with `> ` after it continue it, and what follows is its output; a line `...` stands
for any number of lines that are left out. Everything else in the output must be there, apart from
what is different each time: numbers, ids, sizes, names of nodes. Blocks marked `sh` are not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MARK = "\x1e"
_OMITTED = "..."
_SHOWN_HOME = "/home/me"


@dataclass(frozen=True)
class Command:
    """A command (or Python program) of a page, and the lines that the page shows as its output."""

    text: str
    output: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What running a command gave."""

    command: Command
    exit_code: int
    output: tuple[str, ...]


def blocks(page: str, language: str) -> list[str]:
    """The contents of the fenced blocks of `page` that are marked `language`."""
    return [content for marked, content in _BLOCK.findall(page) if marked == language]


def commands(page: str) -> list[Command]:
    """Everything on `page` that is to be run, in its order."""
    found: list[Command] = []
    for language, content in _BLOCK.findall(page):
        if language == "console":
            found += _console(content)
        elif language == "python":
            found.append(Command(f"python3 - <<'PYTHON'\n{content}PYTHON", (_OMITTED,)))
    return found


def _console(content: str) -> Iterator[Command]:
    text: list[str] = []
    output: list[str] = []
    for line in content.splitlines():
        if line.startswith("$ "):
            if text:
                yield Command("\n".join(text), tuple(output))
            text, output = [line[2:]], []
        elif line.startswith(">") and text and not output:
            text.append(line[2:])
        else:
            assert text, f"output without a command: {line}"
            output.append(line)
    if text:
        yield Command("\n".join(text), tuple(output))


def run(todo: Sequence[Command], home: Path) -> list[Outcome]:
    """Runs all commands in one shell, in a `home` of their own, and what they started to its end.

    A command that fails does not stop those after it.
    """
    script = ["trap 'ckptd local down > /dev/null 2>&1' EXIT"]
    for command in todo:
        script += [f"printf '\\n{_MARK}\\n'", command.text, f"printf '\\n{_MARK}%d\\n' $?"]
    (home / "page.sh").write_text("\n".join(script) + "\n", encoding="utf-8")
    environment = {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LANG": "C.UTF-8",
    }
    log = home / "page.out"
    with log.open("wb") as file:  # not a pipe: daemons outlive the shell if it is stopped
        subprocess.run(
            ["bash", "--noprofile", "--norc", str(home / "page.sh")],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=300,
        )
    shown = log.read_text(encoding="utf-8").replace(str(home), _SHOWN_HOME)
    parts = re.findall(rf"{_MARK}\n(.*?)\n{_MARK}(\d+)", shown, re.DOTALL)
    assert len(parts) == len(todo), f"the page's shell stopped early:\n{shown}"
    return [
        Outcome(command, int(code), tuple(output.strip("\n").splitlines()))
        for command, (output, code) in zip(todo, parts, strict=True)
    ]


def same_output(shown: Sequence[str], printed: Sequence[str]) -> bool:
    """Whether a page shows what was printed."""
    pattern = "".join(
        r"(?:.*\n)*" if line.strip() == _OMITTED else re.escape(_likeness(line)) + r"\n"
        for line in shown
        if line.strip()
    )
    # Whether a slow machine made a restore ask a second node is chance.
    steady = [line for line in printed if line.strip() and "another copy was used" not in line]
    text = "".join(f"{_likeness(line)}\n" for line in steady)
    return re.fullmatch(pattern, text) is not None


def _likeness(line: str) -> str:
    """`line` without what differs from run to run."""
    if line.startswith("exit code "):
        return line
    line = re.sub(r"/home/me/\.local/share/ckptd/local/(node\d)/store(?= )", r"\1", line)
    line = re.sub(r"\b[0-9A-Z]{4}(-[0-9A-Z]{4}){7}\b", "CODE", line)
    line = re.sub(r"-?\b\d+\.\d+(e[+-]\d+)?", "0", line)  # its digits are no id
    line = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,}(\b|…)", "ID", line)
    line = re.sub(r"\bnode\d", "NODE", line)
    line = re.sub(r"\bsuspect\b", "down", line)  # how long it was silent when it was asked
    line = re.sub(r"-?\d+(\.\d+)?(e[+-]\d+)?", "0", line)
    line = re.sub(r"\b0 (B|[kKMGT]i?B)(/s)?", "SIZE", line)
    line = re.sub(r"\b(NODE( SIZE)?)(, NODE( SIZE)?)+", r"\1", line)
    line = re.sub(r"\b(copies|copy)\b", "copies", re.sub(r"\b(shards|shard)\b", "shards", line))
    return " ".join(line.split())
