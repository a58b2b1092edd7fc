"""Joint training of both sides: SC encoders by U2I, then RQ-VAEs of users and of items with them.

    L = alpha L_U2I + gamma (L_RQ_user + L_RQ_item)                        (Align3GR, section 1; paper.md)

Two phases. First alpha = 1, gamma = 0, until the AUC on held-out pairs no longer rises: behaviour alignment
is stable. Then the weights switch, so that gamma leads (the paper's values are not legible: settings). The
auto-encoders rebuild u and v as they are at each step, shifted and scaled by constants fixed at the switch;
no gradient goes through their target, so that u and v cannot shrink to make themselves easy to rebuild.

An item's behaviour part is now and then replaced by what its text predicts: the item encoder learns to place
an item that has no behaviour yet beside those like it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from policies.weights import device_named
from trainer.checkpoint import Checkpoint

from .alignment import ScEncoder, Watch, Watched, u2i_loss
from .din import one_pair_a_user
from .frozen import Frozen
from .interactions import IntArray, batches
from .rqvae import FloatArray, RqVaeFit, RqVaeShape, RqVaeTraining, cosine, residual_kmeans
from .sides import Side, centre, linear_arrays, put_together

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, of)."""

USER_SAMPLE = 20_000
"""Users' vectors that k-means starts and polishes the users' codebooks on."""


@dataclass(frozen=True)
class JointTraining:
    """How both sides are trained; see TokenizationSettings for the meaning."""

    hidden: tuple[int, ...]
    """Hidden layers of the SC encoders."""
    width: int
    """Columns of u and v."""
    epochs: int
    """Of the first phase at most."""
    patience: int
    """Epochs without a better AUC after which the first phase ends."""
    batch: int
    learning_rate: float
    log_q: bool
    alpha: float
    """Weight of U2I in the second phase."""
    gamma: float
    """Weight of the RQ-VAEs in the second phase."""
    drop_behaviour: float
    behaviour_weight: float
    """Weight of behaviour against text in what the SC encoders take."""
    method: str
    """"rqvae" or "rqkmeans" (no second phase: k-means of the aligned vectors)."""
    quantizer: RqVaeTraining
    """Of the second phase; its learning rate and batch are not used for the SC encoders."""


@dataclass(frozen=True)
class Joint:
    """What joint training gives."""

    users: Side | None
    items: Side
    start: Watched
    switch: Watched
    end: Watched
    best: Watched
    """Of the highest AUC."""
    switched_at: int
    """Epoch (of one pair a user) at which the phases changed."""


