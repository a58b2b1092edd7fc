"""``align3gr selfplay`` and ``align3gr curriculum``: preference training as a chain."""

from typing import TYPE_CHECKING, Any

import typer

from align3gr.console import JsonOption, emit, say, settings_of

if TYPE_CHECKING:
    from trainer.round_state import RoundState

app = typer.Typer()


@app.command()
def selfplay(
    context: typer.Context,
    policy: str | None = typer.Option(
        None, "--policy", help="The registered policy that plays (default: the reference).", metavar="VERSION"
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Of samples and of what is drawn within a grade."),
    leave_out: int | None = typer.Option(
        None, "--leave-out", min=0, help="Last items of each user that are not used (default: settings, 2)."
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
    as_json: bool = JsonOption,
) -> None:
    """Let a policy recommend on training histories; what it put beside the target becomes easy, medium, hard.

    Killed, the same command goes on where it was. `align3gr curriculum` does this by itself.
    """
    from datetime import UTC, datetime

    from align3gr.progress import Bars
    from features.errors import BadInput
    from features.log import FeedbackLog
    from policies.ledger import PromotionLedger
    from policies.policy import Policy
    from policies.registry import Registry
    from trainer.preference.selfplay import play
    from trainer.rounds import place_for
    from trainer.training_input import training_histories

    settings = settings_of(context)
    registry = Registry(settings.home, settings.policies.registry)
    version = policy or PromotionLedger(settings.home / "ledger").reference()
    if version is None:
        raise BadInput("no policy is the reference yet: name one with --policy, or make one: `align3gr sft`")
    loaded = Policy.load(
        registry.path(version),
        device=place_for(device),
        policies=registry.directory,
        merged=True,
        settings=settings.policies.decoding,
    )
    snapshot = FeedbackLog.open(settings.home / "log", create=False).snapshot()
    curriculum = settings.trainer.curriculum
    with Bars(shown=not as_json) as bars:
        done = play(
            loaded,
            training_histories(snapshot, settings.features),
            curriculum.selfplay,
            settings.home / "selfplay",
            seed=seed,
            leave_out=curriculum.leave_out if leave_out is None else leave_out,
            clock=lambda: datetime.now(UTC),
            progress=lambda at, total: bars("self-play", at, total),
        )
    facts = {"selfplay": done.selfplay_id, "path": str(done.path), **done.manifest}
    emit(facts, as_json, lambda: _counts(facts))


@app.command()
def curriculum(
    context: typer.Context,
    start: str | None = typer.Option(
        None,
        "--from",
        help="The registered policy it starts from (default: SFT makes one).",
        metavar="VERSION",
    ),
    resume: str | None = typer.Option(
        None, help="Take up an unfinished curriculum: its id, or 'last'.", metavar="ID"
    ),
    device: str | None = typer.Option(None, help="auto, cpu, cuda or cuda:N; a resume keeps its own."),
    seed: int | None = typer.Option(None, min=0, help="Base of every random number of the chain."),
    as_json: bool = JsonOption,
) -> None:
    """The whole chain: SFT, self-play easy, medium, hard, then feedback easy, hard; one policy comes out.

    Each stage starts from the policy of the last one that did no harm on held-out data. The policy is
    registered, not promoted.
    """
    import getpass

    from align3gr.progress import Bars
    from trainer.curriculum import CurriculumPlace, resume_curriculum, start_curriculum

    if start is not None and resume is not None:
        raise typer.BadParameter("--from starts a new curriculum, --resume takes one up: choose one")
    settings = settings_of(context)
    with Bars(shown=not as_json) as bars:
        place = CurriculumPlace(
            settings.home, settings.features, settings.policies, settings.trainer, observe=bars
        )
        last = place.rounds.last()
        if resume is not None:
            name = last.round_id if resume == "last" and last else resume
            state = resume_curriculum(place, name, who=getpass.getuser())
        else:
            if last is not None and last.status == "running":
                say(f"{last.round_id} was left unfinished: align3gr curriculum --resume {last.round_id}")
            state = start_curriculum(place, start=start, seed=seed, device=device, who=getpass.getuser())
    emit(_facts(state), as_json, lambda: _chain(state))


def _counts(facts: dict[str, Any]) -> str:
    lines = [f"{facts['path']}: {facts['targets']} targets of {facts['users']} users"]
    for stage, counts in facts["stages"].items():
        lines.append(
            f"  {stage:<10} {counts['samples']:>7} samples, {counts['rejected_mean']:.1f} rejected each, "
            f"{counts['added_share']:.0%} of them from the trie"
        )
        lines += [f"    refused: {reason}: {count}" for reason, count in counts["refused"].items() if count]
    lines += [f"  refused: {reason}: {count}" for reason, count in facts["refused"].items()]
    return "\n".join(lines)


def _facts(state: "RoundState") -> dict[str, Any]:
    return {
        "curriculum": state.round_id,
        "outcome": state.outcome,
        "why": state.message,
        "version": state.steps["register"]["version"],
        "from": state.steps["start"],
        "stages": {
            name: facts for name, facts in state.steps.items() if "guard" in facts or "skipped" in facts
        },
        "seed": state.seed,
        "device": state.device,
        "started_at": state.started_at,
        "ended_at": state.ended_at,
    }


def _chain(state: "RoundState") -> str:
    steps = state.steps
    lines = [f"curriculum {state.round_id}: {steps['register']['version']} {state.outcome}: {state.message}"]
    lines.append(f"  from {steps['start']['version']} ({steps['start']['made']})")
    if "warning" in steps["start"]:
        lines.append(f"  beware: {steps['start']['warning']}")
    for name, facts in steps.items():
        if "skipped" in facts:
            lines.append(f"  {name:<10} skipped: {facts['skipped']}")
        elif "guard" in facts:
            lines += _stage(name, facts)
    if steps["register"]["new"]:
        lines.append(f"  to make it the reference: align3gr policy promote {steps['register']['version']}")
    return "\n".join(lines)


def _stage(name: str, facts: dict[str, Any]) -> list[str]:
    guard = facts["guard"]
    lines = [
        f"  {name:<10} {facts['samples']} samples, {facts['steps']} steps, loss {facts['first']['loss']:.3f} "
        f"-> {facts['last']['loss']:.3f}"
    ]
    if "not_judged" in guard:
        lines.append(f"    not judged: {guard['not_judged']}")
    else:
        names = ("ndcg@10", "recall@50", "coverage")
        changes = ", ".join(f"{m} {guard['before'][m]:.4f} -> {guard['after'][m]:.4f}" for m in names)
        lines.append(f"    on {guard['after']['users']} users: {changes}")
    return lines + [f"    not chained: {sentence}" for sentence in guard["broken"]]
