"""How far the newest checkpoint is ahead."""

from __future__ import annotations

from ckptd.coordinator.survey import unprotected_steps
from ckptd.core.catalogue import Catalogue
from ckptd.core.headers import VersionHeader


def catalogue(*versions: tuple[str, int | None]) -> Catalogue:
    known = Catalogue("home")
    for number, (name, step) in enumerate(versions):
        known.add_unverified(
            VersionHeader(
                id=f"{number:064x}",
                kind="manifest",
                order=number,
                created="2026-01-02T03:04:05Z",
                name=name,
                content_id="b" * 64,
                size=1,
                files=1,
                shards=1,
                copies=2,
                step=step,
                metrics={},
            )
        )
    return known


def test_steps_are_counted_from_the_newest_version_of_the_run() -> None:
    known = catalogue(("run/step-100", 100), ("run/step-300", 300), ("run/odd", None))
    assert unprotected_steps(known, []) == 0
    assert unprotected_steps(known, [("run/step-500", 500)]) == 200
    assert unprotected_steps(known, [("run/step-400", 400), ("run/step-500", 500)]) == 200
    assert unprotected_steps(known, [("run/step-200", 200)]) == 0
    assert unprotected_steps(known, [("other/step-7", 7), ("run/step-500", 500)]) == 200
    assert unprotected_steps(known, [("run/latest", None)]) is None
