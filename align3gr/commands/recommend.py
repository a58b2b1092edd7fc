"""Commands: recommend, evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align3gr.console import JsonOption, emit, settings_of

if TYPE_CHECKING:
    from align3gr.settings import Settings
    from policies.policy import Recommendation, UserContext

app = typer.Typer()

PolicyOption = typer.Option(None, "--policy", help="Version (default: the reference).")
DeviceOption = typer.Option("cpu", "--device", help="cpu, cuda or cuda:N.")


@app.command()
def recommend(
    context: typer.Context,
    users: list[str] = typer.Argument(help="User ids.", metavar="USER..."),
    k: int = typer.Option(10, "--k", min=1, help="Items a user."),
    policy: str | None = PolicyOption,
    beam: int | None = typer.Option(None, "--beam", min=1, help="Prefixes kept a level (default: settings)."),
    online: bool = typer.Option(False, "--online", help="Read histories from the online store, not the log."),
    strangers: bool = typer.Option(
        False, "--strangers", help="Give users without any feedback what is popular, rather than an error."
    ),
    device: str = DeviceOption,
    as_json: bool = JsonOption,
) -> None:
    """What the reference policy recommends to each USER now."""
    from features.errors import BadInput
    from policies.policy import Policy

    settings = settings_of(context)
    directory = _directory(settings, policy)
    contexts, unknown = _online(settings, users) if online else _from_log(settings, users)
    if unknown and not strangers:
        raise BadInput(
            f"user {unknown[0]!r} has no feedback yet; check the id, or add --strangers for what is popular"
        )
    loaded = Policy.load(directory, device=device, settings=settings.policies.decoding)
    titles, listed = _catalogue(settings)
    lists = loaded.recommend(contexts, k, beam=beam, eligible=listed)
    facts = {
        "policy": loaded.version,
        "users": {
            user.user_id: [_facts(one, titles) for one in listed_items]
            for user, listed_items in zip(contexts, lists, strict=True)
        },
    }

    def text() -> str:
        lines = []
        for user, found in zip(contexts, lists, strict=True):
            known = f"history of {len(user.history)}"
            if user.user_id in unknown:
                known = "no feedback yet: what is popular"
            lines.append(f"{user.user_id}  (policy {loaded.version}, {known})")
            lines += [
                f"{one.position:>4}  {one.score:8.3f}  {one.item_id:<16} {titles.get(one.item_id, '')}"
                for one in found
            ]
        return "\n".join(lines)

    emit(facts, as_json, text)


@app.command()
def evaluate(
    context: typer.Context,
    held_out: Path | None = typer.Option(
        None, "--held-out", help="Events kept back by `replay --leave-out` (JSON lines)."
    ),
    policy: str | None = PolicyOption,
    beam: int | None = typer.Option(None, "--beam", min=1, help="Prefixes kept a level (default: settings)."),
    cutoffs: str = typer.Option("1,5,10,20", "--cutoffs", help="The k of Recall@k and NDCG@k."),
    all_items: bool = typer.Option(
        False, "--all-items", help="Leave seen items in the lists, as printed tables do (another column)."
    ),
    liked_only: bool = typer.Option(False, "--liked-only", help="Held-out events that are liked count only."),
    limit: int | None = typer.Option(None, "--limit", min=1, help="Only the first N users."),
    device: str = DeviceOption,
    as_json: bool = JsonOption,
) -> None:
    """Measure a policy: the full catalogue ranked on held-out events, or else the log's gate users.

    The popularity baseline is measured on the same cases.
    """
    from align3gr.progress import Bars
    from policies.policy import Policy
    from trainer.evaluation import popularity_baseline, rank_catalogue, win_rates

    settings = settings_of(context)
    ks = _cutoffs(cutoffs)
    directory = _directory(settings, policy)
    slates: list[Any] = []
    if held_out is not None:
        ranking = _held_out_cases(settings, held_out, liked_only)
    else:
        slates, ranking = _gate_cases(settings)
    _require_cases(slates, ranking, held_out)
    ranking = ranking[:limit]
    loaded = Policy.load(directory, device=device, settings=settings.policies.decoding)
    _, listed = _catalogue(settings)
    facts: dict[str, Any] = {"policy": loaded.version}
    with Bars(shown=not as_json) as bars:
        if slates:
            rates = win_rates(loaded, slates[:limit], progress=bars)
            facts["slates"] = {
                "users": len(rates),
                "win_rate": sum(rates.values()) / len(rates) if rates else None,
            }
        if ranking:
            ranked = rank_catalogue(
                loaded,
                ranking,
                cutoffs=ks,
                beam=beam,
                eligible=listed,
                exclude_seen=not all_items,
                progress=bars,
            )
            facts["ranking"] = ranked.as_dict()
            popular = [
                one.item_id for one in loaded.recommend([_stranger()], len(loaded.codec), eligible=listed)[0]
            ]
            facts["popularity"] = popularity_baseline(
                popular, ranking, cutoffs=ks, exclude_seen=not all_items
            )
    emit(facts, as_json, lambda: _table(facts))


def _directory(settings: "Settings", policy: str | None) -> Path:
    """Directory of the policy asked for, else of the reference."""
    from features.errors import BadInput
    from policies.ledger import PromotionLedger
    from policies.registry import Registry

    version = policy or PromotionLedger(settings.home / "ledger").reference()
    if version is None:
        raise BadInput("no policy is the reference yet; make one with `align3gr tokenize` and `align3gr sft`")
    return Registry(settings.home, settings.policies.registry).path(version)


def _from_log(settings: "Settings", users: list[str]) -> "tuple[list[UserContext], list[str]]":
    """Contexts in the order of ``users``, and those of them that nobody knows."""
    from features.duck import connect
    from features.histories import recent_histories, seen
    from features.log import FeedbackLog
    from policies.policy import UserContext

    snapshot = FeedbackLog.open(settings.home / "log", create=False).snapshot()
    history: dict[str, list[str]] = {}
    met: dict[str, list[str]] = {}
    if snapshot.files:
        with connect(settings.features) as con:
            found = recent_histories(con, snapshot, settings.features, user_ids=users)
            history = dict(zip(found["user_id"].to_pylist(), found["item_ids"].to_pylist(), strict=True))
            found = seen(con, snapshot, users)
            met = dict(zip(found["user_id"].to_pylist(), found["item_ids"].to_pylist(), strict=True))
    contexts = [UserContext(u, tuple(history.get(u, ())), frozenset(met.get(u, ()))) for u in users]
    return contexts, [user for user in users if user not in met]


def _online(settings: "Settings", users: list[str]) -> "tuple[list[UserContext], list[str]]":
    from features.online.contexts import OnlineFeatures
    from policies.policy import UserContext

    found = OnlineFeatures.open(settings.home / "online", settings.features.online).contexts(users)
    contexts = [UserContext(one.user_id, one.history, one.seen) for one in found]
    return contexts, [one.user_id for one in found if not one.known]


def _catalogue(settings: "Settings") -> tuple[dict[str, str], list[str] | None]:
    """Titles, and the items that may be recommended; without a catalogue all of the codec's may."""
    from features.catalogue import Catalogue, CatalogueMissing

    try:
        items = Catalogue.open(settings.home / "catalogue", create=False).items()
    except CatalogueMissing:
        return {}, None
    ids = items["item_id"].to_pylist()
    return dict(zip(ids, items["title"].to_pylist(), strict=True)), ids


