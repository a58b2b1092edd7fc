"""Own checks: of any installed distribution, through the entry point group ``align3gr.gate_checks``.

    [project.entry-points."align3gr.gate_checks"]
    novelty = "our_checks:Novelty"

names a GateCheck, or a class of one that is made without arguments. Installing it changes nothing: a check
judges when ``policies.gate.checks`` names it, and a name that nobody provides is an error, not a check less.
A check with a method ``measure(policy, lists)`` -> user -> value (``lists``: user -> item ids, best first)
has its figures measured with the others; ``judge`` finds them as ``per_user["own:NAME"]``, also when a
decision is taken again from its stored input.
"""

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from features.errors import BadInput

from ..errors import PoliciesError
from .checks import GateCheck, Trial
from .figures import Check, GateInput

GROUP = "align3gr.gate_checks"


class UnknownCheck(PoliciesError, BadInput):  # noqa: N818 - reads as what it is at the raise site
    """``policies.gate.checks`` names a check that no installed distribution provides."""


def own_checks(names: Sequence[str]) -> list[GateCheck]:
    """The checks of these names, in order. Raises UnknownCheck; PoliciesError for one that cannot load."""
    if not names:
        return []
    installed = {point.name: point for point in entry_points(group=GROUP)}
    found: list[GateCheck] = []
    for name in names:
        if name not in installed:
            there = ", ".join(sorted(installed)) or "none"
            raise UnknownCheck(
                f"policies.gate.checks names {name}, which no installed distribution provides (there: "
                f"{there}); install it, or take the name out"
            )
        try:
            loaded: Any = installed[name].load()
            check = loaded() if isinstance(loaded, type) else loaded
        except Exception as error:
            raise PoliciesError(
                f"gate check {name} cannot be loaded: {error}; see its distribution"
            ) from error
        if not callable(getattr(check, "judge", None)):
            raise PoliciesError(
                f"gate check {name} has no method judge(given, trial); see policies/gate/own.py"
            )
        found.append(check)
    return found


def findings(check: GateCheck, given: GateInput, trial: Trial) -> list[Check]:
    """What an own check finds. Raises PoliciesError when it breaks: who cannot judge promotes nothing."""
    name = getattr(check, "name", type(check).__name__)
    try:
        found = list(check.judge(given, trial))
    except Exception as error:
        raise PoliciesError(f"gate check {name} broke: {type(error).__name__}: {error}") from error
    if not all(isinstance(one, Check) for one in found):
        raise PoliciesError(f"gate check {name} must give policies.gate.Check objects")
    return found
