"""Two policies side by side: figures with intervals, slices, overlap, examples; as a page of its own."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from align3gr.comparison_page import page, write_page
from align3gr.comparison_text import as_text
from align3gr.policy_comparison import PolicyComparison, compare
from features.errors import BadInput
from policies.policy import Policy
from policies.registry import UnknownPolicy
from tests.keeping.conftest import settings_of


@pytest.fixture(scope="module")
def found(whole: Path) -> PolicyComparison:
    torch.set_num_threads(1)
    return compare(settings_of(whole), "v1", "v2", k=5)


def test_figures_are_paired_over_the_same_users(found: PolicyComparison) -> None:
    assert {figure.metric for figure in found.figures} >= {"recall@10", "ndcg@10", "slate win rate"}
    for figure in [*found.figures, *found.slices]:
        assert figure.difference[0] == pytest.approx(figure.b[0] - figure.a[0], abs=1e-12)
        for mean, low, high in (figure.a, figure.b, figure.difference):
            assert low <= mean <= high
    # The round learned the users' taste: v2 ranks liked items of a slate higher, beyond doubt.
    (rate,) = (figure for figure in found.figures if figure.metric == "slate win rate")
    assert rate.difference[1] > 0
    assert found.b["parent"] == "v1"
    assert found.b["round_id"] == "r0001"


def test_slices_part_the_users(found: PolicyComparison) -> None:
    names = {figure.slice for figure in found.slices}
    assert names <= {"short histories", "long histories", "niche taste", "mainstream taste"}
    assert names
    everybody = {figure.metric: figure.users for figure in found.figures}
    assert all(figure.users < everybody[figure.metric] for figure in found.slices)


def test_lists_overlap_as_they_are_recommended(found: PolicyComparison, whole: Path) -> None:
    from align3gr.contexts import contexts_of, listed_titles

    example = found.examples[0]
    settings = settings_of(whole)
    contexts, _ = contexts_of(settings, [example.user_id])
    _, eligible = listed_titles(settings)
    for version, shown in (("v1", example.a), ("v2", example.b)):
        policy = Policy.load(whole / "policies" / version)
        (one,) = policy.recommend(contexts, 5, eligible=eligible)
        assert [place.item_id for place in shown] == [item.item_id for item in one]
    assert all(place.title == f"title {place.item_id}" for place in example.a)
    assert 0 <= found.overlap.jaccard[0] < 1
    assert found.overlap.items_a > 0
    assert found.overlap.more_in_b[0]["b"] > found.overlap.more_in_b[0]["a"]


def test_one_user_is_shown_when_asked_for(whole: Path) -> None:
    found = compare(settings_of(whole), "v2", "v1", user="user-003", k=3)
    assert [example.user_id for example in found.examples] == ["user-003"]
    assert len(found.examples[0].a) == 3
    assert json.loads(json.dumps(found.as_dict()))["examples"][0]["user_id"] == "user-003"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]


def test_the_page_fetches_nothing_and_escapes_what_it_shows(found: PolicyComparison, tmp_path: Path) -> None:
    from dataclasses import replace

    evil = replace(found.examples[0], user_id="<script>alert(1)</script>")
    text = page(replace(found, examples=[evil]))
    reader = _Tags()
    reader.feed(text)
    assert "script" not in reader.tags
    assert reader.links == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert "&lt;script&gt;" in text
    assert reader.tags.count("svg") == len(found.figures) + len(found.slices)
    write_page(tmp_path / "page.html", found)
    assert (tmp_path / "page.html").read_text() == page(found)
    with pytest.raises(BadInput, match="cannot be written"):
        write_page(tmp_path / "none" / "page.html", found)


def test_the_text_says_what_the_page_says(found: PolicyComparison) -> None:
    text = as_text(found)
    for words in ("slate win rate", "of the items in common", found.examples[0].user_id, "long histories"):
        assert words in text
    assert max(map(len, text.splitlines())) < 200


def test_bad_input_is_said(whole: Path) -> None:
    settings = settings_of(whole)
    with pytest.raises(BadInput, match="one policy"):
        compare(settings, "v1", "v1")
    with pytest.raises(UnknownPolicy, match="v9"):
        compare(settings, "v1", "v9")
    with pytest.raises(BadInput, match="'nobody' has no feedback"):
        compare(settings, "v1", "v2", user="nobody")