def _held_out_cases(settings: "Settings", file: Path, liked_only: bool) -> list[Any]:
    """A case for each engaged event of the file: the history in the log, the event's item as target."""
    from features.duck import connect
    from features.errors import BadInput
    from features.histories import histories, seen
    from features.levels import Level, level_of
    from features.log import FeedbackLog
    from trainer.evaluation import RankingCase

    engaged = {"click", "rating", "review", "purchase"}
    targets: list[tuple[str, str]] = []
    for event in _events(file):
        level = level_of(event, settings.features.levels)
        counts = level == Level.LIKED or (
            event.kind in engaged and level != Level.DISLIKED and not liked_only
        )
        if counts:
            targets.append((event.user_id, event.item_id))
    if not targets:
        raise BadInput(f"{file} holds no engaged event to look for; write it with `replay --leave-out 1`")
    snapshot = FeedbackLog.open(settings.home / "log", create=False).snapshot()
    users = sorted({user for user, _ in targets})
    with connect(settings.features) as con:
        found = histories(con, snapshot, settings.features, user_ids=users)
        history = dict(zip(found["user_id"].to_pylist(), found["item_ids"].to_pylist(), strict=True))
        found = seen(con, snapshot, users)
        met = dict(zip(found["user_id"].to_pylist(), found["item_ids"].to_pylist(), strict=True))
    return [
        RankingCase(user, tuple(history[user]), item, frozenset(met.get(user, ())))
        for user, item in targets
        if user in history
    ]


