"""A real tiny policy directory, made in well under a second: what other tests need a policy for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from policies.codec import ScidCodec
from policies.directory import base_of
from policies.policy import write_policy
from policies.prompt import extend_tokenizer
from policies.quantizer import ItemEncoder, Quantizer, TfidfEncoder, directory_hash
from policies.users import InterestAttention, ItemVectors, UserEncoder

WORDS = "a red blue old new lamp chair song film book of the and light night game cup shoe"


def item_ids(count: int) -> list[str]:
    """item-000, item-001, ..."""
    return [f"item-{number:03d}" for number in range(count)]


def tiny_codec(
    items: int | Sequence[str] = 200, sizes: Sequence[int] = (8, 8, 8), *, seed: int = 0, quantizer: str = "q"
) -> ScidCodec:
    """Unique SCIDs drawn without replacement."""
    names = item_ids(items) if isinstance(items, int) else list(items)
    numbers = np.random.default_rng(seed).choice(int(np.prod(sizes)), size=len(names), replace=False)
    codes = np.stack(np.unravel_index(numbers, tuple(sizes)), axis=1)
    return ScidCodec(names, codes, sizes, quantizer_hash=quantizer)


def tiny_user_encoder(
    text: int = 6, behaviour: int = 4, sizes: Sequence[int] = (4, 5, 3), *, seed: int = 0
) -> UserEncoder:
    """Random weights, attention and all; codes of random users are spread over the codebooks."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return draw.normal(size=shape).astype(np.float32)

    width, hidden, latent = text + behaviour, 7, 5
    quantizer = Quantizer(
        codebooks=tuple(normal(size, latent) for size in sizes),
        mean=normal(width) / 4,
        scale=(1 + np.abs(normal(width))) / 4,
        weights=(normal(width, hidden), normal(hidden, latent)),
        biases=(normal(hidden), normal(latent)),
        text_width=text,
    )
    unit = InterestAttention(normal(3 * behaviour, 8), normal(8), normal(8), normal(1))
    return UserEncoder(quantizer, unit)


def tiny_user_codec(
    directory: Path,
    items: int = 200,
    sizes: Sequence[int] = (8, 8, 8),
    user_sizes: Sequence[int] = (4, 5, 3),
    *,
    seed: int = 0,
) -> ScidCodec:
    """A codec with SCIDs for users and a quantizer that codes new items, saved to a directory and loaded."""
    draw = np.random.default_rng([seed, 1])

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return draw.normal(size=shape).astype(np.float32)

    text, behaviour = 6, 4
    words = {word: row for row, word in enumerate(WORDS.split()[1:])}
    encoder = ItemEncoder(
        TfidfEncoder(words, np.ones(len(words), np.float32), normal(len(words), text)),
        Quantizer(
            codebooks=tuple(normal(size, text + behaviour) for size in sizes),
            mean=normal(text + behaviour),
            scale=np.ones(text + behaviour, np.float32),
            text_width=text,
            bridge=normal(text + 1, behaviour),
        ),
    )
    encoder.save(directory / "quantizer")
    tiny_user_encoder(text, behaviour, user_sizes, seed=seed).save(directory / "quantizer" / "users")
    plain = tiny_codec(items, sizes, seed=seed)
    ScidCodec(
        plain.item_ids,
        plain.codes,
        sizes,
        quantizer_hash=directory_hash(directory / "quantizer"),
        user_sizes=user_sizes,
        vectors=ItemVectors.of(normal(items, text), normal(items, behaviour)),
    ).save(directory)
    return ScidCodec.load(directory)


def tiny_tokenizer(codec: ScidCodec) -> Any:
    """Words and single characters, plus the codec's tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    extend_tokenizer(tokenizer, codec)
    return tokenizer


def tiny_model(
    vocabulary: int, *, style: str = "llama", seed: int = 0, width: int = 48, tied: bool = True
) -> Any:
    """A random causal LM of about 50,000 parameters: "llama", "qwen" or "gemma" (sliding window 8)."""
    import torch
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "attn_implementation": "sdpa",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if style == "qwen":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**shape))
    elif style == "gemma":
        layers = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**shape, head_dim=12, sliding_window=8, layer_types=layers)
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    return model.eval()


def write_tiny_policy(
    directory: Path,
    *,
    version: str = "v1",
    codec: ScidCodec | None = None,
    popularity: Sequence[str] | None = None,
    style: str = "llama",
    seed: int = 0,
    lineage: dict[str, Any] | None = None,
) -> Path:
    """A full policy with random weights; returns ``directory``."""
    codec = codec or tiny_codec()
    tokenizer = tiny_tokenizer(codec)
    write_policy(
        directory,
        version=version,
        model=tiny_model(len(tokenizer), style=style, seed=seed),
        tokenizer=tokenizer,
        codec=codec,
        popularity=codec.item_ids if popularity is None else popularity,
        lineage=lineage,
    )
    return directory


def write_tiny_adapter(directory: Path, base: Path, *, version: str = "v2", seed: int = 1) -> Path:
    """An adapter policy with a random (not zero) LoRA on the policy at ``base``; returns ``directory``."""
    import torch
    from peft import LoraConfig, get_peft_model

    from policies.policy import Policy

    parent = Policy.load(base)
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    write_policy(
        directory,
        version=version,
        model=get_peft_model(parent.model, config),
        tokenizer=parent.tokenizer,
        codec=parent.codec,
        popularity=parent.codec.item_ids,
        base=base_of(base),
        lineage={"parent": parent.version},
    )
    return directory
