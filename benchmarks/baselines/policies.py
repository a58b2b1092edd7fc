"""Our own pipeline as rows of the benchmark: a codec and a base policy a seed, under several settings."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from policies.policy import Policy
from policies.settings import DecodingSettings
from trainer.cases import RankingCase
from trainer.evaluation import beam_plan, rank_catalogue
from trainer.metrics import COLUMNS, CUTOFFS, Ranked
from trainer.settings import AlignmentSettings, CollaborativeSettings, TrainerSettings
from trainer.sft import train_sft
from trainer.sft.tasks import CatalogueText
from trainer.tokenization import fit_codec
from trainer.tokenization.text import item_texts

from .models import RowUnavailableError
from .reading import HELD_BACK, Dataset


def tiger_like(settings: TrainerSettings) -> TrainerSettings:
    """TIGER (Rajput et al. 2023): codes of the text alone, no users, the next item and nothing else."""
    return _next_item(settings, collaborative=CollaborativeSettings(method="none"))


def letter_like(settings: TrainerSettings) -> TrainerSettings:
    """LETTER-TIGER (Wang et al. 2024): behaviour in the codes besides text; otherwise TIGER."""
    return _next_item(settings, collaborative=settings.tokenization.collaborative)


def as_they_are(settings: TrainerSettings) -> TrainerSettings:
    """Ours."""
    return settings


def mean_start(settings: TrainerSettings) -> TrainerSettings:
    """Ours, whose codec's tokens start as any new token does."""
    return settings.model_copy(update={"sft": settings.sft.model_copy(update={"new_tokens": "mean"})})


POLICIES: dict[str, Callable[[TrainerSettings], TrainerSettings]] = {
    "tiger-like": tiger_like,
    "letter-tiger-like": letter_like,
    "ours": as_they_are,
    "ours-mean-start": mean_start,
}


def policy_key(name: str, settings: TrainerSettings) -> str:
    """Names the settings of a row: a policy kept for others is not taken for it."""
    wanted = POLICIES[name](settings)
    text = wanted.tokenization.model_dump_json() + wanted.sft.model_dump_json()
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def base_policy(
    place: Path,
    items: pa.Table,
    histories: Sequence[Sequence[str]],
    settings: TrainerSettings,
    seed: int,
    *,
    lineage: Mapping[str, Any],
    device: str = "cpu",
) -> Path:
    """A codec and a base policy fitted to ``histories`` in the folder ``place``, unless they are there; where
    the policy lies."""
    if not (place / "codec").is_dir():
        tokenization = settings.tokenization.model_copy(update={"without_text": "allow"})
        fit_codec(items, histories, tokenization, place / "codec", seed=seed, device=device)
    sasrec = settings.sft.sasrec.model_copy(update={"seed": seed})
    if not (place / "policy").is_dir():
        train_sft(
            place / "codec",
            histories,
            settings.sft.model_copy(update={"seed": seed, "sasrec": sasrec}),
            place / "policy",
            texts=item_texts(items),
            catalogue=CatalogueText.of(items),
            lineage=lineage,
            device=device,
            checkpoint=place / "checkpoint",
        )
    return place / "policy"


def measured_policy(
    name: str,
    seed: int,
    data: Dataset,
    settings: TrainerSettings,
    keep: Path,
    *,
    beams: Sequence[int],
    depth: int,
    device: str,
) -> tuple[dict[str, Ranked], float]:
    """(column -> figures, seconds of tokenization and training); the policy stays under ``keep``.

    Each cutoff up to the widest beam is read off the narrowest that holds it. Raises RowUnavailableError
    where codes of text are wanted of a data set that has none.
    """
    if name == "tiger-like" and not data.has_titles:
        raise RowUnavailableError("the data set has no titles to make codes of")
    wanted = POLICIES[name](settings)
    place = keep / f"{data.name}-{name}-{policy_key(name, settings)}-{seed}"
    began = time.perf_counter()
    histories = [[str(item) for item in history] for history in data.training]
    directory = base_policy(
        place, data.items, histories, wanted, seed, lineage={"leave_out": HELD_BACK}, device=device
    )
    seconds = time.perf_counter() - began
    policy = Policy.load(directory, device=device, settings=DecodingSettings(beam=20, batch=64))
    cases = [
        RankingCase(str(user), tuple(str(item) for item in history), str(target))
        for user, (history, target) in enumerate(zip(data.histories, data.targets, strict=True))
    ]
    columns = {}
    for column in COLUMNS:
        per_user, shape, answered = {}, None, 0
        for beam, cutoffs in beam_plan(beams, [k for k in CUTOFFS if k <= max(beams)]):
            figures = rank_catalogue(
                policy,
                cases,
                cutoffs=cutoffs,
                beam=beam,
                exclude_seen=column == "unseen",
                popularity=[str(item) for item in data.order],
                depth=depth,
            )
            shape = figures.shape if shape is None else shape
            per_user |= {
                f"{metric}@{k}": figures.per_user[f"{metric}@{k}"]
                for k in cutoffs
                if k > answered
                for metric in ("recall", "ndcg")
            }
            answered = max(cutoffs)
        assert shape is not None
        columns[column] = Ranked(per_user, shape)
    return columns, seconds


def _next_item(settings: TrainerSettings, *, collaborative: CollaborativeSettings) -> TrainerSettings:
    tokenization = settings.tokenization.model_copy(
        update={
            "users": False,
            "collaborative": collaborative,
            "alignment": AlignmentSettings(method="none"),
        }
    )
    tasks = settings.sft.tasks.model_copy(update=dict.fromkeys(settings.sft.tasks.weights, 0.0))
    sft = settings.sft.model_copy(
        update={"teacher_weight": 0.0, "item_tokens": 0, "new_tokens": "mean", "tasks": tasks}
    )
    return settings.model_copy(update={"tokenization": tokenization, "sft": sft})
