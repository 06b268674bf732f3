"""The YAML that a config may use, and everything that it may not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.limits import CONFIG_DEPTH_MAX
from ckptd.strict_yaml import YamlRefused, parse_yaml


def test_maps_lists_and_scalars_are_read() -> None:
    text = 'a: {b: [1, 2.5, true, null, "x"]}\nc: |\n  lines\n'
    assert parse_yaml(text) == {"a": {"b": [1, 2.5, True, None, "x"]}, "c": "lines\n"}


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_an_empty_text_is_none(text: str) -> None:
    assert parse_yaml(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: the key a is there twice"),
        ("x: {a: 1, 'a': 2}", "line 1, column 11: the key a is there twice"),
        ("a: &anchor 1", "anchors"),
        ("a: *nowhere", "anchors"),
        ("a: &x [1]\nb: [*x, *x]", "anchors"),
        ("a: !!int 3", "tags"),
        ("a: !!python/object/apply:os.system [id]", "tags"),
        ("a: !custom 3", "tags"),
        ("1: x", "must be quoted"),
        ("on: x", "must be quoted"),
        ("<<: {a: 1}", "must be quoted"),
        ("? [a]\n: x", "must be plain text"),
        ("? {a: 1}\n: x", "must be plain text"),
        ("a: [", "line 1, column 5"),
        ("a: b: c", "line 1"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \x00", "not allowed"),
        ("a: 2026-13-01", "cannot be read"),
        ("a: " + "9" * 5000, "cannot be read"),
        ("\ta: 1", "line 1"),
    ],
)
def test_what_is_not_taken_is_refused_with_its_place(text: str, reason: str) -> None:
    with pytest.raises(YamlRefused, match=reason):
        parse_yaml(text)


def test_deep_nesting_is_refused_before_the_stack_ends() -> None:
    parse_yaml("[" * (CONFIG_DEPTH_MAX - 1) + "]" * (CONFIG_DEPTH_MAX - 1))
    for text in ("[" * 50_000, "{a: " * 50_000, "".join(" " * i + "a:\n" for i in range(300))):
        with pytest.raises(YamlRefused, match="nested deeper"):
            parse_yaml(text)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse_yaml(text)
    except YamlRefused as refused:
        assert str(refused)


@given(st.text(alphabet="{}[]:,&*!-?|>'\"#%@` \n\tab10~<=_.", max_size=200))
def test_any_text_of_yaml_signs_is_read_or_refused(text: str) -> None:
    try:
        parse_yaml(text)
    except YamlRefused as refused:
        assert str(refused)
