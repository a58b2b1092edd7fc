"""Commands: codec show, quality, encode, decode: how ids map back to items, and how good they are."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align3gr.console import JsonOption, emit, settings_of

if TYPE_CHECKING:
    from align3gr.settings import Settings
    from policies.codec import ScidCodec

codec = typer.Typer(no_args_is_help=True, help="Which SCID is which item.")

PolicyOption = typer.Option(
    None, "--policy", help="Codec of this policy (default: the fitted one, else the reference's)."
)


@codec.command("show")
def show(
    context: typer.Context,
    policy: str | None = PolicyOption,
    plot: Path | None = typer.Option(
        None, "--plot", help="Draw the codebooks into this file: .html, .svg or .png."
    ),
    as_json: bool = JsonOption,
) -> None:
    """Show a codec: items, levels, use of its codes, collisions before resolution, both hashes.

    The drawing has the use of every code a level, and the first level's codes in two dimensions, each named
    by the category most of its items have.
    """
    from trainer.tokenization.quality import ambiguous_items, codebook_perplexity, codebook_use

    settings = settings_of(context)
    where, found = _codec(settings, policy)
    fitted = _report(settings, where, found)
    facts: dict[str, Any] = {
        "codec": str(where),
        "items": len(found),
        "sizes": list(found.sizes),
        "user_sizes": list(found.user_sizes),
        "ambiguous": ambiguous_items(found.codes),
        "collision_rate": fitted.get("collision_rate"),
        "use": [round(share, 4) for share in codebook_use(found.codes, found.sizes)],
        "perplexity": [round(value, 1) for value in codebook_perplexity(found.codes)],
        "text_encoder": found.encoder().text.kind if found.can_grow else None,
        "method": found.encoder().quantizer.kind if found.can_grow else None,
        "quantizer_hash": found.quantizer_hash,
        "item_map_hash": found.item_map_hash,
    }
    if plot is not None:
        from align3gr.codebook_plot import plot_codebooks

        rows = _rows(settings)
        plot_codebooks(
            found,
            [_leaf(rows.get(item)) for item in found.item_ids],
            [(rows.get(item) or {}).get("title") or item for item in found.item_ids],
            plot,
        )
        facts["plot"] = str(plot)
    emit(facts, as_json)


@codec.command("quality")
def quality(context: typer.Context, policy: str | None = PolicyOption, as_json: bool = JsonOption) -> None:
    """How good the ids are: collisions before resolution, use and perplexity of each level, lifts.

    A lift is how many times more often than under permuted codes items of one prefix share their category
    (the catalogue's last), or were met by one user; for items that came after the fit, how often they share
    the category of the items they lie among. With a 95% bootstrap interval.
    """
    from trainer.tokenization.quality import ambiguous_items, codebook_perplexity, codebook_use

    settings = settings_of(context)
    where, found = _codec(settings, policy)
    fitted = _report(settings, where, found)
    facts: dict[str, Any] = {
        "items": len(found),
        "ambiguous": ambiguous_items(found.codes),
        "collision_rate": fitted.get("collision_rate"),
        "use": list(codebook_use(found.codes, found.sizes)),
        "perplexity": list(codebook_perplexity(found.codes)),
        "users": _users_facts(found, fitted),
        "auc": fitted.get("auc"),
        "recall_at_10": fitted.get("recall_at_10"),
        "switched_at": fitted.get("switched_at"),
        "lifts": _lifts(settings, found, int(fitted.get("items", len(found)))),
    }
    emit(facts, as_json, lambda: _quality_text(facts, found))


@codec.command("encode")
def encode(
    context: typer.Context,
    items: list[str] = typer.Argument(None, help="Item ids.", metavar="[ITEM]..."),
    users: list[str] = typer.Option([], "--user", help="A user id, for the user's SCID; may be repeated."),
    policy: str | None = PolicyOption,
    as_json: bool = JsonOption,
) -> None:
    """The SCID of each ITEM, and the items that share its first codes, nearest first; the SCID of each user.

    A user's SCID is that of the user's history as it stands in the log now; nothing is stored a user.
    """
    from features.errors import BadInput

    if not items and not users:
        raise BadInput("name an item, or a user with --user, to see its SCID")
    settings = settings_of(context)
    _, found = _codec(settings, policy)
    titles = _titles(settings)
    facts: dict[str, Any] = {
        "items": {item: _item_facts(found, item, titles) for item in items or ()},
        "users": _coded_users(settings, found, users) if users else {},
    }

    def text() -> str:
        lines = []
        for item, one in facts["items"].items():
            lines.append(f"{one['tokens']}  {item}  {one['title'] or ''}")
            for other in one["near"]:
                lines.append(f"    {other['shared']} shared  {other['item_id']}  {other['title'] or ''}")
        for user, one in facts["users"].items():
            lines.append(f"{one['tokens']}  {user}  history of {len(one['history'])}")
        return "\n".join(lines)

    emit(facts, as_json, text)


@codec.command("decode")
def decode(
    context: typer.Context,
    codes: list[str] = typer.Argument(
        help="Codes as 12,7,255 or <a_12><b_7><c_255>; the first codes alone for all items below them.",
        metavar="SCID...",
    ),
    limit: int = typer.Option(20, "--limit", min=1, help="Items listed below the first codes of an SCID."),
    policy: str | None = PolicyOption,
    as_json: bool = JsonOption,
) -> None:
    """The item of each SCID, or the items below its first codes."""
    settings = settings_of(context)
    _, found = _codec(settings, policy)
    titles = _titles(settings)
    facts: dict[str, Any] = {}
    for text in codes:
        wanted = _read_codes(text, found)
        if len(wanted) == found.levels:
            item = found.decode(wanted)
            facts[text] = {"item_id": item, "title": titles.get(item)}
        else:
            facts[text] = _below(found, wanted, titles, limit)

    def said() -> str:
        lines = []
        for text, one in facts.items():
            if "item_id" in one:
                lines.append(f"{text}  {one['item_id']}  {one['title'] or ''}")
                continue
            lines.append(f"{text}  {one['count']} items")
            lines += [
                f"    {','.join(map(str, each['scid']))}  {each['item_id']}  {each['title'] or ''}"
                for each in one["items"]
            ]
        return "\n".join(lines)

    emit(facts, as_json, said)


def _codec(settings: "Settings", policy: str | None) -> "tuple[Path, ScidCodec]":
    from features.errors import BadInput
    from policies.codec import ScidCodec
    from policies.directory import read_manifest
    from policies.errors import PolicyRefused
    from policies.ledger import PromotionLedger
    from policies.registry import Registry

    registry = Registry(settings.home, settings.policies.registry)
    where = settings.home / "codec"
    if policy is None and not where.is_dir():
        policy = PromotionLedger(settings.home / "ledger").reference()
        if policy is None:
            raise BadInput(f"no codec at {where} and no reference policy; fit one with `align3gr tokenize`")
    if policy is None:
        return where, ScidCodec.load(where)
    path = registry.path(policy)
    found = ScidCodec.load(path / "codec")
    if read_manifest(path).codec.quantizer_hash != found.quantizer_hash:
        raise PolicyRefused(
            f"codec mismatch: {path / 'codec'} is not the codec of policy {policy}; restore it"
        )
    return path / "codec", found


def _report(settings: "Settings", where: Path, found: "ScidCodec") -> dict[str, Any]:
    """What the fit of this codec reported; a policy's codec carries none, so the fitted one's when it is the
    same quantizer. Empty where there is none."""
    from trainer.tokenization.fitting import REPORT

    for directory in (where, settings.home / "codec"):
        if (directory / REPORT).is_file():
            fitted: dict[str, Any] = json.loads((directory / REPORT).read_text(encoding="utf-8"))
            if fitted.get("quantizer_hash") == found.quantizer_hash:
                return fitted
    return {}


def _users_facts(found: "ScidCodec", fitted: dict[str, Any]) -> dict[str, Any] | None:
    """What the fit reported of the users' side; none for a codec without SCIDs for users."""
    if not found.user_sizes:
        return None
    return {
        "sizes": list(found.user_sizes),
        "users": fitted.get("users"),
        "sharing": fitted.get("users_sharing"),
        "use": fitted.get("user_use"),
        "perplexity": fitted.get("user_perplexity"),
        "codes_distinct": fitted.get("user_codes_distinct"),
    }


def _lifts(settings: "Settings", found: "ScidCodec", fitted_items: int) -> dict[str, list[dict[str, float]]]:
    """Lifts of depths 1 .. L - 1 by name, empty where there is nothing to compare with.

    Items behind the first ``fitted_items`` rows came after the fit, coded by their text alone.
    """
    import numpy as np

    from trainer.tokenization.quality import category_lift, met_together, new_item_lift, together_lift

    rows = _rows(settings)
    categories = [_leaf(rows.get(item)) for item in found.item_ids]
    depths = range(1, found.levels)
    lifts: dict[str, list[dict[str, float]]] = {"category": [], "together": [], "new_items": []}
    if any(label is not None for label in categories):
        lifts["category"] = [
            category_lift(found.codes, categories, depth=depth).as_dict() for depth in depths
        ]
        fitted, fresh = found.codes[:fitted_items], found.codes[fitted_items:]
        if len(fresh):
            lifts["new_items"] = [
                new_item_lift(
                    fitted, categories[:fitted_items], fresh, categories[fitted_items:], depth=depth
                ).as_dict()
                for depth in depths
            ]
    histories = _histories(settings)
    if histories:
        index = found.items
        met = met_together(
            [np.array([index[item] for item in one if item in index], dtype=np.int64) for one in histories],
            len(found),
        )
        lifts["together"] = [together_lift(found.codes, met, depth=depth).as_dict() for depth in depths]
    return lifts


def _quality_text(facts: dict[str, Any], found: "ScidCodec") -> str:
    unresolved = facts["collision_rate"]
    lines = [
        f"{facts['items']} items, {facts['ambiguous']} ambiguous, "
        + ("" if unresolved is None else f"{unresolved:.1%} shared an SCID before resolution, ")
        + f"levels {found.sizes}"
    ]
    for level, (use, perplexity) in enumerate(zip(facts["use"], facts["perplexity"], strict=True), start=1):
        lines.append(f"level {level}: {use:.1%} of the codes used, perplexity {perplexity:.1f}")
    users = facts["users"]
    if users is not None and users["users"] is not None:
        sharing = "" if users["sharing"] is None else f", {users['sharing']:.1%} share an SCID with another"
        lines.append(f"{users['users']} users coded{sharing}")
        for level, (use, perplexity) in enumerate(
            zip(users["use"] or (), users["perplexity"] or (), strict=True), start=1
        ):
            lines.append(f"users, level {level}: {use:.1%} of the codes used, perplexity {perplexity:.1f}")
    for name in ("auc", "recall_at_10"):
        if facts[name]:
            lines.append(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in facts[name].items()))
    what = {
        "category": "share their category",
        "together": "were met by one user",
        "new_items": "of a new item and one it lies among share their category",
    }
    for kind, words in what.items():
        lines += [
            f"same first {one['depth']}: {one['share']:.2%} of {one['pairs']} pairs {words} "
            f"({one['permuted']:.2%} permuted, {one['lift']:.1f}x, {one['low']:.1f} to {one['high']:.1f})"
            for one in facts["lifts"][kind]
        ]
    return "\n".join(lines)


