"""tokenize on catalogues nobody would wish for: refused in one line, or a codec that says what it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from align3gr.__main__ import app
from align3gr.console import run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs one command of an empty home, with a small quantizer; (exit code, output, errors)."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, **tokenization: Any) -> tuple[int, str, str]:
        small = {"hidden": [16], "code_dimension": 4, "steps": 20, "text_dimension": 8} | tokenization
        settings = {"home": "home", "trainer": {"tokenization": small}}
        Path("align3gr.yaml").write_text(yaml.safe_dump(settings))
        code = run(app, ["--settings", "align3gr.yaml", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def load(command: Command, *items: dict[str, Any], allow_no_text: bool = False) -> tuple[int, str, str]:
    Path("items.jsonl").write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
    return command("catalogue", "load", "items.jsonl", *(["--allow-no-text"] if allow_no_text else []))


def facts(done: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = done
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def test_an_id_given_twice_is_refused(command: Command) -> None:
    code, out, err = load(command, {"item_id": "a", "title": "x"}, {"item_id": "a", "title": "y"})
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "item a is given twice" in err


def test_three_items_have_three_scids(command: Command) -> None:
    load(command, *({"item_id": name, "title": f"lamp {name}", "categories": ["lamp"]} for name in "abc"))
    assert facts(command("tokenize", "--json"))["items"] == 3
    quality = facts(command("codec", "quality", "--json"))
    assert (quality["items"], quality["ambiguous"]) == (3, 0)
    assert command("codec", "show", "--plot", "three.png")[0] == 0


def test_a_text_of_a_megabyte_is_one_text_among_others(command: Command) -> None:
    long = " ".join(f"word{number}" for number in range(110_000))
    assert len(long) > 1_000_000
    others = [{"item_id": f"i{number}", "title": f"lamp number {number}"} for number in range(8)]
    assert load(command, {"item_id": "long", "title": "lamp", "text": long}, *others)[0] == 0
    report = facts(command("tokenize", "--json"))
    assert (report["items"], report["items_without_text"]) == (9, 0)
    # What is read of it ends after 20,000 characters: no more than so many words are kept.
    words = json.loads(Path("home/codec/quantizer/text.json").read_text())["vocabulary"]
    assert len(words) < 2 * 20_000 / len("word1")


def test_a_catalogue_without_any_text_is_refused_or_coded_by_number(command: Command) -> None:
    items = [{"item_id": f"i{number}"} for number in range(6)]
    assert load(command, *items)[0] == 2
    assert load(command, *items, allow_no_text=True)[0] == 0
    code, _, err = command("tokenize")
    assert (code, err.splitlines()[-1].startswith("align3gr: item 'i0' has no title")) == (2, True)
    report = facts(command("tokenize", "--json", without_text="allow"))
    assert (report["items"], report["items_without_text"], report["items_without_behaviour"]) == (6, 6, 6)
    assert facts(command("codec", "quality", "--json"))["ambiguous"] == 0


def test_a_text_encoder_that_is_not_there_is_an_error_and_never_replaced(command: Command) -> None:
    load(command, {"item_id": "a", "title": "lamp"})
    code, _, err = command("tokenize", text_encoder="no-such-model")
    assert code == 2
    assert "sentence-transformers" in err.splitlines()[-1]
    assert not Path("home/codec").exists()
