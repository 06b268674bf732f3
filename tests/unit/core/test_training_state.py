"""Step and metrics, from everything that trainers write."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.layouts import trainer_state

from ckptd.core import limits
from ckptd.core.checkpoint_units import Entry, Kind, Members, Unit
from ckptd.core.training_state import (
    BEST_PREFIX,
    NOT_FINITE,
    TrainingState,
    best_of,
    is_finite,
    shown_metrics,
    sources,
    training_state,
)

UNIT = Unit("run/final", "run/final", "directory")
STEP_UNIT = Unit("run/step-30", "run/step-30", "directory")


def state(value: object) -> bytes:
    return json.dumps(value).encode()


def test_a_trainers_state_gives_the_step_and_what_was_logged_last() -> None:
    found = training_state(UNIT, trainer_state=trainer_state(40))
    assert found == TrainingState(
        40,
        {
            "epoch": 1.0,
            "grad_norm": 1.25,
            "learning_rate": 5e-5,
            "loss": 0.5,
            "eval_loss": 0.4,
            "eval_accuracy": 0.75,
        },
    )


def test_the_first_source_that_knows_the_step_counts() -> None:
    texts = [{"step": "3", "global_step": "x"}]
    metrics = state({"step": 4})
    trainer = state({"global_step": 1})
    assert training_state(STEP_UNIT, trainer_state=trainer, texts=texts, metrics=metrics).step == 1
    assert training_state(STEP_UNIT, texts=texts, metrics=metrics).step == 30
    assert training_state(UNIT, texts=texts, metrics=metrics).step == 3
    assert training_state(UNIT, metrics=metrics).step == 4
    assert training_state(UNIT).step is None
    file = Unit("step_8.safetensors", "x", "file")
    assert training_state(file).step == 8
    assert training_state(Unit("", "mine/step-9", "directory")).step == 9


@pytest.mark.parametrize("step", [-1, True, "x", 1.5, None, 2**63, [1]])
def test_a_step_that_is_none_is_passed_over(step: object) -> None:
    raw = state({"global_step": step})
    assert training_state(UNIT, trainer_state=raw).step is None
    assert training_state(UNIT, metrics=raw).step is None


@pytest.mark.parametrize(("key", "value"), [("iteration", 7), ("iter", 7.0), ("step", "7")])
def test_steps_have_several_names_and_forms(key: str, value: object) -> None:
    assert training_state(UNIT, metrics=state({key: value})).step == 7


def test_what_was_logged_after_the_checkpoint_does_not_count() -> None:
    history = [{"loss": 1.0, "step": 5}, {"loss": 9.0, "step": 6}, {"bleu": 3}]
    raw = state({"global_step": 5, "log_history": history})
    assert training_state(UNIT, trainer_state=raw).metrics == {"loss": 1.0, "bleu": 3.0}
    without = state({"log_history": history})
    assert training_state(UNIT, trainer_state=without).metrics == {"loss": 9.0, "bleu": 3.0}


def test_metrics_come_from_all_sources_and_the_trainer_wins() -> None:
    found = training_state(
        UNIT,
        trainer_state=state({"log_history": [{"loss": 1.0}]}),
        metrics=state({"loss": 2.0, "eval": {"f1": 0.5, "name": "x"}, "fine": True, "text": "y"}),
        texts=[{"loss": "3", "ppl": "4.5", "format": "pt", "step": "1"}, {"ppl": "6", "more": "1"}],
    )
    assert found.metrics == {"loss": 1.0, "eval/f1": 0.5, "ppl": 4.5, "more": 1.0}


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"3", b"[" * 100_000])
def test_what_cannot_be_read_tells_nothing(raw: bytes) -> None:
    assert training_state(UNIT, trainer_state=raw, metrics=raw) == TrainingState()


@pytest.mark.parametrize("history", [None, {}, [1, "x", None], [{"loss": "x"}]])
def test_a_history_of_another_form_tells_nothing(history: object) -> None:
    raw = state({"log_history": history, "best_metric": 1.0})
    assert training_state(UNIT, trainer_state=raw).metrics == {}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_marked_and_not_recorded(loss: float) -> None:
    found = training_state(UNIT, trainer_state=trainer_state(4, loss=loss))
    assert found.metrics[NOT_FINITE] == 1.0
    assert "loss" not in found.metrics
    assert not is_finite(found.metrics)
    assert NOT_FINITE not in shown_metrics(found.metrics)


@pytest.mark.parametrize(
    ("name", "marked"),
    [("loss", True), ("eval_loss", True), ("val/loss", True), ("loss/train", True),
     ("nll-loss", True), ("grad_norm", False), ("loss_scale", False), ("glossy", False)],
)  # fmt: skip
def test_only_losses_mark(name: str, marked: bool) -> None:
    found = training_state(UNIT, metrics=state({name: math.inf, "ok": 1}))
    assert is_finite(found.metrics) is not marked
    assert shown_metrics(found.metrics) == {"ok": 1.0}


def test_a_loss_that_became_a_number_again_does_not_mark() -> None:
    history = [{"loss": math.nan, "step": 1}, {"loss": 1.0, "step": 2}]
    raw = state({"log_history": history})
    assert is_finite(training_state(UNIT, trainer_state=raw).metrics)


def test_a_number_too_large_is_infinite() -> None:
    assert not is_finite(training_state(UNIT, metrics=b'{"loss": 1' + b"0" * 400 + b"}").metrics)
    assert not is_finite(training_state(UNIT, texts=[{"loss": "nan"}]).metrics)


def test_reserved_and_odd_names_are_not_recorded() -> None:
    metrics = {NOT_FINITE: 1, BEST_PREFIX + "x": 1, "": 1, "a\n": 1, "m" * 257: 1, "m" * 256: 1}
    assert set(training_state(UNIT, metrics=state(metrics)).metrics) == {"m" * 256}


def test_of_too_many_metrics_those_of_evaluations_are_kept() -> None:
    metrics = {f"m{number:04}": number for number in range(400)} | {"eval_loss": 1, "z": 1}
    found = training_state(UNIT, metrics=state(metrics)).metrics
    assert len(found) == limits.METRICS_MAX
    assert "eval_loss" in found
    assert "z" not in found


# -- the best


def trained(best: object, values: list[float], **more: object) -> dict[str, float]:
    history = [{"eval_x": value, "other": -value, "step": n} for n, value in enumerate(values)]
    raw = state({"best_metric": best, "log_history": history, **more})
    return training_state(UNIT, trainer_state=raw).metrics


def test_the_trainers_own_best_is_recognised_by_its_value() -> None:
    assert best_of(trained(1.0, [1.0, 2.0])) == ("eval_x", "min")
    assert best_of(trained(2.0, [1.0, 2.0])) == ("eval_x", "max")
    assert best_of(trained(-2.0, [1.0, 2.0])) == ("other", "min")
    assert best_of(trained(1.0, [1.0])) == ("eval_x", "max")
    single = state({"best_metric": 3.0, "log_history": [{"eval_loss": 3.0}]})
    assert best_of(training_state(UNIT, trainer_state=single).metrics) == ("eval_loss", "min")


@pytest.mark.parametrize("best", [None, 7.0, "x", True, math.nan])
def test_without_a_known_best_none_is_recorded(best: object) -> None:
    assert best_of(trained(best, [1.0, 2.0])) is None


def test_what_the_trainer_says_of_its_best_counts() -> None:
    assert best_of(trained(1.0, [1.0, 2.0], greater_is_better=True)) == ("eval_x", "max")
    assert best_of(trained(1.0, [1.0, 2.0], greater_is_better=False)) == ("eval_x", "min")
    assert best_of(trained(1.0, [1.0], metric_for_best_model="x")) == ("eval_x", "max")
    assert best_of(trained(1.0, [1.0], metric_for_best_model="y")) is None


def test_values_that_are_no_numbers_do_not_decide_the_direction() -> None:
    assert best_of(trained(1.0, [1.0, math.inf, 2.0])) == ("eval_x", "min")


def test_a_best_metric_with_too_long_a_name_is_not_recorded() -> None:
    name = "eval_" + "m" * 245
    raw = state({"best_metric": 1.0, "log_history": [{name: 1.0}]})
    found = training_state(UNIT, trainer_state=raw).metrics
    assert found == {name: 1.0}


# -- where to look


def test_the_sources_are_files_directly_in_the_checkpoint() -> None:
    entries = {
        "trainer_state.json": Entry(Kind.FILE, 9),
        "metrics.json": Entry(Kind.FILE, limits.TRAINING_STATE_MAX_BYTES + 1),
        "sub/metrics.json": Entry(Kind.FILE, 9),
        "x.json": Entry(Kind.FILE, 9),
        "d.safetensors": Entry(Kind.DIRECTORY),
        **{f"{number:02}.safetensors": Entry(Kind.FILE, 9) for number in range(12)},
    }
    found = sources(Members(entries))
    assert found[0] == "trainer_state.json"
    assert found[1:] == [f"{number:02}.safetensors" for number in range(8)]


@given(
    st.dictionaries(
        st.text(max_size=5) | st.sampled_from(["log_history", "global_step", "best_metric"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            ),
        ),
        max_size=5,
    )
)
def test_whatever_is_written_what_is_recorded_is_finite(value: dict[str, object]) -> None:
    raw = state(value)
    found = training_state(UNIT, trainer_state=raw, metrics=raw)
    assert all(math.isfinite(number) for number in found.metrics.values())
    assert found.step is None or 0 <= found.step <= 2**62