def _item_facts(found: "ScidCodec", item: str, titles: dict[str, str]) -> dict[str, Any]:
    scid = found.encode(item)
    return {
        "scid": list(scid),
        "tokens": "".join(_tokens(scid)),
        "title": titles.get(item),
        "near": [
            {"item_id": other, "shared": shared, "title": titles.get(other)}
            for other, shared in _neighbours(found, item)
        ],
    }


def _coded_users(settings: "Settings", found: "ScidCodec", users: list[str]) -> dict[str, Any]:
    """The SCID of each user, from the history that a prompt would hold now."""
    from features.duck import connect
    from features.errors import BadInput
    from features.histories import recent_histories
    from features.log import FeedbackLog

    if not found.user_sizes:
        raise BadInput("this codec gives no SCIDs to users; fit one that does with `align3gr tokenize`")
    snapshot = FeedbackLog.open(settings.home / "log", create=False).snapshot()
    known: dict[str, list[str]] = {}
    if snapshot.files:
        with connect(settings.features) as con:
            table = recent_histories(con, snapshot, settings.features, user_ids=users)
        known = dict(zip(table["user_id"].to_pylist(), table["item_ids"].to_pylist(), strict=True))
    strangers = [user for user in users if user not in known]
    if strangers:
        raise BadInput(f"user {strangers[0]!r} has no feedback yet, so no SCID; check the id")
    coded = found.encode_users([known[user] for user in users])
    return {
        user: {
            "scid": scid,
            "tokens": "".join(f"<u{token[1:]}" for token in _tokens(tuple(scid))),
            "history": known[user],
        }
        for user, scid in zip(users, coded.tolist(), strict=True)
    }


