"""Commands: tokenize; codec show, quality, encode, decode."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align3gr.console import JsonOption, emit, say, settings_of

if TYPE_CHECKING:
    from align3gr.settings import Settings
    from policies.codec import ScidCodec

app = typer.Typer()
codec = typer.Typer(no_args_is_help=True, help="Which SCID is which item.")
app.add_typer(codec, name="codec")

PolicyOption = typer.Option(
    None, "--policy", help="Codec of this policy (default: the fitted one, else the reference's)."
)


@app.command()
def tokenize(
    context: typer.Context,
    seed: int = typer.Option(0, min=0, help="Of the quantizer's weights and batches."),
    device: str = typer.Option("cpu", help="Where the RQ-VAE trains: cpu, cuda or cuda:N."),
    as_json: bool = JsonOption,
) -> None:
    """Give every catalogue item its SCID: text and behaviour embeddings, RQ-VAE, unique assignment.

    Writes home/codec. Policies in service keep the codec they were trained on.
    """
    from align3gr.progress import Bars
    from trainer.tokenization import fit_codec
    from trainer.training_input import read_training_input

    settings = settings_of(context)
    given = read_training_input(settings.home, settings.features, need_feedback=False)
    if not given.histories:
        say("no feedback yet: SCIDs come from text alone; run tokenize again when there is some")
    with Bars(shown=not as_json) as bars:
        report = fit_codec(
            given.items,
            given.histories,
            settings.trainer.tokenization,
            settings.home / "codec",
            seed=seed,
            device=device,
            progress=bars,
        )
    emit(
        {"codec": str(settings.home / "codec"), "log_version": given.log_version} | report.as_dict(), as_json
    )


@codec.command("show")
def show(context: typer.Context, policy: str | None = PolicyOption, as_json: bool = JsonOption) -> None:
    """Show a codec: items, levels, how evenly its codes are used, both hashes."""
    from trainer.tokenization.quality import codebook_perplexity, codebook_use

    where, found = _codec(settings_of(context), policy)
    facts: dict[str, Any] = {
        "codec": str(where),
        "items": len(found),
        "sizes": list(found.sizes),
        "ambiguous": 0,  # a codec that held two items of one SCID would have been refused
        "use": [round(share, 4) for share in codebook_use(found.codes, found.sizes)],
        "perplexity": [round(value, 1) for value in codebook_perplexity(found.codes)],
        "text_encoder": found.encoder().text.kind if (where / "quantizer").is_dir() else None,
        "quantizer_hash": found.quantizer_hash,
        "item_map_hash": found.item_map_hash,
    }
    emit(facts, as_json)


@codec.command("quality")
def quality(context: typer.Context, policy: str | None = PolicyOption, as_json: bool = JsonOption) -> None:
    """How good the ids are: collisions before resolution, use and perplexity of each level, prefix purity.

    Purity is measured against the catalogue's last category of each item, beside what chance would give.
    """
    import json

    from trainer.tokenization.fitting import REPORT
    from trainer.tokenization.quality import codebook_perplexity, codebook_use, prefix_purity

    settings = settings_of(context)
    where, found = _codec(settings, policy)
    fitted = json.loads((where / REPORT).read_text(encoding="utf-8")) if (where / REPORT).is_file() else {}
    categories = {row["item_id"]: (row["categories"] or [None])[-1] for row in _items(settings)}
    purity = prefix_purity(found.codes, [categories.get(item) for item in found.item_ids])
    facts: dict[str, Any] = {
        "items": len(found),
        "ambiguous": 0,  # a codec that held two items of one SCID would have been refused
        "collision_rate": fitted.get("collision_rate"),
        "use": list(codebook_use(found.codes, found.sizes)),
        "perplexity": list(codebook_perplexity(found.codes)),
        "purity": [
            {
                "depth": one.depth,
                "pairs": one.pairs,
                "purity": one.purity,
                "chance": one.chance,
                "lift": one.lift,
            }
            for one in purity
        ],
    }

    def text() -> str:
        unresolved = facts["collision_rate"]
        lines = [
            f"{len(found)} items, 0 ambiguous, "
            + ("" if unresolved is None else f"{unresolved:.1%} shared an SCID before resolution, ")
            + f"levels {found.sizes}"
        ]
        for level, (use, perplexity) in enumerate(
            zip(facts["use"], facts["perplexity"], strict=True), start=1
        ):
            lines.append(f"level {level}: {use:.1%} of the codes used, perplexity {perplexity:.1f}")
        for one in purity:
            lines.append(
                f"same first {one.depth}: {one.purity:.1%} of {one.pairs} pairs share their category "
                f"({one.chance:.1%} by chance, {one.lift:.1f}x)"
            )
        return "\n".join(lines)

    emit(facts, as_json, text)


@codec.command("encode")
def encode(
    context: typer.Context,
    items: list[str] = typer.Argument(help="Item ids.", metavar="ITEM..."),
    policy: str | None = PolicyOption,
    as_json: bool = JsonOption,
) -> None:
    """The SCID of each ITEM, and the items that share its first codes, nearest first."""
    settings = settings_of(context)
    _, found = _codec(settings, policy)
    titles = _titles(settings)
    facts: dict[str, Any] = {}
    for item in items:
        near = _neighbours(found, item)
        facts[item] = {
            "scid": list(found.encode(item)),
            "tokens": "".join(_tokens(found.encode(item))),
            "title": titles.get(item),
            "near": [
                {"item_id": other, "shared": shared, "title": titles.get(other)} for other, shared in near
            ],
        }

    def text() -> str:
        lines = []
        for item, one in facts.items():
            lines.append(f"{one['tokens']}  {item}  {one['title'] or ''}")
            for other in one["near"]:
                lines.append(f"    {other['shared']} shared  {other['item_id']}  {other['title'] or ''}")
        return "\n".join(lines)

    emit(facts, as_json, text)


@codec.command("decode")
def decode(
    context: typer.Context,
    codes: list[str] = typer.Argument(help="Codes as 12,7,255 or <a_12><b_7><c_255>.", metavar="SCID..."),
    policy: str | None = PolicyOption,
    as_json: bool = JsonOption,
) -> None:
    """The item of each SCID."""
    settings = settings_of(context)
    _, found = _codec(settings, policy)
    titles = _titles(settings)
    facts = {}
    for text in codes:
        item = found.decode(_read_codes(text, found))
        facts[text] = {"item_id": item, "title": titles.get(item)}
    emit(
        facts,
        as_json,
        lambda: "\n".join(f"{c}  {f['item_id']}  {f['title'] or ''}" for c, f in facts.items()),
    )


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


def _items(settings: "Settings") -> list[dict[str, Any]]:
    """The catalogue's rows, delisted items too; none where there is no catalogue."""
    from features.catalogue import Catalogue, CatalogueMissing

    try:
        items = Catalogue.open(settings.home / "catalogue", create=False).items(listed_only=False)
    except CatalogueMissing:
        return []
    rows: list[dict[str, Any]] = items.select(["item_id", "title", "categories"]).to_pylist()
    return rows


def _titles(settings: "Settings") -> dict[str, str]:
    return {row["item_id"]: row["title"] for row in _items(settings)}


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
    import re

    from features.errors import BadInput

    if re.fullmatch(r"\d+(,\d+)*", text):
        codes = tuple(int(part) for part in text.split(","))
        if len(codes) == found.levels:
            return codes
    tokens = re.findall(r"<([a-z])_(\d+)>", text)
    codes = tuple(int(code) for _, code in tokens)
    if len(codes) == found.levels and "".join(_tokens(codes)) == text:
        return codes
    raise BadInput(f"{text!r} is no SCID of {found.levels} codes; write it as 12,7,255 or <a_12><b_7><c_255>")
