"""What a fit of a codec gave: figures for people and for lineage, kept beside the codec."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .joint import Joint
from .quality import CodeArray, codebook_perplexity, codebook_use

REPORT = "report.json"
"""Lies beside a fitted codec (policies carry the codec without it)."""


@dataclass(frozen=True)
class TokenizationReport:
    """What a fit gave, for people and for lineage."""

    items: int
    sizes: tuple[int, ...]
    method: str
    text_encoder: str
    """"tfidf-svd" or "sentence"."""
    collaborative: str
    """"din", "ppmi" or "none"."""
    pairs: int
    """(History, item met next) pairs that were learned from."""
    aligned: bool
    """Whether users and items were brought together by U2I."""
    items_without_text: int
    items_without_behaviour: int
    collision_rate: float
    """Share of items that shared an SCID before resolution; afterwards none does."""
    moved: int
    """Items whose last code the resolution changed."""
    use: tuple[float, ...]
    """Share of the codes of each level that some item has."""
    perplexity: tuple[float, ...]
    """exp(entropy) of each level's codes over the items."""
    quantizer_hash: str
    item_map_hash: str
    seconds: float
    users: int = 0
    """Users with a history, coded as of its end."""
    user_sizes: tuple[int, ...] = ()
    user_codes_distinct: int = 0
    users_sharing: float = 0.0
    """Share of these users whose SCID another one has too."""
    user_use: tuple[float, ...] = ()
    user_perplexity: tuple[float, ...] = ()
    auc: dict[str, float] = field(default_factory=dict)
    """Of held-out pairs: start, switch (of the phases), end, best."""
    recall_at_10: dict[str, float] = field(default_factory=dict)
    """Of the same pairs over the whole catalogue."""
    switched_at: int | None = None
    """Pass over the users after which the weights switched."""

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def sharing(codes: CodeArray, sizes: Sequence[int]) -> dict[str, Any]:
    """How users' SCIDs are spread over the users."""
    if not len(codes):
        return {}
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    return {
        "user_codes_distinct": len(counts),
        "users_sharing": float(counts[counts > 1].sum() / len(codes)),
        "user_use": codebook_use(codes, sizes),
        "user_perplexity": codebook_perplexity(codes),
    }


def watched_pairs(joint: Joint | None) -> dict[str, Any]:
    """AUC and recall of held-out pairs at the moments that count."""
    if joint is None:
        return {}
    moments = {"start": joint.start, "switch": joint.switch, "end": joint.end, "best": joint.best}
    return {
        "auc": {name: watched.auc for name, watched in moments.items()},
        "recall_at_10": {name: watched.recall_at_10 for name, watched in moments.items()},
        "switched_at": joint.switched_at,
    }
