"""Backbones that come as a directory: what is looked at before one is loaded, and how it is loaded.

A directory is a plain Hugging Face one: config, tokenizer, safetensors. Nothing is downloaded, unpickled or
run from it, and what cannot serve (half a download, no tokenizer, a model that reads both ways) is refused in
one line before any training.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from policies.attention import attention_argument
from policies.codec import ScidCodec, scid_tokens, user_scid_tokens
from policies.errors import ScoringError
from policies.head import READ_ONLY, logits_at
from policies.prompt import RECOMMEND, extend_tokenizer, first_item_token, item_token
from policies.weights import quiet
from trainer.errors import CannotTrain

from .likeness import Likeness
from .new_tokens import start_rows

LOCAL_LEARNING_RATE = 2e-4
"""Peak rate for a pretrained model (the published code's)."""

INDEX = "model.safetensors.index.json"

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_UNFINISHED = ("*.incomplete", "*.part", "*.partial", "*.aria2", "*.crdownload")


@dataclass(frozen=True)
class Backbone:
    """A model and tokenizer that speak the codec's SCID tokens."""

    model: Any
    """transformers causal LM, float32 (frozen weights may be quantized), sdpa attention, in training mode; on
    the CPU unless quantized."""
    tokenizer: Any
    """transformers fast tokenizer."""
    learning_rate: float
    name: str
    scratch: bool = False
    """Whether its weights are random: a preset."""


def from_directory(
    directory: Path,
    codec: ScidCodec,
    *,
    seed: int,
    items: Sequence[int] = (),
    new_tokens: str = "mean",
    likeness: Likeness | None = None,
    quantization: str = "none",
    device: str = "cpu",
) -> Backbone:
    """The model in ``directory`` with the codec's tokens added.

    ``items``: rows of the codec that get a token of their own. ``likeness``: of all the codec's items, what
    its tokens start from besides what ``new_tokens`` says. ``new_tokens`` and ``quantization``: as in
    SftSettings; ``device``: where a quantized model goes.

    Raises CannotTrain when the directory is not whole, or holds no causal language model that can be trained
    on packed prompts.
    """
    require_whole(directory)
    model, tokenizer = load_causal(directory, quantization=quantization, device=device)
    require_causal(model, directory)
    vocabulary = tokenizer.get_vocab()
    known = max(vocabulary.values()) + 1
    fresh = [name for name in codec_tokens(codec, items) if name not in vocabulary]
    extend_tokenizer(tokenizer, codec, items=items)
    start_rows(model, tokenizer, codec, fresh, known=known, how=new_tokens, seed=seed, likeness=likeness)
    set_read_only(model, tokenizer)
    return Backbone(model.train(), tokenizer, LOCAL_LEARNING_RATE, str(directory))


def codec_tokens(codec: ScidCodec, items: Sequence[int] = ()) -> list[str]:
    """Every token that a prompt and its answer are made of; ``items`` have one of their own."""
    scids = [*scid_tokens(codec.sizes), *user_scid_tokens(codec.user_sizes)]
    return [RECOMMEND, *scids, *(item_token(row) for row in items)]


def set_read_only(model: Any, tokenizer: Any) -> None:
    """Let the model's config name the first token that is read and never said, where there is one."""
    first = first_item_token(tokenizer)
    if first is not None:
        setattr(model.config, READ_ONLY, first)


def load_causal(
    directory: Path,
    *,
    quantization: str = "none",
    device: str = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> tuple[Any, Any]:
    """Model (in ``dtype``, "auto": as stored, or quantized on ``device``) and tokenizer of a whole directory.

    Raises CannotTrain when it is no causal language model, lacks weights, or cannot be quantized here.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    extra = {} if quantization == "none" else _quantized(quantization, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        with quiet():
            model, told = AutoModelForCausalLM.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
                **extra,
            )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:300]
        raise CannotTrain(
            f"backbone {directory} cannot be loaded as a causal language model: {cause}"
        ) from error
    lacking = sorted(told["missing_keys"])
    if lacking:
        raise CannotTrain(
            f"backbone {directory} lacks {len(lacking)} weights of a {type(model).__name__}, among them "
            f"{lacking[0]}: it is no causal language model, or its download was interrupted; get it again"
        )
    return model, tokenizer


def require_whole(directory: Path) -> None:
    """Raises CannotTrain, naming the file, for a directory that is half downloaded, has no tokenizer, or
    holds weights that are not safetensors."""
    way_out = "download it again, or `align3gr backbone import` it"
    if not (directory / "config.json").is_file():
        raise CannotTrain(f"backbone {directory} holds no config.json: it is no model directory; {way_out}")
    for pattern in _UNFINISHED:
        found = next(directory.rglob(pattern), None)
        if found is not None:
            raise CannotTrain(
                f"backbone {directory} is an interrupted download: it holds {found.name}; {way_out}"
            )
    for file in _weights_of(directory, way_out):
        _require_readable(directory, file, way_out)
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        raise CannotTrain(
            f"backbone {directory} has no tokenizer (none of {', '.join(_TOKENIZERS)}); "
            "put its tokenizer's files beside its config.json"
        )


@torch.no_grad()
def require_causal(model: Any, directory: Path) -> None:
    """Raises CannotTrain for a model that looks ahead, or that does not read a tree of answers.

    Two prompts that differ in their last token, then both as branches of one packed row: the first token's
    logits must not know the last ones', and the branches' must be those of the prompts.
    """
    model.eval()
    place = model.get_input_embeddings().weight.device
    rows = model.get_input_embeddings().weight.shape[0]
    first, one, two = (torch.tensor([n % rows], device=place) for n in (5, 7, 11))
    prompts = torch.stack([torch.cat([first, one]), torch.cat([first, two])])
    packed = torch.cat([first, one, two])[None]
    positions = torch.tensor([[0, 1, 1]], device=place)
    allowed = torch.eye(3, dtype=torch.bool, device=place)[None].clone()
    allowed[:, :, 0] = True
    try:
        plain = model(input_ids=prompts, use_cache=False).logits.float()
        tree = logits_at(
            model,
            torch.tensor([1, 2], device=place),
            input_ids=packed,
            attention_mask=attention_argument(model, allowed, positions, positions),
            position_ids=positions,
        ).float()
    except (ScoringError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        cause = " ".join(str(error).split())[:200]
        raise CannotTrain(
            f"backbone {directory}: a {type(model).__name__} cannot read packed prompts ({cause}); "
            "use another, such as a Llama, Qwen, Mistral or Gemma"
        ) from error
    # Rounding against the largest logit: 1e-6 in float32, 1e-2 in bfloat16 or quantized.
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    room = float(plain.abs().max()) * (1e-4 if exact else 5e-2) + 1e-7
    if float((plain[0, 0] - plain[1, 0]).abs().max()) > room:
        raise CannotTrain(
            f"backbone {directory}: a {type(model).__name__} reads ahead (it is an encoder), so it cannot "
            "generate; use a causal language model, such as a Llama, Qwen, Mistral or Gemma"
        )
    if float((tree - plain[:, 1, : tree.shape[1]]).abs().max()) > room:
        raise CannotTrain(
            f"backbone {directory}: a {type(model).__name__} does not keep packed prompts apart; "
            "use another, such as a Llama, Qwen, Mistral or Gemma"
        )


def _quantized(quantization: str, device: str) -> dict[str, Any]:
    """Arguments that have transformers quantize while loading: linear layers, not embedding and head."""
    from importlib.util import find_spec

    wish = f"trainer.sft.quantization: {quantization}"
    if not device.startswith("cuda"):
        raise CannotTrain(f"{wish} needs a CUDA GPU, not {device}; set it to none, or train on a GPU")
    if find_spec("bitsandbytes") is None:
        raise CannotTrain(f"{wish} needs bitsandbytes: pip install 'align3gr[quantized]', or set it to none")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "4bit":
        # QLoRA's: 4-bit NormalFloat, double quantization, products in bfloat16.
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def _weights_of(directory: Path, way_out: str) -> list[Path]:
    """The safetensors files that the directory should hold."""
    index = directory / INDEX
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CannotTrain(f"backbone {directory}: {INDEX} cannot be read; {way_out}") from error
        lacking = sorted(name for name in shards if not (directory / name).is_file())
        if lacking:
            raise CannotTrain(
                f"backbone {directory} is an interrupted download: {len(lacking)} of {len(shards)} files of "
                f"weights that {INDEX} names are not there, among them {lacking[0]}; {way_out}"
            )
        return [directory / name for name in sorted(shards)]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        pickles = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
        cause = f"its weights ({pickles[0].name}) are pickles" if pickles else "it holds no weights"
        raise CannotTrain(f"backbone {directory}: {cause}; get the safetensors files of this model")
    if not (directory / "model.safetensors").is_file():
        raise CannotTrain(
            f"backbone {directory} is an interrupted download: it holds {found[0].name} but neither "
            f"model.safetensors nor {INDEX}; {way_out}"
        )
    return [directory / "model.safetensors"]


def _require_readable(directory: Path, file: Path, way_out: str) -> None:
    """Reads the header, which says how long the file must be."""
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise CannotTrain(
            f"backbone {directory}: {file.name} is no whole safetensors file (an interrupted download, or a "
            f"placeholder of large files); {way_out}"
        ) from error
