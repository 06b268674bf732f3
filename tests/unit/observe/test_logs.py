"""What a log line looks like for a service manager and for a person."""

import ast
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog

from ckptd.errors import ConfigError
from ckptd.observe import logs

PEM = "-----BEGIN PRIVATE KEY-----\nSECRET\n-----END PRIVATE KEY-----"
SOURCE = Path(__file__).parents[3] / "src" / "ckptd"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_a_utc_time() -> None:
    stream = io.StringIO()
    log = structlog.get_logger("ckptd.node")  # made before the set-up, as at import
    logs.configure("info", stream)
    log.info("node_started", node="pi1", shards=3)
    [line] = lines(stream)
    assert abs(datetime.fromisoformat(line.pop("timestamp")) - datetime.now(UTC)).seconds < 60
    assert line == {
        "event": "node_started",
        "level": "info",
        "logger": "ckptd.node",
        "node": "pi1",
        "shards": 3,
    }


def test_lines_below_the_level_are_dropped_and_the_level_can_change() -> None:
    stream = io.StringIO()
    log = structlog.get_logger("ckptd")
    logs.configure("warning", stream)
    log.info("hidden")
    logging.getLogger("asyncio").info("hidden too")
    logs.configure("debug", stream)
    log.debug("shown")
    logs.configure("error", stream)
    log.warning("hidden")
    assert [line["event"] for line in lines(stream)] == ["shown"]


def test_an_unknown_level_is_refused_with_its_key() -> None:
    with pytest.raises(ConfigError) as caught:
        logs.configure("loud", io.StringIO())
    assert caught.value.key == "observe.log_level"


def test_libraries_and_warnings_come_out_alike() -> None:
    stream = io.StringIO()
    logs.configure("info", stream)
    logging.getLogger("asyncio").error("task %s was slow", "x")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old call", DeprecationWarning, stacklevel=1)
    library, warning = lines(stream)
    assert library["event"] == warning["event"] == "library_log"
    assert (library["message"], library["logger"]) == ("task x was slow", "asyncio")
    assert "old call" in warning["message"]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["json", "terminal"])
def test_exceptions_are_in_the_line_with_their_cause(stream: io.StringIO) -> None:
    logs.configure("info", stream)
    try:
        try:
            raise OSError("disk gone")
        except OSError as error:
            raise ConfigError("store.path", "unusable") from error
    except ConfigError:
        structlog.get_logger("ckptd").exception("part_failed")
    assert "disk gone" in stream.getvalue()
    assert "store.path: unusable" in stream.getvalue()


@pytest.mark.parametrize("stream_type", [io.StringIO, Terminal])
def test_secrets_never_reach_the_stream(stream_type: type[io.StringIO]) -> None:
    stream = stream_type()
    logs.configure("debug", stream)
    structlog.get_logger("ckptd").info(
        "config_read",
        key="tls.key",
        recovery_code="SECRET",
        tls={"private_key": "SECRET", "cert": "/etc/cert", "deep": [{"password": "SECRET"}]},
        text=f"found {PEM} here",
        cut="-----BEGIN EC PRIVATE KEY-----\nSECRET",
        raw=b"SECRET",
        nested=[[[[[PEM]]]]],
    )
    logging.getLogger("lib").warning("key: %s", PEM)
    assert "SECRET" not in stream.getvalue()
    assert "tls.key" in stream.getvalue()
    assert "/etc/cert" in stream.getvalue()
    assert "found (redacted) here" in stream.getvalue()


def test_a_secret_in_the_text_of_an_exception_is_hidden_too() -> None:
    stream = io.StringIO()
    logs.configure("debug", stream)
    try:
        raise ValueError(PEM)
    except ValueError as error:
        structlog.get_logger("ckptd").error("part_failed", exc_info=error)
    [line] = lines(stream)
    assert "ValueError: (redacted)" in line["exception"]
    assert "SECRET" not in stream.getvalue()


@pytest.mark.parametrize("stream_type", [io.StringIO, Terminal])
def test_names_from_elsewhere_cannot_write_lines_or_steer_the_terminal(
    stream_type: type[io.StringIO],
) -> None:
    stream = stream_type()
    logs.configure("info", stream)
    hostile = 'a\x1b[2J\x07\nevent="faked"\x9b\u202e'
    structlog.get_logger("ckptd").info("file_refused", path=hostile, paths=[hostile])
    text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())  # colours are ours
    assert text.count("\n") == 1
    assert not set(text) & {"\x1b", "\x07", "\x9b"}


def test_a_terminal_gets_text() -> None:
    stream = Terminal()
    logs.configure("info", stream)
    structlog.get_logger("ckptd").info("node_started", node="pi1", shards=3, zone=None)
    text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert "node_started" in text
    assert "node=pi1" in text
    assert "shards=3" in text


def test_handlers_of_others_stay_and_ours_is_replaced() -> None:
    own = logging.NullHandler()
    logging.getLogger().addHandler(own)
    first, second = io.StringIO(), io.StringIO()
    logs.configure("info", first)
    logs.configure("info", second)
    structlog.get_logger("ckptd").info("once")
    assert first.getvalue() == ""
    assert len(lines(second)) == 1
    assert own in logging.getLogger().handlers


def log_calls(tree: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in {"debug", "info", "warning", "error", "exception", "critical"}
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in {"log", "_log", "logger", "_logger"}
        ):
            yield node


def test_every_event_is_a_constant_in_snake_case() -> None:
    seen = 0
    for path in sorted(SOURCE.rglob("*.py")):
        for call in log_calls(ast.parse(path.read_text())):
            seen += 1
            where = f"{path.relative_to(SOURCE)}:{call.lineno}"
            event = call.args[0] if len(call.args) == 1 else None
            assert isinstance(event, ast.Constant), f"{where}: the event is not a constant"
            assert re.fullmatch(r"[a-z]+(_[a-z]+)*", str(event.value)), f"{where}: {event.value!r}"
    assert seen > 5
