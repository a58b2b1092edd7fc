"""Next-item samples from histories, every position at once.

A history of n items holds n-1 samples (items before t -> item t). Written out they repeat the history n-1
times; here they share it: one row is the history once, followed by one short branch a sample,

    BOS  item_1 item_2 ... item_m | <recommend> c_1 .. c_{L-1} | <recommend> c_1 .. c_{L-1} | ...

where the branch for item t sees BOS, the items before t and itself, at the positions it would have in its own
prompt. With SCIDs for users a branch begins with the user's as of item t (trainer.sft.user_scids):

    <ua_3> <ub_7> <uc_1> <recommend> c_1 .. c_{L-1}

Logits, loss and gradients are those of the separate prompts (tested), at a fraction of the tokens.
Histories longer than a prompt are cut into overlapping windows in which every target is trained once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.errors import TrainerError

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TokenMap:
    """What of the tokenizer the samples need."""

    items: IntArray
    """Token ids of every item's SCID, [n_items, L]."""
    begin: tuple[int, ...]
    """What starts every prompt: BOS, or nothing for a tokenizer without one."""
    recommend: int
    pad: int
    users: tuple[IntArray, ...] = ()
    """For each of the U levels of a user's SCID, code -> token id; none: prompts without them."""
    own: IntArray | None = None
    """[n_items] the token that stands for an item in a history, -1 for its codes; none: codes for all."""

    @property
    def levels(self) -> int:
        """L, the number of codes of an SCID."""
        return int(self.items.shape[1])


@dataclass(frozen=True)
class Window:
    """A stretch of one user's history. Invariant: 1 <= first < len(items) <= max_history + 1."""

    user: int
    """Index of the history the window is cut from."""
    start: int
    """Where in the history the window starts."""
    items: IntArray
    """Item indices, oldest first."""
    first: int
    """The first position that is a target; the ones before it are context only."""


@dataclass(frozen=True)
class Branches:
    """The samples of a batch before they become tokens; -1 fills rows to the longest. B rows."""

    prefix: IntArray
    """[B, maxp] item indices of the shared history."""
    visible: IntArray
    """[B, maxb] how many prefix items each branch sees."""
    answers: IntArray
    """[B, maxb] item index of each branch's answer; -1 where there is none."""
    position: IntArray
    """[B, maxb] position of the sample's target in the user's whole history (keys the teacher's targets)."""
    users: IntArray
    """[B] index of the history each row comes from."""
    candidates: IntArray | None = None
    """[B, maxb, M] item indices of a soft target, -1 where there are fewer; none: the answer alone counts."""
    shares: FloatArray | None = None
    """[B, maxb, M] their shares, rows sum to 1; the answer is drawn from them."""
    scids: IntArray | None = None
    """[B, maxb, U] the user's SCID as of each sample; none: prompts without them."""
    spelled: BoolArray | None = None
    """[B, maxp] items shown by their codes though they have a token of their own; none: no such items."""

    @property
    def samples(self) -> int:
        """Answers in the batch."""
        return int((self.answers >= 0).sum())

    def samples_by(self, first: IntArray) -> IntArray:
        """[B, maxb] number of each sample where all of a user's stand in a row from ``first`` [users] on, as
        ``first_samples`` counts them; 0 where there is no answer."""
        numbers = first[self.users][:, None] + self.position - 1
        return np.where(self.answers >= 0, numbers, 0)

    def split(self, samples: int) -> "list[Branches]":
        """The same rows in parts of about ``samples`` answers (at least one row each), in order."""
        if not len(self.users):
            return []
        filled = np.cumsum((self.answers >= 0).sum(axis=1))
        cuts = np.flatnonzero(np.diff((filled - 1) // samples)) + 1
        edges = [0, *cuts.tolist(), len(self.users)]
        return [self._rows(slice(start, end)) for start, end in pairwise(edges)]

    def every(self, count: int, begin: int) -> "Branches":
        """Every ``count``-th row from ``begin`` on; may be none."""
        return self._rows(slice(begin, None, count))

    def _rows(self, rows: slice) -> "Branches":
        return Branches(
            self.prefix[rows],
            self.visible[rows],
            self.answers[rows],
            self.position[rows],
            self.users[rows],
            None if self.candidates is None else self.candidates[rows],
            None if self.shares is None else self.shares[rows],
            None if self.scids is None else self.scids[rows],
            None if self.spelled is None else self.spelled[rows],
        )


@dataclass(frozen=True)
class TreeBatch:
    """Model input for Branches. T = |begin| + longest history + maxb (U + L); N = answers in the batch."""

    input_ids: Tensor
    """int64 [B, T]."""
    position_ids: Tensor
    """int64 [B, T]."""
    allowed: Tensor
    """bool [B, T, T], True where the query (row) may see the key (column)."""
    scored: Tensor
    """int64 [N, L]: places in the flattened [B T] whose next token is the answer's code of each level."""
    targets: Tensor
    """int64 [N, L]: token ids of the answers."""
    candidates: Tensor | None = None
    """int64 [N, L, M]: token ids of a soft target's items at each level."""
    shares: Tensor | None = None
    """float32 [N, L, M]: their shares given the answer's codes of the levels before; rows sum to 1."""

    def to(self, device: str | torch.device) -> "TreeBatch":
        """The same batch on ``device``."""
        return TreeBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.allowed.to(device),
            self.scored.to(device),
            self.targets.to(device),
            None if self.candidates is None else self.candidates.to(device),
            None if self.shares is None else self.shares.to(device),
        )

    @property
    def tokens(self) -> int:
        """Tokens the model reads, padding included."""
        return self.input_ids.numel()


def first_samples(histories: Sequence[IntArray]) -> IntArray:
    """[users]: number of the first sample of each history when all samples of all of them stand in a row.

    Sample (user, position p), p from 1 on, is number ``first[user] + p - 1``.
    """
    lengths = np.array([max(len(history) - 1, 0) for history in histories], dtype=np.int64)
    return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)


