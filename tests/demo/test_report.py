"""The demo's figures and report, from a finished state without a loop behind it."""

import re
from pathlib import Path

import pytest

from align3gr.demo.defaults import DemoOptions
from align3gr.demo.figures import DemoFigures
from align3gr.demo.plots import bars, lines
from align3gr.demo.report import write_report
from align3gr.demo.state import DemoState, RoundRecord, read_state


def finished(seed: int, learning: list[float]) -> DemoState:
    rounds = [
        RoundRecord(
            number, 0.0, number, "v1", {"liked": 3, "neutral": 5, "disliked": 2}, popular=0.2, learning=rate
        )
        for number, rate in enumerate(learning, start=1)
    ]
    return DemoState(
        DemoOptions(seed).as_dict(), 0.0, published=True, base="v1", frozen=0.3, oracle=0.7, random=0.1,
        rounds=rounds, seconds=10.0, finished=True,
    )  # fmt: skip


def test_figures_are_means_over_worlds() -> None:
    figures = DemoFigures.of([finished(1, [0.32, 0.36]), finished(2, [0.34, 0.40])])
    assert figures.learning == pytest.approx([0.33, 0.38])
    assert figures.gap_closed == pytest.approx(0.08 / 0.4)
    assert figures.lift == pytest.approx(0.38 / 0.3 - 1)
    assert (figures.seconds, figures.seeds) == (20.0, [1, 2])
    assert "+26.7%" in figures.table()


def test_a_state_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    state = finished(1, [0.32, 0.36])
    state.write(tmp_path)
    assert read_state(tmp_path) == state


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"format": 99}'])
def test_a_torn_or_foreign_state_is_no_state(tmp_path: Path, torn: str) -> None:
    (tmp_path / "demo.json").write_text(torn)
    assert read_state(tmp_path) is None


def test_the_report_is_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, [(tmp_path / "world-1", finished(1, [0.32, 0.36]))])
    page = path.read_text()
    for words in ("Liked rate by round", "Feedback levels", "Stages", "Gate", "Lineage", "0.360"):
        assert words in page
    assert not re.search(r"(src|href)=|@import|url\(", page)


def test_plots_place_larger_values_higher() -> None:
    drawn = lines({"a": [(0, 0.1), (1, 0.9)]}, x="step", y="rate")
    points = re.search(r'<polyline points="([^"]+)"', drawn)
    assert points is not None
    (first, second) = (tuple(map(float, pair.split(","))) for pair in points[1].split())
    assert second[0] > first[0]
    assert second[1] < first[1]


def test_a_line_breaks_where_there_is_no_number() -> None:
    drawn = lines({"a": [(0, 1.0), (1, 2.0), (2, float("nan")), (3, 1.0), (4, 1.5)]}, x="x", y="y")
    assert len(re.findall("<polyline", drawn)) == 2
    assert "nan" not in drawn


def test_bars_fill_their_whole_height() -> None:
    drawn = bars({"round 1": {"liked": 1, "neutral": 3}}, y="share")
    heights = [float(height) for height in re.findall(r'height="([\d.]+)" fill', drawn)]
    assert len(heights) == 4, "two parts and two legend squares"
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.2)


def test_a_plot_of_nothing_says_so() -> None:
    assert "nothing" in lines({"a": []}, x="x", y="y")
