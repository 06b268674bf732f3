"""Log lines: constant snake_case events with fields, from ckptd and from its libraries alike.

`structlog.get_logger()` gives a logger anywhere; `configure` decides once per process what becomes
of its lines: one JSON object a line for a service manager, coloured key=value for a person.

    {"event": "node_started", "level": "info", "logger": "ckptd.node", "timestamp": "…Z", …}

Lines of libraries that use `logging` have the event `library_log`, their text in `message`.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Final, TextIO

import structlog
from structlog.types import EventDict, Processor

from ckptd.errors import ConfigError

LEVELS: Final = ("debug", "info", "warning", "error")
LIBRARY_EVENT: Final = "library_log"
REDACTED: Final = "(redacted)"

# The ends of field names. Bare `key` stays readable: it is how errors name a key of the config.
_SECRET_FIELD: Final = re.compile(
    r"(?:^|_)(?:private_key|password|passphrase|secret|token|authorization|recovery_code)$"
)
_PRIVATE_KEY: Final = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)
_DEPTH_MAX: Final = 4


def configure(level: str, stream: TextIO | None = None) -> None:
    """Send all log lines of this process at `level` and above to `stream` (default: stderr).

    JSON when `stream` is not a terminal, else text for people. May be called again, to change the
    level or the stream; handlers that others added stay. Raises ConfigError for an unknown level.
    """
    if level not in LEVELS:
        raise ConfigError(
            "observe.log_level", f"{level!r} is not a level; one of {', '.join(LEVELS)}"
        )
    target = sys.stderr if stream is None else stream
    handler = _Handler(target)
    handler.setFormatter(_formatter(terminal=target.isatty()))
    root = logging.getLogger()
    for old in [each for each in root.handlers if isinstance(each, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            *_COMMON,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        # Loggers made before this call, at import, must follow it.
        cache_logger_on_first_use=False,
    )


class _Handler(logging.StreamHandler[TextIO]):
    """Our own handler, told apart from those of an embedding program or of pytest."""


def _formatter(*, terminal: bool) -> logging.Formatter:
    last: list[Processor]
    if terminal:
        plain = structlog.dev.plain_traceback  # by then an exception is text already
        last = [_escape_control, structlog.dev.ConsoleRenderer(exception_formatter=plain)]
    else:
        last = [structlog.processors.JSONRenderer(default=str, sort_keys=True)]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*_COMMON, _name_library_event],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            _redact,
            *last,
        ],
    )


_COMMON: Final[list[Processor]] = [
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.stdlib.PositionalArgumentsFormatter(),
]


def _name_library_event(
    _logger: Any, _method: str, event_dict: EventDict
) -> MutableMapping[str, Any]:
    event_dict["message"] = event_dict["event"]
    event_dict["event"] = LIBRARY_EVENT
    return event_dict


def _redact(_logger: Any, _method: str, event_dict: EventDict) -> MutableMapping[str, Any]:
    """The last line of defence: callers do not log secrets in the first place."""
    return {field: _without_secrets(field, value) for field, value in event_dict.items()}


def _without_secrets(field: str, value: Any, depth: int = 0) -> Any:
    if _SECRET_FIELD.search(field.lower()):
        return REDACTED
    if isinstance(value, bytes | bytearray | memoryview):
        # Bytes are payload, digests or keys; a log line needs none of them.
        return f"({len(value)} bytes)"
    if isinstance(value, str):
        return _PRIVATE_KEY.sub(REDACTED, value)
    if depth >= _DEPTH_MAX:
        return _PRIVATE_KEY.sub(REDACTED, str(value))
    if isinstance(value, dict):
        return {
            str(name): _without_secrets(str(name), inner, depth + 1)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_without_secrets("", inner, depth + 1) for inner in value]
    return value


def _escape_control(_logger: Any, _method: str, event_dict: EventDict) -> MutableMapping[str, Any]:
    """File names and messages of peers must not move the cursor of somebody's terminal."""
    return {
        field: _printable(value, lines=field == "exception") for field, value in event_dict.items()
    }


def _printable(value: Any, *, lines: bool) -> Any:
    if isinstance(value, bool | int | float) or value is None:
        return value
    text = value if isinstance(value, str) else repr(value)
    return "".join(
        char
        if char.isprintable() or (lines and char == "\n")
        else char.encode("unicode_escape").decode()
        for char in text
    )
