"""From a template and what fills it to the tokens of a sample.

A template is a prompt in words with ``{slots}``; a part in square brackets, which holds ``{user}``, stands
only where the codec has SCIDs for users. Free text is never encoded as special tokens; SCIDs are. An answer
that is an item follows ``<recommend>``, as in the product's prompt, and is its L codes; an answer in words
ends with the tokenizer's end token.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

import numpy as np

from policies.codec import scid_tokens, user_scid_tokens
from policies.prompt import RECOMMEND, PromptTokens, item_token, text_ids
from trainer.errors import CannotTrain
from trainer.settings import SftSettings
from trainer.sft.packing import TextSample

Ids = tuple[int, ...]
_OPTIONAL = re.compile(r"\[([^\]]*\{user\}[^\]]*)\]")


@dataclass(frozen=True)
class Template:
    """One wording of a task: the prompt, and which slot answers it."""

    prompt: str
    answer: str
    slots: frozenset[str] = field(init=False)
    """Slots that must be filled; ``user`` is not among them where it is optional."""

    def __post_init__(self) -> None:
        needed = {name for _, name in self.parts(with_user=False) if name} | {self.answer}
        object.__setattr__(self, "slots", frozenset(needed))

    def parts(self, *, with_user: bool) -> list[tuple[str, str | None]]:
        """Literal text, then the slot behind it (none after the last), in order.

        A space in front of a slot belongs to the slot: words bring their own, SCIDs have none.
        """
        text = _OPTIONAL.sub(r"\1" if with_user else "", self.prompt)
        parsed = [(literal, name) for literal, name, _, _ in Formatter().parse(text)]
        return [(literal.removesuffix(" ") if name else literal, name) for literal, name in parsed]


class Writer:
    """Tokens of one tokenizer and codec, and how long samples may be.

    Raises CannotTrain for a tokenizer that splits SCID tokens (``require_whole_scids``).
    """

    def __init__(
        self, tokenizer: Any, tokens: PromptTokens, settings: SftSettings, context: int | None
    ) -> None:
        """``context``: tokens the model can read; none: any number."""
        require_whole_scids(tokenizer, tokens)
        self.tokens = tokens
        lengths = settings.tasks
        self.limit = min(lengths.row_tokens, context or lengths.row_tokens)
        self.title_tokens, self.text_tokens = lengths.title_tokens, lengths.text_tokens
        self.spell_items = settings.spell_items
        self.tokenizer = tokenizer
        self.users = bool(tokens.user_levels)
        self._end: Ids = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self._literals: dict[str, Ids] = {}
        self._titles: dict[str, Ids] = {}
        self.between = self._literal(";")

    @property
    def can_end(self) -> bool:
        """Whether the tokenizer has an end token, which answers in words need."""
        return bool(self._end)

    def item(self, row: int, rng: np.random.Generator, spelled: float) -> Ids:
        """An item in a prompt: its own token where it has one, its SCID at odds of ``spelled`` and for all
        others. Draws nothing for items without a token of their own."""
        if self.tokens.own[row] < 0 or rng.random() < spelled:
            return self.item_answer(row)
        return (int(self.tokens.own[row]),)

    def item_answer(self, row: int) -> Ids:
        """An item's SCID."""
        return tuple(self.tokens.answer(self.tokens.codec.item_ids[row]))

    def user(self, codes: Sequence[int]) -> Ids:
        """A user's SCID."""
        levels = self.tokens.user_levels
        return tuple(int(token_of[code]) for token_of, code in zip(levels, codes, strict=True))

    def title(self, title: str) -> Ids:
        """A title, or a line of a profile, with the space in front of it."""
        found = self._titles.get(title)
        if found is None:
            found = self._titles[title] = self._words(title, self.title_tokens)
        return found

    def text(self, text: str) -> Ids:
        """Any other text, with the space in front of it."""
        return self._words(text, self.text_tokens)

    def joined(self, parts: Sequence[Ids]) -> Ids:
        """As many of ``parts`` as fit a text, the last ones, with separators."""
        return self._last(parts, self.text_tokens, self.between)

    def ended(self, words: Ids) -> Ids:
        """An answer in words, with its end."""
        return words + self._end

    def sample(
        self,
        template: Template,
        answer: Ids,
        *,
        fill: Mapping[str, Ids],
        history: Sequence[Ids] = (),
        between: Ids = (),
        user: Ids = (),
    ) -> TextSample:
        """The prompt of ``template`` with its slots filled, and ``answer``.

        ``history``: the shown items, oldest first, ``between`` each two; the oldest are left out where the
        sample would be too long. Raises CannotTrain when not even the last of them fits.
        """
        parts = template.parts(with_user=bool(user))
        slots = dict(fill) | {"user": user, "history": ()}
        ending = (self.tokens.recommend,) if template.answer == "item" else ()
        around = (*self.tokens.begin, *self._body(parts, slots), *ending)
        room = self.limit - (len(around) + len(answer) - 1)
        slots["history"] = self._last(history, room, between)
        if room < 0 or (history and not slots["history"]):
            raise CannotTrain(
                f"a sample with one item of a history does not fit {self.limit} tokens; raise "
                "trainer.sft.tasks.row_tokens, lower title_tokens and text_tokens, or take a backbone that "
                "reads more"
            )
        return TextSample((*self.tokens.begin, *self._body(parts, slots), *ending), answer)

    def readable(self, ids: Sequence[int]) -> str:
        """Tokens as a person reads them, special ones too."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _body(self, parts: Sequence[tuple[str, str | None]], slots: Mapping[str, Ids]) -> Ids:
        pieces = [(self._literal(literal), slots[name] if name else ()) for literal, name in parts]
        return tuple(token for literal, slot in pieces for token in (*literal, *slot))

    def _last(self, parts: Sequence[Ids], room: int, between: Ids) -> Ids:
        kept: list[Ids] = []
        for part in reversed(parts):
            room -= len(part) + (len(between) if kept else 0)
            if room < 0:
                break
            kept.append(part)
        kept.reverse()
        return tuple(
            token for place, part in enumerate(kept) for token in (*(between if place else ()), *part)
        )

    def _literal(self, text: str) -> Ids:
        found = self._literals.get(text)
        if found is None:
            found = self._literals[text] = tuple(text_ids(self.tokenizer, text)) if text else ()
        return found

    def _words(self, text: str, most: int) -> Ids:
        # No token is longer than a word of 20 letters on average; what is behind is never read.
        return tuple(text_ids(self.tokenizer, f" {text[: 20 * most]}")[:most])


def require_whole_scids(tokenizer: Any, tokens: PromptTokens) -> None:
    """Raises CannotTrain when the tokenizer splits an SCID token, or gives two of them one id."""
    codec = tokens.codec
    names = [RECOMMEND, *scid_tokens(codec.sizes), *user_scid_tokens(codec.user_sizes)]
    names += [item_token(row) for row in np.flatnonzero(tokens.own >= 0).tolist()]
    found = tokenizer(names, add_special_tokens=False)["input_ids"]
    vocabulary = tokenizer.get_vocab()
    for name, ids in zip(names, found, strict=True):
        if list(ids) != [vocabulary[name]]:
            raise CannotTrain(
                f"the backbone's tokenizer splits the SCID token {name} into {len(ids)} tokens; take one "
                "that keeps added special tokens whole (a fast tokenizer of the transformers library does)"
            )
    if len({ids[0] for ids in found}) < len(names):
        raise CannotTrain("the backbone's tokenizer gives two SCID tokens one id; take another backbone")
