"""The decision: promote, refuse or hold, with every check that led to it.

A candidate is promoted when all guards pass and one gain does; refused when a guard fails; held when there
are too few users to judge, or when it is no better than the reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ..settings import GateSettings
from .checks import (
    Better,
    Concentration,
    Coverage,
    GateCheck,
    Latency,
    NotWorse,
    OffPolicy,
    Trial,
    Validity,
    differences,
)
from .figures import WORDS, Check, Floats, GateInput, paired
from .own import findings, own_checks
from .resampling import resample
from .slices import Slices, slice_columns, slice_figures

Outcome = Literal["promote", "refuse", "hold"]


@dataclass(frozen=True)
class Decision:
    """What the gate says, and all it looked at."""

    outcome: Outcome
    why: str
    checks: tuple[Check, ...]
    """Guards first, then gains."""
    users: int
    """Gate users with a case of at least one judged metric."""

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def as_dict(self) -> dict[str, Any]:
        """For policy manifests, MLflow and ``--json``."""
        return asdict(self)


def decide(
    given: GateInput, settings: GateSettings, *, seed: int, own: Sequence[GateCheck] | None = None
) -> Decision:
    """Judge ``given.candidate``: promote, refuse (a check failed, named in ``why``) or hold.

    ``own``: checks beside the built-in ones; by default those that ``settings.checks`` names.
    Pure: the same input, settings and seed give the same decision.
    Raises PoliciesError when the arrays do not have one value per user, or an own check breaks.
    """
    given.require_same_users()
    added = own_checks(settings.checks) if own is None else own
    judged, unjudged = _judged_metrics(given, settings)
    columns = _columns(given, judged, settings)
    random = np.random.default_rng(seed)
    trial = Trial(
        settings=settings,
        judged=tuple(judged),
        resampled=resample(columns, resamples=settings.resamples, random=random),
        seed=seed,
    )
    guards: list[GateCheck] = [
        Validity(),
        Coverage(),
        Concentration(),
        Latency(),
        *(NotWorse(metric, other) for metric in judged for other in _COMPARED),
        Slices(),
        OffPolicy(),
    ]
    checks = [check for one in guards for check in one.judge(given, trial)]
    checks += [check for one in added for check in findings(one, given, trial)]
    gains = [check for metric in judged for check in Better(metric).judge(given, trial)]
    return _decision(given, checks, gains, unjudged, settings)


_COMPARED: tuple[Literal["reference", "anchor"], ...] = ("reference", "anchor")


def _judged_metrics(given: GateInput, settings: GateSettings) -> tuple[list[str], dict[str, int]]:
    judged: list[str] = []
    unjudged: dict[str, int] = {}
    for metric in WORDS:
        users = len(paired(metric, given.candidate, given.reference)[0])
        if users >= settings.min_users:
            judged.append(metric)
        else:
            unjudged[metric] = users
    return judged, unjudged


def _columns(
    given: GateInput, judged: Sequence[str], settings: GateSettings
) -> dict[tuple[str, str], Floats]:
    """Everything that is resampled, resampled once."""
    columns: dict[tuple[str, str], Floats] = {}
    for metric in judged:
        for name, other in (("reference", given.reference), ("anchor", given.anchor)):
            column = differences(metric, given.candidate, other) if other is not None else None
            if column is not None:
                columns[metric, name] = column
    return columns | slice_columns(given, slice_figures(given, judged, settings))


def _decision(
    given: GateInput,
    checks: list[Check],
    gains: list[Check],
    unjudged: Mapping[str, int],
    settings: GateSettings,
) -> Decision:
    counted = [~np.isnan(values) for metric, values in given.candidate.per_user.items() if metric in WORDS]
    users = int(np.logical_or.reduce(counted).sum()) if counted else 0
    failed = [check for check in checks if not check.passed]
    missing = [metric for metric in settings.required if metric in unjudged or metric not in WORDS]
    invalid = [check for check in failed if check.name == "validity"]
    outcome: Outcome
    if invalid or (failed and gains and not missing):
        outcome, why = "refuse", "; ".join(check.words for check in failed)
    elif missing or not gains:
        few = ", ".join(f"{metric}: {unjudged.get(metric, 0)}" for metric in (missing or WORDS))
        outcome = "hold"
        why = f"too few gate users to judge ({few}; {settings.min_users} needed): wait for more feedback"
    elif not any(gain.passed for gain in gains):
        outcome, why = "hold", "no better than the reference: " + "; ".join(gain.words for gain in gains)
    else:
        outcome = "promote"
        why = "; ".join(gain.words for gain in gains if gain.passed)
    return Decision(outcome, why, (*checks, *gains), users)
