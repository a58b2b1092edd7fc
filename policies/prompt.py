"""The prompt: a user's history as SCID tokens, and the tokens that answer it.

``[BOS] <a_..><b_..><c_..> ... <recommend>`` holds the last 20 items of the history, oldest first; an answer
is exactly the L tokens of one SCID, without an end token. SCID tokens are special tokens, so that free text
which happens to contain "<a_12>" is encoded as plain text (``text_ids``) and is never mistaken for an item.

Items may have a token of their own, ``<item_7>`` (the row of the codec, which never changes): in a history it
stands in place of the item's codes, never in an answer. It tells apart what codes alone keep alike, and makes
the prompt a third as long; an item without one is shown by its codes.

With a codec that has SCIDs for users, the user's own stands behind the history, ``... <ua_3><ub_7><uc_1>
<recommend>``, worked out from exactly the items in front of it: prompts of one history share their beginning,
and nothing that came later can leak in.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codec import ScidCodec, scid_tokens, user_scid_tokens
from .errors import CodecError, PolicyRefused
from .users import Histories

TEMPLATE_VERSION = "1"
"""Moves whenever a change here makes the same history another prompt; a policy names the one it learned.

SCIDs of users and tokens of items did not move it: without them the prompt is the one it always was. Which
users' SCIDs a policy learned is in its codec's quantizer hash, which items' tokens in its tokenizer."""

HISTORY = 20
"""Items of the history in a prompt (the paper's own limit)."""

RECOMMEND = "<recommend>"
"""Ends the prompt: what follows is the answer."""

PAD = "<pad>"

_ITEM_TOKEN = re.compile(r"<item_(\d+)>")


def extend_tokenizer(tokenizer: Any, codec: ScidCodec, *, items: Sequence[int] = ()) -> int:
    """Add the codec's SCID tokens, ``<recommend>`` and, where it has none, a pad token; all special.

    ``items``: rows of the codec that get a token of their own.

    Returns how many were added: resize the model's embeddings to ``len(tokenizer)`` afterwards. Calling it
    twice adds nothing the second time.
    """
    from tokenizers import AddedToken

    names = [RECOMMEND, *scid_tokens(codec.sizes), *user_scid_tokens(codec.user_sizes)]
    names += [item_token(row) for row in items]
    added = 0
    if tokenizer.pad_token_id is None:
        added += int(tokenizer.add_special_tokens({"pad_token": PAD}))
    tokens = [AddedToken(name, special=True, normalized=False) for name in names]
    return added + int(tokenizer.add_tokens(tokens, special_tokens=True))


def first_item_token(tokenizer: Any) -> int | None:
    """The lowest id of an item's own token; none: there are none. They are the last of a vocabulary that
    ``extend_tokenizer`` has made."""
    ids = [token for name, token in tokenizer.get_vocab().items() if item_row(name) is not None]
    return min(ids, default=None)


def item_token(row: int) -> str:
    """The name of an item's own token, from its row of the codec."""
    return f"<item_{row}>"


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of free text (catalogue, review, query): whatever it contains, never a special token."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [int(token) for token in ids]


def item_row(token: str) -> int | None:
    """The row of the codec whose item ``token`` stands for; none: it is no item's own token."""
    found = _ITEM_TOKEN.fullmatch(token)
    return None if found is None else int(found[1])


