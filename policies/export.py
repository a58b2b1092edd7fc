"""A policy as a plain Hugging Face directory, for serving stacks that know nothing of ours.

An adapter is added into its base; beside the model lie the codec, and ``align3gr.json``: what a program needs
to write a prompt, to read the answer and to map SCIDs to items. align3gr itself never reads it again.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import PolicyRefused
from .policy import Policy
from .prompt import HISTORY, RECOMMEND, TEMPLATE_VERSION, answer_ids, prompt_ids
from .weights import save_full

FACTS = "align3gr.json"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    directory: str
    version: str
    kind: str
    """Of the policy: an adapter was added into its base."""
    architecture: str
    parameters: int
    items: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def export_policy(directory: Path, out: Path, *, policies: Path | None = None) -> Exported:
    """Write the policy at ``directory`` to ``out``, whole or not at all; logits stay equal up to rounding.

    ``policies``: where bases lie, when not beside ``directory``. Raises PolicyRefused when ``out`` exists or
    the policy cannot be loaded.
    """
    if out.exists():
        raise PolicyRefused(f"{out} exists already; choose another place, or remove it first")
    policy = Policy.load(directory, policies=policies, merged=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        save_full(policy.model, policy.tokenizer, staging)
        policy.codec.save(staging / "codec")
        shutil.copy(directory / "popularity.json", staging)
        text = json.dumps(facts_of(policy), indent=1, ensure_ascii=False)
        (staging / FACTS).write_text(text, encoding="utf-8")
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Exported(
        directory=str(out),
        version=policy.version,
        kind=policy.manifest.kind,
        architecture=type(policy.model).__name__,
        parameters=sum(weight.numel() for weight in policy.model.parameters()),
        items=len(policy.codec),
    )


def facts_of(policy: Policy) -> dict[str, Any]:
    """align3gr.json: the prompt template, how SCIDs map to items, where the policy comes from, an example."""
    codec, tokens = policy.codec, policy.tokens
    own = int((tokens.own >= 0).sum())
    words = policy.tokenizer.convert_ids_to_tokens
    history = list(codec.item_ids[: min(3, len(codec) - 1)])
    answer = codec.item_ids[-1]
    return {
        "what": "A generative recommender: a causal language model that answers a prompt of item ids (SCIDs) "
        "with the SCID of the next item.",
        "policy": policy.version,
        "prompt": {
            "template": TEMPLATE_VERSION,
            "tokens": f"{{begin}}{{items}}{{user}}{RECOMMEND}",
            "begin": words(list(tokens.begin)),
            "items": f"the last {HISTORY} items of the history that have an SCID, oldest first, the tokens "
            "of each one's SCID in the order of levels, nothing between them"
            + ("; an item that has a token <item_{row}> of its own stands as that token" if own else ""),
            "user": "the tokens of the user's SCID, worked out from these items by codec/quantizer/users"
            if codec.user_sizes
            else "nothing",
            "end": RECOMMEND,
            "special_tokens": "add none: encode with add_special_tokens=False",
        },
        "answer": {
            "tokens": codec.levels,
            "end": "none: an answer is exactly these tokens",
            "score": "the sum of the log-probabilities of its tokens, over "
            + ("the tokens before config.json's read_only_from" if own else "the whole vocabulary"),
            "valid": "an answer is an item only where codec/codes.safetensors has it: search among these "
            "(a trie), leave out what the user has seen",
        },
        "scids": {
            "item": "row i of codec/codes.safetensors (int32 [items, levels]) is item i of codec/items.json",
            "levels": [
                {"token": f"<{letter}_{{code}}>", "codes": size}
                for letter, size in zip("abcdefghijklmnopqrstuvwxyz", codec.sizes, strict=False)
            ],
            "user_levels": [
                {"token": f"<u{letter}_{{code}}>", "codes": size}
                for letter, size in zip("abcdefghijklmnopqrstuvwxyz", codec.user_sizes, strict=False)
            ],
            "items": len(codec),
            "items_with_own_token": own,
            "quantizer_hash": codec.quantizer_hash,
            "item_map_hash": codec.item_map_hash,
        },
        "example": {
            "history": history,
            "prompt": "".join(words(prompt_ids(tokens, history))),
            "item": answer,
            "answer": "".join(words(answer_ids(tokens, answer))),
        },
        "lineage": policy.manifest.lineage,
    }
