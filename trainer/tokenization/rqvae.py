"""RQ-VAE: item vectors -> a few codes, coarse to fine.

An encoder E maps x to z; level l replaces the residual r_l by its nearest code e_l (r_0 = z,
r_{l+1} = r_l - e_l); a decoder D rebuilds x from the sum of the codes. Loss (Lee et al., CVPR 2022; TIGER,
NeurIPS 2023; paper section 1):

    |x - D(z + sg(sum_l e_l - z))|^2 + sum_l |sg(r_l) - e_l|^2 + mu |r_l - sg(e_l)|^2

with sg = stop gradient (straight-through). Codebooks start as k-means of the residuals after a short warm-up
of the auto-encoder alone; codes that nobody uses are revived on residuals of the batch; a few Lloyd steps on
the finished residuals end the training, so that each code is the mean of what it stands for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policies.weights import device_named

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, loss)."""


@dataclass(frozen=True)
class RqVaeShape:
    """Sizes of the model; level count and codes per level make the SCID."""

    input_dim: int
    hidden: tuple[int, ...]
    code_dim: int
    levels: int
    codes: int


@dataclass(frozen=True)
class RqVaeTraining:
    """How it is trained; see TokenizationSettings for the meaning and units."""

    steps: int
    batch: int
    learning_rate: float
    commitment: float
    warm_up_steps: int
    revive_every: int
    polish_iterations: int
    decay: float = 0.0
    """Codebooks as running means of what they stand for, forgetting 1 - decay a step; 0: by gradient."""


@dataclass(frozen=True)
class Quantized:
    """What quantization of a batch gives."""

    total: Tensor
    """Sum of the chosen codes, float [B, code_dim]."""
    codes: Tensor
    """int64 [B, levels]."""
    residuals: Tensor
    """What each level had to quantize, float [B, levels, code_dim]."""
    loss: Tensor
    """Codebook plus commitment terms, scalar."""


