"""Names, selectors and paths inside a checkpoint."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core import limits
from ckptd.core.names import (
    Selector,
    check_name,
    check_node_id,
    check_path,
    check_symlink_target,
    colliding,
    parse_selector,
    path_from_json,
    path_to_json,
    symlink_stays_inside,
)
from ckptd.errors import NameRefused

GOOD_NAMES = [
    "a",
    "run-7/checkpoint-1000",
    "größe/日本",
    "a b",
    "...",
    ".hidden",
    "a~",
    "-dash",
    "x" * 255,
    "é" * 127,
    "/".join("s" * 32),
    "/".join(["a" * 127] * 8) + "b",
]
BAD_NAMES = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "a/.",
    "~",
    "~root/x",
    "a/~b",
    "a@b",
    "a\0b",
    "a\nb",
    "a\x7fb",
    "a\x85b",
    "\ud800",
    "a/\udcff",
    "x" * 256,
    "é" * 128,
    "/".join("s" * 33),
    "/".join(["a" * 205] * 5),
]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_name_within_the_rules_is_returned(name: str) -> None:
    assert check_name(name) == name
    assert parse_selector(name) == Selector(name)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_outside_the_rules_is_refused(name: str) -> None:
    with pytest.raises(NameRefused) as refused:
        check_name(name)
    assert refused.value.exit_code == 2
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 600


def test_the_longest_name_has_1024_bytes() -> None:
    longest = "/".join(["a" * 204] * 4 + ["b" * 204])
    assert len(longest) == limits.NAME_MAX_BYTES
    assert check_name(longest) == longest
    with pytest.raises(NameRefused, match="1025 bytes"):
        check_name(longest + "b")


@given(st.text(max_size=40))
def test_an_accepted_name_never_leaves_the_directory_that_it_is_joined_to(
    name: str,
) -> None:
    try:
        check_name(name)
    except NameRefused:
        return
    assert os.path.normpath(os.path.join("/root/of/all", name)) == f"/root/of/all/{name}"


def test_selectors() -> None:
    assert parse_selector("run/c@0123abcd") == Selector("run/c", version_prefix="0123abcd")
    assert parse_selector("run/c@" + "AB" * 32) == Selector("run/c", version_prefix="ab" * 32)
    assert parse_selector("run@latest") == Selector("run", which="latest")
    assert parse_selector("run@best") == Selector("run", which="best")
    assert Selector("run", which="best") != Selector("run", which="latest")


@pytest.mark.parametrize(
    "text",
    [
        "@latest",
        "run@",
        "run@newest",
        "run@LATEST",
        "run@0123abc",
        "run@0123abcg",
        "run@" + "a" * 65,
        "run@01234567@latest",
        "run@\uff10\uff11234567",
        "../run@latest",
    ],
)
def test_a_selector_that_picks_nothing_is_refused(text: str) -> None:
    with pytest.raises(NameRefused):
        parse_selector(text)


@pytest.mark.parametrize("node_id", ["pi1", "0", "rack-2.shelf_a", "a" * 63])
def test_node_ids(node_id: str) -> None:
    assert check_node_id(node_id) == node_id


@pytest.mark.parametrize(
    "node_id",
    ["", "Pi1", "-pi", "pi-", ".", "..", "a/b", "a b", "a\n", "é", "a" * 64, "a@b"],
)
def test_a_node_id_outside_the_rules_is_refused(node_id: str) -> None:
    with pytest.raises(NameRefused):
        check_node_id(node_id)


@pytest.mark.parametrize(
    "path",
    ["a", "a/b", "a b\n", "~", "back\\slash", "...", "@", "é", "\udcff", "x" * 4096],
)
def test_a_path_that_the_file_system_allows_is_returned(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "/",
        "/a",
        "a/",
        "a//b",
        "a/./b",
        "a/../b",
        "a\0",
        "\ud800",
        "\udcc3\udca9",
        "x" * 4097,
        "é" * 2049,
    ],
)
def test_a_path_that_could_leave_or_come_back_changed_is_refused(path: str) -> None:
    with pytest.raises(NameRefused):
        check_path(path)


@given(st.binary(min_size=1, max_size=24).filter(lambda name: not {0, 47} & set(name)))
def test_every_file_name_comes_through_json_unchanged(raw: bytes) -> None:
    name = raw.decode("utf-8", "surrogateescape")
    carried = json.loads(json.dumps(path_to_json(name)).encode())
    carried.encode()  # no lone surrogate is left
    assert path_from_json(carried) == name
    if raw not in (b".", b".."):
        assert check_path(name) == name


def test_readable_names_look_the_same_in_json() -> None:
    assert path_to_json("dir/größe.json") == "dir/größe.json"
    assert path_to_json("a\udcffb") == "a\0ffb"


@pytest.mark.parametrize(
    "text",
    [
        "a\0",
        "a\0f",
        "a\0FF",
        "a\0zz",
        "a\x0041",
        "\0c3\0a9",
        chr(0xDCFF),
        chr(0xD800),
        "\0\0ff",
    ],
)
def test_a_second_spelling_of_a_path_is_refused(text: str) -> None:
    with pytest.raises(NameRefused):
        path_from_json(text)


@given(st.text(alphabet="\x00aé8f9c3", max_size=8))
def test_each_path_has_one_json_form(text: str) -> None:
    try:
        path = path_from_json(text)
    except NameRefused:
        return
    assert path_to_json(path) == text


@pytest.mark.parametrize(
    ("path", "target", "inside"),
    [
        ("link", "file", True),
        ("link", "./a//b/.", True),
        ("link", "..", False),
        ("link", "../x", False),
        ("link", "/etc/passwd", False),
        ("a/link", "..", True),
        ("a/link", "../b/c", True),
        ("a/link", "../../b", False),
        ("a/b/link", ".././../c", True),
        ("link", "a/../b", False),
        ("l", "a/b/up/../x", False),
    ],
)
def test_whether_a_link_stays_inside(path: str, target: str, inside: bool) -> None:
    assert symlink_stays_inside(path, target) is inside
    if inside:
        assert check_symlink_target(path, target) == target
    else:
        with pytest.raises(NameRefused, match="leaves the checkpoint"):
            check_symlink_target(path, target)


@pytest.mark.parametrize("target", ["", "a\0b", "\ud800", "x" * 4097])
def test_a_link_target_that_no_file_system_holds_is_refused(target: str) -> None:
    with pytest.raises(NameRefused):
        check_symlink_target("link", target)


SEGMENT = st.sampled_from(["a", "b", "c", ".."])


@given(
    st.dictionaries(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join),
        st.lists(SEGMENT, min_size=1, max_size=5).map("/".join),
        max_size=6,
    )
)
def test_links_that_pass_never_lead_out_through_each_other(
    links: dict[str, str],
) -> None:
    """A model of path resolution follows every link, also through other links."""
    links = {
        path: target
        for path, target in links.items()
        if symlink_stays_inside(path, target)
        and not any(path.startswith(other + "/") for other in links)
    }

    def resolve(directory: tuple[str, ...], target: str, hops: int) -> tuple[str, ...]:
        for segment in target.split("/"):
            if segment == "..":
                assert directory, "left the checkpoint"
                directory = directory[:-1]
                continue
            directory = (*directory, segment)
            link = links.get("/".join(directory))
            if link is not None and hops:
                directory = resolve(directory[:-1], link, hops - 1)
        return directory

    for path, target in links.items():
        resolve(tuple(path.split("/")[:-1]), target, 8)


def test_collisions_by_case() -> None:
    paths = ["A", "a", "b", "B/x", "c"]
    assert colliding(paths, case_insensitive=True, normalize=False) == [
        ("A", "a"),
        ("b", "B"),
    ]
    assert colliding(paths, case_insensitive=False, normalize=True) == []


def test_collisions_by_unicode_form() -> None:
    composed, decomposed = "\u00e9", "e\u0301"
    assert colliding([composed, decomposed], case_insensitive=False, normalize=True) == [
        (composed, decomposed)
    ]
    assert colliding([composed, decomposed], case_insensitive=True, normalize=False) == []
    assert colliding(["\u00c9", decomposed], case_insensitive=True, normalize=True) == [
        ("\u00c9", decomposed)
    ]


def test_directories_that_are_only_implied_collide_too() -> None:
    paths = ["run/A/x", "run/a/y", "run/a/z"]
    assert colliding(paths, case_insensitive=True, normalize=False) == [("run/A", "run/a")]


def test_one_path_given_twice_does_not_collide_with_itself() -> None:
    assert colliding(["a/b", "a/b", "a"], case_insensitive=True, normalize=True) == []
