"""A policy as a plain Hugging Face directory: its logits, and that a stranger can ask and read by it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from align3gr.__main__ import app
from align3gr.console import run
from policies.errors import PolicyRefused
from policies.export import FACTS, export_policy
from policies.policy import Policy, UserContext
from policies.prompt import prompt_ids
from tests.policies.factory import tiny_user_codec, write_tiny_policy


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_exported_policy_loads_as_any_model_with_equal_logits(
    version: str, tiny_policies: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = export_policy(tiny_policies / version, tmp_path / "out")
    assert done.kind == ("full" if version == "v1" else "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    policy = Policy.load(tiny_policies / version)
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    prompt = torch.tensor([prompt_ids(policy.tokens, policy.codec.item_ids[:6])])
    with torch.no_grad():
        # Computed in float64, so that what is left is the rounding of the merged weights themselves.
        mine, theirs = policy.model.double()(prompt).logits, model.double()(prompt).logits
    torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=0)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_the_facts_are_enough_to_ask_and_to_read(tmp_path: Path) -> None:
    """By the file's words alone: prompt, answer and the item that it is."""
    from transformers import AutoTokenizer

    codec = tiny_user_codec(tmp_path / "codec")
    policy = Policy.load(write_tiny_policy(tmp_path / "v1", codec=codec))
    export_policy(tmp_path / "v1", tmp_path / "out")
    out = tmp_path / "out"
    facts = json.loads((out / FACTS).read_text())
    items = json.loads((out / "codec" / "items.json").read_text())
    codes = load_file(out / "codec" / "codes.safetensors")["codes"]

    def scid(item: str) -> str:
        row = codes[items.index(item)]
        return "".join(
            level["token"].format(code=code)
            for level, code in zip(facts["scids"]["levels"], row, strict=True)
        )

    example = facts["example"]
    written = "".join(facts["prompt"]["begin"]) + "".join(map(scid, example["history"]))
    assert example["prompt"].startswith(written)
    assert example["prompt"].endswith(facts["prompt"]["end"])
    user = example["prompt"].removeprefix(written).removesuffix(facts["prompt"]["end"])
    assert user.count("<u") == len(facts["scids"]["user_levels"]) == 3
    assert scid(example["item"]) == example["answer"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(example["prompt"], add_special_tokens=False)["input_ids"]
    assert ids == prompt_ids(policy.tokens, example["history"])
    assert (
        len(tokenizer(example["answer"], add_special_tokens=False)["input_ids"]) == facts["answer"]["tokens"]
    )


def test_a_copied_codec_still_codes_users_and_new_items(tmp_path: Path) -> None:
    from policies.codec import ScidCodec

    codec = tiny_user_codec(tmp_path / "codec")
    export_policy(write_tiny_policy(tmp_path / "v1", codec=codec), tmp_path / "out")
    copied = ScidCodec.load(tmp_path / "out" / "codec")
    history = [list(codec.item_ids[:4])]
    assert copied.encode_users(history).tolist() == codec.encode_users(history).tolist()
    assert len(copied.place(["fresh"], ["a blue lamp"])) == len(codec) + 1


def test_an_export_is_whole_or_not_there(tiny_policies: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(PolicyRefused, match="exists already"):
        export_policy(tiny_policies / "v1", tmp_path / "out")
    shutil.copytree(tiny_policies / "v1", tmp_path / "v1")
    (tmp_path / "v1" / "popularity.json").write_text("[]")
    with pytest.raises(PolicyRefused, match=r"popularity\.json"):
        export_policy(tmp_path / "v1", tmp_path / "other")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["out", "v1"]


def test_the_command_exports_and_refuses_in_one_line(
    tiny_policies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALIGN3GR_HOME", str(tmp_path))
    shutil.copytree(tiny_policies, tmp_path / "policies")
    assert run(app, ["policy", "export", "v2", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["version"], facts["kind"], facts["items"]) == ("v2", "adapter", 200)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    for version, out, said in (("v2", "out", "exists already"), ("v9", "new", "v9")):
        assert run(app, ["policy", "export", version, str(tmp_path / out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert not (tmp_path / "new").exists()


def test_exporting_leaves_the_policy_as_it_was(tiny_policies: Path, tmp_path: Path) -> None:
    user = UserContext("u", ("item-001", "item-004"))
    before = Policy.load(tiny_policies / "v2").recommend([user], 5)
    export_policy(tiny_policies / "v2", tmp_path / "out")
    assert Policy.load(tiny_policies / "v2").recommend([user], 5) == before
