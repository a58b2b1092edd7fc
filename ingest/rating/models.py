"""Raters that are local Hugging Face models: a text classifier, or a causal model asked for a number.

Both read the answer from logits, one forward pass a batch; nothing is generated or parsed. Let p(s) be the
probability of s stars, s = 1..5: a classifier's softmax over its labels, each meaning some stars; a causal
model's, over the tokens that say "1" to "5" as the next token of PROMPT. The rating is argmax p (setting
``answer: most_likely``), or the mean under p, rounded (``expected``).

Only a local directory of configuration, tokenizer and safetensors is read: no hub, no code from the
directory, no pickles.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ingest.errors import RaterUnusable
from ingest.settings import RatingSettings

PROMPT = (
    "Below is a customer's review of a product. How satisfied is the customer, from 1 (very dissatisfied) to "
    "5 (very satisfied)? Answer with one digit.\n\nReview: {review}\n\nRating (1-5):"
)
"""The question to a causal model. One with a chat template is asked it as the user's turn."""

STARS = (1, 2, 3, 4, 5)
_AT_ONCE = 16
"""Reviews in one forward pass, those of like length together."""
_LOADING = (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, SafetensorError)
_NAMES = {
    2: {"negative": 1.0, "positive": 5.0},
    3: {"negative": 1.0, "neutral": 3.0, "positive": 5.0},
    5: {"very negative": 1.0, "negative": 2.0, "neutral": 3.0, "positive": 4.0, "very positive": 5.0},
}


