"""A policy directory is whole, unchanged and matching, or it is refused in one line that says what to do."""

import json
import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from features.errors import BadInput
from policies.directory import (
    MANIFEST,
    base_of,
    manifest_hash,
    read_manifest,
    verify,
    write_directory,
    write_manifest,
)
from policies.errors import BadRequest, PolicyRefused
from policies.policy import Policy, UserContext, write_policy
from policies.prompt import prompt_ids, text_ids
from policies.scoring import answer_log_probs, pack
from tests.policies.factory import tiny_codec, write_tiny_policy


@pytest.fixture
def folder(tiny_policies: Path, tmp_path: Path) -> Path:
    """A copy of v1 and v2 that a test may damage."""
    shutil.copytree(tiny_policies, tmp_path / "policies")
    return tmp_path / "policies"


def logits(policy: Policy) -> torch.Tensor:
    ids = torch.tensor([prompt_ids(policy.tokens, policy.codec.item_ids[:5])])
    with torch.no_grad():
        return torch.as_tensor(policy.model(ids).logits)


def edit(directory: Path, **facts: object) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps(manifest | facts))


def test_a_full_policy_comes_back_as_it_was_written(tmp_path: Path) -> None:
    lineage = {"parent": None, "dataset_id": "d1", "metrics": {"ndcg": 0.5}}
    write_tiny_policy(tmp_path / "v1", lineage=lineage)
    policy = Policy.load(tmp_path / "v1")
    assert policy.version == "v1"
    assert policy.manifest.kind == "full"
    assert policy.manifest.lineage == lineage
    assert policy.manifest.codec.item_map_hash == policy.codec.item_map_hash
    assert sorted(policy.manifest.files) == [
        "codec/codec.json",
        "codec/codes.safetensors",
        "codec/items.json",
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "popularity.json",
    ]
    assert not policy.model.training
    special = {token for token, added in policy.tokenizer.added_tokens_decoder.items() if added.special}
    assert not special & set(text_ids(policy.tokenizer, "<s> a red <a_1><recommend>"))
    assert list(tmp_path.iterdir()) == [tmp_path / "v1"]


def test_an_adapter_loads_with_plain_peft_and_equal_logits(tiny_policies: Path) -> None:
    ours = Policy.load(tiny_policies / "v2")
    base = AutoModelForCausalLM.from_pretrained(tiny_policies / "v1" / "model")
    plain = PeftModel.from_pretrained(base, tiny_policies / "v2" / "adapter").eval()
    ids = torch.tensor([prompt_ids(ours.tokens, ours.codec.item_ids[:5])])
    with torch.no_grad():
        theirs = plain(ids).logits
    assert torch.equal(logits(ours), theirs)
    assert not torch.allclose(logits(ours), logits(Policy.load(tiny_policies / "v1")))
    config = (tiny_policies / "v2" / "adapter" / "adapter_config.json").read_text()
    assert json.loads(config)["base_model_name_or_path"] == "../v1/model"
    assert str(tiny_policies) not in config


def test_policies_on_one_base_share_its_weights_and_keep_their_own_adapters(
    tiny_policies: Path, tmp_path: Path
) -> None:
    first = Policy.load(tiny_policies / "v1")
    alone = {name: Policy.load(tiny_policies / name) for name in ("v1", "v2")}
    second = Policy.load(tiny_policies / "v2", share_base_with=first)
    third = Policy.load(tiny_policies / "v1", share_base_with=second)
    fourth = Policy.load(tiny_policies / "v2", share_base_with=second)

    def storages(policy: Policy) -> set[int]:
        return {p.data_ptr() for name, p in policy.model.named_parameters() if "lora_" not in name}

    assert storages(first) == storages(second) == storages(third) == storages(fourth)
    assert storages(first).isdisjoint(storages(alone["v1"]))
    for policy, expected in ((first, "v1"), (second, "v2"), (third, "v1"), (fourth, "v2")):
        assert torch.equal(logits(policy), logits(alone[expected]))

    write_tiny_policy(tmp_path / "v1", seed=5)
    stranger = Policy.load(tmp_path / "v1", share_base_with=first)
    assert storages(stranger).isdisjoint(storages(first))


