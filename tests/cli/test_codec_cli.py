"""codec show, quality, encode, decode: how ids map back to items, by the command line alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from align3gr.__main__ import app
from align3gr.console import run
from policies.codec import ScidCodec
from tests.cli.test_base_policy_cli import HISTORIES, events, land, load_catalogue


def settings_file(home: Path, *, users: bool = False) -> Path:
    """Items alone, in a second; or users too, trained as briefly as can be."""
    small = {"hidden": [32], "code_dimension": 8, "steps": 60, "text_dimension": 12}
    alone = {"users": False, "collaborative": {"method": "ppmi"}, "alignment": {"method": "none"}}
    both = {
        "codes": 4,
        "collaborative": {"epochs": 1},
        "alignment": {"epochs": 2, "min_pairs": 16, "hidden": [16], "dimension": 16, "batch_size": 64},
    }
    tokenization = small | (both if users else alone)
    wanted = {
        "home": str(home),
        "policies": {"registry": {"mlflow": False}},
        "trainer": {"tokenization": tokenization},
    }
    file = home.parent / "settings.yaml"
    file.write_text(yaml.safe_dump(wanted))
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and a codec fitted to it by ``tokenize``."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("codec") / "home"
    home.mkdir()
    load_catalogue(home)
    land(home, events()[0])
    assert run(app, ["--settings", str(settings_file(home)), "--debug", "tokenize", "--json"]) == 0
    return home


@pytest.fixture(scope="module")
def home_with_users(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store with a codec that codes users."""
    other = tmp_path_factory.mktemp("users") / "home"
    shutil.copytree(home, other)
    file = settings_file(other, users=True)
    assert run(app, ["--settings", str(file), "--debug", "tokenize", "--json"]) == 0
    return other