def _events(file: Path) -> list[Any]:
    import gzip
    from datetime import UTC, datetime

    from features.errors import BadInput
    from features.interactions import InvalidInteraction, decode_interaction

    now, events, number = datetime.now(UTC), [], 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    events.append(decode_interaction(line, now=now))
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror or error}") from error
    except InvalidInteraction as error:
        raise BadInput(f"{file} line {number}: {error}; see `align3gr validate {file}`") from error
    return events


def _gate_cases(settings: "Settings") -> tuple[list[Any], list[Any]]:
    from features.cases import evaluation_cases
    from features.log import FeedbackLog
    from trainer.evaluation import cases_of

    snapshot = FeedbackLog.open(settings.home / "log", create=False).snapshot()
    found = evaluation_cases(
        snapshot,
        settings.features,
        gate_share=settings.policies.gate.share,
        stop_share=settings.trainer.round.stop_share,
    )
    return cases_of(found.slates, found.ranking)


def _require_cases(slates: list[Any], ranking: list[Any], held_out: Path | None) -> None:
    from features.errors import BadInput

    if slates or ranking:
        return
    if held_out is None:
        raise BadInput("the log holds no case of a gate user yet; evaluate on a file with --held-out")
    raise BadInput(f"no user of {held_out} has a history in the log; replay the rest of the data first")


def _cutoffs(text: str) -> tuple[int, ...]:
    from features.errors import BadInput

    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise BadInput(f"--cutoffs {text}: write positive numbers with commas, as 1,5,10")
    return tuple(sorted({int(part) for part in parts}))


def _stranger() -> "UserContext":
    from policies.policy import UserContext

    return UserContext("")


def _facts(one: "Recommendation", titles: dict[str, str]) -> dict[str, Any]:
    return {
        "item_id": one.item_id,
        "title": titles.get(one.item_id),
        "score": one.score,
        "position": one.position,
        "source": one.source,
    }


def _table(facts: dict[str, Any]) -> str:
    lines = [f"policy {facts['policy']}"]
    if "slates" in facts:
        lines.append(
            f"within slates: win rate {facts['slates']['win_rate']:.4f}, {facts['slates']['users']} users"
        )
    if "ranking" in facts:
        ranked, popular = facts["ranking"], facts["popularity"]
        column = "seen left out" if ranked["seen_left_out"] else "all items"
        lines.append(f"full catalogue, {column}: {ranked['users']} users, {ranked['cases']} cases")
        lines.append(f"{'':<14}{'policy':>9}{'popularity':>12}")
        lines += [f"{name:<14}{ranked[name]:>9.4f}{popular[name]:>12.4f}" for name in popular]
        lines += [f"{name:<14}{ranked[name]:>9.4f}" for name in ("coverage", "validity", "concentration")]
    return "\n".join(lines)
