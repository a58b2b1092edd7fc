"""Handing a stock transformers model a tree of answers: the one place that knows how models take 4-D masks.

A mask is bool [B, 1, Q, K], True where query may look at key, and goes to scaled-dot-product attention as it
is. Every query may look at something (itself at least), or softmax over nothing would give NaN.
"""

from typing import Any

import torch

from .errors import ScoringError


def attention_argument(
    model: Any, allowed: torch.Tensor, query_positions: torch.Tensor, key_positions: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What to pass as ``attention_mask``.

    ``allowed`` bool [B, Q, K]; ``query_positions`` [B, Q] and ``key_positions`` [B, K] are position ids, from
    which sliding windows are measured (Gemma 3, Mistral; an answer's tokens stand beside, not behind, another
    answer's). Raises ScoringError for an attention implementation that reads a bool mask wrongly.
    """
    config = model.config.get_text_config()
    implementation = getattr(config, "_attn_implementation", None)
    if implementation != "sdpa":
        raise ScoringError(
            f"the model runs attention {implementation!r}, which reads a tree mask wrongly; "
            'load it with attn_implementation="sdpa"'
        )
    full = allowed[:, None]
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return full if window is None else _within(full, window, query_positions, key_positions)
    if kinds == {"full_attention"}:
        return full
    if kinds <= {"full_attention", "sliding_attention"} and window is not None:
        return {
            "full_attention": full,
            "sliding_attention": _within(full, window, query_positions, key_positions),
        }
    raise ScoringError(
        f"the model has attention layers {sorted(kinds)}; only full and sliding attention are supported"
    )


def _within(
    full: torch.Tensor, window: int, query_positions: torch.Tensor, key_positions: torch.Tensor
) -> torch.Tensor:
    """Keys less than ``window`` positions back, [B, 1, Q, K]."""
    near = query_positions[:, :, None] - key_positions[:, None, :] < window
    return full & near[:, None]
