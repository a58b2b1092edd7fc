"""The prompt: a user's history as SCID tokens, and the tokens that answer it.

``[BOS] <a_..><b_..><c_..> ... <recommend>`` holds the last 20 items of the history, oldest first; an answer
is exactly the L tokens of one SCID, without an end token. SCID tokens are special tokens, so that free text
which happens to contain "<a_12>" is encoded as plain text (``text_ids``) and is never mistaken for an item.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codec import ScidCodec, scid_tokens, user_scid_tokens
from .errors import PolicyRefused

TEMPLATE_VERSION = "1"
"""Moves whenever a change here makes the same history another prompt; a policy names the one it learned."""

HISTORY = 20
"""Items of the history in a prompt (the paper's own limit)."""

RECOMMEND = "<recommend>"
"""Ends the prompt: what follows is the answer."""

PAD = "<pad>"


def extend_tokenizer(tokenizer: Any, codec: ScidCodec) -> int:
    """Add the codec's SCID tokens, ``<recommend>`` and, where it has none, a pad token; all special.

    Returns how many were added: resize the model's embeddings to ``len(tokenizer)`` afterwards. Calling it
    twice adds nothing the second time.
    """
    from tokenizers import AddedToken

    names = [RECOMMEND, *scid_tokens(codec.sizes), *user_scid_tokens(codec.user_sizes)]
    tokens = [AddedToken(name, special=True, normalized=False) for name in names]
    added = int(tokenizer.add_tokens(tokens, special_tokens=True))
    if tokenizer.pad_token_id is None:
        added += int(tokenizer.add_special_tokens({"pad_token": PAD}))
    return added


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of free text (catalogue, review, query): whatever it contains, never a special token."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [int(token) for token in ids]


class PromptTokens:
    """Token ids of one tokenizer and codec. Raises PolicyRefused when the tokenizer lacks a SCID token."""

    def __init__(self, tokenizer: Any, codec: ScidCodec) -> None:
        self.codec = codec
        names = [RECOMMEND, *scid_tokens(codec.sizes)]
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        missing = [name for name in names if name not in vocabulary]
        if missing:
            raise PolicyRefused(
                f"the tokenizer has no token {missing[0]}, so it does not belong to this codec; "
                "restore the policy directory, or train on this codec with `align3gr sft`"
            )
        ids = [vocabulary[name] for name in names]
        self.recommend: int = ids[0]
        self.begin: tuple[int, ...] = () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)
        self.pad: int = ids[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        starts = np.cumsum([1, *codec.sizes])
        self.levels: tuple[NDArray[np.int64], ...] = tuple(
            np.array(ids[start:end], dtype=np.int64) for start, end in pairwise(starts)
        )
        """For each level, code -> token id."""
        self._item_tokens = np.stack(
            [level[codec.codes[:, i]] for i, level in enumerate(self.levels)], axis=1
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return len(self.begin) + HISTORY * self.codec.levels + 1

    def answer(self, item_id: str) -> list[int]:
        """The L tokens of an item's SCID. Raises CodecError for an item that has none."""
        row = self.codec.items.get(item_id)
        if row is None:
            self.codec.encode(item_id)  # raises
        tokens: list[int] = self._item_tokens[row].tolist()
        return tokens

    def known(self, history: Sequence[str]) -> list[str]:
        """The last 20 items of a history that the codec knows, oldest first."""
        items = self.codec.items
        found: list[str] = []
        for item_id in reversed(history):
            if item_id in items:
                found.append(item_id)
                if len(found) == HISTORY:
                    break
        return found[::-1]


def prompt_ids(tokens: PromptTokens, history: Sequence[str]) -> list[int]:
    """Token ids of the prompt for a history of item ids, oldest first; items without an SCID are left out."""
    body = [token for item_id in tokens.known(history) for token in tokens.answer(item_id)]
    return [*tokens.begin, *body, tokens.recommend]


def answer_ids(tokens: PromptTokens, item_id: str) -> list[int]:
    """The L tokens that answer a prompt with this item. Raises CodecError for an item that has no SCID."""
    return tokens.answer(item_id)
