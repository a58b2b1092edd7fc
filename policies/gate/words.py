"""A stored decision, in sentences: who was judged, on whom, what spoke for it, what against, and what was not
said.

Works on ``decision.json`` and ``gate_input.json`` as they were written, also by earlier versions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .figures import WORDS

_OUTCOME = {
    "promote": "passed: it may become the reference",
    "refuse": "refused it",
    "hold": "held it: it is registered, and the reference stays",
}


def sentences(version: str, decision: Mapping[str, Any], given: Mapping[str, Any] | None) -> list[str]:
    """Why ``version`` was promoted, refused or held; ``given``: the stored input, where it is there."""
    checks = decision["checks"]
    guards = [one for one in checks if not _is_gain(one)]
    gains = [one for one in checks if _is_gain(one)]
    slices = [one for one in guards if one["name"].startswith("slice:")]
    broken = [one for one in guards if not one["passed"]]
    settings = decision.get("settings", {})
    said = [_who(version, decision, given)]
    for one in broken:
        said.append(f"Against it, {one['name']}: {one['words']}.")
    for one in gains:
        said.append(_gain(one, settings))
    kept = [one["name"] for one in guards if one["passed"] and not one["name"].startswith("slice:")]
    if kept:
        said.append(f"It kept within {_count(len(kept), 'bound')}: {', '.join(kept)}.")
    said += _near(guards)
    said += _slices(slices, settings)
    said += _silent(checks, gains, given, settings)
    if decision["outcome"] == "hold":
        said.append(f"It was held because of this: {decision['why']}.")
    return said


def _who(version: str, decision: Mapping[str, Any], given: Mapping[str, Any] | None) -> str:
    against = ""
    if given is not None:
        anchor = given.get("anchor")
        against = f" against the reference {given['reference']['version']}"
        if anchor:
            against += f" and the anchor {anchor['version']}"
    return (
        f"The gate judged {version} on {_count(decision['users'], 'user')} whose feedback no round learns "
        f"from{against}, and {_OUTCOME[decision['outcome']]}."
    )


def _gain(one: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    metric = WORDS.get(one["metric"], one["metric"])
    sure = f" ({settings['confidence']:.0%} confidence, shared over the metrics)" if settings else ""
    if one["passed"]:
        return f"For it: {metric} rose by {one['value']:.4f}, and surely by {one['statistic']:.4f}{sure}."
    moved = "rose" if one["value"] > 0 else "fell" if one["value"] < 0 else "did not move"
    size = f" by {abs(one['value']):.4f}" if one["value"] else ""
    return (
        f"Not for it: {metric} {moved}{size}, which is not distinguishable from no gain: the lower bound is "
        f"{one['statistic']:+.4f}{sure}."
    )


def _near(guards: Sequence[Mapping[str, Any]]) -> list[str]:
    """The check of a judged metric that passed by the least, as a share of its bound."""
    close = [
        one for one in guards
        if one["passed"] and "_not_worse_than_" in one["name"] and one["bound"] < 0
    ]  # fmt: skip
    if not close:
        return []
    nearest = max(close, key=lambda one: one["statistic"] / one["bound"])
    return [f"The closest of them was {nearest['name']}: {nearest['words']}."]


def _slices(slices: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[str]:
    if not slices:
        return []
    harmed = [one for one in slices if not one["passed"]]
    worst = min(slices, key=lambda one: one["value"])
    told = f"{_count(len(slices), 'slice')} had enough users to be judged"
    if settings:
        told += f" (at least {settings['slice_min_users']})"
    if harmed:
        return [f"{told}; harm is established in {', '.join(one['name'][6:] for one in harmed)}."]
    return [
        f"{told}; harm is established in none. The lowest was {worst['name'][6:]} with "
        f"{worst['value']:+.4f}, whose upper bound is {worst['statistic']:+.4f}."
    ]


def _silent(
    checks: Sequence[Mapping[str, Any]],
    gains: Sequence[Mapping[str, Any]],
    given: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> list[str]:
    """What had no say, and why."""
    said = []
    judged = {one["metric"] for one in gains}
    for metric, words in WORDS.items():
        if metric not in judged:
            said.append(f"Without a say: {words}, for too few users have a case of it.")
    names = {one["name"] for one in checks}
    if given is not None and settings and "off_policy" not in names:
        found, least = given.get("off_policy"), settings.get("off_policy_min_effective")
        if least is None:
            said.append("Without a say: off-policy evaluation is switched off.")
        elif found is None:
            said.append(
                f"Without a say: off-policy evaluation; there are fewer than {least:g} sampled slates."
            )
        else:
            said.append(
                f"Without a say: off-policy evaluation; {found['slates']} sampled slates are worth "
                f"{found['effective']:.0f} under the candidate, fewer than {least:g}."
            )
    if given is not None and not given.get("anchor"):
        said.append("There was no anchor beside the reference: the two were one and the same.")
    return said


def _is_gain(check: Mapping[str, Any]) -> bool:
    """Decisions of before roles had names tell gains by their suffix."""
    return bool(check.get("role", "guard") == "gain" or check["name"].endswith("_better"))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