def _below(found: "ScidCodec", prefix: tuple[int, ...], titles: dict[str, str], limit: int) -> dict[str, Any]:
    """The items whose SCID begins with ``prefix``, by SCID."""
    import numpy as np

    from policies.errors import CodecError

    rows = np.flatnonzero((found.codes[:, : len(prefix)] == np.array(prefix)).all(axis=1))
    if len(rows) == 0:
        raise CodecError(f"no item has an SCID that begins with {','.join(map(str, prefix))} in this codec")
    rows = rows[np.lexsort(found.codes[rows].T[::-1])]
    return {
        "prefix": list(prefix),
        "count": len(rows),
        "items": [
            {
                "item_id": found.item_ids[row],
                "title": titles.get(found.item_ids[row]),
                "scid": found.codes[row].tolist(),
            }
            for row in rows[:limit]
        ],
    }


def _rows(settings: "Settings") -> dict[str, dict[str, Any]]:
    """The catalogue's rows by item id, delisted items too; none where there is no catalogue."""
    from features.catalogue import Catalogue, CatalogueMissing

    try:
        items = Catalogue.open(settings.home / "catalogue", create=False).items(listed_only=False)
    except CatalogueMissing:
        return {}
    return {row["item_id"]: row for row in items.select(["item_id", "title", "categories"]).to_pylist()}


