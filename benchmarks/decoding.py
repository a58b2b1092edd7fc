"""Users a second of ``Policy.recommend`` against transformers' ``generate``, same model, beam and trie.

    python benchmarks/decoding.py [--json] [--quick] [--threads N] [--device cpu]

``generate`` runs with ``prefix_allowed_tokens_fn`` over the same trie (plain dicts of token ids, the way
public generative recommenders do it), batch 32, beam 20, 10,000 items, 20-item histories, a random Llama of
15M parameters; both on the same users in one run (ours before and after it), lists compared in order. Then
ours alone for 1, 8 and 32 users, and for 10^3 to 10^6 items. ``ratio`` is wall time; ``ratio_cpu`` is the
process's CPU time: the same on an idle machine, and true on a shared one (use ``--threads 1`` there).
``--json``: the last line is one object [ratio, identical, ...].

A random model has near-equal scores nowhere in fp32 (gaps of about 1e-3), so ordered lists can be compared.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from align3gr.console import say
from policies.codec import ScidCodec
from policies.directory import CodecHashes, Manifest
from policies.policy import Policy, UserContext
from policies.prompt import extend_tokenizer, prompts_ids

BEAM, BATCH, ITEMS = 20, 32, 10_000
SIZES = (256, 256, 256)


def main() -> None:
    """Run, print rows, and with ``--json`` one object as the last line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--quick", action="store_true", help="a small model, up to 10^5 items")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    width, layers = (128, 2) if options.quick else (384, 8)

    policy = build(ITEMS, width, layers, options.device)
    parameters = sum(p.numel() for p in policy.model.parameters())
    say(f"model: {parameters / 1e6:.1f}M parameters, {torch.get_num_threads()} threads, {options.device}")
    facts: dict[str, Any] = {"parameters": parameters, "threads": torch.get_num_threads()}
    facts |= against_generate(policy)
    say(f"batch {BATCH}, beam {BEAM}, {ITEMS} items, identical lists: {facts['identical']}")
    say(f"  ours {facts['users_per_s']:.1f} users/s, generate {facts['generate_users_per_s']:.2f}")
    say(f"  {facts['ratio']:.1f}x in wall time, {facts['ratio_cpu']:.1f}x in CPU time")
    facts["by_users"] = {}
    for count in (1, 8, 32):
        row = speed(policy, count)
        facts["by_users"][count] = row
        say(f"{count} users: {row['users_per_s']:.1f} users/s, {row['cpu_ms_per_user']:.1f} ms of CPU a user")
    facts["by_items"] = {}
    for items in (10**3, 10**4, 10**5) if options.quick else (10**3, 10**4, 10**5, 10**6):
        row = by_items(items, width, layers, options.device)
        facts["by_items"][items] = row
        say(
            f"{items} items: {row['users_per_s']:.1f} users/s, {row['cpu_ms_per_user']:.1f} ms of CPU each, "
            f"trie {row['trie_mb']:.1f} MB, ready in {row['ready_s']:.2f} s"
        )
    facts["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if options.json:
        print(json.dumps(facts))


def against_generate(policy: Policy) -> dict[str, Any]:
    """Both on the same batch; ``generate`` once, after a warm-up on one user (it takes long)."""
    users = people(policy, BATCH)
    policy.recommend(users, BEAM, beam=BEAM)
    generated(policy, users[:1])
    ours = [timed(lambda: policy.recommend(users, BEAM, beam=BEAM)) for _ in range(3)]
    theirs = timed(lambda: generated(policy, users))
    ours += [timed(lambda: policy.recommend(users, BEAM, beam=BEAM)) for _ in range(3)]
    wall, cpu = (statistics.median(one[i] for one in ours) for i in (1, 2))
    lists = [[place.item_id for place in one] for one in ours[0][0]]
    return {
        "ratio": theirs[1] / wall,
        "ratio_cpu": theirs[2] / cpu,
        "identical": lists == theirs[0],
        "users_per_s": BATCH / wall,
        "generate_users_per_s": BATCH / theirs[1],
    }


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall seconds, CPU seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def generated(policy: Policy, users: list[UserContext]) -> list[list[str]]:
    """The lists by ``generate`` with ``prefix_allowed_tokens_fn``; all prompts have one length."""
    prompts = torch.tensor(prompts_ids(policy.tokens, [user.history for user in users]))
    levels = [level.tolist() for level in policy.tokens.levels]
    following: dict[tuple[int, ...], set[int]] = {}
    item_of: dict[tuple[int, ...], str] = {}
    for item_id, codes in zip(policy.codec.item_ids, policy.codec.codes.tolist(), strict=True):
        tokens = tuple(levels[level][code] for level, code in enumerate(codes))
        item_of[tokens] = item_id
        for depth, token in enumerate(tokens):
            following.setdefault(tokens[:depth], set()).add(token)
    allowed = {prefix: sorted(tokens) for prefix, tokens in following.items()}
    width = prompts.shape[1]
    with torch.inference_mode():
        found = policy.model.generate(
            input_ids=prompts.to(policy.device),
            attention_mask=torch.ones_like(prompts).to(policy.device),
            num_beams=BEAM,
            num_return_sequences=BEAM,
            max_new_tokens=3,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, ids: allowed[tuple(ids[width:].tolist())],
            eos_token_id=None,
            pad_token_id=policy.tokens.pad,
        )
    answers = found[:, width:].reshape(len(users), BEAM, 3).tolist()
    return [[item_of[tuple(answer)] for answer in several] for several in answers]


def by_items(items: int, width: int, layers: int, device: str) -> dict[str, float]:
    """Ours at another catalogue size."""
    codec = random_codec(items)
    start = time.perf_counter()
    policy = build(items, width, layers, device, codec)
    ready = time.perf_counter() - start
    return speed(policy, BATCH) | {"trie_mb": policy.trie.bytes / 2**20, "ready_s": ready}


def speed(policy: Policy, count: int, repeats: int = 5) -> dict[str, float]:
    """Ours for ``count`` users in one call: medians after a warm-up call."""
    users = people(policy, count)
    policy.recommend(users, BEAM)
    calls = [timed(lambda: policy.recommend(users, BEAM)) for _ in range(repeats)]
    wall, cpu = (statistics.median(one[i] for one in calls) for i in (1, 2))
    return {"users_per_s": count / wall, "ms": 1000 * wall, "cpu_ms_per_user": 1000 * cpu / count}


def build(items: int, width: int, layers: int, device: str, codec: ScidCodec | None = None) -> Policy:
    """A random policy in memory."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    codec = codec or random_codec(items)
    raw = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    extend_tokenizer(tokenizer, codec)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=2,
            attn_implementation="sdpa",
        )
    )
    hashes = CodecHashes(quantizer_hash=codec.quantizer_hash, item_map_hash=codec.item_map_hash)
    manifest = Manifest(version="v0", prompt_template="1", kind="full", codec=hashes, files={})
    return Policy(manifest, model=model.eval().to(device), tokenizer=tokenizer, codec=codec, popularity=[])


def random_codec(items: int) -> ScidCodec:
    """Unique SCIDs, uniform."""
    numbers = np.random.default_rng(0).choice(int(np.prod(SIZES)), size=items, replace=False)
    codes = np.stack(np.unravel_index(numbers, SIZES), axis=1)
    return ScidCodec([str(n) for n in range(items)], codes, SIZES, quantizer_hash="benchmark")


def people(policy: Policy, count: int) -> list[UserContext]:
    """Users with a history of 20 items each."""
    draw = np.random.default_rng(1)
    histories = draw.integers(0, len(policy.codec), size=(count, 20)).tolist()
    return [
        UserContext(f"user-{n}", tuple(str(item) for item in history)) for n, history in enumerate(histories)
    ]


if __name__ == "__main__":
    main()
