"""Models of policies on disk and in memory: loading, sharing a base, putting on and saving an adapter.

Safetensors only, no code of the directory is run, nothing is fetched.
"""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .directory import Base
from .errors import BadRequest


def device_named(name: str | torch.device) -> torch.device:
    """Raises BadRequest when this machine or this torch has no such device."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadRequest(f"there is no device {name!r} here; use cpu, or install a torch for it") from error
    return torch.empty(0, device=device).device


def load_base(directory: Path, device: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer of a Hugging Face directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            use_safetensors=True,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
        )
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return _in_memory(model).to(device), tokenizer


def twin(model: Any) -> Any:
    """The plain base of a model as new modules around the same tensors, so that each may have its adapter."""
    tensors = [*model.parameters(), *model.buffers()]
    other = copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})
    return other.unload() if hasattr(other, "peft_config") else other


def with_adapter(model: Any, directory: Path, *, trainable: bool) -> Any:
    """The adapter of a policy on its base model (unmerged, so that the base can be shared)."""
    from peft import PeftModel

    with quiet():
        adapted = PeftModel.from_pretrained(
            model, str(directory), is_trainable=trainable, local_files_only=True
        )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.clone()
    return adapted


def save_full(model: Any, tokenizer: Any, directory: Path) -> None:
    """A plain Hugging Face directory."""
    with quiet():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_adapter(model: Any, directory: Path, base: Base) -> None:
    """As peft saves it, without its model card and without this machine's path of the base."""
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    config = directory / "adapter_config.json"
    facts = json.loads(config.read_text(encoding="utf-8"))
    facts["base_model_name_or_path"] = f"../{base.version}/model"
    if isinstance(facts.get("target_modules"), list):
        facts["target_modules"].sort()  # a set in peft: the same adapter is the same bytes in every process
    config.write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")


def _in_memory(model: Any) -> Any:
    """Weights as read are views of the mapped file: a file overwritten later would change what is served, a
    truncated one would kill the process."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars (ours are shown by the commands), and without its warnings that
    peft and we use names it deprecates (those that every version we take has)."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
