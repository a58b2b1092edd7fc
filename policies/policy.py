"""A deployed policy: a model that recommends, with its tokenizer, codec, trie and popularity, loaded as one.

``Policy.load`` reads a policy directory (policies.directory) after checking every byte of it;
``Policy.recommend`` and ``Policy.sample`` turn users into lists of items, each of which exists, stands once,
is unseen and eligible; ``write_policy`` makes a directory from what training ends with.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from .codec import ScidCodec
from .decoding import DeviceTrie, Found, Left, beam_search, sample_slates
from .directory import (
    Base,
    CodecHashes,
    Manifest,
    base_directory,
    manifest_hash,
    read_manifest,
    verify,
    write_directory,
)
from .errors import BadRequest, PoliciesError, PolicyRefused
from .lists import Eligible, Recommendation, UserContext
from .popularity import Popularity
from .prompt import TEMPLATE_VERSION, PromptTokens, prompts_ids
from .settings import DecodingSettings
from .trie import ScidTrie
from .weights import device_named, load_base, save_adapter, save_full, twin, with_adapter

__all__ = ["Eligible", "Policy", "Recommendation", "UserContext", "write_policy"]

_POPULARITY = "popularity.json"


class Policy:
    """A loaded policy. Reading is safe from several threads; nothing in it changes after loading."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        model: Any,
        tokenizer: Any,
        codec: ScidCodec,
        popularity: Sequence[str],
        base: Base | None = None,
        settings: DecodingSettings | None = None,
    ) -> None:
        """Put the parts together. ``base`` names the full policy whose weights the model holds.

        Raises PolicyRefused when tokenizer, model and codec do not belong together.
        """
        self.manifest = manifest
        self.model = model
        self.tokenizer = tokenizer
        self.codec = codec
        self.base = base
        self.settings = settings or DecodingSettings()
        self.tokens = PromptTokens(tokenizer, codec)
        self.trie = ScidTrie.of(codec)
        self.device = next(model.parameters()).device
        rows = model.get_input_embeddings().weight.shape[0]
        if self.tokens.highest >= rows:
            raise PolicyRefused(
                f"policy {manifest.version}: the model embeds {rows} tokens but the codec's reach "
                f"{self.tokens.highest}; "
                "restore the policy directory, or train on this codec with `align3gr sft`"
            )
        self._popularity = Popularity(codec, popularity)
        self._everything = self.eligible(None)
        self.device_trie = DeviceTrie(self.trie, self.tokens.levels, self.device)

    @property
    def version(self) -> str:
        """The registry's version, e.g. "v7"."""
        return self.manifest.version

    @classmethod
    def load(
        cls,
        directory: Path | str,
        *,
        device: str | torch.device = "cpu",
        verify: bool = True,
        policies: Path | None = None,
        codec: ScidCodec | None = None,
        share_base_with: "Policy | None" = None,
        trainable: bool = False,
        merged: bool = False,
        settings: DecodingSettings | None = None,
    ) -> "Policy":
        """Load a policy directory.

        ``verify``: check every sha256 first (off only for a directory verified a moment ago).
        ``policies``: where bases lie, when not beside ``directory``. ``codec``: a longer codec of the same
        quantizer, with items that came after the policy. ``share_base_with``: a loaded policy; where it
        stands on the same base, its base weights are used, not copied (do not train them then).
        ``trainable``: leave the adapter's weights trainable. ``merged``: add the adapter into the weights, a
        quarter faster and equal up to rounding; such a policy shares its base with nobody.

        Raises PolicyRefused for a directory that is half written, corrupt, from the future, or whose base,
        codec or prompt template do not match; nothing is unpickled and no code of the directory is run.
        """
        directory = Path(directory)
        manifest = _verified(directory) if verify else read_manifest(directory)
        if manifest.prompt_template != TEMPLATE_VERSION:
            raise PolicyRefused(
                f"policy {directory} was trained on prompt template {manifest.prompt_template}, this version "
                f"speaks {TEMPLATE_VERSION}; train a new base policy with `align3gr sft`"
            )
        base_dir = base_directory(directory, manifest, policies)
        base = manifest.base or Base(version=manifest.version, sha256=manifest_hash(directory))
        place = device_named(device)
        merged = merged and manifest.kind == "adapter" and not trainable
        lender = None if merged else share_base_with
        if lender is not None and (lender.base, lender.device) != (base, place):
            lender = None
        if verify and base_dir != directory and lender is None:
            _verified(base_dir)
        own = _codec_of(directory, manifest)
        if codec is not None:
            own.require_same_quantizer(codec)
        try:
            if lender is not None:
                model, tokenizer = twin(lender.model), lender.tokenizer
            else:
                model, tokenizer = load_base(base_dir / "model", place)
            if manifest.kind == "adapter":
                model = with_adapter(model, directory / "adapter", trainable=trainable)
                model = model.merge_and_unload() if merged else model
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            cause = " ".join(str(error).split())[:300]
            raise PolicyRefused(
                f"policy {directory} cannot be loaded: {cause}; roll back to another policy"
            ) from error
        model.train(trainable)
        return cls(
            manifest,
            model=model,
            tokenizer=tokenizer,
            codec=codec or own,
            popularity=_read_popularity(directory),
            base=None if merged else base,
            settings=settings,
        )

    def eligible(self, item_ids: Collection[str] | None) -> Eligible:
        """Work out once which items may be recommended (none: all); unknown ids are no error and no item."""
        mask = np.ones(len(self.codec), dtype=bool)
        if item_ids is not None:
            mask[:] = False
            rows = self.codec.items
            mask[[rows[item_id] for item_id in item_ids if item_id in rows]] = True
        alive = torch.from_numpy(self.trie.alive(mask).astype(np.int64)).to(self.device)
        return Eligible(mask, alive)

    def recommend(
        self,
        users: Sequence[UserContext],
        k: int,
        *,
        beam: int | None = None,
        eligible: Collection[str] | Eligible | None = None,
        exclude_seen: bool = True,
    ) -> list[list[Recommendation]]:
        """The k best items of each user, best first: by the policy, or by popularity for an unknown user.

        k items whenever k are eligible (and unseen, unless ``exclude_seen`` is off).
        ``beam``: prefixes kept at each level, default from settings; raised to k.
        Raises BadRequest when k or beam is not positive.
        """
        allowed = self.allowed(eligible)
        _require_positive(k=k, beam=self.settings.beam if beam is None else beam)
        width = max(beam or self.settings.beam, k)
        lists: list[list[Recommendation]] = [[] for _ in users]
        for places, prompts, left in self.batches(users, allowed, exclude_seen):
            found = beam_search(
                self.model, self.device_trie, prompts, left, k=k, beam=width, pad_id=self.tokens.pad
            )
            for place, one in zip(places, self._lists(found), strict=True):
                lists[place] = one
        for place in self._unknown(users):
            lists[place] = self._popular(users[place], k, allowed, exclude_seen)
        return lists

    def sample(
        self,
        users: Sequence[UserContext],
        k: int,
        *,
        seed: int,
        eligible: Collection[str] | Eligible | None = None,
        exclude_seen: bool = True,
        temperature: float = 1.0,
    ) -> list[list[Recommendation]]:
        """A slate of k items of each user drawn without replacement, with propensities (policies.decoding).

        The same seed and user give the same slate, whoever else is in the call: pass a fresh seed for each
        request. An unknown user's slate is drawn so from q(item) proportional to 1 / popularity rank.
        Raises BadRequest when k or temperature is not positive.
        """
        allowed = self.allowed(eligible)
        _require_positive(k=k, temperature=temperature)
        lists: list[list[Recommendation]] = [[] for _ in users]
        for places, prompts, left in self.batches(users, allowed, exclude_seen):
            found = sample_slates(
                self.model,
                self.device_trie,
                prompts,
                left,
                k=k,
                keys=[_key(seed, users[place].user_id) for place in places],
                pad_id=self.tokens.pad,
                temperature=temperature,
            )
            for place, one in zip(places, self._lists(found), strict=True):
                lists[place] = one
        for place in self._unknown(users):
            lists[place] = self._popular(users[place], k, allowed, exclude_seen, seed=seed)
        return lists

    def allowed(self, eligible: Collection[str] | Eligible | None) -> Eligible:
        """Ids, a set worked out before, or none (everything) as what searches take."""
        if eligible is None:
            return self._everything
        if not isinstance(eligible, Eligible):
            return self.eligible(eligible)
        if len(eligible.mask) != len(self.codec):
            raise BadRequest("this set of eligible items belongs to another policy; work it out again")
        return eligible

    def _unknown(self, users: Sequence[UserContext]) -> list[int]:
        return [place for place, user in enumerate(users) if not self.tokens.known(user.history)]

    def batches(
        self, users: Sequence[UserContext], allowed: Eligible, exclude_seen: bool
    ) -> Iterator[tuple[list[int], list[list[int]], Left]]:
        """Users with a history in batches of like prompt length: their places, prompts and items left."""
        if self.model.training:
            raise PoliciesError(
                "the policy is in training mode, where lists would be random; call model.eval()"
            )
        unknown = set(self._unknown(users))
        known = [place for place in range(len(users)) if place not in unknown]
        written = prompts_ids(self.tokens, [users[place].history for place in known])
        prompts = dict(zip(known, written, strict=True))
        order = sorted(prompts, key=lambda place: len(prompts[place]))
        for start in range(0, len(order), self.settings.batch):
            places = order[start : start + self.settings.batch]
            seen = [
                self._seen_rows(users[place], allowed) if exclude_seen else np.empty(0, np.int64)
                for place in places
            ]
            left_out = np.full((len(places), max(map(len, seen))), len(self.codec), dtype=np.int64)
            for row, rows in enumerate(seen):
                left_out[row, : len(rows)] = np.sort(self.trie.leaf_of_item[rows])
            yield (
                places,
                [prompts[place] for place in places],
                Left(allowed.alive, torch.from_numpy(left_out).to(self.device)),
            )

    def _seen_rows(self, user: UserContext, allowed: Eligible) -> NDArray[np.int64]:
        items = self.codec.items
        rows = np.array([items[item_id] for item_id in user.seen if item_id in items], dtype=np.int64)
        kept: NDArray[np.int64] = rows[allowed.mask[rows]]
        return kept

    def _lists(self, found: Found) -> list[list[Recommendation]]:
        items, scores = found.items.tolist(), found.scores.tolist()
        propensities: list[list[float | None]] = [[None] * len(row) for row in items]
        if found.propensities is not None:
            propensities = found.propensities.tolist()
        return [
            [
                Recommendation(self.codec.item_ids[item], score, position, propensity, "policy")
                for position, (item, score, propensity) in enumerate(zip(*columns, strict=True), start=1)
                if item >= 0
            ]
            for columns in zip(items, scores, propensities, strict=True)
        ]

    def _popular(
        self, user: UserContext, k: int, allowed: Eligible, exclude_seen: bool, *, seed: int | None = None
    ) -> list[Recommendation]:
        """By popularity; with a seed, drawn."""
        mask = allowed.mask
        if exclude_seen and user.seen:
            mask = mask.copy()
            mask[self._seen_rows(user, allowed)] = False
        if seed is None:
            found = self._popularity.top(mask, k)
        else:
            found = self._popularity.draw(mask, k, _key(seed, user.user_id))
        propensities: list[float | None] = [None] * len(found.rows)
        if found.propensities is not None:
            propensities = found.propensities.tolist()
        columns = zip(found.rows.tolist(), found.log_shares.tolist(), propensities, strict=True)
        return [
            Recommendation(self.codec.item_ids[row], score, position, propensity, "popularity")
            for position, (row, score, propensity) in enumerate(columns, start=1)
        ]


