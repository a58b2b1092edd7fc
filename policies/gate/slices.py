"""Slices: nobody may pay for the others' gain. New and heavy users, young items, deciles of popularity.

A slice has few users, and there are many slices. If each had to prove that it is not worse, as the whole
must, nearly every good candidate would fail in one of them. So in slices the burden of proof is turned round:
a slice fails only when harm beyond ``slice_margin`` is *established*, by upper bounds that hold for all
slices together (max-t over the shared resamples): a candidate that harms no slice fails on slices in at most
``1 - confidence`` of cases, however many slices there are. A slice with fewer than ``slice_min_users`` users
is silent.

Users do not take places from each other, items do: what rises in a list pushes something down, and the
slates were chosen by the reference, which holds its favourites too high. So a slice of items fails only where
it is established, too, that it ends below the mean of all the candidate's cases: who stands above that has
paid for nobody. (Without this rule Jester's rounds refused six candidates in a row that were truly 4 to 7%
better, since they took the most popular decile down from a figure of .73 to .64, where the mean was .58.)
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
        stands = {name: one for (name, what), one in trial.resampled.items() if what == "stands"}
        uppers = simultaneous_uppers(found, confidence=trial.settings.confidence)
        heights = simultaneous_uppers(stands, confidence=trial.settings.confidence)
        for name, (_, theirs) in sides.items():
            metric, words_of = name.split("/", 1)
            reference = float(np.nanmean(theirs))
            bound = -trial.settings.slice_margin * reference
            passed = bool(uppers[name] >= bound)
            words = (
                f"{words_of}: {WORDS[metric]} moves by {found[name].mean:+.4f} from {reference:.4f} of the "
                f"reference {given.reference.version} over {found[name].users} users; upper bound over all "
                f"slices {uppers[name]:+.4f}, must be at least {bound:+.4f}"
            )
            if not passed and name in heights:
                passed = heights[name] >= 0
                words += (
                    f", unless it may stand as high as all items: {stands[name].mean:+.4f} from their mean, "
                    f"upper bound {heights[name]:+.4f}"
                )
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


def slice_columns(
    given: GateInput, sides: Mapping[str, tuple[Floats, Floats]]
) -> dict[tuple[str, str], Floats]:
    """The columns to resample: ``slice``, candidate less reference; ``stands``, of slices of items, the
    candidate less its mean over all cases."""
    columns = {(name, "slice"): ours - theirs for name, (ours, theirs) in sides.items()}
    for name, (ours, _) in sides.items():
        if name in given.candidate.item_slices:
            everything = given.candidate.per_user[name.split("/", 1)[0]]
            columns[name, "stands"] = ours - np.nanmean(everything)
    return columns


def _where_both(values: Floats, others: Floats) -> Floats:
    return np.where(np.isnan(others), np.nan, values)
