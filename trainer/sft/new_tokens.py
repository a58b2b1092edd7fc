"""What the rows of new tokens start from, in the embedding and, where it has weights of its own, the head.

``mean``: the mean of the rows there are; a new token starts as an unremarkable word. ``codebook``: the vector
of its code, so that codes that are near each other start near each other:

    row = mean + spread (sqrt(1 - o) P c~ + sqrt(o) e_level)

``c~`` is the level's codebook, centred; ``P`` one random map for items and one for users, with orthonormal
columns (rows, into a narrower model), which keeps angles; ``P c~`` is scaled to unit mean square a level;
``e_level`` is a random direction of each level, so that levels stay apart, and ``o`` its share. ``mean`` and
``spread`` are those of the old rows.

``likeness``: on top of ``mean``, what is known of the items (``trainer.sft.likeness``):

    an item's own token    row = mean + strength · spread · Q l
    a code                 its start by ``mean`` + strength · spread · Q l-

with ``l`` the item's likeness, ``l-`` its mean over the items that have the code, and ``Q`` a random
rotation, which keeps angles.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.codec import ScidCodec, scid_tokens, user_scid_tokens
from policies.errors import CodecError
from policies.prompt import item_row, item_token
from policies.quantizer import Quantizer
from policies.users import UserEncoder
from trainer.errors import CannotTrain

from .likeness import Likeness

LEVEL_SHARE = 0.5
"""o: the share of a row's variance that tells its level; chosen, not tuned."""

RANDOM_STRENGTH = 3.0
"""strength where the old rows are a preset's random ones, which no layer has learned to expect: of 3 and 10
the better on Beauty, 8 like 3 (docs/base-policy.md). 1 where they are trained."""

_NEAR = 3e-5
"""Spread of ``mean`` rows as a share of the old rows': as in transformers' mean resizing, sqrt(1e-9)."""

Rows = NDArray[np.float32]


def start_rows(
    model: Any,
    tokenizer: Any,
    codec: ScidCodec,
    fresh: Sequence[str],
    *,
    known: int,
    how: str,
    seed: int,
    likeness: Likeness | None = None,
) -> None:
    """Give the model a row for every token of ``tokenizer`` and start those of ``fresh``, in place.

    ``known``: one more than the highest id there was before; the rows below say what a row looks like. Rows
    that a vocabulary rounded up has to spare are used first and started like any other. ``how``: "keep" (the
    random start of a model from scratch), "mean" or "codebook". ``likeness``: of the codec's items, for their
    own tokens and codes among ``fresh``. Raises CannotTrain for "codebook" with a codec without a quantizer.
    """
    vocabulary = tokenizer.get_vocab()
    old = model.get_input_embeddings().weight.shape[0]
    if max(vocabulary.values()) >= old:
        model.resize_token_embeddings(max(vocabulary.values()) + 1, mean_resizing=False)
    first = min(known, old)
    added = sorted(
        {vocabulary[name] for name in fresh} | {row for row in vocabulary.values() if row >= first}
    )
    if not added:
        return
    for weight in _matrices(model):
        rows = weight.detach()[:first].float().cpu()
        mean, spread = rows.mean(dim=0), rows.std(dim=0)
        if how != "keep":
            noise = torch.randn(len(added), len(mean), generator=torch.Generator().manual_seed(seed))
            weight.data[added] = (mean + _NEAR * spread * noise).to(weight)
        if how == "codebook":
            made = code_rows(codec, len(mean), seed=seed)
            named = [name for name in fresh if name in made]
            codes = torch.from_numpy(np.stack([made[name] for name in named]))
            started = mean + spread.square().mean().sqrt() * codes
            weight.data[[vocabulary[name] for name in named]] = started.to(weight)
        if likeness is not None and likeness.parts:
            size = (RANDOM_STRENGTH if how == "keep" else 1.0) * spread.square().mean().sqrt()
            own, of_codes, turned = _alike(likeness, codec, fresh, vocabulary, len(mean), seed)
            alike = size * torch.from_numpy(turned)
            weight.data[own] = (mean + alike[: len(own)]).to(weight)
            weight.data[of_codes] += alike[len(own) :].to(weight)


