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
from policies.head import READ_ONLY
from policies.prompt import extend_tokenizer, first_item_token
from trainer.errors import CannotTrain

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
    "tiny": Preset(
        hidden=256, layers=6, heads=8, feed_forward=704, text_vocabulary=2048, learning_rate=1.5e-3
    ),
    "small": Preset(
        hidden=448, layers=8, heads=8, feed_forward=1216, text_vocabulary=4096, learning_rate=8e-4
    ),
}
"""About 0.8, 5 and 20 million parameters with 3 x 256 SCID tokens."""

LOCAL_LEARNING_RATE = 2e-4
"""Peak rate for a pretrained model (the published code's)."""


@dataclass(frozen=True)
class Backbone:
    """A model and tokenizer that speak the codec's SCID tokens."""

    model: Any
    """transformers causal LM, float32, sdpa attention, in training mode on the CPU."""
    tokenizer: Any
    """transformers fast tokenizer."""
    learning_rate: float
    name: str


def open_backbone(
    name: str,
    codec: ScidCodec,
    texts: Iterable[str],
    *,
    text_vocabulary: int | None,
    seed: int,
    items: Sequence[int] = (),
) -> Backbone:
    """The preset called ``name``, else the local directory ``name``.

    ``items``: rows of the codec that get a token of their own.

    Raises CannotTrain when it is neither, or cannot be loaded as a causal language model.
    """
    if name in PRESETS:
        return _from_scratch(name, codec, texts, text_vocabulary=text_vocabulary, seed=seed, items=items)
    directory = Path(name)
    if not (directory / "config.json").is_file():
        presets = ", ".join(PRESETS)
        raise CannotTrain(
            f"backbone {name!r} is no preset ({presets}) and no local model directory with a config.json; "
            "set trainer.sft.backbone to one of them"
        )
    return _from_directory(directory, codec, seed=seed, items=items)


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


def set_read_only(model: Any, tokenizer: Any) -> None:
    """Let the model's config name the first token that is read and never said, where there is one."""
    first = first_item_token(tokenizer)
    if first is not None:
        setattr(model.config, READ_ONLY, first)


def _from_scratch(
    name: str,
    codec: ScidCodec,
    texts: Iterable[str],
    *,
    text_vocabulary: int | None,
    seed: int,
    items: Sequence[int],
) -> Backbone:
    from transformers import LlamaConfig, LlamaForCausalLM

    preset = PRESETS[name]
    tokenizer = byte_level_tokenizer(texts, text_vocabulary or preset.text_vocabulary)
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
    set_read_only(model, tokenizer)
    return Backbone(model.train(), tokenizer, preset.learning_rate, name)


def _from_directory(directory: Path, codec: ScidCodec, *, seed: int, items: Sequence[int]) -> Backbone:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, ImportError) as error:
        cause = " ".join(str(error).split())[:300]
        raise CannotTrain(
            f"backbone {directory} cannot be loaded as a causal language model: {cause}"
        ) from error
    extend_tokenizer(tokenizer, codec, items=items)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The mean of the rows there are, with their spread: new tokens start as unremarkable words.
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    set_read_only(model, tokenizer)
    return Backbone(model.train(), tokenizer, LOCAL_LEARNING_RATE, str(directory))
