"""What is known of a codec's quality: from the codec itself, its fit's report, the catalogue and the log.

The measures are those of ``trainer.tokenization.quality``; here what they need is found, and what they gave
is said.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.tokenization.quality import (
    ambiguous_items,
    category_lift,
    codebook_perplexity,
    codebook_use,
    met_together,
    new_item_lift,
    together_lift,
)
from trainer.tokenization.report import REPORT

if TYPE_CHECKING:
    from align3gr.settings import Settings
    from policies.codec import ScidCodec


def quality_facts(settings: "Settings", where: Path, found: "ScidCodec") -> dict[str, Any]:
    """Everything ``codec quality`` tells of the codec ``found``, read from ``where``."""
    fitted = fitted_report(settings, where, found)
    return {
        "items": len(found),
        "ambiguous": ambiguous_items(found.codes),
        "collision_rate": fitted.get("collision_rate"),
        "use": list(codebook_use(found.codes, found.sizes)),
        "perplexity": list(codebook_perplexity(found.codes)),
        "users": _users_facts(found, fitted),
        "auc": fitted.get("auc") or None,
        "recall_at_10": fitted.get("recall_at_10") or None,
        "switched_at": fitted.get("switched_at"),
        "lifts": _lifts(settings, found, int(fitted.get("items", len(found)))),
    }


def quality_text(facts: dict[str, Any], found: "ScidCodec") -> str:
    """``quality_facts`` for a person."""
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


def fitted_report(settings: "Settings", where: Path, found: "ScidCodec") -> dict[str, Any]:
    """What the fit of this codec reported; a policy's codec carries none, so the fitted one's when it is the
    same quantizer. Empty where there is none."""
    for directory in (where, settings.home / "codec"):
        if (directory / REPORT).is_file():
            fitted: dict[str, Any] = json.loads((directory / REPORT).read_text(encoding="utf-8"))
            if fitted.get("quantizer_hash") == found.quantizer_hash:
                return fitted
    return {}


def catalogue_rows(settings: "Settings") -> dict[str, dict[str, Any]]:
    """The catalogue's rows by item id, delisted items too; none where there is no catalogue."""
    from features.catalogue import Catalogue, CatalogueMissing

    try:
        items = Catalogue.open(settings.home / "catalogue", create=False).items(listed_only=False)
    except CatalogueMissing:
        return {}
    return {row["item_id"]: row for row in items.select(["item_id", "title", "categories"]).to_pylist()}


def leaf_category(row: dict[str, Any] | None) -> str | None:
    """The last category of a catalogue row: the narrowest."""
    categories = (row or {}).get("categories") or ()
    return categories[-1] if categories else None


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
    rows = catalogue_rows(settings)
    categories = [leaf_category(rows.get(item)) for item in found.item_ids]
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


def _histories(settings: "Settings") -> list[list[str]]:
    """Every user's history in the log; none where there is no log."""
    from features.catalogue import CatalogueMissing
    from trainer.errors import CannotTrain
    from trainer.training_input import read_training_input

    try:
        return read_training_input(settings.home, settings.features, need_feedback=False).histories
    except (CatalogueMissing, CannotTrain):
        return []
