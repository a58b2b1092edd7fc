"""Slices: nobody may pay for the others' gain. New and heavy users, young items, deciles of popularity.

A slice has few users, and there are many slices. If each had to prove that it is not worse, as the whole
must, nearly every good candidate would fail in one of them. So in slices the burden of proof is turned round:
a slice fails only when harm beyond ``slice_margin`` is *established*, by upper bounds that hold for all
slices together (max-t over the shared resamples): a candidate that harms no slice fails on slices in at most
``1 - confidence`` of cases, however many slices there are. A slice with fewer than ``slice_min_users`` users
is silent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..settings import GateSettings
from .checks import Trial
from .figures import WORDS, Check, Floats, GateInput
from .resampling import simultaneous_uppers


@dataclass(frozen=True)
class Slices:
    """No slice is established as worse."""

    name: str = "slices"

    def judge(self, given: GateInput, trial: Trial) -> Iterable[Check]:
        """One check for each slice with enough users."""
        sides = slice_figures(given, trial.judged, trial.settings)
        found = {name: trial.resampled[name, "slice"] for name in sides}
        uppers = simultaneous_uppers(found, confidence=trial.settings.confidence)
        for name, (_, theirs) in sides.items():
            metric, words_of = name.split("/", 1)
            reference = float(np.nanmean(theirs))
            bound = -trial.settings.slice_margin * reference
            words = (
                f"{words_of}: {WORDS[metric]} moves by {found[name].mean:+.4f} from {reference:.4f} of the "
                f"reference {given.reference.version} over {found[name].users} users; upper bound over all "
                f"slices {uppers[name]:+.4f}, must be at least {bound:+.4f}"
            )
            passed = bool(uppers[name] >= bound)
            yield Check(f"slice:{name}", metric, uppers[name], bound, found[name].mean, passed, words)


def slice_figures(
    given: GateInput, judged: Iterable[str], settings: GateSettings
) -> dict[str, tuple[Floats, Floats]]:
    """``metric/slice`` -> (candidate, reference), float64[n_users], NaN outside, of slices large enough."""
    found: dict[str, tuple[Floats, Floats]] = {}
    for metric in judged:
        ours, theirs = given.candidate.per_user[metric], given.reference.per_user[metric]
        for name, members in given.user_slices.items():
            found[f"{metric}/{name}"] = np.where(members, ours, np.nan), np.where(members, theirs, np.nan)
        for name, values in given.candidate.item_slices.items():
            if name.split("/", 1)[0] == metric and name in given.reference.item_slices:
                found[name] = values, given.reference.item_slices[name]
    return {
        name: (_where_both(ours, theirs), _where_both(theirs, ours))
        for name, (ours, theirs) in found.items()
        if (~np.isnan(ours + theirs)).sum() >= settings.slice_min_users
    }


def slice_columns(sides: Mapping[str, tuple[Floats, Floats]]) -> dict[tuple[str, str], Floats]:
    """The columns to resample."""
    return {(name, "slice"): ours - theirs for name, (ours, theirs) in sides.items()}


def _where_both(values: Floats, others: Floats) -> Floats:
    return np.where(np.isnan(others), np.nan, values)
