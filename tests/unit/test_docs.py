"""The documents: links lead somewhere, commands exist, one word for one thing."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").rglob("*.md")]
)
SOURCES = sorted(
    path
    for folder in ("src", "tests", "bench", "scripts")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix in ("", ".py")
)

# The glossary gives each thing one name; these are the ones it does not give, and unfinished work.
UNWANTED = re.compile(r"\b(TODO|FIXME|TBD|XXX|[Cc]hunks?|[Bb]lobs?|[Ss]lave)\b")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
DOCUMENT_NAME = re.compile(r"[\w./-]*\b[\w-]+\.md\b")


def identified(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(document: Path) -> set[str]:
    """The link targets that headings of `document` make, by the rules of GitHub."""
    headings = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=identified)
def test_every_relative_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    for link in LINK.findall(CODE_BLOCK.sub("", document.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert target.exists(), f"{link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link} names no heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=identified)
def test_the_words_of_the_glossary_are_used_and_nothing_is_left_open(document: Path) -> None:
    assert UNWANTED.findall(document.read_text()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=identified)
def test_every_make_target_that_is_named_exists(document: Path) -> None:
    text = document.read_text()
    named = re.findall(r"`(?:sudo )?make ((?:[a-z-]+ ?)+)", text)
    named += re.findall(r"^(?:sudo )?make ((?:[a-z-]+ ?)+)", text, re.MULTILINE)
    assert {word for words in named for word in words.split()} - make_targets() == set()


def test_every_document_that_code_or_text_names_is_in_the_repository() -> None:
    known = {path.name for path in DOCUMENTS}
    unknown = {
        f"{identified(path)} names {name}"
        for path in [*DOCUMENTS, *SOURCES]
        for name in DOCUMENT_NAME.findall(path.read_text())
        if Path(name).name not in known
    }
    assert unknown == set()


def test_the_index_names_every_document_below_docs() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {
        (index.parent / link.partition("#")[0]).resolve()
        for link in LINK.findall(index.read_text())
    }
    below = {path for path in DOCUMENTS if path.is_relative_to(ROOT / "docs")} - {index}
    assert {identified(path) for path in below - linked} == set()


def test_help_lists_every_target_and_says_what_it_does() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[0].split())
    described = set(re.findall(r"^([a-z-]+):.*## \S", makefile, re.MULTILINE))
    assert described == phony
    required = {"demo", "test", "test-long", "test-root", "lint", "types", "bench", "bench-shards"}
    assert described >= required | {"help", "lock", "clean"}


def test_every_test_that_the_guarantees_name_exists() -> None:
    named = re.findall(
        r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text()
    )
    assert named
    for path, test in named:
        assert re.search(rf"^(?:async )?def {test}\(", (ROOT / path).read_text(), re.MULTILINE)
