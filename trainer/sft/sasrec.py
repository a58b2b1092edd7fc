"""SASRec with full cross-entropy: a collaborative model of item sequences, no text, no SCIDs.

A causal transformer over item embeddings (Kang & McAuley, ICDM 2018) whose output, multiplied with the same
embeddings, gives a logit for every item; the loss is the cross-entropy over the whole catalogue at every
position (not the paper's one sampled negative: with it SASRec is far above what most papers print for it).
It is a baseline, and the teacher that SFT distils. It sees training histories alone; of some users the last
item of these is held out, to keep the weights that rank it best.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.errors import CannotTrain
from trainer.settings import SasRecSettings

from .arithmetic import arithmetic, autocast_type
from .catalogue_loss import catalogue_loss
from .data import batches_of, windows_of

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

Progress = Callable[[int, int, float, float], None]
"""Called with (epoch, epochs, mean loss, NDCG@10 of the held-out items)."""

SCORED_AT_ONCE = 512
SEED_STRIDE = 7919
"""Between the seeds of an ensemble's members: seeds 0, 1, 2 of a benchmark share none."""


class SasRec:
    """A trained model, or several whose probabilities are averaged. Items are numbers from 0; a history holds
    them oldest first."""

    def __init__(self, networks: Sequence["Network"], length: int, device: str = "cpu") -> None:
        self._networks = [network.eval() for network in networks]
        self._length, self._device = length, device

    @classmethod
    def fit(
        cls,
        histories: Sequence[IntArray],
        n_items: int,
        settings: SasRecSettings,
        *,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> "SasRec":
        """Train ``settings.members`` networks on ``histories``, which differ in their seed alone. A pure
        function of histories, settings and threads (on a CPU).

        Raises CannotTrain when no history has two items.
        """
        networks, epochs = [], settings.members * settings.epochs
        for member in range(settings.members):
            own = settings.model_copy(update={"seed": settings.seed + member * SEED_STRIDE})
            tell = partial(_tell, progress, member * settings.epochs, epochs)
            networks.append(_trained(histories, n_items, own, device, tell))
        return cls(networks, settings.length, device)

    def log_probs(self, histories: Sequence[IntArray]) -> FloatArray:
        """log p(next item | history), float32 [n, n_items]; items of the history are not left out.

        After an empty history every item has the same probability.
        """
        found = [
            self._scored(histories[start : start + SCORED_AT_ONCE])
            for start in range(0, len(histories), SCORED_AT_ONCE)
        ]
        return np.concatenate([*found, np.zeros((0, self._networks[0].items.num_embeddings - 1), np.float32)])

    def scores(self, histories: Sequence[IntArray]) -> FloatArray:
        """p(next item | history) with 0 for items of the history, float32 [n, n_items]."""
        found = np.exp(self.log_probs(histories))
        for row, history in zip(found, histories, strict=True):
            row[history] = 0.0
        return np.asarray(found, dtype=np.float32)

    def along(self, histories: Sequence[IntArray]) -> Iterator[tuple[IntArray, npt.NDArray[np.float64]]]:
        """(all items, their ``scores``) at each position but the first of each history, in order."""
        every = np.arange(self._networks[0].items.num_embeddings - 1)
        asked = [history[:end] for history in histories for end in range(1, len(history))]
        for start in range(0, len(asked), SCORED_AT_ONCE):
            for row in self.scores(asked[start : start + SCORED_AT_ONCE]):
                yield every, row.astype(np.float64)

    @torch.inference_mode()
    def _scored(self, histories: Sequence[IntArray]) -> FloatArray:
        lasts = [np.asarray(history, dtype=np.int64)[-self._length :] for history in histories]
        width = max([1, *map(len, lasts)])
        rows = np.zeros((len(lasts), width), dtype=np.int64)
        for row, history in enumerate(lasts):
            rows[row, : len(history)] = history + 1
        ends = torch.tensor([max(len(history), 1) - 1 for history in lasts])
        given, empty = torch.from_numpy(rows).to(self._device), [len(history) == 0 for history in lasts]
        each = []
        for network in self._networks:
            logits = network.logits(network(given)[torch.arange(len(lasts)), ends])
            logits[torch.tensor(empty)] = 0.0
            each.append(logits.float().log_softmax(dim=1))
        found: FloatArray = each[0].cpu().numpy()
        if len(each) > 1:
            found = (torch.stack(each).logsumexp(dim=0) - math.log(len(each))).cpu().numpy()
        return found

    def ndcg(self, told: Sequence[IntArray], held: Sequence[tuple[int, int]]) -> float:
        """Mean NDCG@10 of (history number, item) pairs ``held``, items of the history left out."""
        total = 0.0
        for start in range(0, len(held), SCORED_AT_ONCE):
            part = held[start : start + SCORED_AT_ONCE]
            scores = self._scored([told[user] for user, _ in part])
            for row, (user, item) in zip(scores, part, strict=True):
                own = row[item]
                row[told[user]] = -np.inf
                rank = int((row > own).sum()) + 1
                total += 1 / math.log2(1 + rank) if rank <= 10 else 0.0
        return total / max(len(held), 1)


class Network(nn.Module):
    """Item and position embeddings, pre-norm causal blocks. Item i has row i + 1; row 0 fills up."""

    def __init__(self, n_items: int, settings: SasRecSettings) -> None:
        super().__init__()
        width = settings.dimension
        self.items = nn.Embedding(n_items + 1, width, padding_idx=0)
        self.positions = nn.Embedding(settings.length, width)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(
            Block(width, settings.heads, settings.dropout) for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, items: Tensor) -> Tensor:
        """int64 [B, T] rows, filled up behind -> states [B, T, d]."""
        width = self.items.embedding_dim
        x = self.items(items) * math.sqrt(width) + self.positions.weight[: items.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        states: Tensor = self.norm(x)
        return states

    def logits(self, states: Tensor) -> Tensor:
        """[N, d] -> [N, n_items]."""
        return states @ self.items.weight[1:].T


class Block(nn.Module):
    """Causal self-attention and a feed-forward, each behind a norm and added."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.before_attention, self.before_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.forwards = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]. What fills rows up stands behind, where causal attention never looks."""
        batch, length, width = x.shape
        parts = self.inputs(self.before_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        x = x + self.dropout(self.output(mixed.transpose(1, 2).reshape(batch, length, width)))
        mapped: Tensor = x + self.dropout(self.forwards(self.before_forward(x)))
        return mapped


def _tell(
    progress: Progress | None, before: int, epochs: int, epoch: int, loss: float, quality: float
) -> None:
    if progress is not None:
        progress(before + epoch, epochs, loss, quality)


def _trained(
    histories: Sequence[IntArray],
    n_items: int,
    settings: SasRecSettings,
    device: str,
    tell: Callable[[int, float, float], None],
) -> "Network":
    """One network, at the weights that rank the held-out items best."""
    told, held = _held_out(histories, settings)
    windows = windows_of(told, max_history=settings.length)
    if not windows:
        raise CannotTrain("no history has two items, so there is nothing to learn a teacher from")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = Network(n_items, settings).to(device)
        model = SasRec([network], settings.length, device)
        best, stale, kept = -1.0, 0, None
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
            fused=device.split(":")[0] in ("cpu", "cuda"),
        )
        cast = autocast_type("auto", device)
        for epoch in range(settings.epochs):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / settings.epochs))
            network.train()
            total, count = 0.0, 0
            for batch in batches_of(windows, targets=settings.batch_targets, seed=settings.seed, epoch=epoch):
                items, places, targets = _rows([windows[i] for i in batch])
                with arithmetic(device, cast):
                    states = network(items.to(device)).flatten(0, 1)[places.to(device)]
                loss = catalogue_loss(states.float(), network.items.weight[1:], targets.to(device), cast=cast)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_norm)
                optimizer.step()
                total += float(loss.detach()) * len(targets)
                count += len(targets)
            network.eval()
            quality = model.ndcg(told, held)
            tell(epoch + 1, total / count, quality)
            if quality > best or not held:
                best, stale, kept = quality, 0, copy.deepcopy(network.state_dict())
            else:
                stale += 1
                if stale >= settings.patience:
                    break
        if kept is not None:
            network.load_state_dict(kept)
    return network


