"""The page of ``align3gr policy compare --html``: one file, nothing in it is fetched from elsewhere."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from features.errors import BadInput

from .policy_comparison import Example, Figure, PolicyComparison, Shown

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; color: #222; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; font-size: 1.2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd; }
td, th { text-align: left; vertical-align: top; } td.n { text-align: right; }
.better { color: #2d6a4f; } .worse { color: #b23a48; } small { color: #666; }
.new { background: #eef5ff; }
.pair { display: flex; gap: 2rem; } .pair > div { flex: 1; min-width: 0; } ol { padding-left: 1.6rem; }
"""
_WIDTH, _HEIGHT = 220, 18


def write_page(path: Path, found: PolicyComparison) -> None:
    """Write the comparison to ``path``. Raises BadInput when it cannot be written."""
    try:
        path.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}; name another file") from error


def page(found: PolicyComparison) -> str:
    """The whole document."""
    a, b = _text(found.a["version"]), _text(found.b["version"])
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{a} and {b}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Policies {a} and {b}</h1>",
        _lineage([found.a, found.b]),
        *(f"<p><small>{_text(note)}</small></p>" for note in found.notes),
        "<h2>Figures</h2>",
        f"<p><small>Means over users with 95% bootstrap intervals; the difference is {b} less {a}, "
        "user by user.</small></p>",
        _figures(found.figures, a, b),
        "<h2>Slices of users</h2>",
        _figures(found.slices, a, b),
        "<h2>Overlap of their lists</h2>",
        _overlap(found, a, b),
        "<h2>Side by side</h2>",
        *(_example(one, a, b) for one in found.examples),
        "</body></html>",
    ]
    return "\n".join(parts)


def _lineage(sides: Sequence[dict[str, Any]]) -> str:
    names = ("version", "kind", "parent", "round_id", "dataset_id", "created_at")
    head = "".join(f"<th>{name.removesuffix('_id')}</th>" for name in names)
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{_text(side[name] or '-')}</td>" for name in names)
        + f"<td>{'reference' if side['reference'] else ''}</td></tr>"
        for side in sides
    )
    return f"<table><tr>{head}<th></th></tr>{rows}</table>"


def _figures(figures: Sequence[Figure], a: str, b: str) -> str:
    if not figures:
        return "<p>None: too few users with cases.</p>"
    widest = max(max(abs(one) for one in figure.difference) for figure in figures) or 1.0
    rows = []
    for one in figures:
        mean, low, high = one.difference
        sure = "better" if low > 0 else "worse" if high < 0 else ""
        rows.append(
            f"<tr><td>{_text(one.slice)}</td><td>{_text(one.metric)}</td><td class=n>{one.users}</td>"
            f"<td class=n>{_interval(one.a)}</td><td class=n>{_interval(one.b)}</td>"
            f'<td class="n {sure}">{mean:+.4f} [{low:+.4f}, {high:+.4f}]</td>'
            f"<td>{_bar(one, widest)}</td></tr>"
        )
    names = ("of", "metric", "users", a, b, f"{b} - {a}", "")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _bar(figure: Figure, widest: float) -> str:
    """The difference's interval around zero."""
    mean, low, high = (_WIDTH / 2 * (1 + value / widest) for value in figure.difference)
    colour = "#2d6a4f" if figure.difference[1] > 0 else "#b23a48" if figure.difference[2] < 0 else "#888"
    middle = _HEIGHT / 2
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{figure.difference[0]:+.4f}">'
        f'<line x1="{_WIDTH / 2}" x2="{_WIDTH / 2}" y1="0" y2="{_HEIGHT}" stroke="#bbb"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="{colour}"/>'
        f'<circle cx="{mean:.1f}" cy="{middle}" r="4" fill="{colour}"/></svg>'
    )


def _overlap(found: PolicyComparison, a: str, b: str) -> str:
    overlap = found.overlap
    lines = [
        f"<p>{overlap.users} users, lists of {overlap.k}: of the items in either list "
        f"<b>{overlap.jaccard[0]:.1%}</b> [{overlap.jaccard[1]:.1%}, {overlap.jaccard[2]:.1%}] are in both; "
        f"{overlap.same_first:.1%} have the same first item, {overlap.identical:.1%} the same list. "
        f"{a} shows {overlap.items_a} different items, {b} {overlap.items_b}.</p>"
    ]
    for words, rows in ((f"more by {b}", overlap.more_in_b), (f"more by {a}", overlap.more_in_a)):
        if rows:
            cells = "".join(
                f"<tr><td>{_text(row['title'] or row['item_id'])}</td><td class=n>{row['a']}</td>"
                f"<td class=n>{row['b']}</td></tr>"
                for row in rows
            )
            lines.append(f"<table><tr><th>shown {words}</th><th>{a}</th><th>{b}</th></tr>{cells}</table>")
    return "".join(lines)


def _example(example: Example, a: str, b: str) -> str:
    history = ", ".join(_text(title) for title in example.history) or "none"
    return (
        f"<h3>{_text(example.user_id)}</h3><p><small>History: {history}</small></p>"
        f'<div class="pair"><div><b>{a}</b>{_list(example.a)}</div>'
        f"<div><b>{b}</b>{_list(example.b)}</div></div>"
    )


def _list(shown: Sequence[Shown]) -> str:
    rows = []
    for one in shown:
        other = "not in the other" if one.place_in_other is None else f"{one.place_in_other} in the other"
        mark = ' class="new"' if one.place_in_other is None else ""
        rows.append(f"<li{mark}>{_text(one.title or one.item_id)} <small>{other}</small></li>")
    return f"<ol>{''.join(rows)}</ol>"


def _interval(three: Sequence[float]) -> str:
    return f"{three[0]:.4f} [{three[1]:.4f}, {three[2]:.4f}]"


def _text(value: Any) -> str:
    return html.escape(str(value))
