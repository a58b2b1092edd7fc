"""The gate between a candidate policy and its promotion: figures in, one explained decision out.

``figures`` is what was measured, ``checks`` the named requirements, ``slices`` the same for parts of the
users and of the catalogue, ``decision`` puts them together, ``record`` keeps input and decision as files and
takes the decision again, ``words`` explains it, ``own`` finds checks of other distributions. docs/gate.md has
it all in prose.
"""

from .checks import Better, GateCheck, NotWorse, Trial
from .decision import Decision, Outcome, decide
from .figures import WORDS, Check, Floats, GateInput, OffPolicyFigures, PolicyFigures
from .resampling import lower_bound

__all__ = [
    "WORDS",
    "Better",
    "Check",
    "Decision",
    "Floats",
    "GateCheck",
    "GateInput",
    "NotWorse",
    "OffPolicyFigures",
    "Outcome",
    "PolicyFigures",
    "Trial",
    "decide",
    "lower_bound",
]
