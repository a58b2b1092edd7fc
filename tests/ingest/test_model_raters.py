"""Raters that are local models: logits in, stars out; and one line for a directory that will not do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

from ingest.errors import RaterUnusable
from ingest.rating import rater_of
from ingest.rating.models import PROMPT, CausalRater, ClassifierRater, stars_of_labels
from ingest.settings import RatingSettings
from tests.trainer.backbone_directories import write_backbone
from trainer.sft.presets import byte_level_tokenizer

TEXTS = ["I love it", "Broken after one day, and nobody answers.", "ok", ""]


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_backbone(tmp_path_factory.mktemp("causal") / "model")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that tell texts apart, its five labels named as reviews' classifiers name them."""
    directory = tmp_path_factory.mktemp("classifier") / "model"
    torch.manual_seed(3)
    tokenizer = byte_level_tokenizer(["a red lamp", "an old blue chair"], 270)
    labels = {n: f"{n + 1} star{'s' if n else ''}" for n in range(5)}
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64, id2label=labels, initializer_range=0.8,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(directory)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(directory)
    return directory


def settings(kind: str, directory: Path, **changes: object) -> RatingSettings:
    return RatingSettings.model_validate({"rater": kind, "directory": directory, **changes})


def test_a_classifiers_rating_is_its_most_likely_label_or_the_rounded_mean(classifier: Path) -> None:
    rater = ClassifierRater(settings("classifier", classifier))
    model = BertForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    with torch.no_grad():
        alone = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(dim=1)[0] for text in TEXTS[:3]]
    torch.testing.assert_close(
        rater.probabilities(TEXTS[:3]).float(), torch.stack(alone), rtol=1e-4, atol=1e-5
    )
    assert rater.rate(TEXTS) == [*(int(one.argmax()) + 1 for one in alone), None]
    means = [float(sum(p * n for n, p in enumerate(one.tolist(), 1))) for one in alone]
    expected = ClassifierRater(settings("classifier", classifier, answer="expected"))
    assert expected.rate(TEXTS) == [*(int(mean + 0.5) for mean in means), None]
    assert len({rater.version, expected.version}) == 2