def _alike(
    likeness: Likeness,
    codec: ScidCodec,
    fresh: Sequence[str],
    vocabulary: Mapping[str, int],
    width: int,
    seed: int,
) -> tuple[list[int], list[int], Rows]:
    """(ids of items' own tokens, ids of codes, Q l of the former and then of the latter [n, width]): of the
    items and codes that ``likeness`` knows something of."""
    rows = likeness.rows(width)
    known = np.asarray(rows.any(axis=1))
    wanted = set(fresh)
    own = [row for row in map(item_row, fresh) if row is not None and known[row]]
    names = scid_tokens(codec.sizes)
    means, codes, first = [rows[own]], [], 0
    for level, size in enumerate(codec.sizes):
        having = np.bincount(codec.codes[known, level], minlength=size)
        sums = np.zeros((size, width), dtype=np.float32)
        np.add.at(sums, codec.codes[known, level], rows[known])
        met = [code for code in np.flatnonzero(having).tolist() if names[first + code] in wanted]
        means.append((sums[met] / having[met, None]).astype(np.float32))
        codes += [vocabulary[names[first + code]] for code in met]
        first += size
    turn = _orthonormal(width, width, np.random.default_rng([seed, 9]))
    turned: Rows = (np.concatenate(means) @ turn.T).astype(np.float32)
    return [vocabulary[item_token(row)] for row in own], codes, turned


def code_rows(codec: ScidCodec, width: int, *, seed: int) -> Mapping[str, Rows]:
    """Token -> row [width], mean 0 and mean square 1 a level, from the codec's codebooks.

    A level beyond the codebooks (it only tells items apart) gets random vectors in place of theirs. An item's
    own token gets the sum of its codes' rows, scaled alike. Raises CannotTrain when the codec holds no
    quantizer.
    """
    draw = np.random.default_rng([seed, 7])
    items, users = _codebooks(codec)
    rows = [*_levels(items, codec.sizes, width, draw), *_levels(users, codec.user_sizes, width, draw)]
    names = [*scid_tokens(codec.sizes), *user_scid_tokens(codec.user_sizes)]
    by_level = np.split(np.stack(rows[: sum(codec.sizes)]), np.cumsum(codec.sizes)[:-1])
    own = sum(level[codec.codes[:, number]] for number, level in enumerate(by_level))
    items_own = np.asarray(own / np.sqrt(codec.levels), dtype=np.float32)
    names += [item_token(row) for row in range(len(codec))]
    return dict(zip(names, [*rows, *items_own], strict=True))


def _codebooks(codec: ScidCodec) -> tuple[tuple[Rows, ...], tuple[Rows, ...]]:
    """Of items and of users (none for a codec without SCIDs for them), [K, z] a level."""
    try:
        items: Quantizer = codec.encoder().quantizer
        if not codec.user_sizes or codec.source is None:
            return items.codebooks, ()
        return items.codebooks, UserEncoder.load(codec.source / "quantizer" / "users").quantizer.codebooks
    except CodecError as error:
        raise CannotTrain(
            f"trainer.sft.new_tokens: codebook: {error}; or set trainer.sft.new_tokens to mean"
        ) from error


def _levels(books: Sequence[Rows], sizes: Sequence[int], width: int, draw: np.random.Generator) -> list[Rows]:
    """Rows of every level and code, in order."""
    made: list[Rows] = []
    turn = _orthonormal(width, books[0].shape[1], draw) if books else None
    for level, size in enumerate(sizes):
        direction = _unit_square(draw.normal(size=(1, width)))
        if turn is not None and level < len(books):
            codes = (books[level] - books[level].mean(axis=0)) @ turn.T
        else:
            codes = draw.normal(size=(size, width))
        row = np.sqrt(1 - LEVEL_SHARE) * _unit_square(codes) + np.sqrt(LEVEL_SHARE) * direction
        made.extend(row.astype(np.float32))
    return made


def _orthonormal(tall: int, wide: int, draw: np.random.Generator) -> NDArray[np.float64]:
    """[tall, wide] with orthonormal columns, or rows where there are more columns than rows."""
    square = np.linalg.qr(draw.normal(size=(max(tall, wide), min(tall, wide))))[0]
    return np.asarray(square if tall >= wide else square.T)


def _unit_square(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scaled to mean square 1; zeros stay zeros."""
    return values / max(float(np.sqrt(np.square(values).mean())), 1e-12)


def _matrices(model: Any) -> list[Tensor]:
    """Embedding and, unless it is the same, head: [V, H] each."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    return [embedding] if head is None or head.weight is embedding else [embedding, head.weight]
