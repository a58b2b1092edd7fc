"""Commands: codec show, quality, encode, decode: how ids map back to items, and how good they are."""

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
    from align3gr.codec_quality import catalogue_rows, fitted_report, leaf_category
    from trainer.tokenization.quality import ambiguous_items, codebook_perplexity, codebook_use

    settings = settings_of(context)
    where, found = _codec(settings, policy)
    fitted = fitted_report(settings, where, found)
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
        "collaborative": fitted.get("collaborative"),
        "aligned": fitted.get("aligned"),
        "quantizer_hash": found.quantizer_hash,
        "item_map_hash": found.item_map_hash,
    }
    if plot is not None:
        from align3gr.codebook_plot import plot_codebooks

        rows = catalogue_rows(settings)
        plot_codebooks(
            found,
            [leaf_category(rows.get(item)) for item in found.item_ids],
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
    from align3gr.codec_quality import quality_facts, quality_text

    settings = settings_of(context)
    where, found = _codec(settings, policy)
    facts = quality_facts(settings, where, found)
    emit(facts, as_json, lambda: quality_text(facts, found))


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
    from features.histories import items_of_users, recent_histories
    from features.log import FeedbackLog

    if not found.user_sizes:
        raise BadInput("this codec gives no SCIDs to users; fit one that does with `align3gr tokenize`")
    snapshot = FeedbackLog.open(settings.home / "log", create=False).snapshot()
    known: dict[str, list[str]] = {}
    if snapshot.files:
        with connect(settings.features) as con:
            known = items_of_users(recent_histories(con, snapshot, settings.features, user_ids=users))
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


def _titles(settings: "Settings") -> dict[str, str]:
    from align3gr.codec_quality import catalogue_rows

    return {item: row["title"] for item, row in catalogue_rows(settings).items()}


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