def train_jointly(
    frozen: Frozen,
    training: JointTraining,
    item_shape: RqVaeShape,
    user_shape: RqVaeShape | None,
    *,
    seed: int,
    device: str = "cpu",
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Joint:
    """Train both sides; ``user_shape`` none: users are aligned with, but get no SCIDs.

    Same seed: same result (CPU). A checkpoint at the end of each epoch of both phases; a resumed training
    equals an uninterrupted one. Raises BadRequest for a device that is not there.
    """
    run = _Run(frozen, training, item_shape, user_shape, seed, device_named(device))
    kept = checkpoint or Checkpoint(None, "")
    if (saved := kept.load(run.device)) is not None:
        run.restore(saved.facts, saved.states)
    say = progress or (lambda _phase, _done, _of: None)
    while not run.aligned:
        run.align()
        say("alignment", run.epoch, training.epochs)
        kept.save(run.facts(), run.states())
    while training.method == "rqvae" and run.step < training.quantizer.steps:
        run.quantize()
        say("codes", run.step, training.quantizer.steps)
        kept.save(run.facts(), run.states())
    return run.finish()


class _Run:
    """The state of one joint training; every random draw is a function of (seed, epoch or step)."""

    def __init__(
        self,
        frozen: Frozen,
        training: JointTraining,
        item_shape: RqVaeShape,
        user_shape: RqVaeShape | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.frozen, self.interactions, self.item_inputs = frozen, frozen.interactions, frozen.vectors
        self.training, self.seed, self.device = training, seed, device
        self.text_alone = np.concatenate([frozen.items.text, frozen.predicted], axis=1)
        self.watch = Watch(self.interactions, seed=seed)
        sample = np.random.default_rng([seed, 17]).permutation(self.interactions.pairs)[:USER_SAMPLE]
        self.user_sample = frozen.user_vectors(np.sort(sample))
        widths = (self.item_inputs.shape[1], *training.hidden, training.width)
        split, weight = frozen.items.text.shape[1], training.behaviour_weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.user_sc = ScEncoder(widths, *centre(self.user_sample, split, weight)).to(device)
            self.item_sc = ScEncoder(widths, *centre(self.item_inputs, split, weight)).to(device)
        parameters = [*self.user_sc.parameters(), *self.item_sc.parameters()]
        self.aligner = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=1e-4)
        self.item_rq = RqVaeFit(item_shape, training.quantizer, seed=seed + 1, device=device)
        self.user_rq = None
        if user_shape is not None:
            self.user_rq = RqVaeFit(user_shape, training.quantizer, seed=seed + 2, device=device)
        fits = [self.item_rq] if self.user_rq is None else [self.item_rq, self.user_rq]
        self.fits = fits
        coded = [parameter for fit in fits for parameter in fit.model.parameters()]
        self.coder = torch.optim.AdamW(coded, lr=training.quantizer.learning_rate, weight_decay=1e-4)
        self.scales: dict[str, Tensor] = {}
        self.epoch, self.step, self.waited, self.aligned = 0, 0, 0, False
        self.history = [self._measure()]

    # -- the two phases

    def align(self) -> None:
        """An epoch of the first phase; sets ``aligned`` when it was the last."""
        for batch in self._epoch_batches():
            loss = self._u2i(batch, self._rng(batch))[0]
            self._descend(loss, self.aligner)
        self.epoch += 1
        best = max(watched.auc for watched in self.history)
        self.history.append(self._measure())
        self.waited = 0 if self.history[-1].auc > best + 1e-3 else self.waited + 1
        if self.waited >= self.training.patience or self.epoch >= self.training.epochs:
            self.aligned = True
            self.switch = len(self.history) - 1
            self.scales = {"item": self._scale(self._v()), "user": self._scale(self._u())}

    def quantize(self) -> None:
        """An epoch of the second phase."""
        training, steps = self.training, self.training.quantizer.steps
        for batch in self._epoch_batches():
            if self.step == steps:
                break
            rng = self._rng(batch)
            u2i, users = self._u2i(batch, rng)
            rows = rng.integers(len(self.item_inputs), size=training.quantizer.batch)
            v = self._normal("item", self.item_sc(self._item_batch(rows, rng)))
            coded = self.item_rq.loss(self.step, v, lambda: self._normal("item", self._v()))
            if self.user_rq is not None:
                u = self._normal("user", users)
                coded = coded + self.user_rq.loss(self.step, u, lambda: self._normal("user", self._u()))
            share = cosine(self.step, steps)
            for optimizer, rate in (
                (self.aligner, training.learning_rate),
                (self.coder, training.quantizer.learning_rate),
            ):
                for group in optimizer.param_groups:
                    group["lr"] = rate * share
            self._descend(training.alpha * u2i + training.gamma * coded, self.aligner, self.coder)
            for fit in self.fits:
                fit.after(self.step)
            self.step += 1
        self.epoch += 1
        self.history.append(self._measure())

    def finish(self) -> Joint:
        """Polish the codebooks and hand everything over."""
        v, u = self._normal("item", self._v()), self._normal("user", self._u())
        users = None
        if self.user_rq is not None:
            users = self._side("user", self.user_sc, u, self.user_rq)
        return Joint(
            users=users,
            items=self._side("item", self.item_sc, v, self.item_rq),
            start=self.history[0],
            switch=self.history[self.switch],
            end=self.history[-1],
            best=max(self.history, key=lambda watched: watched.auc),
            switched_at=self.switch,
        )

    # -- parts of a step

    def _u2i(self, places: IntArray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(loss, u) of a batch of pairs."""
        interactions = self.interactions
        taken = interactions.flat[places]
        met = torch.from_numpy(interactions.met(interactions.owner[places], taken)).to(self.device)
        u = self.user_sc(self._tensor(self.frozen.user_vectors(places)))
        v = self.item_sc(self._item_batch(taken, rng))
        log_q = None
        if self.training.log_q:
            log_q = self._tensor(np.log(interactions.shares[taken]).astype(np.float32))
        return u2i_loss(u, v, met, log_q), u

    def _item_batch(self, rows: IntArray, rng: np.random.Generator) -> Tensor:
        text_alone = rng.random(len(rows)) < self.training.drop_behaviour
        chosen = np.where(text_alone[:, None], self.text_alone[rows], self.item_inputs[rows])
        return self._tensor(chosen)

    def _descend(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()

    def _epoch_batches(self) -> list[IntArray]:
        places = one_pair_a_user(self.interactions, np.random.default_rng([self.seed, self.epoch, 13]))
        size = self.training.batch
        return [places[rows] for rows in batches(len(places), size, seed=self.seed, epoch=self.epoch)]

    def _rng(self, batch: IntArray) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, int(batch[0]), 19])

    # -- what is looked at between steps

    @torch.no_grad()
    def _v(self) -> Tensor:
        return torch.cat([self.item_sc(self._tensor(part)) for part in _chunks(self.item_inputs)])

    @torch.no_grad()
    def _u(self) -> Tensor:
        return torch.cat([self.user_sc(self._tensor(part)) for part in _chunks(self.user_sample)])

    @torch.no_grad()
    def _measure(self) -> Watched:
        users = self._tensor(self.frozen.user_vectors(self.watch.places))
        return self.watch.measure(self.user_sc(users), self._v())

    @staticmethod
    def _scale(values: Tensor) -> Tensor:
        """[s + 1]: the mean, then one spread for all columns."""
        mean = values.mean(dim=0)
        spread = (values - mean).square().mean().sqrt().clamp(min=1e-6)
        return torch.cat([mean, spread[None]])

    def _normal(self, side: str, values: Tensor) -> Tensor:
        scale = self.scales[side]
        return (values - scale[:-1]) / scale[-1]

    def _side(self, name: str, encoder: ScEncoder, vectors: Tensor, fit: RqVaeFit) -> Side:
        """``vectors``: what the RQ-VAE quantizes, of all items or of a sample of users."""
        scale = self.scales[name].cpu().numpy()
        first = linear_arrays(encoder.cpu().eval().layers)
        if self.training.method == "rqkmeans":
            shape = fit.model.shape
            books = residual_kmeans(vectors.cpu().numpy(), shape.levels, shape.codes, seed=self.seed)
            layers = put_together(first, scale[:-1], float(scale[-1]), [])
        else:
            model = fit.finish(vectors)
            books = [book.detach().numpy().copy() for book in model.codebooks]
            layers = put_together(first, scale[:-1], float(scale[-1]), linear_arrays(model.encoder))
        return Side(
            mean=encoder.mean.numpy(),
            scale=encoder.scale.numpy(),
            weights=tuple(np.ascontiguousarray(weight, dtype=np.float32) for weight, _ in layers),
            biases=tuple(np.ascontiguousarray(bias, dtype=np.float32) for _, bias in layers),
            codebooks=tuple(books),
        )

    def _tensor(self, array: npt.NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    # -- checkpoints

    def facts(self) -> dict[str, Any]:
        """Where the training stands, as plain values."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "waited": self.waited,
            "switch": self.switch if self.aligned else None,
            "history": [watched.as_dict() for watched in self.history],
        }

    def states(self) -> dict[str, Any]:
        """Weights, optimizers and codebooks."""
        return {
            "user_sc": self.user_sc.state_dict(),
            "item_sc": self.item_sc.state_dict(),
            "aligner": self.aligner.state_dict(),
            "coder": self.coder.state_dict(),
            "fits": [fit.state() for fit in self.fits],
            "scales": self.scales,
        }

    def restore(self, facts: Any, states: Any) -> None:
        """Take up what ``facts`` and ``states`` gave."""
        self.epoch, self.step, self.waited = facts["epoch"], facts["step"], facts["waited"]
        self.history = [Watched(**watched) for watched in facts["history"]]
        if facts["switch"] is not None:
            self.aligned, self.switch = True, int(facts["switch"])
        self.user_sc.load_state_dict(states["user_sc"])
        self.item_sc.load_state_dict(states["item_sc"])
        self.aligner.load_state_dict(states["aligner"])
        self.coder.load_state_dict(states["coder"])
        for fit, state in zip(self.fits, states["fits"], strict=True):
            fit.restore(state)
        self.scales = dict(states["scales"])


def _chunks(rows: FloatArray, size: int = 65_536) -> list[FloatArray]:
    return [rows[start : start + size] for start in range(0, max(len(rows), 1), size)]
