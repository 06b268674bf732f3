"""Step and metrics of a checkpoint, from what the trainer wrote beside the weights.

Sources, the first that knows counts: `trainer_state.json` (Hugging Face Trainer), the step in the
checkpoint's name, the metadata of safetensors files, `metrics.json`.

Manifests record finite numbers only. What else must be known of a version stands among its metrics
under names that begin with `ckptd:`, which no trainer's metric may have:

- `ckptd:not-finite` = 1: its last loss is NaN or infinite. It is never @best or @latest.
- `ckptd:best:METRIC` = 1 or -1: the trainer itself looks for the largest or smallest METRIC.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from msgspec import Struct

from ckptd.core import limits
from ckptd.core.checkpoint_units import Members, Unit, step_of

TRAINER_STATE: Final = "trainer_state.json"
METRICS_FILE: Final = "metrics.json"
RESERVED_PREFIX: Final = "ckptd:"
NOT_FINITE: Final = "ckptd:not-finite"
BEST_PREFIX: Final = "ckptd:best:"
_STEP_KEYS: Final = ("global_step", "step", "iteration", "iter")
_STEP_MAX: Final = 2**62
_SAFETENSORS_READ_MAX: Final = 8


class TrainingState(Struct, frozen=True):
    """What a manifest records. `step` is None when nothing tells; `metrics` are finite, and include
    those under reserved names."""

    step: int | None = None
    metrics: dict[str, float] = {}


def sources(members: Members) -> list[str]:
    """The files directly in a checkpoint that may tell, besides its name: JSON files to be read
    whole (no longer than `limits.TRAINING_STATE_MAX_BYTES`) and safetensors headers."""
    found = []
    for path, entry in members.entries.items():
        if "/" in path or not entry.is_file:
            continue
        if path in (TRAINER_STATE, METRICS_FILE):
            if entry.size <= limits.TRAINING_STATE_MAX_BYTES:
                found.append(path)
        elif path.endswith(".safetensors"):
            found.append(path)
    tensors = [path for path in found if path.endswith(".safetensors")]
    return [path for path in found if path not in tensors[_SAFETENSORS_READ_MAX:]]


def training_state(
    unit: Unit,
    *,
    trainer_state: bytes | None = None,
    metrics: bytes | None = None,
    texts: Iterable[Mapping[str, str]] = (),
) -> TrainingState:
    """Reads the bytes of the two JSON files (None when they are not there) and the metadata of
    safetensors files. What cannot be read tells nothing; it never keeps a checkpoint from being
    stored."""
    trainer = _object(trainer_state)
    written = _object(metrics)
    merged: dict[str, str] = {}
    for text in texts:
        merged = {**text, **merged}
    steps = (
        _whole(trainer.get("global_step")),
        _step_in_name(unit),
        _first_step(merged),
        _first_step(written),
    )
    numbers = _flat(written) | _from_texts(merged) | _last_logged(trainer)
    return TrainingState(
        next((step for step in steps if step is not None), None),
        _recorded(numbers, _best(trainer)),
    )


def is_finite(metrics: Mapping[str, float]) -> bool:
    """Whether the loss that a version was stored with was a number."""
    return not metrics.get(NOT_FINITE)


def shown_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of the trainer alone, without reserved names."""
    return {name: value for name, value in metrics.items() if not _is_reserved(name)}


def best_of(metrics: Mapping[str, float]) -> tuple[str, Literal["min", "max"]] | None:
    """The metric that the trainer itself looks for, and its better end."""
    for name, value in sorted(metrics.items()):
        if name.startswith(BEST_PREFIX):
            return name.removeprefix(BEST_PREFIX), "max" if value > 0 else "min"
    return None


def _is_reserved(name: str) -> bool:
    return name.startswith(RESERVED_PREFIX)


