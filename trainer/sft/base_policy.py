"""The base policy: a codec and training histories in, a policy directory out."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from policies.codec import ScidCodec
from policies.policy import write_policy
from policies.prompt import HISTORY, PromptTokens
from policies.weights import device_named
from trainer.checkpoint import Checkpoint
from trainer.errors import CannotTrain
from trainer.ranks import Ranks
from trainer.settings import SftSettings

from .data import TokenMap, windows_of
from .likeness import Likeness
from .lora import plain, with_lora
from .presets import open_backbone
from .sasrec import SasRec
from .tasks import NO_TEXT, CatalogueText, Mixture
from .tasks.mixture import require_context
from .tasks.writing import require_whole_scids
from .teacher import Progress as Preparing
from .teacher import Teacher, parts_of
from .training import ALONE, Progress, train_next_item
from .user_scids import UserScids


@dataclass(frozen=True)
class SftReport:
    """What SFT gave, for people and for lineage."""

    backbone: str
    parameters: int
    trained_parameters: int
    """Fewer where LoRA trained it."""
    users: int
    """Histories with at least two items the codec knows."""
    samples: int
    """Samples (targets) an epoch."""
    steps: int
    losses: list[float]
    """Mean loss of each epoch, nats a code; the target's entropy is in it where a teacher is used."""
    tokens_per_s: float
    resumed_at: int
    unknown_items: int
    """Items of the histories that the codec does not know; they were left out."""
    seconds: float
    tasks: dict[str, dict[str, Any]]
    """Of each task with text: weight, samples a step, samples there are, skipped for want of text, and the
    mean loss of each epoch, nats a token."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def train_sft(
    codec_dir: Path,
    histories: Sequence[Sequence[str]],
    settings: SftSettings,
    out: Path,
    *,
    texts: Iterable[str] = (),
    catalogue: CatalogueText = NO_TEXT,
    popularity: Sequence[str] | None = None,
    version: str = "base",
    lineage: Mapping[str, Any] | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
    preparing: Preparing | None = None,
) -> SftReport:
    """Train the base policy on next-item prediction and write the policy directory ``out`` (kind "full").

    ``histories``: item ids of each training user, oldest first. ``texts``: catalogue text, for the tokenizer
    of a preset. ``catalogue``: titles, texts and categories, for the tasks that
    ``settings.tasks`` gives a weight, for the teacher's share of like texts, and for what the codec's
    tokens start from.
    ``popularity``: item ids, most liked first; default: by occurrences in ``histories``.
    ``checkpoint``: folder for the state of an interrupted run; a call with the same input continues it and
    ends with the weights of an uninterrupted one; the state is removed at the end. Same input and seed: same
    weights (CPU, same threads).

    ``device``: cpu, cuda, cuda:N, or auto (a GPU where there is one). ``ranks``: processes that share each
    step; the leading one writes, the others return once it has. ``preparing``: told how far the teacher is,
    before the first step.

    Raises CannotTrain when no history has two known items, the backbone cannot be used or ``out`` exists,
    PolicyRefused for a codec that cannot be read, BadRequest for a device that is not there.
    """
    started = time.perf_counter()
    place = str(device_named(ranks.place(found_device(device))))
    if out.exists() and ranks.leads:
        raise CannotTrain(f"{out} exists already; a policy is never rewritten, choose another place")
    codec = ScidCodec.load(codec_dir)
    indexed = index_histories(codec, histories)
    windows = windows_of(indexed, max_history=HISTORY)
    if not windows:
        raise CannotTrain(
            f"none of {len(histories)} histories has two items with an SCID; ingest feedback first, "
            "or fit the codec to this catalogue with `align3gr tokenize`"
        )
    texts = list(texts)
    lines = [catalogue.lines.get(item_id, "") for item_id in codec.item_ids]
    reopen = partial(
        open_backbone,
        settings.backbone,
        codec,
        texts,
        text_vocabulary=settings.text_vocabulary,
        seed=settings.seed,
        new_tokens=settings.new_tokens,
        items=most_frequent(indexed, len(codec), settings.item_tokens),
        likeness=Likeness.of(lines, indexed) if settings.new_tokens == "likeness" else None,
    )
    backbone = reopen(quantization=settings.quantization, device=place)
    parameters = sum(p.numel() for p in backbone.model.parameters())
    prompt = PromptTokens(backbone.tokenizer, codec)
    require_whole_scids(backbone.tokenizer, prompt)
    require_context(backbone.model, prompt)
    tokens = token_map(prompt)
    scids = UserScids.of(codec, indexed)
    mixture = Mixture.of(settings, codec, backbone.tokenizer, backbone.model, indexed, scids, catalogue)
    model = with_lora(backbone, settings.lora, prompt.ids, seed=settings.seed)
    trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rate = settings.learning_rate or backbone.learning_rate
    key = run_key(codec, indexed, settings, texts, catalogue)
    state = None if checkpoint is None else checkpoint / key[:16]
    taught = None if checkpoint is None else checkpoint / f"{key[:16]}-teacher"
    teacher = None
    if settings.teacher_weight > 0:
        kept = Checkpoint(taught, key)
        tell = preparing if ranks.leads else None
        teacher = _teacher(indexed, lines, settings, place, kept, ranks, tell)
    trained = train_next_item(
        model,
        windows,
        tokens,
        settings,
        learning_rate=rate,
        device=place,
        checkpoint=state,
        run_key=key,
        teacher=teacher,
        scids=scids,
        mixture=mixture,
        ranks=ranks,
        progress=progress if ranks.leads else None,
    )
    report = SftReport(
        backbone=backbone.name,
        parameters=parameters,
        trained_parameters=trained_parameters,
        users=len({window.user for window in windows}),
        samples=trained.samples,
        steps=trained.steps,
        losses=trained.losses,
        tokens_per_s=trained.tokens / max(trained.seconds, 1e-9),
        resumed_at=trained.resumed_at,
        unknown_items=sum(map(len, histories)) - sum(map(len, indexed)),
        seconds=time.perf_counter() - started,
        tasks={} if mixture is None else mixture.report(trained.task_losses),
    )
    facts = {"settings": {"sft": settings.model_dump(mode="json")}, "metrics": {"sft": report.as_dict()}}
    if ranks.leads:
        write_policy(
            out,
            version=version,
            model=plain(model, lambda: reopen().model),
            tokenizer=backbone.tokenizer,
            codec=codec,
            popularity=by_popularity(histories) if popularity is None else popularity,
            lineage=merged(facts, lineage or {}),
        )
        for done in (state, taught):
            Checkpoint(done, key).clear()
    ranks.wait()
    return report


def _teacher(
    indexed: Sequence[np.ndarray[Any, Any]],
    lines: Sequence[str],
    settings: SftSettings,
    device: str,
    kept: Checkpoint,
    ranks: Ranks,
    tell: Preparing | None,
) -> Teacher:
    """From ``kept``, where an interrupted run left it; made and kept there otherwise. ``lines``: the text of
    each of the codec's items."""
    saved = kept.load()

    def trained(epoch: int, epochs: int, loss: float, quality: float) -> None:
        if tell is not None:
            tell("SASRec", epoch, epochs, f"loss {loss:.3f}  NDCG@10 of held-out items {quality:.4f}")

    if saved is not None:
        teacher = Teacher.of_state(saved.states["teacher"], settings.teacher_weight)
    else:
        parts = parts_of(
            settings.teacher,
            indexed,
            len(lines),
            texts=lines,
            sasrec=lambda: SasRec.fit(indexed, len(lines), settings.sasrec, device=device, progress=trained),
        )
        teacher = Teacher.of(
            indexed,
            len(lines),
            parts,
            keep=settings.teacher_items,
            weight=settings.teacher_weight,
            progress=tell,
        )
    ranks.wait()  # everyone has looked for a kept one before the leading process writes it
    if saved is None and ranks.leads:
        kept.save({}, {"teacher": teacher.as_state()})
    return teacher


