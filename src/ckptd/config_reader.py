"""Reads one map of a config key by key, and notes every fault instead of stopping at the first.

A reader method returns a harmless value after a fault; the caller goes on and finds the next one.
What it built is thrown away once there is any error.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Final, TypeVar

from ckptd.core.limits import CONFIG_LIST_MAX, CONFIG_TEXT_MAX
from ckptd.core.names import check_name, check_node_id
from ckptd.core.quantities import (
    Address,
    format_duration,
    format_rate,
    format_size,
    parse_address,
    parse_duration,
    parse_percent,
    parse_rate,
    parse_size,
)
from ckptd.errors import ConfigError, NameRefused

T = TypeVar("T")
N = TypeVar("N", int, float)
C = TypeVar("C", bound=str)
_MISSING: Final = object()


class Section:
    """One map of the config at dotted path `path`; None and an absent map are an empty one.

    `errors` is shared by all sections of a config. `close` reports the keys that nobody asked for.
    """

    def __init__(self, value: object, path: str, errors: list[ConfigError], *, home: Path) -> None:
        self.home = home
        self._path = path
        self._errors = errors
        self._asked: set[str] = set()
        self._values: dict[str, object] = {}
        # What is no map lacks every key; saying so for each would bury the one real fault.
        self._is_map = isinstance(value, dict) or value is None
        if isinstance(value, dict):
            self._values = value
        elif value is not None:
            self.fault("", f"must be a map of keys, not {_kind(value)}")

    def fault(self, key: str, message: str) -> None:
        """Note that `key` of this section is wrong; "" is the section itself."""
        self._errors.append(ConfigError(self._dotted(key), message))

    def has(self, key: str) -> bool:
        """Whether `key` is there with a value. Asking does not count as reading it."""
        return self._values.get(key) is not None

    def close(self) -> None:
        """Refuse every key that was never asked for, with the nearest that exists."""
        for key in sorted(self._values.keys() - self._asked):
            near = difflib.get_close_matches(key, sorted(self._asked), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.fault(key, f"unknown key{hint}")

    def section(self, key: str) -> Section:
        self._asked.add(key)
        return Section(self._values.get(key), self._dotted(key), self._errors, home=self.home)

    def sections(self, key: str) -> list[Section]:
        """A list of maps; absent or empty: none."""
        return [
            Section({} if value is None else value, path, self._errors, home=self.home)
            for path, value in self._items(key)
        ]

    def text(self, key: str, default: str | None = None) -> str:
        """One line of text, empty only if the default is; without a default it must be there."""

        def parse(value: object) -> str:
            return "" if value == default == "" else _plain_text(value)

        return self._parsed(key, default, parse, "")

    def texts(self, key: str) -> tuple[str, ...]:
        return self._parsed_list(key, _plain_text)

    def identifier(self, key: str, default: str | None = None) -> str:
        """A cluster, node or zone id, by the rules of `check_node_id`."""

        def parse(value: object) -> str:
            if value == default == "":
                return ""
            try:
                return check_node_id(_plain_text(value))
            except NameRefused as error:
                raise ValueError(error.message.removeprefix("node id ")) from error

        return self._parsed(key, default, parse, "unset")

    def name_prefix(self, key: str) -> str:
        """The leading segments of checkpoint names, or "" when absent or empty."""

        def parse(value: object) -> str:
            if value == "":
                return ""
            try:
                return check_name(_plain_text(value))
            except NameRefused as error:
                raise ValueError(error.message) from error

        return self._parsed(key, "", parse, "")

    def flag(self, key: str, default: bool) -> bool:
        def parse(value: object) -> bool:
            if not isinstance(value, bool):
                raise ValueError(f"must be true or false, not {_kind(value)}")
            return value

        return self._parsed(key, default, parse, default)

    def whole(self, key: str, default: int, low: int, high: int) -> int:
        return self._parsed(key, default, lambda value: _whole(value, low, high), default)

    def optional_whole(self, key: str, low: int, high: int) -> int | None:
        self._asked.add(key)
        return self.whole(key, low, low, high) if self.has(key) else None

    def choice(self, key: str, default: C | None, allowed: tuple[C, ...]) -> C:
        return self._parsed(key, default, lambda value: _choice(value, allowed), allowed[0])

    def choices(self, key: str, allowed: tuple[C, ...]) -> tuple[C, ...]:
        """At least one of `allowed`, each at most once."""
        chosen = self._parsed_list(key, lambda value: _choice(value, allowed))
        if not chosen and not self._values.get(key) and self._is_map:
            self.fault(key, f"missing: name at least one of {', '.join(allowed)}")
        elif len(set(chosen)) < len(chosen):
            self.fault(key, "names one twice")
        return chosen

    def size(self, key: str, default: int, low: int, high: int) -> int:
        """Bytes, written `32MiB`."""

        def parse(value: object) -> int:
            return _within(parse_size(_plain_text(value)), low, high, format_size)

        return self._parsed(key, default, parse, default)

    def rate(self, key: str, default: int, low: int, high: int) -> int:
        """Bytes per second, written `20MB/s`."""

        def parse(value: object) -> int:
            return _within(parse_rate(_plain_text(value)), low, high, format_rate)

        return self._parsed(key, default, parse, default)

    def share_or_size(self, key: str, default: tuple[float, int]) -> tuple[float, int]:
        """(percent, 0) when written `5%`, (0, bytes) when written `2GiB`."""

        def parse(value: object) -> tuple[float, int]:
            text = _plain_text(value)
            if not text.endswith("%"):
                return 0.0, parse_size(text)
            percent = parse_percent(text)
            if percent > 90:
                raise ValueError("more than 90% leaves no room for checkpoints")
            return percent, 0

        return self._parsed(key, default, parse, default)

    def duration(self, key: str, default: float, low: float, high: float) -> float:
        """Seconds, written `10m`."""

        def parse(value: object) -> float:
            return _within(parse_duration(_plain_text(value)), low, high, format_duration)

        return self._parsed(key, default, parse, default)

    def optional_duration(self, key: str, low: float, high: float) -> float | None:
        self._asked.add(key)
        return self.duration(key, low, low, high) if self.has(key) else None

    def address(self, key: str, default: Address, *, any_port: bool = False) -> Address:
        """`HOST:PORT`; port 0 (any free one) only with `any_port`."""
        return self._parsed(key, default, lambda value: _address(value, any_port), default)

    def addresses(self, key: str) -> tuple[Address, ...]:
        return self._parsed_list(key, lambda value: _address(value, any_port=False))

    def absolute_path(self, key: str) -> Path:
        """A path that is absolute after a leading `~` was replaced by `home`. Must be there."""

        def parse(value: object) -> Path:
            text = _plain_text(value)
            if text == "~" or text.startswith("~/"):
                text = str(self.home) + text[1:]
            path = PurePosixPath(text)
            if not path.is_absolute():
                raise ValueError(f"{text!r} is not an absolute path")
            if ".." in path.parts:
                raise ValueError(f"{text!r}: write the path without ..")
            return Path(path)

        return self._parsed(key, None, parse, Path("/"))

    def _dotted(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path and key else self._path or key

    def _items(self, key: str) -> list[tuple[str, object]]:
        self._asked.add(key)
        value = self._values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.fault(key, f"must be a list, not {_kind(value)}")
            return []
        if len(value) > CONFIG_LIST_MAX:
            self.fault(key, f"has {len(value)} items, at most {CONFIG_LIST_MAX} are taken")
            return []
        return [(f"{self._dotted(key)}[{index}]", item) for index, item in enumerate(value)]

    def _parsed(
        self, key: str, default: T | None, parse: Callable[[object], T], after_fault: T
    ) -> T:
        self._asked.add(key)
        value = self._values.get(key, _MISSING)
        if value is _MISSING:
            if default is None and self._is_map:
                self.fault(key, "missing")
            return after_fault if default is None else default
        try:
            return parse(value)
        except ValueError as error:
            self.fault(key, str(error))
            return after_fault

    def _parsed_list(self, key: str, parse: Callable[[object], T]) -> tuple[T, ...]:
        parsed = []
        for path, value in self._items(key):
            try:
                parsed.append(parse(value))
            except ValueError as error:
                self._errors.append(ConfigError(path, str(error)))
        return tuple(parsed)


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    kinds = {dict: "a map", list: "a list", bool: "true or false", str: "text"}
    return kinds.get(type(value), f"the {type(value).__name__} {str(value)[:40]}")


def _plain_text(value: object) -> str:
    if isinstance(value, dict | list) or value is None:
        raise ValueError(f"must be text, not {_kind(value)}")
    if not isinstance(value, str):
        raise ValueError(f'must be text, not {_kind(value)}: quote it or add its unit ("…")')
    if not value:
        raise ValueError("is empty")
    if len(value) > CONFIG_TEXT_MAX:
        raise ValueError(f"is longer than {CONFIG_TEXT_MAX} characters")
    if not value.isprintable():
        raise ValueError("holds control characters")
    return value


def _whole(value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be a whole number, not {_kind(value)}")
    return _within(value, low, high, str)


def _choice(value: object, allowed: tuple[C, ...]) -> C:
    for word in allowed:
        if value == word:
            return word
    raise ValueError(f"must be {' or '.join(allowed)}, not {str(value)[:40]!r}")


def _address(value: object, any_port: bool) -> Address:
    address = parse_address(_plain_text(value))
    if address.port == 0 and not any_port:
        raise ValueError(f"{address}: port 0 cannot be connected to")
    return address


def _within(value: N, low: N, high: N, written: Callable[[N], str]) -> N:
    if not low <= value <= high:
        raise ValueError(
            f"{written(value)} is out of range: {written(low)} to {written(high)} are taken"
        )
    return value