def test_a_merged_adapter_scores_the_same_and_leaves_its_base_alone(tiny_policies: Path) -> None:
    base = Policy.load(tiny_policies / "v1")
    before = logits(base)
    merged = Policy.load(tiny_policies / "v2", merged=True, share_base_with=base)
    assert not hasattr(merged.model, "peft_config")
    # W x + B (A x) against (W + B A) x in fp32.
    torch.testing.assert_close(
        logits(merged), logits(Policy.load(tiny_policies / "v2")), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(logits(base), before)
    plain = Policy.load(tiny_policies / "v1", share_base_with=merged)
    assert torch.equal(logits(plain), before)


def test_rounds_chain_on_one_base(tiny_policies: Path, tmp_path: Path) -> None:
    """v3 continues v2's adapter: its base is v1, and training starts from v2's own log-probabilities."""
    shutil.copytree(tiny_policies, tmp_path / "policies")
    parent = Policy.load(tmp_path / "policies" / "v2", trainable=True)
    before = logits(Policy.load(tmp_path / "policies" / "v2"))
    trained = [p for p in parent.model.parameters() if p.requires_grad]
    assert parent.model.training
    assert trained
    optimizer = torch.optim.SGD(trained, lr=0.1)
    packed = pack(
        [prompt_ids(parent.tokens, ["item-001"])], [[parent.tokens.answer("item-002")]], parent.tokens.pad
    )
    answer_log_probs(parent.model, packed).sum().neg().backward()
    optimizer.step()
    base = base_of(tmp_path / "policies" / "v2")
    assert base == base_of(tmp_path / "policies" / "v1")
    write_policy(
        tmp_path / "policies" / "v3",
        version="v3",
        model=parent.model,
        tokenizer=parent.tokenizer,
        codec=parent.codec,
        popularity=[],
        base=base,
    )
    child = Policy.load(tmp_path / "policies" / "v3")
    assert child.base == base
    assert not torch.allclose(logits(child), before)
    assert torch.allclose(logits(child), logits(parent), atol=1e-6)
    assert torch.equal(logits(Policy.load(tmp_path / "policies" / "v2")), before)


def test_a_policies_folder_may_lie_elsewhere_than_the_candidate(folder: Path, tmp_path: Path) -> None:
    (folder / "v2").rename(tmp_path / "candidate")
    with pytest.raises(PolicyRefused, match="stands on v1, which is not at"):
        Policy.load(tmp_path / "candidate")
    assert Policy.load(tmp_path / "candidate", policies=folder).version == "v2"


def test_a_registry_may_number_a_staged_policy(folder: Path) -> None:
    manifest = read_manifest(folder / "v2")
    write_manifest(folder / "v2", manifest.model_copy(update={"version": "v9"}))
    (folder / "v2").rename(folder / "v9")
    assert Policy.load(folder / "v9").version == "v9"


FILES = ["model/model.safetensors", "model/config.json", "codec/codes.safetensors", "popularity.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_refused(folder: Path, name: str) -> None:
    file = folder / "v1" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for version in ("v1", "v2"):
        if version == "v2" and not name.startswith("model/"):
            continue
        with pytest.raises(PolicyRefused, match=f"v1: {name} is not the file it was written with"):
            Policy.load(folder / version)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / "v1" / name).unlink()
    with pytest.raises(PolicyRefused, match=f"lacks {name}"):
        Policy.load(folder / "v1")


def drop_manifest(folder: Path) -> None:
    (folder / "v1" / MANIFEST).unlink()


def truncate_manifest(folder: Path) -> None:
    text = (folder / "v1" / MANIFEST).read_text()
    (folder / "v1" / MANIFEST).write_text(text[: len(text) // 2])


def list_manifest(folder: Path) -> None:
    (folder / "v1" / MANIFEST).write_text("[]")


def future_format(folder: Path) -> None:
    edit(folder / "v1", format=2)


def unknown_key(folder: Path) -> None:
    edit(folder / "v1", colour="blue")


def other_template(folder: Path) -> None:
    edit(folder / "v1", prompt_template="0")


def extra_pickle(folder: Path) -> None:
    (folder / "v1" / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04")


def extra_code(folder: Path) -> None:
    (folder / "v1" / "model" / "modeling.py").write_text("raise SystemExit")


def linked_file(folder: Path) -> None:
    (folder / "v1" / "model" / "more.json").symlink_to("/dev/null")


def wrong_codec(folder: Path) -> None:
    edit(folder / "v1", codec={"quantizer_hash": "q", "item_map_hash": "other"})


def foreign_codec(folder: Path) -> None:
    """A codec directory, in itself right, that belongs to another policy; all file hashes agree."""
    shutil.rmtree(folder / "v1" / "codec")
    tiny_codec(100, (16, 16, 16), quantizer="other").save(folder / "v1" / "codec")
    manifest = read_manifest(folder / "v1")
    files = {name: digest for name, digest in manifest.files.items() if not name.startswith("codec/")}
    (folder / "v1" / MANIFEST).write_text(manifest.model_copy(update={"files": files}).model_dump_json())
    import hashlib

    for file in (folder / "v1" / "codec").iterdir():
        files[f"codec/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    edit(folder / "v1", files=files)


def named_pickle(folder: Path) -> None:
    extra_pickle(folder)
    manifest = read_manifest(folder / "v1")
    edit(folder / "v1", files=manifest.files | {"model/pytorch_model.bin": "0"})


def climbing_name(folder: Path) -> None:
    manifest = read_manifest(folder / "v1")
    edit(folder / "v1", files=manifest.files | {"model/../../secret.json": "0"})


def climbing_base(folder: Path) -> None:
    edit(folder / "v1", kind="adapter", base={"version": "../v1", "sha256": "0"})


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (drop_manifest, "half written"),
        (truncate_manifest, "cannot be read"),
        (list_manifest, "cannot be read"),
        (future_format, "format 2, not 1; update align3gr"),
        (unknown_key, "colour"),
        (other_template, "prompt template 0"),
        (extra_pickle, "holds model/pytorch_model.bin"),
        (extra_code, "holds model/modeling.py"),
        (named_pickle, "holds no code and no pickles"),
        (climbing_name, "names 'model/../../secret.json'"),
        (climbing_base, "base.version"),
        (linked_file, "holds model/more.json"),
        (wrong_codec, "codec mismatch"),
        (foreign_codec, "codec mismatch"),
    ],
)
def test_what_is_not_whole_and_matching_is_refused_in_one_line(
    folder: Path, damage: Callable[[Path], None], cause: str
) -> None:
    damage(folder)
    with pytest.raises(PolicyRefused) as caught:
        Policy.load(folder / "v1")
    message = str(caught.value)
    assert cause in message
    assert "\n" not in message
    assert ";" in message  # the way out
    assert isinstance(caught.value, BadInput)
    assert caught.value.exit_code == 2


def test_an_adapter_on_another_base_of_the_same_name_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "v1")
    write_tiny_policy(folder / "v1", seed=9)
    with pytest.raises(PolicyRefused, match="stands on another v1"):
        Policy.load(folder / "v2")
    with pytest.raises(PolicyRefused, match="stands on another v1"):
        Policy.load(folder / "v2", verify=False)


def test_a_borrowed_base_is_not_read_again_and_a_read_one_is_verified(folder: Path) -> None:
    first = Policy.load(folder / "v1")
    (folder / "v1" / "model" / "model.safetensors").write_bytes(b"damaged since")
    assert Policy.load(folder / "v2", share_base_with=first).version == "v2"
    with pytest.raises(PolicyRefused, match="v1: model/model"):
        Policy.load(folder / "v2")


def test_files_damaged_after_loading_do_not_reach_a_loaded_policy(folder: Path) -> None:
    loaded = {name: Policy.load(folder / name) for name in ("v1", "v2")}
    before = {name: logits(policy) for name, policy in loaded.items()}
    for file in (folder / "v1/model/model.safetensors", folder / "v2/adapter/adapter_model.safetensors"):
        size = file.stat().st_size
        with file.open("r+b") as handle:
            handle.write(b"\0" * size)
        assert all(torch.equal(logits(loaded[name]), before[name]) for name in loaded)
        os.truncate(file, 0)
    assert all(torch.equal(logits(loaded[name]), before[name]) for name in loaded)


def test_damaged_weights_are_refused_even_unverified(folder: Path) -> None:
    (folder / "v1" / "model" / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(PolicyRefused, match="cannot be loaded"):
        Policy.load(folder / "v1", verify=False)


def test_a_policy_takes_items_that_came_after_it_and_no_other_tokenizer(folder: Path) -> None:
    codec = Policy.load(folder / "v1").codec
    free = next(c for c in product(range(8), repeat=3) if list(c) not in codec.codes.tolist())
    policy = Policy.load(folder / "v1", codec=codec.extend(["brand-new"], np.array([free])))
    one = policy.recommend([UserContext("u", ("brand-new", "item-003"))], 201, beam=201)[0]
    assert "brand-new" in {place.item_id for place in one}
    with pytest.raises(PolicyRefused, match=r"codec mismatch.*align3gr sft"):
        Policy.load(folder / "v1", codec=tiny_codec(seed=3))


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "policies" / "v1"

    def fails(staging: Path) -> None:
        (staging / "model").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_directory(target, fails, lambda files: pytest.fail(str(files)))
    assert list(target.parent.iterdir()) == []
    write_tiny_policy(target)
    before = manifest_hash(target)
    with pytest.raises(PolicyRefused, match="exists already"):
        write_tiny_policy(target, seed=2)
    assert manifest_hash(target) == before
    assert verify(target).version == "v1"


def test_adapter_and_base_must_be_named_together(tiny_policies: Path, tmp_path: Path) -> None:
    policy = Policy.load(tiny_policies / "v1")
    parts = {"tokenizer": policy.tokenizer, "codec": policy.codec, "popularity": []}
    with pytest.raises(PolicyRefused, match="an adapter needs the base"):
        write_policy(
            tmp_path / "v2", version="v2", model=policy.model, base=base_of(tiny_policies / "v1"), **parts
        )
    adapted = get_peft_model(policy.model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(PolicyRefused, match="an adapter needs the base"):
        write_policy(tmp_path / "v2", version="v2", model=adapted, **parts)


def test_a_directory_that_is_not_there_and_a_device_that_is_not_there(
    tiny_policies: Path, tmp_path: Path
) -> None:
    with pytest.raises(PolicyRefused, match="there is no policy at"):
        Policy.load(tmp_path / "v99")
    with pytest.raises(BadRequest, match="no device 'warp'"):
        Policy.load(tiny_policies / "v1", device="warp")
