"""Commands: policy list, show, why, promote, canary, withdraw, rollback, resume, history, export, mirror."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align3gr.console import JsonOption, emit, say, settings_of

if TYPE_CHECKING:
    from align3gr.settings import Settings
    from policies.ledger import LedgerEntry, PromotionLedger
    from policies.registry import Registry

app = typer.Typer()
policy = typer.Typer(no_args_is_help=True, help="Registered policies, and which of them is the reference.")
app.add_typer(policy, name="policy")

WhoOption = typer.Option(None, "--who", help="Who does this (default: the user of the operating system).")
WhyOption = typer.Option("by hand", "--why", help="Reason, kept in the ledger.")


@policy.command("list")
def list_policies(context: typer.Context, as_json: bool = JsonOption) -> None:
    """List registered policies, the reference and the canary marked."""
    registry, ledger = _rooms(context)
    reference, anchor, on_trial = ledger.reference(), ledger.anchor(), ledger.canary()
    rows = [
        {
            **found.as_dict(),
            "reference": found.version == reference,
            "anchor": found.version == anchor,
            "canary": on_trial is not None and found.version == on_trial.version,
        }
        for found in registry.list()
    ]

    def text() -> str:
        if not rows:
            return f"no policy in {registry.directory}: make one with align3gr tokenize and align3gr sft"
        head = f"{'':2}{'version':<9}{'kind':<9}{'parent':<9}{'round':<26}{'created':<27}"
        lines = [head.rstrip()]
        for row in rows:
            mark = "*" if row["reference"] else "c" if row["canary"] else "a" if row["anchor"] else ""
            cells = (row["parent"] or "-", row["round_id"] or "-", row["created_at"] or "-")
            line = f"{mark:<2}{row['version']:<9}{row['kind']:<9}{cells[0]:<9}{cells[1]:<26}{cells[2]:<27}"
            lines.append(line.rstrip())
        lines.append("* reference, a anchor" + (f", c canary: {on_trial.words}" if on_trial else ""))
        return "\n".join(lines)

    facts = {
        "reference": reference,
        "anchor": anchor,
        "canary": on_trial.as_dict() if on_trial else None,
        "held": ledger.held(),
        "policies": rows,
    }
    emit(facts, as_json, text)


@policy.command("show")
def show_policy(context: typer.Context, version: str, as_json: bool = JsonOption) -> None:
    """Show a policy: lineage, metrics, the gate's checks, every move of the ledger that names it.

    Exits with 2, after saying what it knows, when a file of it is not what it was written with.
    """
    from policies.directory import verify
    from policies.errors import PolicyRefused

    registry, ledger = _rooms(context)
    manifest = registry.show(version)
    moves = [entry.as_dict() for entry in ledger.history() if version in (entry.source, entry.target)]
    decision = _decision_of(registry, manifest)
    facts = {
        "version": version,
        "reference": ledger.reference() == version,
        "path": str(registry.path(version)),
        "manifest": manifest,
        "gate": decision,
        "moves": moves,
    }

    def text() -> str:
        lines = [f"policy {version}" + (" (reference)" if facts["reference"] else "")]
        lines += [f"{'path':<16} {facts['path']}", *_described(manifest, decision)]
        lines += [f"{'moved':<16} {_sentence(move)}" for move in moves]
        return "\n".join(lines)

    try:
        verify(registry.path(version))
    except PolicyRefused as error:
        emit({**facts, "damage": str(error)}, as_json, text)
        raise
    emit({**facts, "damage": None}, as_json, text)


@policy.command("why")
def why_policy(
    context: typer.Context,
    version: str,
    replay: bool = typer.Option(
        False,
        "--replay",
        help="Take the decision again from its stored input, and say whether it is the same.",
    ),
    as_json: bool = JsonOption,
) -> None:
    """Say in sentences why VERSION was promoted, held or refused, and what became of it.

    With --replay exits with 1 when the decision, taken again, differs.
    """
    from policies.gate.record import DECISION, decide_again, same, stored_decision, stored_input
    from policies.gate.words import sentences

    registry, ledger = _rooms(context)
    round_id = (registry.show(version).get("lineage") or {}).get("round_id")
    moves = [entry.as_dict() for entry in ledger.history() if version in (entry.source, entry.target)]
    facts: dict[str, Any] = {"version": version, "round_id": round_id, "outcome": None, "moves": moves}
    if round_id is None:
        facts["sentences"] = [f"{version} comes from no round, so no gate has judged it."]
        if replay:
            facts["sentences"].append("There is no decision to take again.")
    else:
        directory = registry.home / "rounds" / str(round_id)
        decision = stored_decision(directory)
        facts |= {"outcome": decision["outcome"], "decision": str(directory / DECISION)}
        facts["sentences"] = sentences(version, decision, stored_input(directory))
        if replay:
            stored, again = decide_again(directory)
            facts["same"] = same(stored, again)
            facts["sentences"].append(
                f"Taken again from its stored input, the decision is the same: {again['outcome']}."
                if facts["same"]
                else f"Taken again from its stored input, it DIFFERS: {again['outcome']}: {again['why']}"
            )
    facts["sentences"] += [_sentence(move).strip() for move in moves] or [
        f"{version} never was the reference."
    ]
    emit(facts, as_json, lambda: "\n".join(facts["sentences"]))
    if facts.get("same") is False:
        raise typer.Exit(1)


@policy.command("promote")
def promote(
    context: typer.Context,
    version: str,
    expects: str | None = typer.Option(
        None, "--expects", help="Reference this is to replace (default: the one in force now)."
    ),
    who: str | None = WhoOption,
    why: str = WhyOption,
    as_json: bool = JsonOption,
) -> None:
    """Make VERSION the reference, after checking that it loads and matches its codec."""
    registry, ledger = _rooms(context)
    replaced = expects if expects is not None else ledger.reference()
    path = registry.path(version)
    from policies.policy import Policy

    Policy.load(path)
    entry = ledger.promote(version, expects=replaced, who=who or _user(), why=why)
    _tell(entry, as_json)


@policy.command("canary")
def canary(
    context: typer.Context,
    version: str | None = typer.Argument(None, help="Left out: say how the canary does, and change nothing."),
    share: float | None = typer.Option(
        None, "--share", help="Of users, above 0 and below 1 (default: the first of promotion.canary.steps)."
    ),
    who: str | None = WhoOption,
    why: str = WhyOption,
    as_json: bool = JsonOption,
) -> None:
    """Give VERSION a share of users beside the reference; the scheduler grows or withdraws it."""
    from policies.settings import CanarySettings

    settings = settings_of(context)
    registry, ledger = _rooms(context)
    if version is None:
        _look(settings, as_json)
        return
    steps = (settings.policies.promotion.canary or CanarySettings()).steps
    path = registry.path(version)
    from policies.policy import Policy

    Policy.load(path)
    entry = ledger.start_canary(
        version,
        steps[0] if share is None else share,
        expects=ledger.reference(),
        who=who or _user(),
        why=why,
    )
    _tell(entry, as_json)


@policy.command("withdraw")
def withdraw(
    context: typer.Context,
    version: str,
    who: str | None = WhoOption,
    why: str = WhyOption,
    as_json: bool = JsonOption,
) -> None:
    """End the canary VERSION: the reference serves everybody; automatic promotion is held as by rollback."""
    _, ledger = _rooms(context)
    _tell(ledger.withdraw(version, who=who or _user(), why=why), as_json)
    if not as_json:
        say("automatic promotion is held until `align3gr policy resume`")


@policy.command("rollback")
def rollback(
    context: typer.Context,
    to: str | None = typer.Option(None, "--to", help="Earlier reference (default: the one before)."),
    who: str | None = WhoOption,
    why: str = WhyOption,
    as_json: bool = JsonOption,
) -> None:
    """Go back to an earlier reference; automatic promotion is held until `policy resume`.

    While there is a canary it is what is taken back, unless --to names an earlier reference.
    """
    registry, ledger = _rooms(context)
    on_trial = ledger.canary()
    if to is None and on_trial is not None:
        entry = ledger.withdraw(on_trial.version, who=who or _user(), why=why)
    else:
        if to is not None:
            registry.path(to)
        entry = ledger.rollback(who=who or _user(), why=why, to=to)
    _tell(entry, as_json)
    if not as_json:
        say("automatic promotion is held until `align3gr policy resume`")


@policy.command("resume")
def resume(
    context: typer.Context, who: str | None = WhoOption, why: str = WhyOption, as_json: bool = JsonOption
) -> None:
    """Let rounds promote again after a rollback."""
    _, ledger = _rooms(context)
    _tell(ledger.resume(who=who or _user(), why=why), as_json)


@policy.command("history")
def history(context: typer.Context, as_json: bool = JsonOption) -> None:
    """Show every move of the reference, oldest first: who, when, why."""
    _, ledger = _rooms(context)
    moves = [entry.as_dict() for entry in ledger.history()]

    def text() -> str:
        return "\n".join(_sentence(move) for move in moves) or "no policy was promoted yet"

    emit({"reference": ledger.reference(), "held": ledger.held(), "moves": moves}, as_json, text)


@policy.command("export")
def export(
    context: typer.Context,
    version: str,
    out: Path = typer.Argument(..., help="The directory to make."),
    as_json: bool = JsonOption,
) -> None:
    """Write VERSION as a plain Hugging Face directory: an adapter is added into its base.

    AutoModelForCausalLM and AutoTokenizer read it; align3gr.json in it says how to ask and how to read.
    """
    registry, _ = _rooms(context)
    path = registry.path(version)
    from policies.export import export_policy

    emit(export_policy(path, out).as_dict(), as_json)


@policy.command("compare")
def compare(
    context: typer.Context,
    first: str = typer.Argument(metavar="A"),
    second: str = typer.Argument(metavar="B"),
    user: str | None = typer.Option(None, "--user", help="Show this user's lists side by side."),
    k: int = typer.Option(10, "--k", min=1, max=100, help="Length of the lists."),
    html: Path | None = typer.Option(None, "--html", help="Also write a page: one file, to open or to send."),
    device: str = typer.Option("cpu", "--device", help="cpu, cuda or cuda:N."),
    as_json: bool = JsonOption,
) -> None:
    """Two policies on the same gate users: figures, slices of users, overlap of lists, examples."""
    from align3gr.comparison_page import write_page
    from align3gr.comparison_text import as_text
    from align3gr.policy_comparison import compare as run
    from align3gr.progress import Bars

    with Bars(shown=not as_json) as bars:
        found = run(settings_of(context), first, second, user=user, k=k, device=device, progress=bars)
    if html is not None:
        write_page(html, found)
    emit(found.as_dict(), as_json, lambda: as_text(found))


@policy.command("mirror")
def mirror(context: typer.Context, as_json: bool = JsonOption) -> None:
    """Bring MLflow up to date with the registered policies, the rounds and the reference."""
    registry, ledger = _rooms(context)
    done = registry.mirror(ledger)
    where = registry.settings.uri or str(registry.home / "mlflow")
    emit({"mirrored": done, "mlflow": where}, as_json)
    if not done:
        raise typer.Exit(1)


def _look(settings: "Settings", as_json: bool) -> None:
    from trainer.canary import look
    from trainer.workplace import Workplace

    found = look(Workplace(settings.home, settings.features, settings.policies, settings.trainer))
    if found is None:
        emit({"canary": None}, as_json, lambda: "there is no canary")
        return
    decided = found.decision

    def text() -> str:
        who = f"{found.version} beside {found.reference}, {found.share:.4g} of users"
        return f"{who}: {decided.action}, {decided.why}"

    emit({"canary": found.as_dict()}, as_json, text)


def _rooms(context: typer.Context) -> "tuple[Registry, PromotionLedger]":
    from policies.ledger import PromotionLedger
    from policies.registry import Registry

    settings = settings_of(context)
    registry = Registry(settings.home, settings.policies.registry)
    return registry, PromotionLedger(settings.home / "ledger")


def _user() -> str:
    """The person: the login name, or the number where the system knows no name (containers)."""
    import getpass
    import os

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"


def _tell(entry: "LedgerEntry", as_json: bool) -> None:
    move = entry.as_dict()
    emit({**move, "reference": entry.reference}, as_json, lambda: _sentence(move))


def _sentence(move: dict[str, Any]) -> str:
    steps = {
        "promote": f"promoted {move['to']} in place of {move['from'] or 'nothing'}",
        "rollback": f"rolled back from {move['from']} to {move['to']}",
        "hold": "held automatic promotion",
        "resume": "resumed automatic promotion",
        "anchor": f"fixed {move['to']} as the anchor",
        "canary": f"gave {move['to']} {move.get('share') or 0:.4g} of users beside {move['from']}",
        "withdraw": f"withdrew the canary {move['to']}, {move['from']} serves everybody",
    }
    return f"{move['seq']:>4}  {move['at'][:19]}  {move['who']} {steps[move['action']]}: {move['why']}"


def _decision_of(registry: "Registry", manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The stored decision with all figures; none for a policy of no round, or where the record is gone."""
    from policies.gate.record import NoDecision, stored_decision

    round_id = (manifest.get("lineage") or {}).get("round_id")
    if round_id is None:
        return None
    try:
        return stored_decision(registry.home / "rounds" / str(round_id))
    except NoDecision:
        return None


def _described(manifest: dict[str, Any], decision: dict[str, Any] | None) -> list[str]:
    """Kind, base, lineage and gate of a manifest as aligned lines."""
    lineage = manifest.get("lineage") or {}
    lines = [f"{'kind':<16} {manifest.get('kind')}"]
    if manifest.get("base"):
        lines.append(f"{'base':<16} {manifest['base'].get('version')}")
    for key in ("parent", "dataset_id", "round_id", "created_at"):
        if lineage.get(key) is not None:
            lines.append(f"{key:<16} {lineage[key]}")
    for name, value in (lineage.get("metrics") or {}).items():
        if isinstance(value, int | float):
            lines.append(f"{name:<16} {value:.4f}")
    gate = decision or lineage.get("gate")
    if isinstance(gate, dict):
        lines.append(f"{'gate':<16} {gate.get('outcome')}: {gate.get('why')}")
        for check in gate.get("checks", []):
            lines.append(f"{'':<16} {'pass' if check['passed'] else 'FAIL'}  {check['words']}")
    return lines