def found_device(name: str) -> str:
    """``name``, or for "auto" cuda where there is a GPU, else cpu."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def index_histories(codec: ScidCodec, histories: Sequence[Sequence[str]]) -> list[np.ndarray[Any, Any]]:
    """Codec rows of each history's known items, int64, order kept."""
    rows = codec.items
    return [
        np.array([rows[item] for item in history if item in rows], dtype=np.int64) for history in histories
    ]


def token_map(tokens: PromptTokens) -> TokenMap:
    """The token ids that samples are made of."""
    codes = tokens.codec.codes
    items = np.stack([level[codes[:, i]] for i, level in enumerate(tokens.levels)], axis=1)
    own = tokens.own if (tokens.own >= 0).any() else None
    return TokenMap(items, tokens.begin, tokens.recommend, tokens.pad, tokens.user_levels, own)


def most_frequent(indexed: Sequence[np.ndarray[Any, Any]], n_items: int, count: int) -> list[int]:
    """Rows of the ``count`` items met most often, in order of rows; items nobody met are not among them."""
    met = np.bincount(np.concatenate([*indexed, np.zeros(0, np.int64)]), minlength=n_items)
    most = np.argsort(-met, kind="stable")[:count]
    rows: list[int] = np.sort(most[met[most] > 0]).tolist()
    return rows


def by_popularity(histories: Sequence[Sequence[str]]) -> list[str]:
    """Item ids by number of occurrences, most first; ties alphabetical."""
    counts = Counter(item for history in histories for item in history)
    return sorted(counts, key=lambda item: (-counts[item], item))


def run_key(
    codec: ScidCodec,
    indexed: Sequence[np.ndarray[Any, Any]],
    settings: SftSettings,
    texts: Sequence[str],
    catalogue: CatalogueText = NO_TEXT,
) -> str:
    """Names a training by all that determines it; a checkpoint of another training is not continued.

    Users' SCIDs follow from what is in it: the user module is in the quantizer hash, the vectors of the items
    in the item map's."""
    digest = hashlib.sha256(codec.quantizer_hash.encode() + codec.item_map_hash.encode())
    kept = settings.model_dump(mode="json", exclude={"checkpoint_every"})
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for history in indexed:
        digest.update(len(history).to_bytes(8, "little") + history.tobytes())
    for text in texts:
        digest.update(text.encode() + b"\0")
    texts_taught = settings.teacher_weight > 0 and settings.teacher.texts > 0
    texts_start = settings.new_tokens == "likeness"
    if texts_taught or texts_start or any(settings.tasks.weights.values()):
        for part in catalogue.parts():
            digest.update(part)
    return digest.hexdigest()


def merged(facts: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """``more`` over ``facts``; mappings under the same key are merged."""
    out = dict(facts)
    for key, value in more.items():
        mine = out.get(key)
        out[key] = {**mine, **value} if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return out
