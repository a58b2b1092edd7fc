"""Tiny Hugging Face directories, as downloads leave them."""

from pathlib import Path

from tests.policies.factory import tiny_model
from trainer.sft.presets import byte_level_tokenizer


def write_backbone(
    directory: Path, *, style: str = "llama", tied: bool = True, pad: bool = True, shards: bool = False
) -> Path:
    """Random weights of about 40,000 parameters and a byte-level tokenizer; returns ``directory``."""
    tokenizer = byte_level_tokenizer(["a red lamp", "an old blue chair"], 270)
    model = tiny_model(len(tokenizer), style=style, tied=tied)
    if not pad:
        tokenizer.pad_token = None
        model.config.pad_token_id = None
    model.save_pretrained(directory, max_shard_size="40KB" if shards else "5GB")
    tokenizer.save_pretrained(directory)
    return directory