def _recorded(numbers: dict[str, float], best: tuple[str, float] | None) -> dict[str, float]:
    """At most `limits.METRICS_MAX`: the reserved ones, then those that decide most often."""
    recorded: dict[str, float] = {}
    if any(_is_loss(name) and not math.isfinite(value) for name, value in numbers.items()):
        recorded[NOT_FINITE] = 1.0
    if best is not None and len(BEST_PREFIX + best[0]) <= limits.METRIC_NAME_MAX_CHARACTERS:
        recorded[BEST_PREFIX + best[0]] = best[1]
    names = sorted(numbers, key=lambda name: (not name.startswith("eval"), name))
    for name in names:
        if len(recorded) == limits.METRICS_MAX:
            break
        if math.isfinite(numbers[name]) and _is_metric_name(name):
            recorded[name] = numbers[name]
    return recorded


def _is_loss(name: str) -> bool:
    parts = name.replace("-", "_").replace(".", "_").split("/")
    return parts[0] == "loss" or parts[-1].split("_")[-1] == "loss"


def _is_metric_name(name: str) -> bool:
    short = 0 < len(name) <= limits.METRIC_NAME_MAX_CHARACTERS
    return short and not _is_reserved(name) and name.isprintable()


def _object(raw: bytes | None) -> dict[str, Any]:
    """A JSON object; NaN and Infinity are read as Python writes them. {} for anything else."""
    try:
        value = json.loads(raw or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _whole(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value <= _STEP_MAX else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _step_in_name(unit: Unit) -> int | None:
    name = unit.path or unit.name
    return step_of(name.rpartition(".")[0] if unit.kind == "file" else name)


def _first_step(values: Mapping[str, object]) -> int | None:
    for key in _STEP_KEYS:
        value = values.get(key)
        if isinstance(value, str):
            value = int(value) if value.isdecimal() and len(value) < 20 else None
        if (step := _whole(value)) is not None:
            return step
    return None


def _flat(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an object and, as OUTER/INNER, of objects in it."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        inner = value if isinstance(value, dict) else {}
        for key, part in [(name, value), *((f"{name}/{key}", inner[key]) for key in inner)]:
            number = _number(part)
            if number is not None and key not in _STEP_KEYS:
                numbers[key] = number
    return numbers


def _from_texts(texts: Mapping[str, str]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, text in texts.items():
        try:
            number = float(text)
        except ValueError:
            continue
        if name not in _STEP_KEYS:
            numbers[name] = number
    return numbers


def _history(trainer: Mapping[str, Any]) -> list[dict[str, Any]]:
    history = trainer.get("log_history")
    rows = history if isinstance(history, list) else []
    return [row for row in rows if isinstance(row, dict)]


def _last_logged(trainer: Mapping[str, Any]) -> dict[str, float]:
    """Of each metric the value that was logged last, up to the step of the checkpoint."""
    until = _whole(trainer.get("global_step"))
    last: dict[str, float] = {}
    for row in _history(trainer):
        step = _whole(row.get("step"))
        if until is None or step is None or step <= until:
            last |= _flat(row)
    return last


def _best(trainer: Mapping[str, Any]) -> tuple[str, float] | None:
    """The metric of the trainer's `best_metric`, and 1 or -1 for the direction.

    Hugging Face records only its value: the metric is the one that had this value at some step, and
    it is the largest or the smallest of all then. With a single evaluation, a loss is to be small
    and anything else large.
    """
    value = _number(trainer.get("best_metric"))
    if value is None or not math.isfinite(value):
        return None
    series: dict[str, list[float]] = {}
    for row in _history(trainer):
        for name, number in _flat(row).items():
            series.setdefault(name, []).append(number)
    named = trainer.get("metric_for_best_model")
    wanted = {named, f"eval_{named}"} if isinstance(named, str) else None
    for name in sorted(series, key=lambda name: (not name.startswith("eval_"), name)):
        if value not in series[name] or (wanted is not None and name not in wanted):
            continue
        return name, _direction(trainer.get("greater_is_better"), name, value, series[name])
    return None


def _direction(greater: object, name: str, value: float, values: list[float]) -> float:
    if isinstance(greater, bool):
        return 1.0 if greater else -1.0
    finite = [number for number in values if math.isfinite(number)]
    if min(finite) == max(finite):
        return -1.0 if _is_loss(name) else 1.0
    return 1.0 if value == max(finite) else -1.0
