"""What the catalogue says of items, and what tasks make of it: wishes, preferences, profile lines.

There is no language model at hand to write an intention or a preference, so both are made from categories and
telling words by rules that are a few lines each. A word tells something when it stands in at most a fourth of
the catalogue, a category when in at most half.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from policies.text import terms
from trainer.tokenization.text import item_texts

TELLING_WORDS = 8
"""Words of an item that a wish is drawn from."""
PREFERRED_CATEGORIES = 3
PREFERRED_WORDS = 5


@dataclass(frozen=True)
class CatalogueText:
    """Title, text and categories by item id; an item may lack any of them."""

    titles: Mapping[str, str]
    texts: Mapping[str, str]
    categories: Mapping[str, tuple[str, ...]]
    lines: Mapping[str, str]
    """All of it in one string: what SCIDs and users' profiles are made of (``item_texts``)."""

    @classmethod
    def of(cls, items: pa.Table) -> "CatalogueText":
        """From a catalogue table (``item_id`` and any of ``title``, ``text``, ``categories``)."""
        ids = items.column("item_id").to_pylist()

        def column(name: str) -> list[str]:
            if name not in items.column_names:
                return [""] * len(ids)
            return [one_line(value or "") for value in items.column(name).to_pylist()]

        groups: list[tuple[str, ...]] = [()] * len(ids)
        if "categories" in items.column_names:
            groups = [
                tuple(one_line(name) for name in names or () if name.strip())
                for names in items.column("categories").to_pylist()
            ]
        return cls(
            dict(zip(ids, column("title"), strict=True)),
            dict(zip(ids, column("text"), strict=True)),
            dict(zip(ids, groups, strict=True)),
            dict(zip(ids, map(one_line, item_texts(items)), strict=True)),
        )

    def parts(self) -> Iterator[bytes]:
        """Everything in it, for a hash."""
        for item_id, title in self.titles.items():
            for part in (item_id, title, self.texts[item_id], *self.categories[item_id]):
                yield part.encode("utf-8", "surrogatepass") + b"\0"
            yield b"\n"


NO_TEXT = CatalogueText({}, {}, {}, {})


class ItemWords:
    """The same by row of a codec; nothing for rows the catalogue does not hold. Nothing in it is random."""

    def __init__(self, item_ids: Sequence[str], catalogue: CatalogueText) -> None:
        self.title: list[str] = [catalogue.titles.get(item_id, "") for item_id in item_ids]
        self.text: list[str] = [catalogue.texts.get(item_id, "") for item_id in item_ids]
        self.line: list[str] = [catalogue.lines.get(item_id, "") for item_id in item_ids]
        groups = [catalogue.categories.get(item_id, ()) for item_id in item_ids]
        held = Counter(name for names in groups for name in set(names))
        count = max(len(item_ids), 1)
        self.categories: list[tuple[str, ...]] = [
            tuple(name for name in names if held[name] <= count / 2) for names in groups
        ]
        """The telling ones, as the catalogue orders them (the most specific last, where it has an order)."""
        self._held = held
        found = [
            list(dict.fromkeys(word for word in terms(f"{title} {text}") if _is_word(word)))
            for title, text in zip(self.title, self.text, strict=True)
        ]
        frequency = Counter(word for words in found for word in words)
        telling = {word for word, times in frequency.items() if times <= count / 4}
        self._weight = {word: math.log(count / frequency[word]) for word in telling}
        self.words: list[list[str]] = [[word for word in words if word in telling] for words in found]
        """Telling words of title and text, each once, in their order."""
        self._shared = {word for word in telling if frequency[word] > 1}
        self._count = count

    def __len__(self) -> int:
        return len(self.title)

    def can_wish(self, row: int) -> bool:
        """Whether a wish can be made of the item."""
        return bool(self.categories[row] or self.words[row])

    def wish(self, row: int, rng: np.random.Generator) -> str:
        """What somebody who looks for the item might type: one of its two last categories, and one to three
        of its TELLING_WORDS most telling words, those that other items have too before its own."""
        parts = []
        if self.categories[row]:
            last = self.categories[row][-2:]
            parts.append(last[int(rng.integers(len(last)))].lower())
        ranked = sorted(
            self.words[row], key=lambda word: (word not in self._shared, -self._weight[word], word)
        )[:TELLING_WORDS]
        if ranked:
            count = min(int(rng.integers(1, 4)), len(ranked))
            parts.append(" ".join(ranked[i] for i in rng.permutation(len(ranked))[:count]))
        return ", ".join(parts)

    def preference(self, rows: Sequence[int]) -> str:
        """What the items have in common: the categories, then the telling words that stand out in them.

        Both by (items of these that have it) x log(items of the catalogue / those that have it); a word must
        be in two of the items, unless there is just one. "" where nothing is known of them.
        """
        groups = Counter(name for row in rows for name in set(self.categories[row]))
        weight = {name: math.log(self._count / self._held[name]) for name in groups}
        chosen = list(islice(_ranked(groups, weight), PREFERRED_CATEGORIES))
        words = Counter(word for row in rows for word in self.words[row])
        least = 2 if len(rows) > 1 else 1
        often = Counter({word: times for word, times in words.items() if times >= least})
        told = list(islice(_ranked(often, self._weight), PREFERRED_WORDS))
        if not chosen and not told:
            told = list(islice(_ranked(words, self._weight), PREFERRED_WORDS))
        return "; ".join(", ".join(part) for part in (chosen, told) if part)


def one_line(text: str) -> str:
    """Runs of white space as one space."""
    return " ".join(text.split())


def _ranked(counts: Mapping[str, int], weight: Mapping[str, float]) -> list[str]:
    return sorted(counts, key=lambda name: (-counts[name] * weight[name], name))


def _is_word(word: str) -> bool:
    return len(word) > 2 and not word.isdigit()
