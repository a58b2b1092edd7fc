"""LoRA for SFT: low-rank matrices on every projection and the rows of the codec's tokens, all else frozen.

peft trains the rows (``trainable_token_indices``): of the embedding, which a tied head shares, or of both.
At the end all of it is added into the weights: what SFT gives is always a plain model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.weights import quiet
from trainer.errors import CannotTrain
from trainer.settings import LoraSettings

from .backbones import Backbone

LARGE = 100_000_000
"""Parameters from which a pretrained model is trained by LoRA unless settings say otherwise."""

LARGE_RANK = 8
"""Rank for such a model (the published code's, on a 7B model)."""


def rank_for(backbone: Backbone, settings: LoraSettings) -> int:
    """Rank of the LoRA matrices; 0: all weights are trained."""
    if settings.rank is not None:
        return settings.rank
    large = sum(weight.numel() for weight in backbone.model.parameters()) >= LARGE
    return LARGE_RANK if large and not backbone.scratch else 0


def with_lora(backbone: Backbone, settings: LoraSettings, rows: list[int], *, seed: int) -> Any:
    """The backbone's model with LoRA matrices that change nothing yet, or itself where all of it is trained.

    ``rows``: token ids whose rows are trained. Raises CannotTrain for quantized weights without LoRA, a head
    that has a bias, targets that match no module.
    """
    rank = rank_for(backbone, settings)
    model = backbone.model
    if rank == 0:
        if getattr(model, "is_quantized", False):
            raise CannotTrain(
                "quantized weights cannot be trained themselves; set trainer.sft.lora.rank (8, say), or "
                "trainer.sft.quantization to none"
            )
        return model
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise CannotTrain(
            f"backbone {backbone.name}: the head of a {type(model).__name__} has a bias, which LoRA with "
            "trained rows would leave out; set trainer.sft.lora.rank to 0 to train all weights"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
        trainable_token_indices=_rows_by_module(model, rows),
    )
    try:
        with quiet(), seeded(seed):
            return get_peft_model(model, config).train()
    except ValueError as error:
        cause = " ".join(str(error).split())[:200]
        raise CannotTrain(f"trainer.sft.lora.targets: {cause}") from error


def plain(model: Any, reopen: Callable[[], Any]) -> Any:
    """The model with what LoRA learned added into its weights, on the CPU; itself where there was no LoRA.

    ``reopen``: makes the backbone's model as it was before, in full precision; called for a quantized one,
    whose own weights are too coarse to add to.
    """
    if not hasattr(model, "peft_config"):
        return model
    quantized = getattr(model, "is_quantized", False)
    merged = onto(reopen(), model) if quantized else model.merge_and_unload()
    for weight in merged.parameters():
        weight.requires_grad_(True)
    return merged.eval()


def onto(fresh: Any, learned: Any) -> Any:
    """What ``learned``, a model with LoRA, learned, added into the weights of ``fresh``, its backbone."""
    from peft import get_peft_model

    with quiet():
        other = get_peft_model(fresh, learned.peft_config["default"])
    load_trained(other, {name: weight.to("cpu") for name, weight in trained_state(learned).items()})
    return other.merge_and_unload()


def trained_state(model: Any) -> Mapping[str, Tensor]:
    """The weights that training changes, by name: all that a checkpoint needs beside the backbone."""
    if not hasattr(model, "peft_config"):
        state: Mapping[str, Tensor] = model.state_dict()
        return state
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def load_trained(model: Any, state: Mapping[str, Tensor]) -> None:
    """Put back what ``trained_state`` gave."""
    if not hasattr(model, "peft_config"):
        model.load_state_dict(state)
        return
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state[name])


def keep_less(model: Any, recompute: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Turn gradient checkpointing on. ``recompute``: what activations are computed in a second time; it must
    choose the kernels that the first time did."""
    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), recompute())}
    with quiet():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def keep_all(model: Any) -> None:
    """Turn it off: a policy is not written with it."""
    with quiet():
        model.gradient_checkpointing_disable()


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Dropout's random numbers from ``numbers`` alone; the process's own come back afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
        yield


def _rows_by_module(model: Any, rows: list[int]) -> list[int] | dict[str, list[int]]:
    """As peft wants them: a list for an embedding and a head tied to it, else a list each, by name."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        return rows
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return {names[id(embedding)]: rows, names[id(head)]: rows}
