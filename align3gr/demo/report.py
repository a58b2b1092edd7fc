"""The demo's report: one HTML file without scripts, fonts or pictures from elsewhere."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from policies.ledger import PromotionLedger
from policies.registry import Registry
from policies.settings import RegistrySettings

from .figures import DemoFigures
from .plots import bars, lines
from .state import DemoState

_LEVEL_COLOURS = ("#66a182", "#c9ccd3", "#d1495b")
"""Liked, neutral, disliked."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2rem auto; color: #222; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; font-size: 1.2rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd; }
td { text-align: left; vertical-align: top; } th { text-align: left; } td.n { text-align: right; }
.promoted { color: #2d6a4f; } .refused, .held { color: #b23a48; } small { color: #666; }
"""


def write_report(path: Path, worlds: Sequence[tuple[Path, DemoState]]) -> None:
    """Write the report over finished worlds: (home, state) each."""
    figures = DemoFigures.of([state for _, state in worlds])
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>align3gr demo</title>",
        f"<style>{_STYLE}</style><h1>align3gr demo</h1>",
        _summary(figures, worlds[0][1]),
        "<h2>Liked rate by round</h2>",
        _liked_rates(figures, worlds),
    ]
    for home, state in worlds:
        parts += _world(home, state)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")


def _summary(figures: DemoFigures, state: DemoState) -> str:
    size = state.options["size"]
    seeds = ", ".join(str(seed) for seed in figures.seeds)
    return (
        f"<p>Worlds {seeds}: {size['items']:,} items with text, {size['learners']:,} users whose feedback is "
        f"learned from, {size['evaluated']:,} users that only judge. After {len(figures.learning)} rounds "
        f"the learning policy's liked rate is <b>{figures.learning[-1]:.3f}</b>, the frozen base policy's "
        f"{figures.frozen[-1]:.3f} (<b>{figures.lift:+.1%}</b>); popularity {figures.popularity[-1]:.3f}, "
        f"oracle {figures.oracle[-1]:.3f}, random {figures.random[-1]:.3f}. {figures.gap_closed:.1%} of the "
        f"gap to the oracle is closed. {figures.seconds:.0f} s of work.</p>"
        "<p><small>Liked rate: expected share of ten recommended items that end up liked, by the world's own "
        "model of reactions, mean over the users that judge.</small></p>"
    )


def _liked_rates(figures: DemoFigures, worlds: Sequence[tuple[Path, DemoState]]) -> str:
    def by_round(values: Sequence[float], start: float | None = None) -> list[tuple[float, float]]:
        points = [(float(number), value) for number, value in enumerate(values, start=1)]
        return points if start is None else [(0.0, start), *points]

    series = {
        "learning": by_round(figures.learning, figures.frozen[0]),
        "frozen": by_round(figures.frozen, figures.frozen[0]),
        "popularity": by_round(figures.popularity, figures.popularity[0]),
        "oracle": by_round(figures.oracle, figures.oracle[0]),
        "random": by_round(figures.random, figures.random[0]),
    }
    rows = [
        [
            f"world {state.options['seed']}",
            *(f"{value:.3f}" for value in (state.frozen or 0.0, *state.learning)),
        ]
        for _, state in worlds
    ]
    heads = ["", "frozen", *(f"round {number}" for number in range(1, len(figures.learning) + 1))]
    return lines(series, x="round", y="liked rate") + _table(heads, rows)


def _world(home: Path, state: DemoState) -> list[str]:
    levels = {
        f"round {one.number}": {name: float(count) for name, count in one.levels.items()}
        for one in state.rounds
    }
    return [
        f"<h2>World {state.options['seed']}</h2>",
        "<h3>Feedback levels of what was seen</h3>",
        bars(levels, y="share of impressions", colours=_LEVEL_COLOURS),
        "<h3>Stages: loss and margin</h3>",
        *_stages(home, state),
        "<h3>Gate</h3>",
        _gate(home, state),
        "<h3>Lineage</h3>",
        _lineage(home),
        "<h3>Promotion ledger</h3>",
        _ledger(home),
    ]


def _stages(home: Path, state: DemoState) -> list[str]:
    drawn: list[str] = []
    for figure, words in (
        ("loss", "Softmax-DPO loss"),
        ("rewards/margins", "reward margin, chosen - rejected"),
    ):
        series: dict[str, list[tuple[float, float]]] = {}
        offset = 0.0
        for one in state.rounds:
            for stage in ("easy", "hard"):
                rows = _metrics(home, one.round_id, stage)
                smooth = _smooth([float(row[figure]) for row in rows if figure in row])
                points = [(offset + place, value) for place, value in enumerate(smooth)]
                series.setdefault(stage, []).extend([*points, (offset + len(rows), float("nan"))])
                offset += len(rows)
        drawn.append(lines(series, x="optimizer step, over all rounds", y=words))
    return drawn


def _smooth(values: list[float], width: int = 9) -> list[float]:
    """Running mean over ``width`` steps."""
    half = width // 2
    parts = [values[max(0, at - half) : at + half + 1] for at in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _metrics(home: Path, round_id: str | None, stage: str) -> list[dict[str, Any]]:
    path = home / "rounds" / str(round_id) / stage / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _gate(home: Path, state: DemoState) -> str:
    rows = []
    for one in state.rounds:
        path = home / "rounds" / str(one.round_id) / "decision.json"
        checks = json.loads(path.read_text(encoding="utf-8"))["checks"] if path.exists() else []
        listed = "".join(
            f"<li>{'pass' if check['passed'] else '<b>no</b>'}: {html.escape(check['words'])}</li>"
            for check in checks
        )
        outcome = html.escape(str(one.outcome))
        rows.append(
            f"<tr><td>{one.number}<td class='{outcome}'>{html.escape(str(one.version))} {outcome}"
            f"<td><details><summary>{html.escape(one.why or '')}</summary><ul>{listed}</ul></details>"
        )
    return "<table><tr><th>round<th>decision<th>why" + "".join(rows) + "</table>"


def _lineage(home: Path) -> str:
    policies = Registry(home, RegistrySettings(mlflow=False)).list()
    rows = [
        [one.version, one.kind, one.parent or "-", one.round_id or "-", (one.dataset_id or "-")[:16]]
        for one in policies
    ]
    return _table(["policy", "kind", "parent", "round", "dataset"], rows)


def _ledger(home: Path) -> str:
    rows = [
        [
            str(entry.seq),
            f"{entry.at:%H:%M:%S}",
            entry.who,
            entry.action,
            entry.source or "-",
            entry.target or "-",
        ]
        for entry in PromotionLedger(home / "ledger").history()
    ]
    return _table(["", "UTC", "who", "move", "from", "to"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(one)}" for one in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"