class PromptTokens:
    """Token ids of one tokenizer and codec.

    Raises PolicyRefused when the tokenizer lacks a SCID token, or the codec's user module cannot be used.
    """

    def __init__(self, tokenizer: Any, codec: ScidCodec) -> None:
        self.codec = codec
        names = [RECOMMEND, *scid_tokens(codec.sizes), *user_scid_tokens(codec.user_sizes)]
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
        starts = np.cumsum([1, *codec.sizes, *codec.user_sizes])
        by_level = [np.array(ids[start:end], dtype=np.int64) for start, end in pairwise(starts)]
        self.levels: tuple[NDArray[np.int64], ...] = tuple(by_level[: codec.levels])
        """For each level, code -> token id."""
        self.user_levels: tuple[NDArray[np.int64], ...] = tuple(by_level[codec.levels :])
        """The same for users' SCIDs; empty for a codec without them."""
        self.own: NDArray[np.int64] = np.full(len(codec), -1, dtype=np.int64)
        """[n_items]: the token an item has of its own, -1 for none."""
        for name, token in vocabulary.items():
            row = item_row(name)
            if row is not None and row < len(codec):
                self.own[row] = token
        self._item_tokens = np.stack(
            [level[codec.codes[:, i]] for i, level in enumerate(self.levels)], axis=1
        )
        # Reads the user module now: a policy that cannot write a prompt is refused when it is loaded.
        self.users([np.empty(0, dtype=np.int64)])

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return len(self.begin) + HISTORY * self.codec.levels + len(self.user_levels) + 1

    @property
    def ids(self) -> list[int]:
        """The codec's token ids, ascending: ``<recommend>``, items' and users' SCIDs, items' own tokens."""
        own = self.own[self.own >= 0]
        return sorted({self.recommend, *np.concatenate([*self.levels, *self.user_levels, own]).tolist()})

    @property
    def highest(self) -> int:
        """The highest token id of a prompt or an answer: a model has to embed it."""
        levels = (int(level.max()) for level in (*self.levels, *self.user_levels))
        return max(self.recommend, int(self.own.max(initial=-1)), *levels)

    def answer(self, item_id: str) -> list[int]:
        """The L tokens of an item's SCID. Raises CodecError for an item that has none."""
        row = self.codec.items.get(item_id)
        if row is None:
            self.codec.encode(item_id)  # raises
        tokens: list[int] = self._item_tokens[row].tolist()
        return tokens

    def answers(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """``answer`` of many items, by their rows of the codec: int64 [n] -> [n, L]."""
        tokens: NDArray[np.int64] = self._item_tokens[rows]
        return tokens

    def known(self, history: Sequence[str]) -> list[str]:
        """The last 20 items of a history that the codec knows, oldest first."""
        return [self.codec.item_ids[row] for row in self.rows(history)]

    def rows(self, history: Sequence[str]) -> NDArray[np.int64]:
        """``known`` as rows of the codec, int64 [<= 20]."""
        items = self.codec.items
        found: list[int] = []
        for item_id in reversed(history):
            row = items.get(item_id)
            if row is not None:
                found.append(row)
                if len(found) == HISTORY:
                    break
        return np.array(found[::-1], dtype=np.int64)

    def body(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands for items in a history: the item's own token or its SCID's; int64 [n] rows -> [m]."""
        own = self.own[rows]
        if (own < 0).all():
            spelled: NDArray[np.int64] = self._item_tokens[rows].reshape(-1)
            return spelled
        shown = self._item_tokens[rows].copy()
        there = np.ones_like(shown, dtype=np.bool_)
        shown[own >= 0, 0] = own[own >= 0]
        there[own >= 0, 1:] = False
        tokens: NDArray[np.int64] = shown[there]
        return tokens

    def users(self, histories: Histories) -> NDArray[np.int64]:
        """The tokens of the SCID of each user, from histories as rows of the codec: int64 [n, U].

        Raises PolicyRefused when the codec's user module cannot be used.
        """
        try:
            codes = self.codec.encode_user_rows(histories)
        except CodecError as error:
            raise PolicyRefused(str(error)) from error
        found = np.empty(codes.shape, dtype=np.int64)
        for level, token_of in enumerate(self.user_levels):
            found[:, level] = token_of[codes[:, level]]
        return found


def prompts_ids(tokens: PromptTokens, histories: Sequence[Sequence[str]]) -> list[list[int]]:
    """Token ids of the prompt for each history of item ids, oldest first; items without an SCID are left out.

    All users are coded at once: one by one is slow.
    """
    rows = [tokens.rows(history) for history in histories]
    users = tokens.users(rows).tolist()
    return [
        [*tokens.begin, *tokens.body(one).tolist(), *user, tokens.recommend]
        for one, user in zip(rows, users, strict=True)
    ]


def prompt_ids(tokens: PromptTokens, history: Sequence[str]) -> list[int]:
    """``prompts_ids`` of one history."""
    return prompts_ids(tokens, [history])[0]


def answer_ids(tokens: PromptTokens, item_id: str) -> list[int]:
    """The L tokens that answer a prompt with this item. Raises CodecError for an item that has no SCID."""
    return tokens.answer(item_id)