class RqVae(nn.Module):
    """Encoder, residual codebooks, decoder. ``codebooks``: float [levels, codes, code_dim]."""

    codebooks: nn.Parameter

    def __init__(self, shape: RqVaeShape) -> None:
        super().__init__()
        self.shape = shape
        widths = (shape.input_dim, *shape.hidden, shape.code_dim)
        self.encoder = mlp(widths)
        self.decoder = mlp(widths[::-1])
        self.codebooks = nn.Parameter(torch.zeros(shape.levels, shape.codes, shape.code_dim))

    def encoder_arrays(self) -> tuple[tuple[FloatArray, ...], tuple[FloatArray, ...]]:
        """(weights [in, out], biases [out]) of the encoder's layers, for ``policies.quantizer``."""
        linear = [layer for layer in self.encoder if isinstance(layer, nn.Linear)]
        weights = tuple(np.ascontiguousarray(layer.weight.detach().numpy().T) for layer in linear)
        return weights, tuple(layer.bias.detach().numpy().copy() for layer in linear)

    def quantize(self, z: Tensor, commitment: float, *, by_gradient: bool = True) -> Quantized:
        """Nearest codes of ``z`` [B, code_dim], level by level; without ``by_gradient`` the codebooks get
        none and the loss is the commitment alone (they are moved by ``MovingMeans``)."""
        residual = z
        total, loss = torch.zeros_like(z), z.new_zeros(())
        codes, residuals = [], []
        for book in self.codebooks:
            residuals.append(residual)
            chosen = nearest(residual.detach(), book.detach())
            vector = book[chosen]
            if by_gradient:
                loss = loss + F.mse_loss(vector, residual.detach())
            loss = loss + commitment * F.mse_loss(residual, vector.detach())
            total = total + vector
            residual = residual - vector.detach()
            codes.append(chosen)
        return Quantized(total, torch.stack(codes, 1), torch.stack(residuals, 1), loss)

    def forward(self, x: Tensor, commitment: float, *, by_gradient: bool = True) -> tuple[Tensor, Quantized]:
        """(rebuilt x [B, input_dim], what quantization gave); gradients pass straight through the codes."""
        z = self.encoder(x)
        quantized = self.quantize(z, commitment, by_gradient=by_gradient)
        rebuilt: Tensor = self.decoder(z + (quantized.total - z).detach())
        return rebuilt, quantized


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them (none after the last)."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        if i:
            layers.append(nn.ReLU())
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre for each point: [B, D], [K, D] -> int64 [B]; ties go to the lowest."""
    return ((centres**2).sum(1) - 2 * points @ centres.T).argmin(1)


class RqVaeFit:
    """An RQ-VAE in training: its loss at each step, and the upkeep of its codebooks after it.

    The optimizer belongs to whoever calls: alone (``train_rqvae``) or jointly with the SC encoders
    (``joint.train_jointly``). Randomness is a function of (seed, step), so that a resumed fit needs only
    ``state`` and the step.
    """

    def __init__(
        self, shape: RqVaeShape, training: RqVaeTraining, *, seed: int, device: torch.device
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = RqVae(shape).to(device)
        self.training, self.seed = training, seed
        self.used = torch.zeros(shape.levels, shape.codes, dtype=torch.bool)
        self.means = MovingMeans(shape, training.decay, device) if training.decay > 0 else None
        self._last: Quantized | None = None

    def loss(self, step: int, x: Tensor, everything: Callable[[], Tensor]) -> Tensor:
        """Of a batch [B, input_dim]; the target of the reconstruction is ``x`` as it is, without gradient.

        The first steps warm the auto-encoder up without codes; then k-means of ``everything()``, a large
        sample of x, starts the codebooks.
        """
        model = self.model
        self._last = None
        if step < self.training.warm_up_steps:
            return F.mse_loss(model.decoder(model.encoder(x)), x.detach())
        if step == self.training.warm_up_steps:
            _initialise_codebooks(model, everything(), self._generator(step))
            if self.means is not None:
                self.means.restart(model.codebooks)
        rebuilt, quantized = model.forward(x, self.training.commitment, by_gradient=self.means is None)
        self._last = quantized
        return F.mse_loss(rebuilt, x.detach()) + quantized.loss

    @torch.no_grad()
    def after(self, step: int) -> None:
        """To be called after the optimizer's step: moving means, and codes that nobody used start again."""
        quantized, training = self._last, self.training
        if quantized is None:
            return
        if self.means is not None:
            self.means.update(self.model.codebooks, quantized)
        for level in range(self.model.shape.levels):
            self.used[level, quantized.codes[:, level].cpu()] = True
        since = step + 1 - training.warm_up_steps
        if since % training.revive_every == 0 and step + 1 < training.steps:
            _revive(self.model, self.used, quantized.residuals.detach(), self._generator(step))
            if self.means is not None:
                self.means.restart(self.model.codebooks)
            self.used.zero_()

    def finish(self, everything: Tensor) -> RqVae:
        """The model on the CPU, its codebooks polished on ``everything`` [n, input_dim]."""
        self.model.cpu().eval()
        _polish(self.model, everything.cpu(), self.training.polish_iterations)
        return self.model

    def state(self) -> dict[str, Any]:
        """All that a resumed fit needs, as tensors."""
        kept: dict[str, Any] = {"model": self.model.state_dict(), "used": self.used}
        if self.means is not None:
            kept |= {"counts": self.means.counts, "sums": self.means.sums}
        return kept

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self.model.load_state_dict(state["model"])
        self.used.copy_(state["used"])
        if self.means is not None:
            self.means.counts.copy_(state["counts"])
            self.means.sums.copy_(state["sums"])

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)


