"""What the codec's tokens start from when items have texts or company: alike items near each other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policies.codec import ScidCodec, scid_tokens
from policies.prompt import PromptTokens
from tests.policies.factory import tiny_codec
from tests.trainer import small_world
from tests.trainer.backbone_directories import write_backbone
from tests.trainer.small_sft import QUICK
from trainer.sft.backbones import from_directory
from trainer.sft.base_policy import train_sft
from trainer.sft.likeness import WIDTH, Likeness
from trainer.sft.new_tokens import RANDOM_STRENGTH
from trainer.sft.presets import open_backbone
from trainer.sft.tasks import CatalogueText

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS = np.repeat(np.arange(4), 15)
"""Of the 60 items of ``tiny_codec(60)``."""
WORDS = ("brass lamp shade bulb", "green tea leaf pot", "wool scarf knit warm", "garden spade soil seed")
TEXTS = [f"{WORDS[group]} number{place % 7}" for place, group in enumerate(GROUPS)]


def company(*, of: np.ndarray[Any, Any] = GROUPS) -> list[np.ndarray[Any, Any]]:
    """Histories that stay within a group."""
    random = np.random.default_rng(3)
    return [random.permutation(np.flatnonzero(of == group))[:6] for group in np.tile(np.unique(of), 30)]


def cosines(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return np.asarray(unit @ unit.T)


def opened(likeness: Likeness | None, codec: ScidCodec, **more: Any) -> Any:
    return open_backbone(
        "demo",
        codec,
        TEXTS,
        text_vocabulary=260,
        seed=0,
        items=range(len(codec)),
        new_tokens="likeness",
        likeness=likeness,
        **more,
    )


@pytest.mark.parametrize("known", ["texts", "company", "both"])
def test_items_that_are_alike_start_alike_and_so_do_their_codes(known: str) -> None:
    codec = tiny_codec(60)
    texts = TEXTS if known != "company" else [""] * 60
    likeness = Likeness.of(texts, company() if known != "texts" else [])
    assert len(likeness.parts) == (2 if known == "both" else 1)
    backbone = opened(likeness, codec)
    weight = backbone.model.get_input_embeddings().weight.detach().numpy()
    tokens = PromptTokens(backbone.tokenizer, codec)
    own = weight[tokens.own]
    same = GROUPS[:, None] == GROUPS[None]
    apart = ~np.eye(60, dtype=bool)
    near = cosines(own)
    assert near[same & apart].mean() > near[~same].mean() + 0.3
    # A rotation and one scale: what the likeness says of any two items is what the rows say.
    np.testing.assert_allclose(near, cosines(likeness.rows(weight.shape[1])), atol=2e-2)
    assert own.std() == pytest.approx(RANDOM_STRENGTH * 0.02, rel=0.1)
    # A code lies nearer to the items that have it than to the others.
    first = weight[tokens.levels[0]]
    to_items = first @ own.T
    having = codec.codes[:, 0][None] == np.arange(codec.sizes[0])[:, None]
    met = having.any(axis=1)
    with_it = np.array([to_items[code][having[code]].mean() for code in np.flatnonzero(met)])
    without = np.array([to_items[code][~having[code]].mean() for code in np.flatnonzero(met)])
    assert (with_it > without).mean() > 0.9


def test_rows_have_mean_square_one_and_nothing_is_made_up() -> None:
    texts = [*TEXTS[:40], *[""] * 20]
    of = np.where(np.arange(60) < 50, GROUPS, -1)
    histories = [history for history in company(of=of) if (history < 50).all()]
    likeness = Likeness.of(texts, histories)
    assert all(part.shape == (60, WIDTH) for part in likeness.parts)
    for width in (16, 127, 512):
        rows = likeness.rows(width)
        assert rows.shape == (60, width)
        assert not rows[50:].any()  # neither text nor company
        assert np.square(rows[:40]).mean() == pytest.approx(1, rel=0.25)
        np.testing.assert_array_equal(rows, Likeness.of(texts, histories).rows(width))


def test_one_text_for_all_tells_nothing_apart() -> None:
    assert not Likeness.of(["a lamp"] * 60, []).rows(32).any()
    both = Likeness.of(["a lamp"] * 60, company()).rows(32)
    np.testing.assert_array_equal(both[:, :16], 0)
    assert both[:, 16:].any(axis=1).all()


def test_where_nothing_is_known_tokens_start_as_any_others() -> None:
    codec = tiny_codec(60)
    nothing = Likeness.of([""] * 60, [np.array([3])])
    assert nothing.parts == ()
    assert not nothing.rows(32).any()
    rows = [opened(given, codec).model.get_input_embeddings().weight.detach() for given in (nothing, None)]
    torch.testing.assert_close(*rows, atol=0, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_pretrained_model_keeps_its_words_and_the_new_rows_have_their_spread(
    tied: bool, tmp_path: Path
) -> None:
    codec, likeness = tiny_codec(60), Likeness.of(TEXTS, company())
    local = write_backbone(tmp_path / "model", tied=tied)
    found = from_directory(local, codec, seed=0, items=range(60), new_tokens="likeness", likeness=likeness)
    plain = from_directory(local, codec, seed=0, items=range(60), new_tokens="mean")
    tokens = PromptTokens(found.tokenizer, codec)
    codes = found.tokenizer.convert_tokens_to_ids(scid_tokens(codec.sizes))
    for get in ("get_input_embeddings", "get_output_embeddings"):
        weight, before = (getattr(one.model, get)().weight.detach() for one in (found, plain))
        words = min(tokens.ids)
        torch.testing.assert_close(weight[:words], before[:words], atol=0, rtol=0)
        old = weight[:words]
        assert float((weight[tokens.own] - old.mean(dim=0)).std()) == pytest.approx(
            float(old.std()), rel=0.15
        )
        assert (weight[codes] != before[codes]).any()


def test_a_policy_starts_from_its_catalogue_and_the_same_input_gives_the_same_policy(
    codec_dir: Path, tmp_path: Path
) -> None:
    wanted = QUICK.model_copy(update={"new_tokens": "likeness", "item_tokens": 40})
    histories, items = small_world.histories(24), small_world.items()

    def trained(name: str, catalogue: CatalogueText, **changed: Any) -> tuple[list[float], bytes]:
        report = train_sft(
            codec_dir,
            histories,
            wanted.model_copy(update=changed),
            tmp_path / name,
            texts=["a lamp"],
            catalogue=catalogue,
        )
        return report.losses, (tmp_path / name / "model" / "model.safetensors").read_bytes()

    text = CatalogueText.of(items)
    losses, weights = trained("one", text)
    assert trained("again", text) == (losses, weights)
    assert losses[-1] < losses[0]
    unlike = CatalogueText(text.titles, text.texts, text.categories, dict.fromkeys(text.lines, "the same"))
    assert trained("other", unlike)[0] != losses
    assert trained("mean", text, new_tokens="mean")[0] != losses
