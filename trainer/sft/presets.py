"""Backbones of the base policy: small Llamas from scratch, or any local causal language model.

A preset is a stock ``LlamaForCausalLM`` with a byte-level BPE tokenizer of its own, fitted to the catalogue's
text, so that any text can be encoded. A local Hugging Face directory keeps its tokenizer and weights. Either
way the codec's SCID tokens are added and the embeddings resized; nothing is ever downloaded.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from policies.codec import ScidCodec
from policies.prompt import extend_tokenizer
from trainer.errors import CannotTrain

from .backbones import Backbone, codec_tokens, from_directory, set_read_only
from .likeness import Likeness
from .new_tokens import start_rows

__all__ = ["PRESETS", "Backbone", "Preset", "byte_level_tokenizer", "open_backbone"]

BEGIN, END, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True)
class Preset:
    """Sizes of a Llama from scratch, and what it trains well with."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    text_vocabulary: int
    learning_rate: float


PRESETS = {
    "demo": Preset(hidden=128, layers=3, heads=4, feed_forward=384, text_vocabulary=512, learning_rate=3e-3),
    "mini": Preset(hidden=160, layers=4, heads=5, feed_forward=432, text_vocabulary=512, learning_rate=2e-3),
    "tiny": Preset(
        hidden=256, layers=6, heads=8, feed_forward=704, text_vocabulary=2048, learning_rate=1.5e-3
    ),
    "small": Preset(
        hidden=448, layers=8, heads=8, feed_forward=1216, text_vocabulary=4096, learning_rate=8e-4
    ),
}
"""About 0.8, 1.4, 5 and 20 million parameters with 3 x 256 SCID tokens."""


def open_backbone(
    name: str,
    codec: ScidCodec,
    texts: Iterable[str],
    *,
    text_vocabulary: int | None,
    seed: int,
    items: Sequence[int] = (),
    new_tokens: str = "mean",
    likeness: Likeness | None = None,
    quantization: str = "none",
    device: str = "cpu",
) -> Backbone:
    """The preset called ``name``, else the local directory ``name``.

    ``items``: rows of the codec that get a token of their own. ``likeness``: of all the codec's items, what
    its tokens start from besides what ``new_tokens`` says. ``new_tokens``, ``quantization``: as in
    SftSettings; ``device``: where a quantized model goes.
    Raises CannotTrain when it is neither, or cannot be loaded as a causal language model.
    """
    if name in PRESETS:
        if quantization != "none":
            raise CannotTrain(
                f"the preset {name} is trained from scratch, all of it, so it cannot be quantized; "
                "set trainer.sft.quantization to none"
            )
        return _from_scratch(
            name,
            codec,
            texts,
            text_vocabulary=text_vocabulary,
            seed=seed,
            items=items,
            new_tokens=new_tokens,
            likeness=likeness,
        )
    if not Path(name).is_dir():
        presets = ", ".join(PRESETS)
        raise CannotTrain(
            f"backbone {name!r} is no preset ({presets}) and no local model directory; set "
            "trainer.sft.backbone to one of them, or make a directory with `align3gr backbone import`"
        )
    return from_directory(
        Path(name),
        codec,
        seed=seed,
        items=items,
        new_tokens=new_tokens,
        likeness=likeness,
        quantization=quantization,
        device=device,
    )


def byte_level_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of at most ``vocabulary`` tokens fitted to ``texts``; encodes any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def _from_scratch(
    name: str,
    codec: ScidCodec,
    texts: Iterable[str],
    *,
    text_vocabulary: int | None,
    seed: int,
    items: Sequence[int],
    new_tokens: str,
    likeness: Likeness | None,
) -> Backbone:
    from transformers import LlamaConfig, LlamaForCausalLM

    preset = PRESETS[name]
    tokenizer = byte_level_tokenizer(texts, text_vocabulary or preset.text_vocabulary)
    known = max(tokenizer.get_vocab().values()) + 1
    extend_tokenizer(tokenizer, codec, items=items)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        intermediate_size=preset.feed_forward,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    how = "codebook" if new_tokens == "codebook" else "keep"
    start_rows(
        model,
        tokenizer,
        codec,
        codec_tokens(codec, items),
        known=known,
        how=how,
        seed=seed,
        likeness=likeness,
    )
    set_read_only(model, tokenizer)
    return Backbone(model.train(), tokenizer, preset.learning_rate, name, scratch=True)
