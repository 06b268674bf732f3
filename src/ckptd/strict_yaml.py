"""YAML as a config needs it: plain maps, lists and scalars, each key once, and nothing that runs
code or grows when read.

Refused beyond what `yaml.SafeLoader` refuses: a key written twice in one map (the last one would
win silently), anchors and aliases (a few lines can stand for gigabytes), explicit tags, deep
nesting, several documents.
"""

from __future__ import annotations

from typing import Any

import yaml

from ckptd.core.limits import CONFIG_DEPTH_MAX


class YamlRefused(ValueError):
    """The text is not YAML, or YAML that is not taken. The message names line and column."""


class _StrictLoader(yaml.SafeLoader):
    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        place = _place(event.start_mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise YamlRefused(f"{place}: anchors (&) and aliases (*) are not taken here")
        if getattr(event, "tag", None) is not None:
            raise YamlRefused(f"{place}: tags (!) are not taken here")
        self._depth += 1
        if self._depth > CONFIG_DEPTH_MAX:
            raise YamlRefused(f"{place}: nested deeper than {CONFIG_DEPTH_MAX} levels")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            place = _place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlRefused(f"{place}: a key must be plain text")
            if key_node.tag != "tag:yaml.org,2002:str":
                raise YamlRefused(f'{place}: the key {key_node.value} must be quoted: "…"')
            if key_node.value in seen:
                raise YamlRefused(f"{place}: the key {key_node.value} is there twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def parse_yaml(text: str) -> object:
    """The one document in `text` as dicts with text keys, lists and scalars; None when empty.

    Raises `YamlRefused`.
    """
    try:
        loader = _StrictLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{_place(mark)}: " if mark else ""
        raise YamlRefused(f"{place}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise YamlRefused(str(error)) from error
    except YamlRefused:
        raise
    except ValueError as error:
        # An implicit date such as 2026-13-01, or a number with thousands of digits.
        raise YamlRefused(f"a value cannot be read: {error}") from error
