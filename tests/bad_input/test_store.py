"""An empty log, too few likes, users and items that nobody knows, items without a word."""

import re
import shutil

import pytest

from features.catalogue import Catalogue
from features.log import FeedbackLog
from tests.bad_input.place import Place
from tests.trainer.round_world import START

LEASE = ["rounds", "rounds/lease"]
"""A round's lease is a file that stays."""
FAILED_ROUND = [*LEASE, r"rounds/r0001(/.*)?"]
"""A round that failed on its input is kept, with the reason."""


def without_log(place: Place) -> None:
    shutil.rmtree(place.home / "log")


def with_empty_log(place: Place) -> None:
    without_log(place)
    FeedbackLog.open(place.home / "log")


@pytest.mark.parametrize("prepare", [without_log, with_empty_log])
@pytest.mark.parametrize("command", [["round"], ["sft"], ["evaluate"], ["recommend", "user-000"]], ids=str)
def test_without_feedback_nothing_is_learned(place: Place, prepare, command: list[str]) -> None:  # type: ignore[no-untyped-def]
    prepare(place)
    before, files = place.counts(), place.files(but=FAILED_ROUND)
    place.in_fork(*command).refused(2, "feedback" if command[0] != "evaluate" else "log")
    after = place.counts()
    assert after | {"rounds": before["rounds"]} == before
    assert place.files(but=FAILED_ROUND) == files


def test_tokenize_goes_by_text_alone_and_says_so(place: Place) -> None:
    with_empty_log(place)
    place.set(TRAINER__TOKENIZATION__STEPS=2)
    done = place.in_fork("tokenize")
    assert (done.code, len(done.err.splitlines())) == (0, 1)
    assert "no feedback yet" in done.err


@pytest.mark.parametrize("command", ["tokenize", "sft"])
def test_without_a_catalogue_there_is_nothing_to_learn(place: Place, command: str) -> None:
    shutil.rmtree(place.home / "catalogue")
    before, files = place.counts(), place.files()
    place.in_fork(command).refused(2, "no catalogue", "align3gr catalogue load")
    assert (place.counts(), place.files()) == (before, files)


def test_too_few_likes_end_a_round_with_the_reason(place: Place) -> None:
    settings = (place.folder / "align3gr.yaml").read_text()
    place.file("align3gr.yaml", re.sub(r"min_samples: \d+", "min_samples: 100000", settings))
    before = place.counts()
    place.in_fork("round").refused(2, "came to anything", "at least 100000 are needed", "min_samples")
    # The dataset stays: it is the record of what there was to learn from.
    assert place.counts() == before | {"datasets": 1, "rounds": 1}
    place.in_fork("round", "--resume", "last").refused(2, "has ended (failed)")
    assert place.counts() == before | {"datasets": 1, "rounds": 1}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["recommend", "nobody"], ["'nobody'", "--strangers"], id="recommend"),
        pytest.param(["recommend", "user-001", "nobody", "--online"], ["--strangers"], id="recommend-online"),
        pytest.param(["features", "show", "nobody"], ["user nobody", "check the id"], id="features"),
        pytest.param(["catalogue", "show", "nix"], ["item nix", "catalogue load"], id="catalogue-show"),
        pytest.param(["catalogue", "delist", "item-001", "nix"], ["item nix"], id="catalogue-delist"),
        pytest.param(["codec", "encode", "nix"], ["'nix'", "catalogue load"], id="codec-encode"),
        pytest.param(["codec", "decode", "7,x"], ["'7,x'", "<a_12>"], id="codec-decode-no-codes"),
        pytest.param(["codec", "decode", "7,7"], ["begins with 7,7"], id="codec-decode-empty-prefix"),
        pytest.param(["codec", "decode", "99,1,1"], ["(99, 1, 1)"], id="codec-decode-nobody"),
    ],
)
def test_an_unknown_user_or_item_is_named(place: Place, arguments: list[str], says: list[str]) -> None:
    before, files = place.counts(), place.files(but=["online/.*"])
    place.in_fork(*arguments).refused(2, *says)
    assert (place.counts(), place.files(but=["online/.*"])) == (before, files)


def test_a_stranger_gets_what_is_popular_when_asked_for_and_it_is_said(place: Place) -> None:
    files = place.files()
    done = place.in_fork("recommend", "nobody", "--strangers", "--k", "3")
    assert (done.code, done.err) == (0, "")
    assert "nobody  (policy v1, no feedback yet: what is popular)" in done.out
    assert "item-000" in done.out
    assert place.files() == files


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"item_id":"bare"}', ["item bare", "--allow-no-text"]),
        ('{"item_id":"a","title":"A"}\n{"title":"no id"}', ["line 2", "item_id is missing"]),
        ('{"item_id":"a","title":7}', ["line 1"]),
        ('{"item_id":', ["line 1", "not JSON"]),
        ("[1]", ["line 1", "an object"]),
    ],
    ids=["no-text", "no-id", "title-no-text", "not-json", "no-object"],
)
def test_an_item_that_cannot_be_taken_stops_the_whole_load(place: Place, line: str, says: list[str]) -> None:
    place.file("items.jsonl", line + "\n")
    before, files = place.counts(), place.files()
    place.in_fork("catalogue", "load", "items.jsonl").refused(2, *says)
    assert (place.counts(), place.files()) == (before, files)


def test_tokenize_refuses_an_item_without_text(place: Place) -> None:
    from features.catalogue import Item

    Catalogue.open(place.home / "catalogue").load([Item(item_id="bare")], now=START, allow_no_text=True)
    before, files = place.counts(), place.files()
    place.in_fork("tokenize").refused(2, "'bare'", "without_text")
    assert (place.counts(), place.files()) == (before, files)