def write_policy(
    directory: Path,
    *,
    version: str,
    model: Any,
    tokenizer: Any,
    codec: ScidCodec,
    popularity: Sequence[str],
    base: Base | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write a policy directory whole or not at all; the manifest last, one rename at the end.

    ``base`` none: kind "full", ``model`` a plain transformers model. ``base`` given (``directory.base_of``):
    kind "adapter", ``model`` the PeftModel that was trained on that base.
    Raises PolicyRefused when the directory exists or the model is not of that kind.
    """
    adapter = hasattr(model, "peft_config")
    if adapter != (base is not None):
        raise PolicyRefused(
            "an adapter needs the base it was trained on, and a full policy has none; "
            "pass base=base_of(the base's directory), or merge the adapter first"
        )
    PromptTokens(tokenizer, codec)  # refuses a tokenizer of another codec

    def fill(staging: Path) -> None:
        if base is None:
            save_full(model, tokenizer, staging / "model")
        else:
            save_adapter(model, staging / "adapter", base)
        codec.save(staging / "codec")
        (staging / _POPULARITY).write_text(json.dumps(list(popularity), ensure_ascii=False), encoding="utf-8")

    def seal(files: Mapping[str, str]) -> Manifest:
        return Manifest(
            version=version,
            prompt_template=TEMPLATE_VERSION,
            kind="adapter" if adapter else "full",
            base=base,
            codec=CodecHashes(quantizer_hash=codec.quantizer_hash, item_map_hash=codec.item_map_hash),
            files=dict(files),
            lineage=dict(lineage or {}),
        )

    return write_directory(directory, fill, seal)


_verified = verify
"""``Policy.load`` has an argument of the same name."""


def _codec_of(directory: Path, manifest: Manifest) -> ScidCodec:
    codec = ScidCodec.load(directory / "codec")
    if (codec.quantizer_hash, codec.item_map_hash) != (
        manifest.codec.quantizer_hash,
        manifest.codec.item_map_hash,
    ):
        raise PolicyRefused(
            f"policy {directory}: codec mismatch: its codec is not the one its manifest names; "
            "restore it from a backup, or roll back to another policy"
        )
    return codec


def _read_popularity(directory: Path) -> list[str]:
    try:
        popularity = json.loads((directory / _POPULARITY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise PolicyRefused(
            f"policy {directory}: {_POPULARITY} cannot be read: {cause}; roll back to another policy"
        ) from error
    return [str(item_id) for item_id in popularity]


def _key(seed: int, user_id: str) -> int:
    """128 bits for one user's noise."""
    digest = hashlib.blake2b(f"{seed}\0{user_id}".encode(), digest_size=16)
    return int.from_bytes(digest.digest(), "big")


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise BadRequest(f"{name} must be positive, not {value}")