def _titles(settings: "Settings") -> dict[str, str]:
    return {item: row["title"] for item, row in _rows(settings).items()}


def _leaf(row: dict[str, Any] | None) -> str | None:
    """The last category of a catalogue row: the narrowest."""
    categories = (row or {}).get("categories") or ()
    return categories[-1] if categories else None


def _histories(settings: "Settings") -> list[list[str]]:
    """Every user's history in the log; none where there is no log."""
    from features.catalogue import CatalogueMissing
    from trainer.errors import CannotTrain
    from trainer.training_input import read_training_input

    try:
        return read_training_input(settings.home, settings.features, need_feedback=False).histories
    except (CatalogueMissing, CannotTrain):
        return []


def _neighbours(found: "ScidCodec", item: str, most: int = 5) -> list[tuple[str, int]]:
    """(item id, shared leading codes) of the items with the longest shared prefix, at least one code."""
    import numpy as np

    own = np.array(found.encode(item))
    shared = (found.codes == own).cumprod(axis=1).sum(axis=1)
    shared[found.items[item]] = 0
    order = np.argsort(-shared, kind="stable")[:most]
    return [(found.item_ids[row], int(shared[row])) for row in order if shared[row] > 0]


def _tokens(codes: tuple[int, ...]) -> list[str]:
    from policies.codec import LETTERS

    return [f"<{LETTERS[level]}_{code}>" for level, code in enumerate(codes)]


def _read_codes(text: str, found: "ScidCodec") -> tuple[int, ...]:
    """One to L codes of either spelling."""
    from features.errors import BadInput

    codes: tuple[int, ...] = ()
    if re.fullmatch(r"\d+(,\d+)*", text):
        codes = tuple(int(part) for part in text.split(","))
    else:
        tokens = tuple(int(code) for _, code in re.findall(r"<([a-z])_(\d+)>", text))
        if len(tokens) <= found.levels and "".join(_tokens(tokens)) == text:
            codes = tokens
    if 1 <= len(codes) <= found.levels:
        return codes
    raise BadInput(
        f"{text!r} is no SCID of {found.levels} codes, nor the first of one; "
        "write it as 12,7,255 or <a_12><b_7><c_255>"
    )