def _held_out(
    histories: Sequence[IntArray], settings: SasRecSettings
) -> tuple[list[IntArray], list[tuple[int, int]]]:
    """(histories to learn from, (user, item) held out): the last item of some histories of three or more."""
    told = [np.asarray(history, dtype=np.int64) for history in histories]
    long = np.array([user for user, history in enumerate(told) if len(history) > 2], dtype=np.int64)
    count = min(int(len(long) * settings.held_out), 2000)
    rng = np.random.default_rng([settings.seed, 7])
    held = []
    for user in np.sort(rng.choice(long, count, replace=False)) if count else ():
        held.append((int(user), int(told[user][-1])))
        told[user] = told[user][:-1]
    return told, held


def _rows(windows: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [B, T], flat places that predict [N], the items they predict [N])."""
    width = max(len(window.items) for window in windows) - 1
    rows = np.zeros((len(windows), width), dtype=np.int64)
    places, targets = [], []
    for row, window in enumerate(windows):
        rows[row, : len(window.items) - 1] = window.items[:-1] + 1
        places.append(row * width + np.arange(window.first - 1, len(window.items) - 1))
        targets.append(window.items[window.first :])
    return (
        torch.from_numpy(rows),
        torch.from_numpy(np.concatenate(places)),
        torch.from_numpy(np.concatenate(targets)),
    )
