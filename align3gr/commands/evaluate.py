"""Command: evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align3gr.console import JsonOption, emit, say, settings_of

if TYPE_CHECKING:
    from align3gr.settings import Settings
    from trainer.comparison import Comparison

app = typer.Typer()

CUTOFFS = "1,5,10,20,50,100"


@app.command()
def evaluate(
    context: typer.Context,
    versions: list[str] | None = typer.Argument(
        None, help="Policies to measure side by side (default: the reference).", metavar="[VERSION]..."
    ),
    policy: str | None = typer.Option(None, "--policy", help="The same, for one version."),
    back: int | None = typer.Option(
        None,
        "--back",
        min=1,
        help="Leave one out from the log: the last item (1, test), or the one before (2).",
    ),
    held_out: Path | None = typer.Option(
        None, "--held-out", help="Events kept back by `replay --leave-out` (JSON lines)."
    ),
    liked_only: bool = typer.Option(False, "--liked-only", help="Held-out events that are liked count only."),
    beam: str | None = typer.Option(
        None,
        "--beam",
        help="Prefixes kept a level, e.g. 20,50 (default: settings). A beam answers k up to it.",
    ),
    cutoffs: str | None = typer.Option(
        None, "--cutoffs", help=f"The k of Recall@k and NDCG@k (default: {CUTOFFS} up to the widest beam)."
    ),
    all_items: bool = typer.Option(
        False, "--all-items", help="Only the column with seen items in the lists, as printed tables have it."
    ),
    unseen: bool = typer.Option(False, "--unseen", help="Only the column with seen items left out."),
    users: int | None = typer.Option(
        None, "--users", "--limit", min=1, help="Only N users, always the same."
    ),
    seeds: bool = typer.Option(
        False, "--seeds", help="The versions are seeds of one recipe: also their mean, over users and seeds."
    ),
    off_policy: bool = typer.Option(
        False, "--off-policy", help="Two versions on the log's sampled slates, by their propensities."
    ),
    everybody: bool = typer.Option(
        False,
        "--everybody",
        help="With --off-policy: not gate users only. Wrong for a policy that learned from these slates.",
    ),
    device: str = typer.Option("cpu", "--device", help="cpu, cuda or cuda:N."),
    as_json: bool = JsonOption,
) -> None:
    """Measure policies: the full catalogue ranked, in two columns that are never mixed.

    --off-policy A B: what each would have earned on the slates that were sampled.

    Cases: --back (leave one out from the log), --held-out (a file), else the log's gate users. Intervals hold
    95% of the bootstrap resamples of users; differences are paired. Popularity is measured on the same cases.
    """
    from align3gr.cases import cases_for
    from align3gr.contexts import listed_titles
    from align3gr.progress import Bars
    from align3gr.registered import directories_of
    from features.errors import BadInput
    from policies.policy import Policy
    from trainer.comparison import Comparison
    from trainer.slates import win_rates

    settings = settings_of(context)
    named = [*(versions or []), *([policy] if policy else [])]
    if back is not None and held_out is not None:
        raise BadInput("--back takes cases from the log and --held-out from a file; give one of them")
    if off_policy:
        if back is not None or held_out is not None:
            raise BadInput("--off-policy takes its slates from the log; give no --back and no --held-out")
        _off_policy(settings, directories_of(settings, named), everybody, device, users, as_json)
        return
    if all_items and unseen:
        raise BadInput("--all-items and --unseen each leave one column; give neither for both")
    beams = _numbers("--beam", beam) if beam else (settings.policies.decoding.beam,)
    ks = _numbers("--cutoffs", cutoffs) if cutoffs else ()
    ks = ks or tuple(k for k in _numbers("--cutoffs", CUTOFFS) if k <= max(beams))
    directories = directories_of(settings, named)
    slates, ranking = cases_for(settings, back=back, held_out=held_out, liked_only=liked_only, users=users)
    columns = ("all_items",) if all_items else ("unseen",) if unseen else ("unseen", "all_items")
    _, listed = listed_titles(settings)
    comparison = Comparison(ranking, beams, ks, columns, eligible=listed)
    facts: dict[str, Any] = {"policy": "", "policies": []}
    with Bars(shown=not as_json) as bars:
        for directory in directories:
            loaded = Policy.load(directory, device=device, settings=settings.policies.decoding)
            facts["policies"].append(loaded.version)
            if slates:
                rates = win_rates(loaded, slates, progress=bars)
                mean = sum(rates.values()) / len(rates) if rates else None
                facts.setdefault("slates", {"users": len(rates), "win_rate": mean})
                facts.setdefault("win_rates", {})[loaded.version] = mean
            if ranking:
                comparison.measure(loaded, progress=bars)
            if back is not None and _left_out(loaded) < back:
                say(
                    f"{loaded.version} may have been trained on the items it is asked for: no test; "
                    f"keep them out with --leave-out {max(back, 2)} of `align3gr tokenize` and `align3gr sft`"
                )
    facts["policy"] = facts["policies"][0]
    if ranking:
        facts |= _facts(comparison, seeds=seeds)
    emit(facts, as_json, lambda: _table(facts, comparison))


def _off_policy(
    settings: "Settings",
    directories: list[Path],
    everybody: bool,
    device: str,
    users: int | None,
    as_json: bool,
) -> None:
    from align3gr.contexts import listed_titles
    from align3gr.off_policy import compared_off_policy, off_policy_text
    from align3gr.progress import Bars

    _, listed = listed_titles(settings)
    with Bars(shown=not as_json) as bars:
        facts = compared_off_policy(
            settings,
            directories,
            eligible=listed,
            everybody=everybody,
            device=device,
            users=users,
            progress=bars,
        )
    emit(facts, as_json, lambda: off_policy_text(facts, settings.policies.gate.off_policy_min_effective))


def _left_out(policy: Any) -> int:
    """How many last items of every user the policy's training left out, as far as its lineage says."""
    return int((policy.manifest.lineage or {}).get("leave_out") or 0)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from features.errors import BadInput

    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise BadInput(f"{option} {text}: write positive numbers with commas, as 1,5,10")
    return tuple(sorted({int(part) for part in parts}))