def call(home: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(app, ["--settings", str(settings_file(home)), *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def facts_of(home: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    code, out, err = call(home, capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out.splitlines()[-1])


def test_show_says_what_a_codec_is(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = facts_of(home, capsys, "codec", "show")
    assert (shown["items"], shown["ambiguous"], shown["text_encoder"]) == (60, 0, "tfidf-svd")
    assert (shown["method"], shown["user_sizes"]) == ("rqvae", [])
    assert 0 <= shown["collision_rate"] <= 1


def test_quality_compares_prefixes_with_permuted_codes(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = facts_of(home, capsys, "codec", "quality")
    assert {"items", "ambiguous", "collision_rate", "use", "perplexity", "auc", "lifts"} <= quality.keys()
    assert (quality["items"], quality["ambiguous"], quality["users"]) == (60, 0, None)
    for kind in ("category", "together"):
        # Topics have words of their own and users stay in one: by chance one pair in six is of one topic.
        first = quality["lifts"][kind][0]
        assert first["depth"] == 1
        assert 1.5 < first["low"] <= first["lift"] <= first["high"]
    assert len(quality["lifts"]["category"]) == 2
    assert quality["lifts"]["new_items"] == []
    text = call(home, capsys, "codec", "quality")[1]
    assert "60 items, 0 ambiguous" in text
    assert re.search(r"same first 1: .* share their category \(.* permuted, .*x, .* to .*\)", text)
    assert "were met by one user" in text


def test_quality_tells_what_came_after_the_fit_from_what_was_fitted(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "home"
    shutil.copytree(home, other)
    report = json.loads((other / "codec" / "report.json").read_text())
    (other / "codec" / "report.json").write_text(json.dumps(report | {"items": 48}))
    new = facts_of(other, capsys, "codec", "quality")["lifts"]["new_items"][0]
    assert new["items"] == 12
    assert new["lift"] > 1.5
    assert "of a new item and one it lies among" in call(other, capsys, "codec", "quality")[1]


def test_quality_without_log_or_catalogue_says_the_rest(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "home"
    shutil.copytree(home, other)
    shutil.rmtree(other / "log")
    quality = facts_of(other, capsys, "codec", "quality")
    assert (quality["lifts"]["together"], len(quality["lifts"]["category"])) == ([], 2)
    shutil.rmtree(other / "catalogue")
    (other / "codec" / "report.json").unlink()
    quality = facts_of(other, capsys, "codec", "quality")
    assert quality["lifts"] == {"category": [], "together": [], "new_items": []}
    assert quality["collision_rate"] is None


def test_quality_reports_users_where_the_codec_codes_them(
    home_with_users: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((home_with_users / "codec" / "report.json").read_text())
    quality = facts_of(home_with_users, capsys, "codec", "quality")
    assert quality["users"] == {
        "sizes": [4, 4, 4],
        "users": 60,
        "sharing": report["users_sharing"],
        "use": report["user_use"],
        "perplexity": report["user_perplexity"],
        "codes_distinct": report["user_codes_distinct"],
    }
    assert quality["auc"].keys() == quality["recall_at_10"].keys() == {"start", "switch", "end", "best"}
    assert quality["switched_at"] == report["switched_at"]
    text = call(home_with_users, capsys, "codec", "quality")[1]
    assert "60 users coded, " in text
    assert re.search(r"auc: start 0?\.\d+, switch", text)
    assert facts_of(home_with_users, capsys, "codec", "show")["user_sizes"] == [4, 4, 4]


def test_items_map_to_ids_and_back(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts_of(home, capsys, "codec", "encode", "item-007")["items"]["item-007"]
    assert found["title"] == "chair number 1"
    assert all(one["title"] for one in found["near"])
    for text in (found["tokens"], ",".join(map(str, found["scid"]))):
        assert facts_of(home, capsys, "codec", "decode", text)[text]["item_id"] == "item-007"
    code, out, _ = call(home, capsys, "codec", "encode", "item-007")
    assert code == 0
    assert "shared" in out


def test_the_first_codes_list_the_items_below_them(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec = ScidCodec.load(home / "codec")
    first, second, _ = codec.encode("item-007")
    below = [item for item in codec.item_ids if codec.encode(item)[:2] == (first, second)]
    for text in (f"{first},{second}", f"<a_{first}><b_{second}>"):
        found = facts_of(home, capsys, "codec", "decode", text)[text]
        assert (found["prefix"], found["count"]) == ([first, second], len(below))
        assert sorted(one["item_id"] for one in found["items"]) == sorted(below)
        assert [one["scid"] for one in found["items"]] == sorted(one["scid"] for one in found["items"])
        assert all(one["title"] for one in found["items"])
    one = facts_of(home, capsys, "codec", "decode", str(first), "--limit", "1")[str(first)]
    assert len(one["items"]) == 1 <= one["count"]
    assert f"{one['count']} items" in call(home, capsys, "codec", "decode", str(first))[1]


def test_a_user_has_the_scid_of_the_history_in_the_log(
    home_with_users: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = facts_of(home_with_users, capsys, "codec", "encode", "item-001", "--user", "user-0")
    assert found["users"]["user-0"]["history"] == HISTORIES[0][:-1]
    codec = ScidCodec.load(home_with_users / "codec")
    first, second, third = codec.encode_users([HISTORIES[0][:-1]])[0].tolist()
    tokens = f"<ua_{first}><ub_{second}><uc_{third}>"
    assert (found["users"]["user-0"]["tokens"], found["users"]["user-0"]["scid"]) == (
        tokens,
        [first, second, third],
    )
    assert "item-001" in found["items"]
    out = call(home_with_users, capsys, "codec", "encode", "--user", "user-0")[1]
    assert f"{tokens}  user-0  history of {len(HISTORIES[0]) - 1}" in out


@pytest.mark.parametrize("kind", ["html", "svg", "png"])
def test_the_codebooks_are_drawn(
    kind: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"codebooks.{kind}"
    assert facts_of(home, capsys, "codec", "show", "--plot", str(file))["plot"] == str(file)
    content = file.read_bytes()
    if kind == "png":
        assert content.startswith(b"\x89PNG")
        return
    text = content.decode()
    assert text.startswith("<!doctype html>" if kind == "html" else "<?xml")
    assert "level 3" in text
    if kind == "html":
        assert "number 0" in text  # an example's title
        assert "<script" not in text


def test_a_title_is_text_in_the_page(home: Path, tmp_path: Path) -> None:
    from align3gr.codebook_plot import plot_codebooks

    codec = ScidCodec.load(home / "codec")
    plot_codebooks(codec, ["<b>$x$"] * 60, ["<script>alert(1)</script>"] * 60, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["encode"], "--user"),
        (["encode", "no-such-item"], "no-such-item"),
        (["encode", "--user", "user-0"], "gives no SCIDs to users"),
        (["decode", "99,99"], "begins with 99,99"),
        (["decode", "0,0,0,0,0"], "is no SCID of 3 codes"),
        (["decode", "<b_1>"], "is no SCID of 3 codes"),
        (["decode", "lamp"], "lamp"),
        (["show", "--plot", "codes.pdf"], ".html, .svg or .png"),
        (["show", "--plot", "no-such-folder/codes.svg"], "no-such-folder"),
        (["show", "--policy", "v99"], "v99"),
    ],
)
def test_bad_input_is_one_line_and_two(
    arguments: list[str], says: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(home, capsys, "codec", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_a_stranger_has_no_scid(home_with_users: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(home_with_users, capsys, "codec", "encode", "--user", "nobody")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "'nobody' has no feedback yet" in err


def test_ambiguous_items_are_counted_from_the_codes(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No codec with two items of one SCID can be loaded, so a broken one is put in by hand."""
    import align3gr.commands.codec as commands

    broken = ScidCodec.load(home / "codec")
    broken.codes[1] = broken.codes[0]
    monkeypatch.setattr(commands, "_codec", lambda *_: (home / "codec", broken))
    for command in ("show", "quality"):
        assert facts_of(home, capsys, "codec", command)["ambiguous"] == 2