def train_rqvae(
    vectors: FloatArray,
    shape: RqVaeShape,
    training: RqVaeTraining,
    *,
    seed: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> RqVae:
    """Train on vectors float32 [n, input_dim]; same input and seed give the same model on the CPU.

    Raises BadRequest for a device that is not there.
    """
    place = device_named(device)
    fit = RqVaeFit(shape, training, seed=seed, device=place)
    x_all = torch.from_numpy(vectors).to(place)
    optimizer = torch.optim.AdamW(fit.model.parameters(), lr=training.learning_rate, weight_decay=1e-4)
    batches = _Batches(len(vectors), training.batch, torch.Generator().manual_seed(seed))
    for step in range(training.steps):
        x = x_all[next(batches).to(place)]
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * cosine(step, training.steps)
        loss = fit.loss(step, x, lambda: x_all)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        fit.after(step)
        if progress is not None:
            progress(step + 1, training.steps, float(loss.detach()))
    return fit.finish(x_all)


def cosine(step: int, steps: int) -> float:
    """Share of the peak learning rate: half a cosine, down to a twentieth."""
    return max(0.5 * (1 + math.cos(math.pi * step / max(steps, 1))), 0.05)


def residual_kmeans(vectors: FloatArray, levels: int, codes: int, *, seed: int) -> list[FloatArray]:
    """RQ k-means: the codebooks alone, no encoder; one float32 [codes, d] a level. Seconds, deterministic."""
    generator = torch.Generator().manual_seed(seed)
    residual = torch.from_numpy(vectors)
    books = []
    for _ in range(levels):
        centres = kmeans(residual, codes, generator, iterations=25)
        books.append(centres.numpy())
        residual = residual - centres[nearest(residual, centres)]
    return books


def kmeans(points: Tensor, k: int, generator: torch.Generator, iterations: int = 10) -> Tensor:
    """Lloyd's centres [k, D] of [n, D], from k-means++ seeds. With fewer points than k some centres coincide
    with points plus a little noise, so that all are different."""
    centres = _plus_plus(points, k, generator)
    return lloyd(points, centres, iterations)


def lloyd(points: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Lloyd iterations from given centres; an empty cell moves to the point that is served worst."""
    centres = centres.clone()
    for _ in range(iterations):
        owner = nearest(points, centres)
        counts = torch.bincount(owner, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        empty = torch.nonzero(counts == 0).ravel()
        if len(empty) and len(points) > len(centres) - len(empty):
            error = ((points - centres[owner]) ** 2).sum(1)
            worst = error.argsort(descending=True, stable=True)[: len(empty)]
            centres[empty[: len(worst)]] = points[worst]
    return centres


def _plus_plus(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    n = len(points)
    first = int(torch.randint(n, (1,), generator=generator))
    centres = [points[first]]
    distance = ((points - centres[0]) ** 2).sum(1)
    spread = float(points.std()) if n > 1 else 1.0
    for _ in range(k - 1):
        if float(distance.sum()) <= 1e-12:
            pick = int(torch.randint(n, (1,), generator=generator))
            noise = torch.randn(points.shape[1], generator=generator).to(points)
            centre = points[pick] + 1e-2 * max(spread, 1e-3) * noise
        else:
            pick = int(torch.multinomial(distance.cpu(), 1, generator=generator))
            centre = points[pick]
        centres.append(centre)
        distance = torch.minimum(distance, ((points - centre) ** 2).sum(1))
    return torch.stack(centres)


@torch.no_grad()
def _initialise_codebooks(model: RqVae, x: Tensor, generator: torch.Generator) -> None:
    residual = model.encoder(x)
    for level in range(model.shape.levels):
        centres = kmeans(residual, model.shape.codes, generator)
        model.codebooks[level] = centres
        residual = residual - centres[nearest(residual, centres)]


@torch.no_grad()
def _polish(model: RqVae, x: Tensor, iterations: int) -> None:
    residual = model.encoder(x)
    for level in range(model.shape.levels):
        centres = lloyd(residual, model.codebooks[level], iterations)
        model.codebooks[level] = centres
        residual = residual - centres[nearest(residual, centres)]


@torch.no_grad()
def _revive(model: RqVae, used: Tensor, residuals: Tensor, generator: torch.Generator) -> None:
    """Dead codes (not used since the last call) start again on random residuals of this batch."""
    for level in range(model.shape.levels):
        dead = torch.nonzero(~used[level]).ravel()
        if len(dead):
            picks = torch.randint(len(residuals), (len(dead),), generator=generator)
            model.codebooks[level, dead] = residuals[picks, level]


class MovingMeans:
    """Codebooks as exponential moving means of the residuals they stand for (van den Oord et al., NeurIPS
    2017, appendix A.1): ``N <- d N + (1 - d) n``, ``m <- d m + (1 - d) sum``, code = m / N."""

    def __init__(self, shape: RqVaeShape, decay: float, device: torch.device) -> None:
        self.decay = decay
        self.counts = torch.ones(shape.levels, shape.codes, device=device)
        self.sums = torch.zeros(shape.levels, shape.codes, shape.code_dim, device=device)

    @torch.no_grad()
    def restart(self, codebooks: Tensor) -> None:
        """Begin at codebooks that were set by other means."""
        self.counts.fill_(1.0)
        self.sums.copy_(codebooks)

    @torch.no_grad()
    def update(self, codebooks: Tensor, quantized: Quantized) -> None:
        """Move ``codebooks`` in place by one batch."""
        for level, book in enumerate(codebooks):
            chosen = quantized.codes[:, level]
            counts = torch.bincount(chosen, minlength=len(book)).to(self.counts)
            sums = torch.zeros_like(book).index_add_(0, chosen, quantized.residuals[:, level])
            self.counts[level].mul_(self.decay).add_(counts, alpha=1 - self.decay)
            self.sums[level].mul_(self.decay).add_(sums, alpha=1 - self.decay)
            book.copy_(self.sums[level] / self.counts[level].clamp(min=1e-5)[:, None])


class _Batches:
    """Endless shuffled batches of row numbers, epoch by epoch."""

    def __init__(self, n: int, size: int, generator: torch.Generator) -> None:
        self.n, self.size, self.generator = n, min(size, n), generator
        self.queue = torch.empty(0, dtype=torch.int64)

    def __next__(self) -> Tensor:
        while len(self.queue) < self.size:
            self.queue = torch.cat([self.queue, torch.randperm(self.n, generator=self.generator)])
        batch, self.queue = self.queue[: self.size], self.queue[self.size :]
        return batch