def _facts(comparison: "Comparison", *, seeds: bool) -> dict[str, Any]:
    """``ranking`` and ``popularity`` are the first policy's first row; ``rows`` holds all."""
    first = comparison.rows[0]
    facts: dict[str, Any] = {
        "ranking": first.figures.as_dict(),
        "popularity": comparison.popularity[first.column],
        "baseline": comparison.popularity,
        "rows": [row.as_dict() for row in comparison.rows],
        "differences": [one.as_dict() for one in comparison.differences()],
    }
    if seeds:
        facts["over_seeds"] = [one.as_dict() for one in comparison.over_seeds()]
    return facts


def _table(facts: dict[str, Any], comparison: "Comparison") -> str:
    from trainer.metrics import COLUMN_WORDS

    lines = ["policy " + ", ".join(facts["policies"])]
    for version, rate in facts.get("win_rates", {}).items():
        said = "no slate can be judged" if rate is None else f"win rate {rate:.4f}"
        lines.append(f"within slates: {version} {said}, {facts['slates']['users']} users")
    groups = comparison.groups()
    if groups:
        cases = groups[0][2][0].figures
        lines.append(
            f"the full catalogue ranked, {len(cases.users)} users, {cases.cases} cases; 95% intervals"
        )
    for column, beam, rows in groups:
        lines += ["", f"{COLUMN_WORDS[column]}: {len(rows[0].figures.users)} users, beam {beam}"]
        popular = comparison.popularity[column]
        lines.append(f"{'':<14}" + "".join(f"{row.version:<26}" for row in rows) + "popularity")
        for name in rows[0].intervals:
            cells = "".join(f"{_interval(row.intervals[name]):<26}" for row in rows)
            lines.append(f"{name:<14}{cells}{popular[name]:.4f}")
        for name, values in _shapes(rows):
            lines.append(f"{name:<14}" + "".join(f"{value:<26}" for value in values).rstrip())
        extra = comparison.differences() + (comparison.over_seeds() if "over_seeds" in facts else [])
        for one in extra:
            if (one.column, one.beam) == (column, beam):
                lines.append(f"{one.names}:")
                lines += [f"  {name:<12}{_interval(value)}" for name, value in one.intervals.items()]
    return "\n".join(lines)


def _interval(one: Any) -> str:
    return f"{one.mean:.4f} [{one.low:.4f}, {one.high:.4f}]"


def _shapes(rows: Any) -> list[tuple[str, list[str]]]:
    figures = [row.figures for row in rows]
    depth = figures[0].shape.depth
    return [
        (f"coverage@{depth}", [f"{one.coverage:.4f}" for one in figures]),
        ("concentration", [f"{one.concentration:.4f}" for one in figures]),
        ("popularity", [f"{one.shape.popularity:.4f}" for one in figures]),
        ("validity", [f"{one.validity:.4f}" for one in figures]),
        ("users/s", [f"{one.latency.users_per_s:.1f}" for one in figures]),
        (
            "ms a batch",
            [
                f"p50 {one.latency.p50_ms:.0f}, p95 {one.latency.p95_ms:.0f} of {one.latency.batch}"
                for one in figures
            ],
        ),
    ]
