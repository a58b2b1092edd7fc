"""One epoch of U2I alignment against the per-sample loop of the released code, on the same batches.

    python benchmarks/alignment.py beauty/ [--json] [--batches 4] [--batch 1024] [--threads 1]

Both train the same SC encoders from the same weights, one pair of each user an epoch. *Ours* masks what
users met with one table a batch. *Loop* goes over the batch sample by sample, as the released code does: it
collects the items that the sample's user did not interact with, scores them and adds up the loss. The loop's
epoch is extrapolated from ``--batches`` batches; ours is the same batches and, beside it, a whole epoch. The
losses of the first batch must agree to 1e-4. ``--json``: the last line is one object [ratio, ratio_cpu,
epoch_s, loop_epoch_s, pairs, batch, loss_difference].
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from align3gr.console import say
from benchmarks.tokenization import read
from trainer.tokenization.alignment import ScEncoder, u2i_loss
from trainer.tokenization.din import one_pair_a_user
from trainer.tokenization.interactions import IntArray, Interactions, batches

WIDTHS = (96, 128, 64)
"""Vectors of 64 + 32 columns, and the default SC encoder."""


class Sides:
    """Random frozen vectors of users and items, SC encoders and their optimizer."""

    def __init__(self, interactions: Interactions) -> None:
        torch.manual_seed(0)
        zeros, ones = np.zeros(WIDTHS[0], dtype=np.float32), np.ones(WIDTHS[0], dtype=np.float32)
        self.users, self.items = ScEncoder(WIDTHS, zeros, ones), ScEncoder(WIDTHS, zeros, ones)
        self.user_vectors = torch.randn(interactions.users, WIDTHS[0])
        self.item_vectors = torch.randn(interactions.n_items, WIDTHS[0])
        self.optimizer = torch.optim.AdamW([*self.users.parameters(), *self.items.parameters()], lr=1e-3)

    def descend(self, loss: Tensor) -> float:
        """One optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return float(loss.detach())


def ours(sides: Sides, interactions: Interactions, places: IntArray) -> Tensor:
    """The product's loss of a batch of pairs."""
    users, taken = interactions.owner[places], interactions.flat[places]
    met = torch.from_numpy(interactions.met(users, taken))
    return u2i_loss(sides.users(sides.user_vectors[users]), sides.items(sides.item_vectors[taken]), met)


def loop(sides: Sides, interactions: Interactions, places: IntArray, sets: list[set[int]]) -> Tensor:
    """The same loss, sample by sample."""
    users, taken = interactions.owner[places].tolist(), interactions.flat[places].tolist()
    u, v = sides.users(sides.user_vectors[users]), sides.items(sides.item_vectors[taken])
    total = torch.zeros(())
    for row, user in enumerate(users):
        negatives = [j for j, item in enumerate(taken) if j != row and item not in sets[user]]
        positive = (u[row] * v[row]).sum()
        scores = torch.cat([positive[None], v[negatives] @ u[row]])
        total = total - torch.log_softmax(scores, dim=0)[0]
    return total / len(users)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    items, histories = read(wanted.folder)
    rows = [np.array([int(item) for item in history[:-2]], dtype=np.int64) for history in histories]
    interactions = Interactions.of(rows, items.num_rows, seed=0)
    sets = [set(history.tolist()) for history in rows]
    places = one_pair_a_user(interactions, np.random.default_rng(0))
    cut = [places[batch] for batch in batches(len(places), wanted.batch, seed=0, epoch=0)]
    some = cut[: wanted.batches]

    first, second = Sides(interactions), Sides(interactions)
    with torch.no_grad():
        losses = ours(first, interactions, cut[0]), loop(second, interactions, cut[0], sets)
    difference = abs(float(losses[0] - losses[1]))
    if difference > 1e-4:
        raise SystemExit(f"the two losses of one batch differ by {difference}: this is a defect")
    mine, theirs = Sides(interactions), Sides(interactions)
    fast = timed(lambda: [mine.descend(ours(mine, interactions, batch)) for batch in some])
    slow = timed(lambda: [theirs.descend(loop(theirs, interactions, batch, sets)) for batch in some])
    again = Sides(interactions)
    epoch = timed(lambda: [again.descend(ours(again, interactions, batch)) for batch in cut])
    facts = {
        "ratio": slow[0] / fast[0],
        "ratio_cpu": slow[1] / fast[1],
        "epoch_s": epoch[0],
        "loop_epoch_s": slow[0] * len(cut) / len(some),
        "pairs": len(places),
        "batch": wanted.batch,
        "loss_difference": difference,
    }
    say(f"{len(places)} pairs: {facts['ratio']:.1f}x wall, {facts['ratio_cpu']:.1f}x processor time")
    if wanted.json:
        print(json.dumps(facts))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(wall, processor) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