def test_a_causal_models_rating_is_read_from_the_logits_of_the_five_digits(causal: Path) -> None:
    rater = rater_of(settings("causal", causal))
    assert isinstance(rater, CausalRater)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(causal).eval(),
        AutoTokenizer.from_pretrained(causal),
    )
    digits = [tokenizer(str(n), add_special_tokens=False)["input_ids"] for n in range(1, 6)]
    assert all(len(one) == 1 for one in digits), "the byte-level tokenizer has a token for each digit"
    alone = []
    for text in TEXTS[:3]:
        ids = tokenizer(PROMPT.replace("{review}", text), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            last = model(input_ids=ids).logits[0, -1]
        alone.append(torch.stack([last[one[0]] for one in digits]).softmax(dim=0))
    torch.testing.assert_close(
        rater.probabilities(TEXTS[:3]).float(), torch.stack(alone), rtol=1e-4, atol=1e-5
    )
    assert rater.rate(TEXTS) == [*(int(one.argmax()) + 1 for one in alone), None]


def test_a_chat_model_is_asked_by_its_template(causal: Path, tmp_path: Path) -> None:
    directory = tmp_path / "chat"
    shutil.copytree(causal, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    tokenizer.save_pretrained(directory)
    plain = CausalRater(settings("causal", causal, prompt="<user>Stars for: {review}?<answer>"))
    chat = CausalRater(settings("causal", directory, prompt="Stars for: {review}?"))
    torch.testing.assert_close(
        chat.probabilities(TEXTS[:2]), plain.probabilities(TEXTS[:2]), rtol=1e-6, atol=1e-9
    )
    assert chat.version != plain.version


def test_a_review_beyond_the_models_length_is_read_from_its_beginning(classifier: Path, causal: Path) -> None:
    long = "It is a good red lamp. " * 400
    for rater in (
        ClassifierRater(settings("classifier", classifier)),
        CausalRater(settings("causal", causal)),
    ):
        (whole,) = rater.rate([long])
        assert whole in (1, 2, 3, 4, 5)
        shares = rater.probabilities([long + "Terrible!", long])
        torch.testing.assert_close(shares[0], shares[1], rtol=1e-6, atol=1e-9)


def test_the_version_names_weights_prompt_and_answer(causal: Path, tmp_path: Path) -> None:
    first = CausalRater(settings("causal", causal)).version
    assert CausalRater(settings("causal", causal, batch_reviews=2)).version == first
    moved = tmp_path / "elsewhere"
    shutil.copytree(causal, moved)
    assert CausalRater(settings("causal", moved)).version == first
    other = write_backbone(tmp_path / "other", style="qwen")
    versions = {first, CausalRater(settings("causal", other)).version}
    versions.add(CausalRater(settings("causal", causal, prompt="{review} Stars:")).version)
    versions.add(CausalRater(settings("causal", causal, answer="expected")).version)
    assert len(versions) == 4


@pytest.mark.parametrize(
    ("labels", "told", "stars"),
    [
        (["1 star", "2 stars", "3 stars", "4 stars", "5 stars"], {}, [1, 2, 3, 4, 5]),
        (["five_5", "four_4", "three_3", "two_2", "one_1"], {}, [5, 4, 3, 2, 1]),
        (["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4"], {}, [1, 2, 3, 4, 5]),
        (["NEGATIVE", "POSITIVE"], {}, [1, 5]),
        (["positive", "neutral", "negative"], {}, [5, 3, 1]),
        (["Very Negative", "Negative", "Neutral", "Positive", "very_positive"], {}, [1, 2, 3, 4, 5]),
        (["LABEL_0", "LABEL_1"], {"LABEL_0": 1, "LABEL_1": 4.5}, [1, 4.5]),
    ],
)
def test_labels_are_stars_by_name_or_by_the_settings(
    labels: list[str], told: dict[str, float], stars: list[float]
) -> None:
    assert stars_of_labels(dict(enumerate(labels)), told, Path("m")) == stars


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["LABEL_0", "LABEL_1"], {}),
        (["LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4", "LABEL_5"], {}),
        (["joy", "anger", "fear"], {}),
        (["joy", "anger"], {"joy": 5.0}),
    ],
)
def test_labels_that_mean_nothing_to_us_are_refused_by_name(
    labels: list[str], told: dict[str, float]
) -> None:
    with pytest.raises(RaterUnusable, match=rf"labels are {', '.join(labels)}; set ingest.rating.labels"):
        stars_of_labels(dict(enumerate(labels)), told, Path("m"))


def refusal(kind: str, directory: Path) -> str:
    with pytest.raises(RaterUnusable) as raised:
        rater_of(settings(kind, directory))
    text = str(raised.value)
    assert raised.value.exit_code == 2
    assert "\n" not in text
    assert str(directory) in text
    return text


def test_what_is_no_such_model_is_refused_in_one_line(causal: Path, classifier: Path, tmp_path: Path) -> None:
    assert "holds no config.json" in refusal("causal", tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refusal("classifier", tmp_path / "empty")
    assert "lack" in refusal("classifier", causal)
    broken = tmp_path / "broken"
    shutil.copytree(classifier, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be loaded" in refusal("classifier", broken)
    pickled = tmp_path / "pickled"
    shutil.copytree(classifier, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "cannot be loaded" in refusal("classifier", pickled)


def test_code_in_a_directory_is_not_run(causal: Path, tmp_path: Path) -> None:
    directory = tmp_path / "code"
    shutil.copytree(causal, directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    assert "cannot be loaded" in refusal("causal", directory)
    assert not (tmp_path / "ran").exists()


def test_a_model_needs_its_directory_in_the_settings() -> None:
    with pytest.raises(ValueError, match="rater causal needs directory"):
        RatingSettings(rater="causal")
    with pytest.raises(ValueError, match=r"must say with \{review\}"):
        RatingSettings(prompt="how good?")
