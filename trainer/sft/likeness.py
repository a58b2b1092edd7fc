"""What items have in common before anything is trained: their catalogue texts, and who is met with whom.

An item's own token is a name: a random row says nothing of what it names, and a small model spends most of
its training on finding out. Two vectors that cost seconds know much of it already,

    t_i   TF-IDF of the item's catalogue text, truncated SVD
    c_i   company in training histories, shifted PPMI, truncated SVD (trainer.tokenization.collaborative)

and a row that starts from both starts near the rows of items that are alike. What a part does not know (an
item without text, an item met alone) is zero there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.tokenization.collaborative import collaborative_embeddings
from trainer.tokenization.text import fit_tfidf

from .votes import TEXT_VOCABULARY

IntArray = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]

WIDTH = 128
"""Singular vectors of a part at most."""
ALL_ALIKE = 1e-4
"""Spread of a part's rows, of length 1, below which they tell nothing apart but rounding."""


@dataclass(frozen=True)
class Likeness:
    """Parts that know something of some item, each float32 [n_items, WIDTH], strongest column first."""

    parts: tuple[Rows, ...]

    @classmethod
    def of(cls, texts: Sequence[str], histories: Sequence[IntArray]) -> "Likeness":
        """``texts``: one an item, may be empty; ``histories``: item numbers, oldest first. Deterministic."""
        encoder = fit_tfidf(texts, dimension=WIDTH, vocabulary=TEXT_VOCABULARY, ngrams=1)
        behaviour = collaborative_embeddings(histories, len(texts), dimension=WIDTH)
        return cls(tuple(part for part in (encoder.encode(texts), behaviour) if part.any()))

    def rows(self, width: int) -> Rows:
        """float32 [n_items, width], mean square 1 over the items that are known, 0 for the others.

        Each part has the same share of the columns and of the square; of a part with more columns than its
        share the strongest are kept.
        """
        n_items = len(self.parts[0]) if self.parts else 0
        found = np.zeros((n_items, width), dtype=np.float32)
        share = width // max(len(self.parts), 1)
        for place, part in enumerate(self.parts):
            kept = part[:, :share]
            known = np.asarray(kept.any(axis=1))
            if not known.any():
                continue
            centred = kept[known] - kept[known].mean(axis=0)
            scale = float(np.sqrt(np.square(centred).sum() / known.sum()))
            if scale < ALL_ALIKE:
                continue
            columns = slice(place * share, place * share + kept.shape[1])
            found[known, columns] = centred * (np.sqrt(width / len(self.parts)) / scale)
        return found