class _ModelRater(ABC):
    """What both share: a directory, its hash as version, batches, and how p becomes a rating."""

    def __init__(self, settings: RatingSettings, head: Any) -> None:
        assert settings.directory is not None  # the settings see to it
        self.directory, self._settings = settings.directory, settings
        self._device = torch.device(settings.device)
        self._tokenizer, self._model = _loaded(settings.directory, head, self._device)
        told = [_content(settings.directory), settings.answer, settings.max_chars, *self._told()]
        self.version = f"{settings.rater}-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]}"

    def rate(self, texts: Sequence[str]) -> list[int | None]:
        """1 to 5 for each text; None for one without a word."""
        ratings: list[int | None] = [None] * len(texts)
        worded = [n for n, text in enumerate(texts) if text.strip()]
        worded.sort(key=lambda n: len(texts[n]))
        for start in range(0, len(worded), _AT_ONCE):
            batch = worded[start : start + _AT_ONCE]
            shares = self.probabilities([texts[n][: self._settings.max_chars] for n in batch])
            for n, stars in zip(batch, self._ratings(shares), strict=True):
                ratings[n] = stars
        return ratings

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """p, float64 [texts, 5] on the CPU."""
        ids = [self._ids(text) for text in texts]
        tokens = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, mine in enumerate(ids):
            tokens[row, : len(mine)] = torch.tensor(mine)
            mask[row, : len(mine)] = 1
        return self._read(tokens.to(self._device), mask.to(self._device)).double().cpu()

    @abstractmethod
    def _told(self) -> list[Any]:
        """What else decides an answer."""

    @abstractmethod
    def _ids(self, text: str) -> list[int]:
        """Token ids of the model's input for ``text``."""

    @abstractmethod
    def _read(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """``tokens``, ``mask`` int64 [n, T], filled up on the right; p, float [n, 5]."""

    def _ratings(self, shares: Tensor) -> list[int]:
        if self._settings.answer == "most_likely":
            return [int(place) + 1 for place in shares.argmax(dim=1)]
        means = shares @ torch.tensor(STARS, dtype=torch.float64)
        return [max(1, min(5, int(mean + 0.5))) for mean in means.tolist()]


class ClassifierRater(_ModelRater):
    """A text classifier; its labels are stars by name, or by ``settings.labels``."""

    def __init__(self, settings: RatingSettings) -> None:
        """Raises RaterUnusable when the directory is no such model or its labels mean nothing to us."""
        from transformers import AutoModelForSequenceClassification

        super().__init__(settings, AutoModelForSequenceClassification)
        stars = stars_of_labels(self._model.config.id2label, settings.labels, self.directory)
        # Between two stars a label counts for both: 2.5 is half 2 and half 3.
        spread = [[max(0.0, 1 - abs(star - one)) for one in STARS] for star in stars]
        self._spread = torch.tensor(spread, device=self._device)

    def _told(self) -> list[Any]:
        return [sorted(self._settings.labels.items())]

    def _ids(self, text: str) -> list[int]:
        longest = _longest(self._tokenizer, self._model)
        ids: list[int] = self._tokenizer(text, truncation=True, max_length=longest)["input_ids"]
        return ids

    def _read(self, tokens: Tensor, mask: Tensor) -> Tensor:
        logits = self._model(input_ids=tokens, attention_mask=mask).logits.float()
        shares: Tensor = logits.softmax(dim=1) @ self._spread
        return shares


class CausalRater(_ModelRater):
    """A causal model that is asked ``settings.prompt``, and answers with its next token's logits."""

    def __init__(self, settings: RatingSettings) -> None:
        """Raises RaterUnusable when the directory is no such model or has no token for a digit."""
        from transformers import AutoModelForCausalLM

        self._prompt = settings.prompt or PROMPT
        super().__init__(settings, AutoModelForCausalLM)
        self._answers = [self._tokens_that_say(star) for star in STARS]

    def _told(self) -> list[Any]:
        return [self._prompt]

    def _ids(self, text: str) -> list[int]:
        """The prompt's ids; of a review that is too long only its beginning stands in it."""
        longest = _longest(self._tokenizer, self._model)
        while len(ids := self._encoded(self._asked(text))) > longest and text:
            text = text[: len(text) * longest // len(ids) - 1]
        return ids

    def _read(self, tokens: Tensor, mask: Tensor) -> Tensor:
        last = mask.sum(dim=1) - 1
        places = torch.tensor(sorted(set(last.tolist())), device=last.device)  # where the head is computed
        mine = torch.searchsorted(places, last)
        logits = self._model(input_ids=tokens, attention_mask=mask, logits_to_keep=places).logits
        said = logits[torch.arange(len(tokens), device=tokens.device), mine].float()
        scores = [said[:, answers].logsumexp(dim=1) for answers in self._answers]
        return torch.stack(scores, dim=1).softmax(dim=1)

    def _asked(self, text: str) -> str:
        question = self._prompt.replace("{review}", text)
        if not getattr(self._tokenizer, "chat_template", None):
            return question
        turns = [{"role": "user", "content": question}]
        asked: str = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return asked

    def _encoded(self, asked: str) -> list[int]:
        special = not getattr(self._tokenizer, "chat_template", None)  # a template brings its own
        ids: list[int] = self._tokenizer(asked, add_special_tokens=special)["input_ids"]
        end = self._tokenizer.eos_token_id
        return ids[:-1] if special and ids and ids[-1] == end else ids

    def _tokens_that_say(self, star: int) -> list[int]:
        """Every single token that continues the prompt with this digit, with or without a space."""
        asked = self._asked("good")
        before = self._encoded(asked)
        found = []
        for way in (f"{star}", f" {star}"):
            after = self._encoded(asked + way)
            if len(after) == len(before) + 1 and after[:-1] == before:
                found.append(after[-1])
        if not found:
            raise _unusable(
                self.directory,
                f"it has no token for the answer {star}",
                "give a prompt whose answer is one token, or another model",
            )
        return found


def stars_of_labels(labels: dict[int, str], told: dict[str, float], directory: Path) -> list[float]:
    """The stars of each label, in the order of the model's outputs.

    By ``told`` where it names every label, else by name: "1 star" .. "5 stars" (any five, a digit each),
    LABEL_0 .. LABEL_4, negative / (neutral) / positive, very negative .. very positive. Raises
    RaterUnusable otherwise.
    """
    names = [labels[n] for n in sorted(labels)]
    if told and set(told) == set(names):
        return [told[name] for name in names]
    plain = [" ".join(name.lower().replace("_", " ").replace("-", " ").split()) for name in names]
    by_name = _NAMES.get(len(plain), {})
    if set(plain) == set(by_name):
        return [by_name[name] for name in plain]
    if not told and plain == [f"label {n}" for n in range(5)]:
        return [1.0, 2.0, 3.0, 4.0, 5.0]
    digits = ["".join(sign for sign in name if sign.isdigit()) for name in plain]
    if not told and sorted(digits) == ["1", "2", "3", "4", "5"] and "label" not in plain[0]:
        return [float(digit) for digit in digits]
    raise _unusable(
        directory, f"its labels are {', '.join(names)}", "set ingest.rating.labels to the stars of each"
    )


def _loaded(directory: Path, head: Any, device: torch.device) -> tuple[Any, Any]:
    """Tokenizer and model; every weight of the model comes from the directory."""
    from transformers import AutoTokenizer

    if not (directory / "config.json").is_file():
        raise _unusable(
            directory, "it holds no config.json", "name the local directory of a Hugging Face model"
        )
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            model, told = head.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        model = model.to(device).eval()
    except _LOADING as error:
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise RaterUnusable(
            f"rater {directory} cannot be loaded: {cause}; name a directory with configuration, tokenizer "
            "and safetensors, of the kind that ingest.rating.rater says"
        ) from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise _unusable(
            directory,
            f"its files lack {len(missing)} weights of {head.__name__.removeprefix('AutoModelFor')}, "
            f"first {missing[0]}",
            "set ingest.rating.rater to the kind of model that it is",
        )
    return tokenizer, model


def _unusable(directory: Path, cause: str, way_out: str) -> RaterUnusable:
    return RaterUnusable(f"rater {directory}: {cause}; {way_out}")


def _longest(tokenizer: Any, model: Any) -> int:
    """Tokens that the model takes."""
    places = getattr(model.config, "max_position_embeddings", None) or 4096
    return int(min(tokenizer.model_max_length, places))


def _content(directory: Path) -> str:
    """A hash over the names and bytes of the directory's files."""
    whole = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        with path.open("rb") as file:
            whole.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and advice: an error of ours is one line."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
