"""What the rows of new tokens start from: near codes near, levels apart, the spread of the old rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from policies.codec import ScidCodec, scid_tokens, user_scid_tokens
from policies.prompt import PromptTokens, item_token
from policies.quantizer import Quantizer
from policies.users import UserEncoder
from tests.policies.factory import tiny_codec, tiny_user_codec
from tests.trainer import small_world
from tests.trainer.backbone_directories import write_backbone
from tests.trainer.small_sft import QUICK
from trainer.errors import CannotTrain
from trainer.sft.backbones import from_directory
from trainer.sft.base_policy import train_sft
from trainer.sft.new_tokens import code_rows
from trainer.sft.presets import open_backbone

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> ScidCodec:
    """A codec with codebooks, for users too."""
    return tiny_user_codec(tmp_path_factory.mktemp("codec"))


def angles(vectors: np.ndarray) -> np.ndarray:
    centred = vectors - vectors.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("width", [48, 10])
def test_codes_that_are_near_each_other_start_near_each_other(width: int, grown: ScidCodec) -> None:
    rows = code_rows(grown, width, seed=0)
    assert grown.source is not None
    users = UserEncoder.load(grown.source / "quantizer" / "users").quantizer
    items = Quantizer.load(grown.source / "quantizer")
    names = scid_tokens(grown.sizes) + user_scid_tokens(grown.user_sizes)
    at = 0
    for book in (*items.codebooks, *users.codebooks):
        made = np.stack([rows[name] for name in names[at : at + len(book)]])
        # An orthonormal map keeps every angle between the level's codes (10 dimensions fit both widths).
        np.testing.assert_allclose(angles(made), angles(book), atol=1e-4)
        at += len(book)
    assert at == len(names) == len(rows) - len(grown)


def test_levels_stay_apart(grown: ScidCodec) -> None:
    rows = code_rows(grown, 64, seed=0)
    means = [
        np.mean([row for name, row in rows.items() if name.startswith(f"<{level}_")], axis=0)
        for level in ("a", "b", "c", "ua", "ub", "uc")
    ]
    for one, mean in enumerate(means):
        assert np.square(mean).mean() == pytest.approx(0.5, rel=1e-3)
        for other in means[:one]:
            cosine = mean @ other / np.linalg.norm(mean) / np.linalg.norm(other)
            assert abs(cosine) < 0.5


def test_an_items_own_token_starts_near_the_items_it_shares_codes_with(
    grown: ScidCodec, tmp_path: Path
) -> None:
    rows = code_rows(grown, 64, seed=0)
    own = np.stack([rows[item_token(row)] for row in range(len(grown))])
    assert np.square(own).mean() == pytest.approx(1, rel=0.3)
    near = angles(own)
    shared = (grown.codes[:, None] == grown.codes[None]).sum(axis=2)
    assert near[shared == 2].mean() > near[shared == 1].mean() > near[shared == 0].mean()
    found = from_directory(
        write_backbone(tmp_path / "model"), grown, seed=0, items=[3, 5], new_tokens="codebook"
    )
    tokens = PromptTokens(found.tokenizer, grown)
    assert np.flatnonzero(tokens.own >= 0).tolist() == [3, 5]
    assert found.model.config.read_only_from == min(tokens.own[[3, 5]])


def test_a_level_beyond_the_codebooks_gets_rows_of_its_own(tmp_path: Path) -> None:
    codec = tiny_user_codec(tmp_path, sizes=(8, 8, 8))
    longer = ScidCodec(
        codec.item_ids,
        np.concatenate([codec.codes, np.zeros((len(codec), 1), np.int32)], axis=1),
        (8, 8, 8, 4),
        quantizer_hash=codec.quantizer_hash,
        source=codec.source,
    )
    rows = code_rows(longer, 32, seed=0)
    assert len(rows) == 28 + len(longer)
    assert np.square([rows[f"<d_{code}>"] for code in range(4)]).mean() == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_have_the_mean_and_the_spread_of_the_old_ones(
    tied: bool, grown: ScidCodec, tmp_path: Path
) -> None:
    local = write_backbone(tmp_path / "model", tied=tied)
    found = from_directory(local, grown, seed=0, new_tokens="codebook")
    again = from_directory(local, grown, seed=0, new_tokens="codebook")
    ids = found.tokenizer.convert_tokens_to_ids(scid_tokens(grown.sizes) + user_scid_tokens(grown.user_sizes))
    for get in ("get_input_embeddings", "get_output_embeddings"):
        weight = getattr(found.model, get)().weight.detach()
        old, new = weight[: min(ids)], weight[ids]
        assert float(new.std()) == pytest.approx(float(old.std()), rel=0.1)
        torch.testing.assert_close(weight, getattr(again.model, get)().weight.detach(), atol=0, rtol=0)


def test_a_preset_may_start_from_the_codebooks_too(codec_dir: Path, tmp_path: Path) -> None:
    codec = ScidCodec.load(codec_dir)
    models = [
        open_backbone("demo", codec, ["a lamp"], text_vocabulary=260, seed=0, new_tokens=how)
        for how in ("mean", "codebook")
    ]
    ids = models[0].tokenizer.convert_tokens_to_ids(scid_tokens(codec.sizes))
    rows = [one.model.get_input_embeddings().weight.detach() for one in models]
    others = [row for row in range(len(rows[0])) if row not in ids]
    torch.testing.assert_close(rows[0][others[:260]], rows[1][others[:260]], atol=0, rtol=0)
    assert (rows[0][ids] != rows[1][ids]).any(dim=1).all()
    wanted = QUICK.model_copy(update={"new_tokens": "codebook"})
    report = train_sft(codec_dir, small_world.histories(24), wanted, tmp_path / "policy")
    assert report.losses[-1] < report.losses[0]


def test_a_codec_without_codebooks_is_refused() -> None:
    with pytest.raises(CannotTrain, match="new_tokens"):
        open_backbone("demo", tiny_codec(60), ["a lamp"], text_vocabulary=260, seed=0, new_tokens="codebook")
