"""Plots as SVG text, so that a report is one file that needs nothing: lines over steps, bars by part."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#8d6a9f", "#edae49", "#4f5d75")
_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 150, 16, 40


@dataclass(frozen=True)
class Frame:
    """Where numbers fall on the drawing."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, value: float) -> float:
        """Horizontal place of ``value``."""
        share = (value - self.low_x) / ((self.high_x - self.low_x) or 1.0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Vertical place of ``value``; larger is higher."""
        share = (value - self.low_y) / ((self.high_y - self.low_y) or 1.0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, from_zero: bool = True
) -> str:
    """One line a series of (x, y) points, in order, with a legend; it breaks where y is not a number.

    ``x`` and ``y`` name the axes.
    """
    points = [point for one in series.values() for point in one if math.isfinite(point[1])]
    if not points:
        return "<p>nothing to draw</p>"
    ys = [value for _, value in points]
    low = min(0.0, *ys) if from_zero else min(ys)
    high = max(ys) + 0.05 * ((max(ys) - low) or 1.0)
    frame = Frame(min(place for place, _ in points), max(place for place, _ in points), low, high)
    drawn = [_axes(frame, x, y)]
    for number, (name, one) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        for part in _pieces(one):
            path = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in part)
            drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(one) <= 20:
            drawn += [
                f'<circle cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="3" fill="{colour}">'
                f"<title>{html.escape(name)}: {b:.4f}</title></circle>"
                for a, b in one
                if math.isfinite(b)
            ]
        drawn.append(_legend(number, name, colour))
    return _svg(drawn)


def bars(parts: Mapping[str, Mapping[str, float]], *, y: str, colours: Sequence[str] = COLOURS) -> str:
    """One stacked bar for each key of ``parts``, shares of its whole from bottom to top, with a legend."""
    names = list(dict.fromkeys(name for one in parts.values() for name in one))
    frame = Frame(0.0, max(len(parts), 1), 0.0, 1.0)
    drawn = [_axes(frame, "", y, ticks_x=False)]
    width = (_WIDTH - _LEFT - _RIGHT) / max(len(parts), 1)
    for column, (label, one) in enumerate(parts.items()):
        total, below = sum(one.values()) or 1.0, 0.0
        left = _LEFT + column * width + 0.15 * width
        for number, name in enumerate(names):
            share = one.get(name, 0.0) / total
            top, bottom = frame.y(below + share), frame.y(below)
            drawn.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{0.7 * width:.1f}" height="{bottom - top:.1f}" '
                f'fill="{colours[number % len(colours)]}">'
                f"<title>{html.escape(name)}: {share:.1%}</title></rect>"
            )
            below += share
        drawn.append(_text(left + 0.35 * width, _HEIGHT - _BOTTOM + 16, label, "middle"))
    drawn += [_legend(number, name, colours[number % len(colours)]) for number, name in enumerate(names)]
    return _svg(drawn)


def _pieces(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The stretches of ``points`` between those whose y is not finite."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for place, value in points:
        if math.isfinite(value):
            pieces[-1].append((place, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _axes(frame: Frame, x: str, y: str, ticks_x: bool = True) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    drawn = [
        f'<line x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}" stroke="#888"/>',
        f'<line x1="{_LEFT}" y1="{_TOP}" x2="{_LEFT}" y2="{bottom}" stroke="#888"/>',
        _text((_LEFT + right) / 2, _HEIGHT - 6, x, "middle"),
        f'<text x="14" y="{(_TOP + bottom) / 2}" transform="rotate(-90 14 {(_TOP + bottom) / 2})" '
        f'text-anchor="middle">{html.escape(y)}</text>',
    ]
    for value in _ticks(frame.low_y, frame.high_y):
        place = frame.y(value)
        drawn.append(f'<line x1="{_LEFT}" y1="{place:.1f}" x2="{right}" y2="{place:.1f}" stroke="#eee"/>')
        drawn.append(_text(_LEFT - 6, place + 4, f"{value:g}", "end"))
    if ticks_x:
        for value in _ticks(frame.low_x, frame.high_x):
            drawn.append(_text(frame.x(value), bottom + 16, f"{value:g}", "middle"))
    return "".join(drawn)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between ``low`` and ``high``."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _legend(number: int, name: str, colour: str) -> str:
    left, top = _WIDTH - _RIGHT + 12, _TOP + 18 * number
    return (
        f'<rect x="{left}" y="{top}" width="12" height="12" fill="{colour}"/>'
        f"{_text(left + 18, top + 10, name, 'start')}"
    )


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _svg(drawn: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" font-size="11" '
        f'font-family="system-ui, sans-serif">{"".join(drawn)}</svg>'
    )
