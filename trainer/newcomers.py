"""New items enter with the next round: coded from their text by the parent policy's own quantizer.

The item map of a codec only grows and the tokens stay the same, so nothing is retrained for them: the round's
policies carry the longer map, prompts and answers may hold the new items, and lists may show them.
"""

import logging
import os
import shutil
from pathlib import Path

import pyarrow as pa

from policies.codec import ScidCodec
from policies.errors import CodecError

from .tokenization.text import item_texts

log = logging.getLogger(__name__)


def grow_codec(parent: Path, items: pa.Table, out: Path) -> int:
    """Write the codec of the policy at ``parent``, grown by ``items``, to ``out``; how many are new.

    ``items``: of the catalogue, columns item_id, title, categories, text. Nothing is written when nothing is
    new; what is at ``out`` already stays (a round that goes on after a kill keeps its items). Items that have
    no text, or find no free code, wait for the next fit of a codec: the log says so, the round goes on.
    """
    codec = ScidCodec.load(parent / "codec")
    if out.exists():
        return len(ScidCodec.load(out)) - len(codec)
    if not codec.can_grow:
        return 0
    texts = dict(zip(items.column("item_id").to_pylist(), item_texts(items), strict=True))
    try:
        longer = codec.grow(texts)
    except CodecError as error:
        log.warning("new items wait cause=%s", error)
        return 0
    if longer is not codec:
        staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
        shutil.rmtree(staging, ignore_errors=True)
        longer.save(staging)
        staging.rename(out)
    waiting = sum(item_id not in longer.items for item_id in texts)
    if waiting:
        log.warning("new items wait count=%d cause=they have no text", waiting)
    return len(longer) - len(codec)


def grown_codec(directory: Path) -> ScidCodec | None:
    """What ``grow_codec`` wrote, none where nothing was new."""
    return ScidCodec.load(directory) if directory.exists() else None
