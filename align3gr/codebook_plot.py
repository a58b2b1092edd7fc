"""A codec's codebooks as one picture: how evenly codes are used, and what the first level's codes mean.

Above, the items of every code of each level, most used first. Below, the first level's vectors on their two
leading principal components, a dot a code: as large as its items are many, coloured and named by the category
most of them have. The page (.html) also lists these codes with example titles.
"""

import html
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from features.errors import BadInput
from policies.codec import ScidCodec

COLOURED = 9
"""Categories with a colour of their own: those that name the most items; the others are grey."""
NAMED = 40
"""Codes named in the picture, most used first, where their names do not cover each other."""


@dataclass(frozen=True)
class CodeMeaning:
    """What a code of the first level stands for."""

    code: int
    items: int
    category: str | None
    """The category most of its items have; none where no item has one."""
    share: float
    """Share of its items with that category."""
    titles: tuple[str, ...]
    """Titles of a few of them."""


def plot_codebooks(
    codec: ScidCodec, categories: Sequence[str | None], titles: Sequence[str], file: Path
) -> None:
    """Draw ``codec`` into ``file``, a .html, .svg or .png. One category and one title an item of the codec.

    Raises BadInput for another ending or a file that cannot be written, CodecError for a codec without its
    quantizer.
    """
    kind = file.suffix.lower()
    if kind not in {".html", ".svg", ".png"}:
        raise BadInput(f"--plot {file}: end the name in .html, .svg or .png")
    meanings = first_codes(codec, categories, titles)
    figure = _figure(codec, meanings, codec.encoder().quantizer.codebooks[0])
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png" if kind == ".png" else "svg", dpi=150)
    content = drawn.getvalue()
    if kind == ".html":
        content = _page(codec, meanings, content.decode()).encode()
    try:
        file.write_bytes(content)
    except OSError as error:
        raise BadInput(f"{file} cannot be written: {error.strerror or error}; name another file") from error


def first_codes(
    codec: ScidCodec, categories: Sequence[str | None], titles: Sequence[str], *, examples: int = 3
) -> list[CodeMeaning]:
    """Meaning of every code of the first level that some item has, most used first."""
    members: dict[int, list[int]] = {}
    for row, code in enumerate(codec.codes[:, 0].tolist()):
        members.setdefault(code, []).append(row)
    found = []
    for code, rows in sorted(members.items(), key=lambda one: (-len(one[1]), one[0])):
        named = Counter(label for row in rows if (label := categories[row]) is not None)
        label, count = min(named.items(), key=lambda one: (-one[1], one[0])) if named else (None, 0)
        typical = [row for row in rows if categories[row] == label][:examples]
        found.append(
            CodeMeaning(code, len(rows), label, count / len(rows), tuple(titles[row] for row in typical))
        )
    return found


def _figure(codec: ScidCodec, meanings: Sequence[CodeMeaning], book: npt.NDArray[np.float32]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 12), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 3))
    above, below = halves
    for level, axes in enumerate(np.atleast_1d(above.subplots(1, codec.levels))):
        size = codec.sizes[level]
        counts = np.sort(np.bincount(codec.codes[:, level], minlength=size))[::-1]
        axes.bar(np.arange(size), counts, width=1.0, color="#1b6ca8")
        axes.axhline(len(codec) / size, color="#d1495b", linewidth=1)
        axes.set_title(f"level {level + 1}: {(counts > 0).mean():.0%} of {size} codes used", fontsize=10)
        axes.set_xlabel("codes, most used first")
    above.supylabel("items (line: all codes alike)", fontsize=9)
    axes = below.subplots()
    places = _two_dimensions(book)[[one.code for one in meanings]]
    colours = _colours(meanings)
    axes.scatter(
        places[:, 0],
        places[:, 1],
        s=[20 + 600 * one.items / max(each.items for each in meanings) for one in meanings],
        c=[colours.get(one.category, "#b8b8b8") for one in meanings],
        alpha=0.7,
        linewidths=0,
    )
    axes.set_title("level 1: a dot a code, named by the category most of its items have", fontsize=10)
    axes.set_xlabel("first principal component of the codebook")
    axes.set_ylabel("second")
    _name_codes(axes, places, meanings)
    return figure


def _name_codes(axes: Any, places: npt.NDArray[np.float64], meanings: Sequence[CodeMeaning]) -> None:
    """Names of the most used codes, those left out that would cover one already there."""
    span = np.ptp(places, axis=0)
    span[span == 0] = 1.0
    taken: list[tuple[float, float, float]] = []
    for place, one in zip(places, meanings, strict=True):
        name = one.category or f"code {one.code}"
        name = name if len(name) <= 24 else name[:23] + "…"
        x, y = (place - places.min(axis=0)) / span
        width = 0.008 * len(name)
        covered = any(abs(y - b) < 0.022 and x < a + other and a < x + width for a, b, other in taken)
        if not covered:
            taken.append((float(x), float(y), width))
            # A dollar sign would begin a formula.
            axes.annotate(
                name.replace("$", r"\$"), place, fontsize=8, xytext=(4, 3), textcoords="offset points"
            )
        if len(taken) == NAMED:
            return


def _colours(meanings: Sequence[CodeMeaning]) -> dict[str | None, str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    items: Counter[str] = Counter()
    for one in meanings:
        if one.category is not None:
            items[one.category] += one.items
    ordered = sorted(items, key=lambda label: (-items[label], label))[:COLOURED]
    colours = [to_hex(colormaps["tab10"](number)) for number in range(10) if number != 7]  # 7 is grey
    return dict(zip(ordered, colours, strict=False))


def _two_dimensions(book: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """[K, z] -> [K, 2] on the leading principal components, the largest entry of each positive."""
    centred = book.astype(np.float64) - book.mean(axis=0)
    _, _, right = np.linalg.svd(centred, full_matrices=False)
    places = np.zeros((len(book), 2))
    found = centred @ right[:2].T
    places[:, : found.shape[1]] = found
    signs = np.sign(places[np.abs(places).argmax(axis=0), np.arange(2)])
    return np.asarray(places * np.where(signs == 0, 1, signs))


def _page(codec: ScidCodec, meanings: Sequence[CodeMeaning], drawing: str) -> str:
    rows = "".join(
        f"<tr><td>&lt;a_{one.code}&gt;</td><td>{one.items}</td><td>{html.escape(one.category or '')}</td>"
        f"<td>{one.share:.0%}</td><td>{html.escape('; '.join(one.titles))}</td></tr>"
        for one in meanings
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Codebooks</title><style>'
        "body{font:14px system-ui,sans-serif;margin:2em;max-width:75em}svg{max-width:100%;height:auto}"
        "td,th{text-align:left;padding:.2em .8em;border-bottom:1px solid #ddd}</style></head><body>"
        f"<h1>Codebooks of {len(codec)} items</h1><p>quantizer {codec.quantizer_hash[:12]}, items "
        f"{codec.item_map_hash[:12]}</p>{drawing[drawing.index('<svg') :]}<h2>Codes of the first level</h2>"
        "<table><tr><th>code</th><th>items</th><th>most common category</th><th>share</th><th>such as</th>"
        f"</tr>{rows}</table></body></html>"
    )