def windows_of(histories: Sequence[IntArray], *, max_history: int = 20) -> list[Window]:
    """Windows that together train every item but the first of each history exactly once.

    A target of a history longer than ``max_history`` sees at least half as many items as a full prompt holds.
    Histories with fewer than two items give none.
    """
    windows = []
    context = max(max_history // 2, 1)
    for user, history in enumerate(histories):
        items = np.asarray(history, dtype=np.int64)
        done = 1
        while done < len(items):
            start = 0 if done == 1 else done - context
            end = min(start + max_history + 1, len(items))
            windows.append(Window(user, start, items[start:end], done - start))
            done = end
    return windows


def batches_of(windows: Sequence[Window], *, targets: int, seed: int, epoch: int) -> list[IntArray]:
    """Shuffled batches of window numbers, about ``targets`` samples each, windows of like length together.

    A pure function of (windows, targets, seed, epoch): a resumed run sees the same batches.
    """
    rng = np.random.default_rng([seed, epoch, 1])
    lengths = np.array([len(window.items) for window in windows])
    samples = np.array([len(window.items) - window.first for window in windows])
    shuffled = rng.permutation(len(windows))
    # Sorted within pools only: rows of a batch are alike in length, yet their company changes every epoch.
    pool = max(1, 64 * targets // max(int(samples.mean()) if len(samples) else 1, 1))
    batches = []
    for offset in range(0, len(shuffled), pool):
        part = shuffled[offset : offset + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        filled = np.cumsum(samples[part])
        cuts = np.flatnonzero(np.diff((filled - 1) // targets)) + 1
        batches += [batch for batch in np.split(part, cuts) if len(batch)]
    return [batches[i] for i in rng.permutation(len(batches))]


def branches_of(
    windows: Sequence[Window], *, drop: float = 0.0, rng: np.random.Generator | None = None
) -> Branches:
    """One row a window, one branch a target. With ``drop``, each item is left out of its row's history with
    that probability (it stays a target): the model learns not to lean on any single item."""
    rows, longest, most = len(windows), 0, 0
    kept: list[BoolArray] = []
    for window in windows:
        keep = np.ones(len(window.items), dtype=np.bool_)
        if drop > 0 and rng is not None:
            keep = rng.random(len(window.items)) >= drop
        keep[-1] = False  # the last item is only ever a target
        kept.append(keep)
        longest, most = max(longest, int(keep.sum())), max(most, len(window.items) - window.first)
    prefix = np.full((rows, longest), -1, dtype=np.int64)
    visible = np.zeros((rows, most), dtype=np.int64)
    answers = np.full((rows, most), -1, dtype=np.int64)
    position = np.zeros((rows, most), dtype=np.int64)
    for row, (window, keep) in enumerate(zip(windows, kept, strict=True)):
        chosen = window.items[keep]
        prefix[row, : len(chosen)] = chosen
        count = len(window.items) - window.first
        visible[row, :count] = np.cumsum(keep)[window.first - 1 : -1]
        answers[row, :count] = window.items[window.first :]
        position[row, :count] = window.start + np.arange(window.first, len(window.items))
    users = np.array([window.user for window in windows], dtype=np.int64)
    return Branches(prefix, visible, answers, position, users)


def tree_batch(branches: Branches, tokens: TokenMap) -> TreeBatch:
    """Tokens, positions and attention mask of ``branches``.

    Raises TrainerError when branches carry users' SCIDs and ``tokens`` knows none, or the other way round.
    """
    levels = tokens.levels
    rows, most = branches.answers.shape
    history, ends = _history_tokens(branches, tokens)
    begin, heads = len(tokens.begin), _user_tokens(branches, tokens)
    ahead = heads.shape[2]  # U
    size = ahead + levels  # tokens of a branch
    prefix_width, branch_width = begin + history.shape[1], most * size
    width = prefix_width + branch_width

    ids = np.full((rows, width), tokens.pad, dtype=np.int64)
    ids[:, :begin] = tokens.begin
    ids[:, begin:prefix_width] = history
    answers = tokens.items[branches.answers]  # rows of -1 read the last item; they are never scored
    inputs = np.concatenate(
        [heads, np.full((rows, most, 1), tokens.recommend, dtype=np.int64), answers[..., :-1]], axis=2
    )
    ids[:, prefix_width:] = inputs.reshape(rows, -1)

    seen = begin + np.take_along_axis(ends, branches.visible, axis=1)  # prefix tokens a branch sees
    limit = np.empty((rows, width), dtype=np.int64)
    limit[:, :prefix_width] = np.arange(1, prefix_width + 1)
    limit[:, prefix_width:] = np.repeat(seen, size, axis=1)
    position = np.empty((rows, width), dtype=np.int64)
    position[:, :prefix_width] = np.arange(prefix_width)
    position[:, prefix_width:] = (seen[..., None] + np.arange(size)).reshape(rows, -1)

    real = branches.answers >= 0
    ahead_of_codes = prefix_width + np.arange(most) * size + ahead  # where <recommend> stands in each branch
    branch = np.arange(rows)[:, None] * width + ahead_of_codes
    scored = branch[real][:, None] + np.arange(levels)
    candidates, shares = _soft_targets(branches, tokens, real)
    return TreeBatch(
        torch.from_numpy(ids),
        torch.from_numpy(position),
        _tree_mask(torch.from_numpy(limit), prefix_width, size, most),
        torch.from_numpy(scored),
        torch.from_numpy(answers[real]),
        candidates,
        shares,
    )


def _history_tokens(branches: Branches, tokens: TokenMap) -> tuple[IntArray, IntArray]:
    """(tokens of the histories, padded behind [B, H]; where the first n items end [B, maxp + 1])."""
    prefix, levels = branches.prefix, tokens.levels
    own = np.full(prefix.shape, -1) if tokens.own is None else tokens.own[prefix]
    if branches.spelled is not None:
        own = np.where(branches.spelled, -1, own)
    widths = np.where(prefix < 0, 0, np.where(own >= 0, 1, levels))
    ends = np.zeros((len(prefix), prefix.shape[1] + 1), dtype=np.int64)
    np.cumsum(widths, axis=1, out=ends[:, 1:])
    found = np.full((len(prefix), int(ends[:, -1].max(initial=0))), tokens.pad, dtype=np.int64)
    for level in range(levels):
        row, place = np.nonzero(widths > level)
        item = prefix[row, place]
        token = tokens.items[item, level]
        if level == 0:
            token = np.where(own[row, place] >= 0, own[row, place], token)
        found[row, ends[row, place] + level] = token
    return found, ends


def spell(branches: Branches, share: float, rng: np.random.Generator) -> Branches:
    """Show each item of the histories by its codes with probability ``share``, so that the model can read
    items that have no token of their own."""
    return replace(branches, spelled=rng.random(branches.prefix.shape) < share)


def _user_tokens(branches: Branches, tokens: TokenMap) -> IntArray:
    """[B, maxb, U] tokens of the users' SCIDs; U is 0 for prompts without them."""
    scids = branches.scids
    if scids is None:
        scids = np.empty((*branches.answers.shape, 0), dtype=np.int64)
    if scids.shape[2] != len(tokens.users):
        raise TrainerError(
            f"samples carry {scids.shape[2]} codes a user, the prompt has {len(tokens.users)}: "
            "code the users with the codec that the tokens are of"
        )
    found = np.empty(scids.shape, dtype=np.int64)
    for level, token_of in enumerate(tokens.users):
        found[..., level] = token_of[scids[..., level]]
    return found


def _soft_targets(
    branches: Branches, tokens: TokenMap, real: BoolArray
) -> tuple[Tensor | None, Tensor | None]:
    """Token ids and conditional shares [N, L, M] of the candidates that share the answer's codes so far."""
    if branches.candidates is None or branches.shares is None:
        return None, None
    candidates = tokens.items[branches.candidates[real]].transpose(0, 2, 1)  # [N, L, M]
    answers = tokens.items[branches.answers[real]]  # [N, L]
    same = candidates == answers[:, :, None]
    before = np.ones_like(same)
    before[:, 1:] = np.logical_and.accumulate(same, axis=1)[:, :-1]
    shares = np.where(before, branches.shares[real][:, None, :], 0.0)
    shares /= shares.sum(axis=2, keepdims=True)
    return torch.from_numpy(candidates), torch.from_numpy(shares.astype(np.float32))


def _tree_mask(limit: Tensor, prefix_width: int, size: int, most: int) -> Tensor:
    """bool [B, T, T]: prefix keys below the query's limit; branch keys of the same branch, not later.

    A row has ``most`` branches of ``size`` tokens."""
    rows, width = limit.shape
    mask = torch.zeros(rows, width, width, dtype=torch.bool)
    mask[:, :, :prefix_width] = torch.arange(prefix_width) < limit[:, :, None]
    order = torch.arange(most * size)
    branch = order // size
    own = (branch[:, None] == branch[None, :]) & (order[None, :] <= order[:, None])
    mask[:, prefix_width:, prefix_width:] = own
    return mask
