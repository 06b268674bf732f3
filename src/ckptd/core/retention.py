"""Which versions a policy drops and which it keeps, with the reasons: a pure function of versions,
rules, what is protected, pins and the time.

What never happens, whatever the rules say: a version goes without a newer one of its run that is
protected and stays; a version that is not protected takes the place of one that is; a version with
a loss that is no number takes the place of one with a loss that is. docs/retention.md explains it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime
from typing import Final, Literal

import msgspec
from msgspec import Struct

from ckptd.core import limits
from ckptd.core.headers import VersionHeader, age_of
from ckptd.core.training_state import is_finite

BestMode = Literal["min", "max"]


class KeepBest(Struct, frozen=True):
    """The metric that decides, and which end of it is the better one."""

    metric: str
    mode: BestMode


class RetentionRule(Struct, frozen=True):
    """What to keep of the runs that match `runs`; None means that the rule says nothing of it."""

    runs: str = "*"
    keep_last: int | None = None
    keep_every_steps: int | None = None
    keep_every_s: float | None = msgspec.field(default=None, name="keep_every")
    keep_within_s: float | None = msgspec.field(default=None, name="keep_within")
    keep_best: KeepBest | None = None


class Kept(Struct, frozen=True):
    """A version that stays, and why."""

    version: VersionHeader
    reason: str


class Dropped(Struct, frozen=True):
    """A version that goes, and why. `justified_by` is the id of the version that makes it
    superfluous: it stays, is protected, and is of the same run."""

    version: VersionHeader
    reason: str
    justified_by: str


class Plan(Struct, frozen=True):
    """What becomes of each live version; both newest first."""

    delete: tuple[Dropped, ...]
    keep: tuple[Kept, ...]

    def is_large(self, seen: Collection[str] | None) -> bool:
        """Whether somebody must confirm it: it drops more than half of the live versions.

        `seen` are the ids that were live when the same rules were last applied here, None if they
        never were. What came since then may go again without a question, so that a checkpoint that
        is overwritten faster than rules are applied does not stop them.
        """
        live = len(self.delete) + len(self.keep)
        if 2 * len(self.delete) <= live:
            return False
        if seen is None:
            return True
        ids = [each.version.id for each in self.delete]
        ids += [each.version.id for each in self.keep]
        return len(self.delete) > sum(version_id not in seen for version_id in ids)


class Batch(Struct, frozen=True):
    """The content of one retention tombstone."""

    justified_by: str
    versions: tuple[VersionHeader, ...]


def plan(
    versions: Iterable[VersionHeader],
    rules: Sequence[RetentionRule],
    *,
    protected: Collection[str],
    pinned: Collection[str],
    now_s: float,
) -> Plan:
    """What the rules drop and keep of the live `versions`.

    The first rule whose pattern fits a run decides. `protected` are ids of versions that their
    holders have just confirmed to be; `pinned` those that a pin names; `now_s` is the wall clock in
    seconds since the epoch (`prudent_now_s`).
    """
    runs: dict[str, list[VersionHeader]] = {}
    for version in sorted(versions, key=age_of, reverse=True):
        runs.setdefault(version.run, []).append(version)
    dropped: list[Dropped] = []
    kept: list[Kept] = []
    for run, members in runs.items():
        rule = next((rule for rule in rules if fnmatch.fnmatchcase(run, rule.runs)), None)
        if rule is None:
            kept += [Kept(version, "no rule is for its run") for version in members]
            continue
        reasons = _Run(rule, members, protected, pinned, now_s).reasons()
        justifying = _justifying(members, protected)
        for version in members:
            if why := reasons[version.id]:
                kept.append(Kept(version, "; ".join(why)))
            else:
                justified_by = justifying(version)
                assert justified_by is not None, "what nothing justifies has a reason to stay"
                dropped.append(Dropped(version, _why_dropped(version, rule), justified_by.id))
    return Plan(
        tuple(sorted(dropped, key=lambda each: age_of(each.version), reverse=True)),
        tuple(sorted(kept, key=lambda each: age_of(each.version), reverse=True)),
    )


def batches(dropped: Iterable[Dropped]) -> list[Batch]:
    """The tombstones that drop these versions: one for each that justifies some, or several when
    they are too many for one."""
    by: dict[str, list[VersionHeader]] = {}
    for each in dropped:
        by.setdefault(each.justified_by, []).append(each.version)
    size = limits.TOMBSTONE_VERSIONS_MAX
    return [
        Batch(justified_by, tuple(versions[start : start + size]))
        for justified_by, versions in sorted(by.items())
        for start in range(0, len(versions), size)
    ]


def unjustified(
    dead: Iterable[VersionHeader],
    live: Iterable[VersionHeader],
    *,
    protected: Collection[str],
) -> list[Dropped]:
    """What the rules dropped before, with a version that justifies it now: one of the same run that
    is live, protected and newer. Left out is what has none."""
    runs: dict[str, list[VersionHeader]] = {}
    for version in sorted(live, key=age_of, reverse=True):
        runs.setdefault(version.run, []).append(version)
    found = []
    for version in dead:
        justified_by = _justifying(runs.get(version.run, []), protected)(version)
        if justified_by is not None:
            found.append(Dropped(version, "dropped before", justified_by.id))
    return found


def prudent_now_s(own_s: float, others_s: Iterable[float]) -> float:
    """The time to measure ages by, of this node's wall clock and those of the nodes it can ask.

    A clock that runs ahead would expire everything, so the earlier of the own one and of what most
    of the others say counts.
    """
    others = sorted(others_s)
    if not others:
        return own_s
    return min(own_s, others[(len(others) - 1) // 2])


class _Run:
    """One run under one rule. `versions` are its live ones, newest first."""

    def __init__(
        self,
        rule: RetentionRule,
        versions: Sequence[VersionHeader],
        protected: Collection[str],
        pinned: Collection[str],
        now_s: float,
    ) -> None:
        self._rule = rule
        self._versions = versions
        self._protected = protected
        self._pinned = pinned
        self._now_s = now_s
        self._reasons: dict[str, list[str]] = {version.id: [] for version in versions}

    def reasons(self) -> dict[str, list[str]]:
        """By version id, why it stays; nothing for what goes."""
        for version in self._versions:
            if version.id in self._pinned:
                self._keep(version, "pinned")
        sound = [version for version in self._versions if is_finite(version.metrics)]
        # Twice: what is not protected stays if the rule wants it, and is left out of the count
        # when it comes to what is.
        for counted in (sound, self._protected_of(sound)):
            self._apply(counted)
        self._keep_not_finite()
        self._keep_newest_protected()
        self._keep_what_nothing_justifies()
        self._keep_before_unprotected()
        return self._reasons

    def _keep(self, version: VersionHeader, reason: str) -> None:
        if reason not in self._reasons[version.id]:
            self._reasons[version.id].append(reason)

    def _protected_of(self, versions: Sequence[VersionHeader]) -> list[VersionHeader]:
        return [version for version in versions if version.id in self._protected]

    def _apply(self, versions: Sequence[VersionHeader]) -> None:
        rule = self._rule
        if rule.keep_last is not None:
            self._keep_last(versions, rule.keep_last)
        if (steps := rule.keep_every_steps) is not None:
            self._keep_first(
                [v for v in versions if v.step is not None and (v.step >= steps or v.step == 0)],
                lambda v: (v.step or 0) // steps,
                lambda v: v.step or 0,
                f"one of every {steps} steps",
            )
        if (every_s := rule.keep_every_s) is not None:
            self._keep_first(
                [v for v in versions if self._age_s(v) is not None],
                lambda v: _created_s(v) // every_s,
                _created_s,
                "one of every such time",
            )
        self._keep_best(versions)
        self._keep_by_age(versions)

    def _keep_last(self, versions: Sequence[VersionHeader], count: int) -> None:
        of_name: dict[str, list[VersionHeader]] = {}  # the newest name first
        for version in versions:
            of_name.setdefault(version.name, []).append(version)
        for found in list(of_name.values())[:count]:
            for version in found[:count]:
                self._keep(version, f"among the newest {count}")

    def _keep_first(
        self,
        versions: Sequence[VersionHeader],
        bucket_of: Callable[[VersionHeader], float],
        position_of: Callable[[VersionHeader], float],
        reason: str,
    ) -> None:
        """Keeps the first of each bucket: it stays the first, whatever comes and goes later. Of
        several at one position the newest version."""
        first: dict[float, VersionHeader] = {}
        for version in versions:  # newest first
            bucket = bucket_of(version)
            known = first.get(bucket)
            if known is None or position_of(version) < position_of(known):
                first[bucket] = version
        for version in first.values():
            self._keep(version, reason)

    def _keep_best(self, versions: Sequence[VersionHeader]) -> None:
        best = self._rule.keep_best
        if best is None:
            return
        sign = 1 if best.mode == "max" else -1
        rated = [version for version in versions if best.metric in version.metrics]
        if rated:
            found = max(rated, key=lambda v: (sign * v.metrics[best.metric], age_of(v)))
            self._keep(found, f"best {best.metric}")

    def _keep_by_age(self, versions: Sequence[VersionHeader]) -> None:
        within_s = self._rule.keep_within_s
        if within_s is None and self._rule.keep_every_s is None:
            return
        for version in versions:
            age_s = self._age_s(version)
            if age_s is None:
                self._keep(version, "its time of creation is not in the past")
            elif within_s is not None and age_s < within_s:
                self._keep(version, "younger than keep_within")

    def _age_s(self, version: VersionHeader) -> float | None:
        """Age in seconds; None when the time of creation cannot be true."""
        created_s = _created_s(version)
        return self._now_s - created_s if created_s <= self._now_s else None

    def _keep_not_finite(self) -> None:
        """The newest versions whose loss is no number, as long as nothing better has come after
        them: somebody may want to look into them, and nobody to train on."""
        newest: list[VersionHeader] = []
        for version in self._versions:
            if not is_finite(version.metrics):
                newest.append(version)
            elif version.id in self._protected:
                break
        self._keep_by_age([v for v in self._versions if not is_finite(v.metrics)])
        for counted in (newest, self._protected_of(newest)):
            self._keep_last(counted, self._rule.keep_last or 1)

    def _keep_newest_protected(self) -> None:
        """Also when the rule wants none: without it nothing of the run could be trusted."""
        justifying = _newest_protected(self._versions, self._protected)
        if justifying is not None:
            self._keep(justifying, "the newest protected version of its run")

    def _keep_what_nothing_justifies(self) -> None:
        justifying = _justifying(self._versions, self._protected)
        for version in self._versions:
            if not self._reasons[version.id] and justifying(version) is None:
                self._keep(version, "nothing newer of its run is protected")

    def _keep_before_unprotected(self) -> None:
        """An older version of a name stays until the newer one is protected."""
        waiting: set[str] = set()
        for version in self._versions:
            if version.id not in self._protected:
                if self._reasons[version.id]:
                    waiting.add(version.name)
            elif version.name in waiting:
                waiting.discard(version.name)
                self._keep(version, "the newer version of its name is not protected yet")
            else:
                waiting.discard(version.name)


_DISTANT: Final = float("inf")


def _created_s(version: VersionHeader) -> float:
    """Time of creation in seconds since the epoch; infinitely late when it cannot be read."""
    try:
        return datetime.fromisoformat(version.created).timestamp()
    except (ValueError, OverflowError):
        return _DISTANT


def _newest_protected(
    versions: Sequence[VersionHeader], protected: Collection[str]
) -> VersionHeader | None:
    """The newest protected of `versions` (newest first): with a finite loss if there is one."""
    found = [version for version in versions if version.id in protected]
    sound = (version for version in found if is_finite(version.metrics))
    return next(sound, found[0] if found else None)


def _justifying(
    versions: Sequence[VersionHeader], protected: Collection[str]
) -> Callable[[VersionHeader], VersionHeader | None]:
    """For a version of the run `versions` (newest first), the one whose being protected allows it
    to go; None when none does."""
    newest = _newest_protected(versions, protected)

    def justifying(version: VersionHeader) -> VersionHeader | None:
        if newest is None or newest.id == version.id:
            return None
        if is_finite(newest.metrics):
            worthless = not is_finite(version.metrics)
            return newest if worthless or age_of(version) < age_of(newest) else None
        if is_finite(version.metrics):
            return None
        return newest if age_of(version) < age_of(newest) else None

    return justifying


def _why_dropped(version: VersionHeader, rule: RetentionRule) -> str:
    if not is_finite(version.metrics):
        return "its loss is not finite, and a newer version or one with a finite loss is protected"
    wanted = [
        text
        for text, value in (
            (f"among the newest {rule.keep_last}", rule.keep_last),
            (f"the one of every {rule.keep_every_steps} steps", rule.keep_every_steps),
            ("the one of every such time", rule.keep_every_s),
            ("younger than keep_within", rule.keep_within_s),
            ("the best", rule.keep_best),
        )
        if value is not None
    ]
    return "not " + ", nor ".join(wanted)
