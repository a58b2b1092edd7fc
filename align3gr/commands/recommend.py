"""Command: recommend."""

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
    from align3gr.contexts import contexts_of, listed_titles
    from align3gr.registered import directories_of
    from features.errors import BadInput
    from policies.policy import Policy

    settings = settings_of(context)
    (directory,) = directories_of(settings, [policy] if policy else [])
    contexts, unknown = _online(settings, users) if online else contexts_of(settings, users)
    if unknown and not strangers:
        raise BadInput(
            f"user {unknown[0]!r} has no feedback yet; check the id, or add --strangers for what is popular"
        )
    loaded = Policy.load(directory, device=device, settings=settings.policies.decoding)
    titles, listed = listed_titles(settings)
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


def _online(settings: "Settings", users: list[str]) -> "tuple[list[UserContext], list[str]]":
    from features.online.contexts import OnlineFeatures
    from policies.policy import UserContext

    found = OnlineFeatures.open(settings.home / "online", settings.features.online).contexts(users)
    contexts = [UserContext(one.user_id, one.history, one.seen) for one in found]
    return contexts, [one.user_id for one in found if not one.known]


def _facts(one: "Recommendation", titles: dict[str, str]) -> dict[str, Any]:
    return {
        "item_id": one.item_id,
        "title": titles.get(one.item_id),
        "score": one.score,
        "position": one.position,
        "source": one.source,
    }
