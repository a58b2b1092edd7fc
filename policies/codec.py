"""The codec of a policy: which SCID (semantic-collaborative id) is which item, and how codes become tokens.

An SCID is one code a level; **one SCID is one item, always**. The codec has two hashes: the quantizer's (what
turns content into codes: it must match the policy) and the item map's (append-only: new items need no new
policy). SCIDs exist only inside a policy directory; everything stored elsewhere is item ids.

A codec directory::

    codec.json         format, sizes, user_sizes, quantizer_hash, item_map_hash, items (a count)
    items.json         item ids, index = row of codes
    codes.safetensors  codes int32 [n_items, L]
    quantizer/         see policies.quantizer (absent for a codec whose items are all there will ever be);
                       quantizer/users: see policies.users (a codec with SCIDs for users)
    vectors.safetensors  what users' SCIDs are made of, a row an item (a codec with SCIDs for users)
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import CodecError, PolicyRefused
from .quantizer import Codes, ItemEncoder
from .text import directory_hash
from .users import Histories, ItemVectors, UserEncoder

FORMAT = 1
_VECTORS = "vectors.safetensors"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class ScidCodec:
    """item id <-> SCID. Immutable; ``extend`` returns a longer one.

    Raises CodecError when two items share an SCID, an item comes twice, or a code is out of range.
    """

    def __init__(
        self,
        item_ids: Sequence[str],
        codes: NDArray[np.integer],
        sizes: Sequence[int],
        *,
        quantizer_hash: str,
        user_sizes: Sequence[int] = (),
        vectors: ItemVectors | None = None,
        source: Path | None = None,
    ) -> None:
        """``codes`` [n_items, L], ``sizes`` [L]; ``source``: the directory it was read from.

        ``user_sizes`` and ``vectors`` (a row an item) together, for a codec with SCIDs for users.
        """
        self.item_ids: tuple[str, ...] = tuple(item_ids)
        self.codes: Codes = np.ascontiguousarray(codes, dtype=np.int32).reshape(
            len(self.item_ids), len(sizes)
        )
        self.sizes: tuple[int, ...] = tuple(int(size) for size in sizes)
        self.user_sizes: tuple[int, ...] = tuple(int(size) for size in user_sizes)
        self.quantizer_hash = quantizer_hash
        self.vectors = vectors
        self.source = source
        self._check()

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def levels(self) -> int:
        """Codes in an SCID."""
        return len(self.sizes)

    @cached_property
    def items(self) -> Mapping[str, int]:
        """Item id -> row of ``codes``."""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @cached_property
    def item_map_hash(self) -> str:
        """sha256 over (item id, codes, vectors) in order."""
        digest = hashlib.sha256(json.dumps(self.sizes).encode())
        digest.update(self.codes.tobytes())
        digest.update(json.dumps(self.item_ids, ensure_ascii=False).encode())
        if self.vectors is not None:
            digest.update(self.vectors.as_bytes())
        return digest.hexdigest()

    def encode(self, item_id: str) -> tuple[int, ...]:
        """The item's SCID. Raises CodecError for an item that has none."""
        row = self.items.get(item_id)
        if row is None:
            raise CodecError(
                f"item {item_id!r} has no SCID in this codec; "
                "add it with `align3gr catalogue load`, then extend the codec"
            )
        return tuple(self.codes[row].tolist())

    def decode(self, codes: Sequence[int]) -> str:
        """The item of an SCID. Raises CodecError when no item has it."""
        row = self._rows.get(tuple(int(code) for code in codes))
        if row is None:
            raise CodecError(f"no item has the SCID {tuple(codes)} in this codec")
        return self.item_ids[row]

    def encode_users(self, histories: Sequence[Sequence[str]]) -> Codes:
        """Users' SCIDs, int32 [n, U], from item ids of histories, oldest first; unknown ones are left out.

        U is 0 for a codec without SCIDs for users. Raises CodecError when the codec's user module is gone.
        """
        if not self.user_sizes:
            return np.empty((len(histories), 0), dtype=np.int32)
        rows = self.items
        indexed = [
            np.array([rows[item] for item in history if item in rows], dtype=np.int64)
            for history in histories
        ]
        return self.encode_user_rows(indexed)

    def encode_user_rows(self, histories: Histories) -> Codes:
        """``encode_users`` of histories given as rows of ``codes``."""
        if self.vectors is None or not self.user_sizes:
            return np.empty((len(histories), 0), dtype=np.int32)
        return self._users.encode(self.vectors, histories)

    @cached_property
    def _users(self) -> UserEncoder:
        if self.source is None or not self.can_grow:
            raise CodecError(
                "this codec holds no user module, so it cannot code users; fit one with `align3gr tokenize`"
            )
        encoder = UserEncoder.load(self.source / "quantizer" / "users")
        if encoder.quantizer.sizes != self.user_sizes:
            raise CodecError(
                f"codec {self.source}: users' SCIDs are {self.user_sizes} by codec.json and "
                f"{encoder.quantizer.sizes} by its user module; restore both together"
            )
        return encoder

    def extend(
        self, item_ids: Sequence[str], codes: NDArray[np.integer], vectors: ItemVectors | None = None
    ) -> "ScidCodec":
        """A codec with more items behind the ones it has; the quantizer, and so the policy, stays the same.

        ``vectors``: of the new items, for a codec with SCIDs for users. Raises CodecError when an item is
        known already, a new SCID is taken, or the vectors are missing.
        """
        known = [item_id for item_id in item_ids if item_id in self.items]
        if known:
            raise CodecError(
                f"item {known[0]!r} has an SCID already; a codec only grows, it is never rewritten"
            )
        added = np.asarray(codes, dtype=np.int32).reshape(len(item_ids), self.levels)
        longer = None
        if self.vectors is not None:
            if vectors is None:
                raise CodecError("a codec with SCIDs for users needs the vectors of new items: use place()")
            longer = self.vectors.joined(vectors)
        return ScidCodec(
            (*self.item_ids, *item_ids),
            np.concatenate([self.codes, added]),
            self.sizes,
            quantizer_hash=self.quantizer_hash,
            user_sizes=self.user_sizes,
            vectors=longer,
            source=self.source,
        )

    def place(self, item_ids: Sequence[str], texts: Sequence[str]) -> "ScidCodec":
        """``extend`` with items known by their text alone, coded by this codec's own quantizer."""
        encoder = self.encoder()
        made = encoder.vectors(texts)
        codes = encoder.quantizer.place(made, self.sizes, self.codes)
        vectors = None
        if self.vectors is not None:
            width = encoder.quantizer.text_width
            vectors = ItemVectors.of(made[:, :width], made[:, width:])
        return self.extend(item_ids, codes, vectors)

    def grow(self, texts: Mapping[str, str]) -> "ScidCodec":
        """``place`` those of ``texts`` (item id -> text) that are new and say something; itself when none is.

        An item without text cannot be coded by its content: it waits for the next fit.
        """
        fresh = [item_id for item_id, text in texts.items() if item_id not in self.items and text.strip()]
        return self.place(fresh, [texts[item_id] for item_id in fresh]) if fresh else self

    @property
    def can_grow(self) -> bool:
        """Whether the codec holds the quantizer that codes new items."""
        return self.source is not None and (self.source / "quantizer").is_dir()

    def encoder(self) -> ItemEncoder:
        """What codes new items. Raises CodecError when this codec was saved without it."""
        if self.source is None or not self.can_grow:
            raise CodecError(
                "this codec holds no quantizer, so it cannot code new items; fit one with `align3gr tokenize`"
            )
        return ItemEncoder.load(self.source / "quantizer")

    def save(self, directory: Path) -> None:
        """Write the codec into ``directory`` (made if missing), with the quantizer of where it came from."""
        from safetensors.numpy import save_file

        directory.mkdir(parents=True, exist_ok=True)
        if self.source is not None and self.source != directory and (self.source / "quantizer").is_dir():
            shutil.copytree(self.source / "quantizer", directory / "quantizer", dirs_exist_ok=True)
        (directory / "items.json").write_text(json.dumps(self.item_ids, ensure_ascii=False), encoding="utf-8")
        save_file({"codes": self.codes}, directory / "codes.safetensors")
        if self.vectors is not None:
            self.vectors.save(directory / _VECTORS)
        facts = {
            "format": FORMAT,
            "sizes": self.sizes,
            "user_sizes": self.user_sizes,
            "quantizer_hash": self.quantizer_hash,
            "item_map_hash": self.item_map_hash,
            "items": len(self),
        }
        (directory / "codec.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "ScidCodec":
        """Raises PolicyRefused when files are missing or unreadable, or either hash does not match."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            facts = json.loads((directory / "codec.json").read_text(encoding="utf-8"))
            if facts["format"] != FORMAT:
                raise PolicyRefused(
                    f"codec {directory} has format {facts['format']}, not {FORMAT}; update align3gr"
                )
            codec = cls(
                json.loads((directory / "items.json").read_text(encoding="utf-8")),
                load_file(directory / "codes.safetensors")["codes"],
                facts["sizes"],
                quantizer_hash=facts["quantizer_hash"],
                user_sizes=facts["user_sizes"],
                vectors=ItemVectors.load(directory / _VECTORS) if facts["user_sizes"] else None,
                source=directory,
            )
            item_map_hash = facts["item_map_hash"]
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            cause = " ".join(str(error).split())
            raise PolicyRefused(
                f"codec {directory} cannot be read: {cause}; restore it, or roll back to another policy"
            ) from error
        if codec.item_map_hash != item_map_hash:
            raise PolicyRefused(
                f"codec {directory}: the item map is not the one that codec.json names; restore both together"
            )
        quantizer = directory / "quantizer"
        if quantizer.is_dir() and directory_hash(quantizer) != codec.quantizer_hash:
            raise PolicyRefused(
                f"codec {directory}: the quantizer is not the one codec.json names; restore both together"
            )
        return codec

    def require_same_quantizer(self, other: "ScidCodec") -> None:
        """Refuse another tokenizer under a policy: its tokens would mean other items.

        Re-tokenizing under a frozen recommender is published to collapse it.
        Raises PolicyRefused when quantizer, sizes, or the SCID or the vectors of a shared item differ.
        """
        way_out = "train a base policy on the new codec with `align3gr sft`"
        if (self.quantizer_hash, self.sizes, self.user_sizes) != (
            other.quantizer_hash,
            other.sizes,
            other.user_sizes,
        ):
            raise PolicyRefused(
                f"codec mismatch: the policy speaks quantizer {self.quantizer_hash[:12]} {self.sizes}, "
                f"this codec is {other.quantizer_hash[:12]} {other.sizes}; {way_out}"
            )
        shared = min(len(self), len(other))
        if (
            self.item_ids[:shared] != other.item_ids[:shared]
            or not np.array_equal(self.codes[:shared], other.codes[:shared])
            or not _same_vectors(self.vectors, other.vectors, shared)
        ):
            raise PolicyRefused(
                "codec mismatch: neither item map continues the other, though the quantizer is the same; "
                f"{way_out}"
            )

    @cached_property
    def _rows(self) -> Mapping[tuple[int, ...], int]:
        return {tuple(codes): row for row, codes in enumerate(self.codes.tolist())}

    def _check(self) -> None:
        if not 1 <= self.levels <= len(LETTERS):
            raise CodecError(f"an SCID has 1 to {len(LETTERS)} levels, not {self.levels}")
        if len(self.items) != len(self):
            twice = next(i for row, i in enumerate(self.item_ids) if self.items[i] != row)
            raise CodecError(f"item {twice!r} stands twice in the codec; give every item one id")
        if bool(self.user_sizes) != (self.vectors is not None) or (
            self.vectors is not None and len(self.vectors) != len(self)
        ):
            raise CodecError("a codec with SCIDs for users needs one vector an item, any other codec none")
        outside = (self.codes < 0) | (self.codes >= np.array(self.sizes))
        if outside.any():
            row = int(outside.any(axis=1).argmax())
            raise CodecError(
                f"item {self.item_ids[row]!r} has SCID {self.codes[row].tolist()}, "
                f"outside the codebooks {self.sizes}"
            )
        order = np.lexsort(self.codes.T[::-1])
        same = (self.codes[order[1:]] == self.codes[order[:-1]]).all(axis=1)
        if same.any():
            at = int(same.argmax())
            left, right = self.item_ids[order[at]], self.item_ids[order[at + 1]]
            raise CodecError(
                f"items {left!r} and {right!r} share the SCID {self.codes[order[at]].tolist()}; "
                "resolve collisions before making a codec"
            )


def _same_vectors(one: ItemVectors | None, other: ItemVectors | None, count: int) -> bool:
    """Whether the first ``count`` items mean the same to users' SCIDs."""
    if one is None or other is None:
        return one is other
    return np.array_equal(one.text[:count], other.text[:count]) and np.array_equal(
        one.behaviour[:count], other.behaviour[:count]
    )


def scid_tokens(sizes: Sequence[int]) -> list[str]:
    """The token strings of every level and code, level by level: "<a_0>" ... "<a_255>", "<b_0>" ..."""
    return [f"<{LETTERS[level]}_{code}>" for level, size in enumerate(sizes) for code in range(size)]


def user_scid_tokens(sizes: Sequence[int]) -> list[str]:
    """The same for users' SCIDs: "<ua_0>" ..."""
    return [f"<u{LETTERS[level]}_{code}>" for level, size in enumerate(sizes) for code in range(size)]
