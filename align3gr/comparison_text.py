"""The comparison of two policies for a terminal."""

from collections.abc import Sequence

from .policy_comparison import Example, Figure, PolicyComparison


def as_text(found: PolicyComparison) -> str:
    """Figures, slices, overlap and examples, a block each."""
    a, b = found.a["version"], found.b["version"]
    overlap = found.overlap
    lines = [f"{a} and {b}: means over users [95%], difference {b} - {a}", *found.notes]
    lines += _table(found.figures) + _table(found.slices)
    lines += [
        "",
        f"lists of {overlap.k} for {overlap.users} users: {overlap.jaccard[0]:.1%} of the items in common, "
        f"{overlap.same_first:.1%} with the same first item, {overlap.identical:.1%} identical; "
        f"{a} shows {overlap.items_a} items, {b} {overlap.items_b}",
    ]
    for words, rows in ((f"more by {b}", overlap.more_in_b), (f"more by {a}", overlap.more_in_a)):
        shown = ", ".join(f"{row['title'] or row['item_id']} ({row['a']} -> {row['b']})" for row in rows)
        if shown:
            lines.append(f"  shown {words}: {shown}")
    for example in found.examples:
        lines += _example(example, a, b)
    return "\n".join(lines)


def _table(figures: Sequence[Figure]) -> list[str]:
    lines = []
    group = None
    for one in figures:
        if one.slice != group:
            group = one.slice
            lines += ["", f"{group}"]
        mean, low, high = one.difference
        lines.append(
            f"  {one.metric:<15}{_three(one.a):<27}{_three(one.b):<27}{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
            f"  {one.users} users"
        )
    return lines


def _example(example: Example, a: str, b: str) -> list[str]:
    lines = ["", f"{example.user_id}  (history: {', '.join(example.history[-5:]) or 'none'})"]
    lines.append(f"  {'':>3}  {a:<38}  {b}")
    for place in range(max(len(example.a), len(example.b))):
        cells = [side[place] if place < len(side) else None for side in (example.a, example.b)]
        names = ["" if cell is None else (cell.title or cell.item_id)[:34] for cell in cells]
        marks = ["*" if cell is not None and cell.place_in_other is None else " " for cell in cells]
        lines.append(f"  {place + 1:>3}  {marks[0]}{names[0]:<37}  {marks[1]}{names[1]}")
    return [*lines, "       * not in the other list"]


def _three(values: Sequence[float]) -> str:
    return f"{values[0]:.4f} [{values[1]:.4f}, {values[2]:.4f}]"
