"""Which tokens a model can say, and its logits over them where something is predicted.

Tokens that stand for items in histories (``policies.prompt``) are read and never said. They are the last of
the vocabulary; the model's config names the first of them, and log pi is normalised over the tokens before
it. Without such tokens that is the full vocabulary.
"""

import inspect
from typing import Any

import torch
from torch import nn

READ_ONLY = "read_only_from"
"""Attribute of the model's config: the first token that is never said; absent: every token may be."""

_OTHER_HEADS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier")


def said(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """``logits`` [..., V] of the model without those of tokens that are never said."""
    first = getattr(model.config, READ_ONLY, None)
    return logits if first is None else logits[..., :first]


def logits_at(model: Any, places: torch.Tensor, *, cache: Any = None, **inputs: Any) -> torch.Tensor:
    """Logits over what can be said, [*places, V'], at ``places`` in the flattened [B T] of ``inputs``.

    ``cache``: a transformers cache to read and to write; none: nothing is kept. Where the head is a plain
    matrix it is computed at these places and for these tokens alone.
    """
    # LoRA stands inside of the model's own layers; a head that it wraps is no plain matrix.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    remembered = {"use_cache": False} if cache is None else {"use_cache": True, _cache_name(inner): cache}
    head = inner.get_output_embeddings()
    plain = (
        type(head) is nn.Linear
        and getattr(head, "bias", None) is None
        and not any(getattr(model.config.get_text_config(), name, None) for name in _OTHER_HEADS)
    )
    if not plain:
        # Every column that predicts something in some row: stock models take no finer choice.
        width = inputs["input_ids"].shape[1]
        columns, among = torch.unique(places % width, return_inverse=True)
        logits = said(model, model(logits_to_keep=columns, **remembered, **inputs).logits)
        return logits.flatten(0, 1)[places // width * len(columns) + among]
    states = inner.get_decoder()(**remembered, **inputs).last_hidden_state
    weight = head.weight[: getattr(model.config, READ_ONLY, None)]
    return nn.functional.linear(states.flatten(0, 1)[places], weight)


def _cache_name(model: Any) -> str:
    """What the model calls its cache: transformers renamed the argument in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
