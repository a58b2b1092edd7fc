"""One side (items, or users) as training hands it to the deployed quantizer: numpy arrays and no torch."""

from dataclasses import dataclass

import numpy as np
import torch

from .rqvae import FloatArray


@dataclass(frozen=True)
class Side:
    """One side's modules after training, as the deployed quantizer takes them."""

    mean: FloatArray
    """[d] subtracted from an input vector."""
    scale: FloatArray
    """[d] that it is divided by then."""
    weights: tuple[FloatArray, ...]
    """[in, out] of each layer of the perceptron between the input and what is quantized."""
    biases: tuple[FloatArray, ...]
    codebooks: tuple[FloatArray, ...]
    """[K, z] of each level."""


Layers = list[tuple[FloatArray, FloatArray]]


def linear_arrays(layers: torch.nn.Sequential) -> Layers:
    """(weight [in, out], bias [out]) of each linear layer."""
    found = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    return [(layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy().copy()) for layer in found]


def put_together(first: Layers, shift: FloatArray, spread: float, second: Layers) -> Layers:
    """SC encoder, shift and scale, RQ encoder as one perceptron. Nothing stands between the last layer of the
    one and the first of the other, so they are one layer."""
    weight, bias = first[-1]
    weight, bias = weight / spread, (bias - shift) / spread
    if not second:
        return [*first[:-1], (weight, bias)]
    (w2, b2), *rest = second
    return [*first[:-1], (weight @ w2, bias @ w2 + b2), *rest]


def centre(vectors: FloatArray, text_width: int, weight: float) -> tuple[FloatArray, FloatArray]:
    """(mean [d], scale [d]) of [n, d]: afterwards the text part and the behaviour part vary equally much in
    all, times ``weight`` for behaviour; a part that never varies is left as it is."""
    mean = vectors.mean(axis=0).astype(np.float32)
    scale = np.ones(vectors.shape[1], dtype=np.float32)
    for part, factor in ((slice(None, text_width), 1.0), (slice(text_width, None), weight)):
        energy = float(((vectors[:, part] - mean[part]) ** 2).sum(axis=1).mean())
        if energy > 1e-12:
            scale[part] = np.sqrt(2 * energy / vectors.shape[1]) / factor
    return mean, scale
