"""``align3gr evaluate --off-policy A B``: two policies on the log's sampled slates, neither served."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.errors import BadInput
from features.log import FeedbackLog
from features.sampled_slates import sampled_slates
from policies.policy import Policy
from trainer.off_policy import off_policy_report, sampled_cases

if TYPE_CHECKING:
    from align3gr.settings import Settings

WORDS = {
    "ips": "IPS, whole slates",
    "cascade": "IPS, read from the top",
    "snips": "SNIPS",
    "dr": "doubly robust",
}


def compared_off_policy(
    settings: "Settings",
    directories: Sequence[Path],
    *,
    eligible: Sequence[str] | None,
    everybody: bool,
    device: str,
    users: int | None,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """The facts. Raises BadInput for other than two policies, and where there are too few slates."""
    if len(directories) != 2:
        raise BadInput(
            f"--off-policy compares two different policies, not {len(directories)}: "
            "write align3gr evaluate --off-policy v2 v1"
        )
    gate = settings.policies.gate
    table = sampled_slates(
        FeedbackLog.open(settings.home / "log", create=False).snapshot(),
        settings.features,
        gate_share=gate.share,
        stop_share=settings.trainer.round.stop_share,
        role=None if everybody else "gate",
        most=gate.off_policy_slates,
    )
    cases = sampled_cases(table)
    if users is not None:
        kept = sorted({case.user.user_id for case in cases})[:users]
        cases = [case for case in cases if case.user.user_id in set(kept)]
    policies: list[Policy] = []
    for directory in directories:
        policies.append(
            Policy.load(
                directory,
                device=device,
                settings=settings.policies.decoding,
                share_base_with=policies[0] if policies else None,
            )
        )
    report = off_policy_report(policies, cases, eligible=eligible, progress=progress)
    if report is None:
        whose = "users" if everybody else "gate users (--everybody takes all users)"
        raise BadInput(
            f"the log holds {len(cases)} sampled slates of {whose} with a known outcome, of fewer than two "
            "users with a history; set server.sample_share, and wait until the attribution window has closed"
        )
    least, worth = gate.off_policy_min_effective, min(one.effective for one in report.evaluations)
    return {**report.as_dict(), "enough": least is not None and worth >= least}


def off_policy_text(facts: dict[str, Any], least: float | None) -> str:
    """For people."""
    lines = [
        f"{facts['slates']} sampled slates of {facts['users']} users; liked places a slate, 95% intervals",
        f"as logged {_cell(facts['logged'])}: what was served, which is no estimate of any other policy",
    ]
    for row in facts["rows"]:
        lines += ["", f"{row['policy']}: the slates are worth {row['effective']:.0f} under it"]
        lines += [f"  {words:<24} {_cell(row[name])}" for name, words in WORDS.items() if name in row]
    for one in facts["differences"]:
        lines += ["", f"{one['of']}:"]
        lines += [f"  {words:<24} {_cell(one[name])}" for name, words in WORDS.items() if name in one]
    if facts["enough"] is False:
        lines += [
            "",
            f"Too little to go by: fewer than {least:g} effective slates; intervals may be too narrow.",
        ]
    if facts["left_out"]:
        lines += ["", f"{facts['left_out']} slates of users without a known history are left out."]
    return "\n".join(lines)


def _cell(one: dict[str, float]) -> str:
    return f"{one['value']:.4f} [{one['low']:.4f}, {one['high']:.4f}]"
