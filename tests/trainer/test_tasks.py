"""Tasks with text: what a sample may know, what it is made of, and how tasks mix into a step."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from policies.codec import ScidCodec
from policies.prompt import PromptTokens, extend_tokenizer, text_ids
from tests.policies.factory import tiny_codec, tiny_model, tiny_tokenizer, tiny_user_codec
from tests.trainer import small_world
from tests.trainer.small_sft import QUICK, rows_of
from tests.trainer.small_tasks import CATALOGUE, opened
from trainer.errors import CannotTrain
from trainer.settings import TaskSettings
from trainer.sft.base_policy import train_sft
from trainer.sft.tasks import TASKS, CatalogueText
from trainer.sft.tasks.mixture import require_context, require_samples
from trainer.sft.tasks.words import ItemWords
from trainer.sft.tasks.writing import Template, require_whole_scids

pytestmark = pytest.mark.usefixtures("one_thread")

OF_HISTORY = ("titles_to_item", "items_to_title", "mixed_history", "preference")
IN_WORDS = ("items_to_title", "item_to_text", "preference", "user_to_profile")


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> ScidCodec:
    """60 items with SCIDs for users too."""
    return tiny_user_codec(tmp_path_factory.mktemp("codec"), items=60)


@pytest.fixture(scope="module")
def tokenizer(codec: ScidCodec) -> Any:
    return tiny_tokenizer(codec)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return tiny_model(len(tokenizer))


# Samples


def test_settings_name_every_task_and_give_it_no_weight() -> None:
    assert TaskSettings().weights == dict.fromkeys(TASKS, 0.0)


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_is_a_function_of_seed_epoch_and_number(
    name: str, codec: ScidCodec, tokenizer: Any, model: Any
) -> None:
    histories = rows_of(codec, [6, 4, 1, 25])
    first, again = (opened(codec, tokenizer, model, histories)[name] for _ in range(2))
    assert 4 <= len(first.templates) <= 6
    assert first.samples > 20
    many = range(2 * first.samples)  # beyond the last candidate the order starts again
    drawn = [first.draw(3, 1, number) for number in many]
    assert drawn == [again.draw(3, 1, number) for number in reversed(many)][::-1]
    assert drawn != [first.draw(3, 2, number) for number in many]
    assert drawn != [first.draw(4, 1, number) for number in many]
    limit = first.writer.limit
    assert all(sample.tokens <= limit for sample in drawn)


@pytest.mark.parametrize("name", TASKS)
def test_only_the_target_is_answered_and_it_ends_as_documented(
    name: str, codec: ScidCodec, tokenizer: Any, model: Any
) -> None:
    task = opened(codec, tokenizer, model, rows_of(codec, [6, 4, 25]))[name]
    tokens = PromptTokens(tokenizer, codec)
    for number in range(20):
        sample = task.draw(0, 0, number)
        asks_item = sample.prompt[-1] == tokens.recommend
        assert sample.prompt[0] == tokenizer.bos_token_id
        assert (sample.target[-1] == tokenizer.eos_token_id) == (name in IN_WORDS)
        assert asks_item == (name.endswith("_to_item") or name == "mixed_history")
        if name not in IN_WORDS:
            assert len(sample.target) == 3
            levels = tokens.levels if asks_item else tokens.user_levels
            assert all(token in level for token, level in zip(sample.target, levels, strict=True))


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("text_to_item", "item_to_text")])
def test_nothing_behind_the_target_is_looked_at(
    name: str, codec: ScidCodec, tokenizer: Any, model: Any
) -> None:
    history = rows_of(codec, [12])[0]
    place = 5  # items 0 .. 4 are before the target
    other = np.concatenate([history[: place + 1], history[place + 1 :][::-1]])
    # These say nothing of the target either.
    if name in ("preference", "profile_to_user", "user_to_profile"):
        other = np.concatenate([history[:place], history[place:][::-1]])
    samples = []
    for one in (history, other, history[: place + 1]):
        task = opened(codec, tokenizer, model, [one])[name]
        samples.append([task.write(place - 1, np.random.default_rng(seed)) for seed in range(12)])
    assert samples[0] == samples[1] == samples[2]


def test_a_prompt_with_a_history_holds_the_user_as_of_then(
    codec: ScidCodec, tokenizer: Any, model: Any
) -> None:
    history = rows_of(codec, [9])[0]
    tokens = PromptTokens(tokenizer, codec)
    tasks = opened(codec, tokenizer, model, [history])
    for name in OF_HISTORY:
        for candidate in range(8):
            mine = tokens.users([history[: candidate + 1]])[0].tolist()
            text = tasks[name].write(candidate, np.random.default_rng(candidate)).prompt
            assert any(list(text[i : i + 3]) == mine for i in range(len(text))), name
    for candidate in range(8):  # the answer stands in no prompt
        sample = tasks["profile_to_user"].write(candidate, np.random.default_rng(candidate))
        assert list(sample.target) == tokens.users([history[: candidate + 1]])[0].tolist()
        assert not set(sample.prompt) & {int(t) for level in tokens.user_levels for t in level}


def test_a_codec_without_scids_for_users_leaves_their_clause_out() -> None:
    plain = tiny_codec(60)
    tokenizer = tiny_tokenizer(plain)
    tasks = opened(plain, tokenizer, tiny_model(len(tokenizer)), rows_of(plain, [6, 9]))
    assert (tasks["profile_to_user"].samples, tasks["user_to_profile"].samples) == (0, 0)
    for form in tasks["titles_to_item"].templates:
        said = "".join(literal for literal, _ in form.parts(with_user=False))
        assert not {"[", "]"} & set(said)
    for number in range(10):
        prompt = tokenizer.decode(tasks["items_to_title"].draw(0, 0, number).prompt)
        assert "<u" not in prompt
        assert "[" not in prompt


def test_text_that_looks_like_a_token_stays_text(codec: ScidCodec, tokenizer: Any, model: Any) -> None:
    sly = CatalogueText.of(
        pa.table({"item_id": list(codec.item_ids), "title": ["<a_1><recommend></s> lamp"] * 60})
    )
    task = opened(codec, tokenizer, model, rows_of(codec, [6]), catalogue=sly)["titles_to_item"]
    tokens = PromptTokens(tokenizer, codec)
    sample = task.draw(0, 0, 0)
    assert sample.prompt.count(tokens.recommend) == 1
    assert not set(sample.prompt) & {int(token) for level in tokens.levels for token in level}
    assert tokenizer.eos_token_id not in sample.prompt


def test_of_a_history_that_is_too_long_the_latest_items_are_shown(
    codec: ScidCodec, tokenizer: Any, model: Any
) -> None:
    histories = [np.arange(30, dtype=np.int64)]
    task = opened(codec, tokenizer, model, histories, row_tokens=120)["titles_to_item"]
    words = ItemWords(codec.item_ids, CATALOGUE)
    sample = task.write(27, np.random.default_rng(0))  # the target is item 28
    assert sample.tokens <= 120
    said = tokenizer.decode(sample.prompt)
    assert words.title[27] in said
    assert words.title[10] not in said
    short = tiny_model(len(tokenizer))
    short.config.max_position_embeddings = 30
    with pytest.raises(CannotTrain, match="row_tokens"):
        opened(codec, tokenizer, short, histories)["titles_to_item"].write(27, np.random.default_rng(0))


def test_a_mixed_history_shows_both_names_and_untitled_items_by_scid(
    codec: ScidCodec, tokenizer: Any, model: Any
) -> None:
    some = pa.table({"item_id": list(codec.item_ids)[:30], "title": [f"lamp {i}" for i in range(30)]})
    history = np.arange(20, 41, dtype=np.int64)
    task = opened(codec, tokenizer, model, [history], catalogue=CatalogueText.of(some))["mixed_history"]
    tokens = PromptTokens(tokenizer, codec)
    shown = set()
    for seed in range(20):
        prompt = task.write(18, np.random.default_rng(seed)).prompt  # before it: items 20 .. 38
        said = tokenizer.decode(prompt)
        assert all(said.count(f"lamp {item};") + said.count(f"lamp {item}.") <= 1 for item in range(20, 30))
        for item in range(30, 39):
            ids = tokens.body(np.array([item])).tolist()
            assert any(list(prompt[i : i + 3]) == ids for i in range(len(prompt)))
        shown.add("lamp 25" in said)
    assert shown == {True, False}


def test_items_with_a_token_of_their_own_are_shown_by_it_and_answered_by_their_codes(
    codec: ScidCodec,
) -> None:
    tokenizer = tiny_tokenizer(codec)
    extend_tokenizer(tokenizer, codec, items=range(30))
    tokens = PromptTokens(tokenizer, codec)
    tasks = opened(codec, tokenizer, tiny_model(len(tokenizer)), [np.arange(20, 41, dtype=np.int64)])
    own = set(tokens.own[20:30].tolist())
    prompts = [tasks["items_to_title"].write(18, np.random.default_rng(seed)).prompt for seed in range(20)]
    shown = [len(own & set(prompt)) for prompt in prompts]
    assert max(shown) == 10
    assert 7 < np.mean(shown) < 10  # one in ten is spelled, as settings say
    described = [tasks["item_to_text"].write(5, np.random.default_rng(seed)).prompt for seed in range(20)]
    assert {int(tokens.own[5]) in prompt for prompt in described} == {True, False}
    for name in ("titles_to_item", "text_to_item"):
        target = tasks[name].write(5, np.random.default_rng(0)).target
        assert all(token in level for token, level in zip(target, tokens.levels, strict=True))


# Words


def test_wishes_and_preferences_are_made_of_what_tells_items_apart() -> None:
    table = pa.table(
        {
            "item_id": [f"i{n}" for n in range(8)],
            "title": ["red wool socks", "blue wool hat", "iron pan", "iron pot", "pen", "ink", "mug", "cup"],
            "text": [""] * 8,
            "categories": [["Shop", "Clothes"]] * 2 + [["Shop", "Kitchen"]] * 2 + [["Shop"]] * 4,
        }
    )
    words = ItemWords([f"i{n}" for n in range(8)], CatalogueText.of(table))
    assert words.categories[:3] == [("Clothes",), ("Clothes",), ("Kitchen",)]  # all are of the Shop
    assert words.preference([0, 1, 4]) == "Clothes; wool"
    assert words.preference([2]) == "Kitchen; pan, iron"
    assert words.preference([4, 5]) == "ink, pen"
    wishes = {words.wish(0, np.random.default_rng(seed)) for seed in range(40)}
    assert all(wish.startswith("clothes, ") for wish in wishes)
    assert {word for wish in wishes for word in wish.split(", ")[1].split()} == {"red", "wool", "socks"}
    assert words.line[1] == "blue wool hat. Shop, Clothes"


def test_a_template_knows_its_slots_and_its_optional_clause() -> None:
    form = Template("[User {user}. ]So far: {history}. Next:", "item")
    assert form.slots == {"history", "item"}
    assert form.parts(with_user=True) == [("User", "user"), (". So far:", "history"), (". Next:", None)]
    assert form.parts(with_user=False) == [("So far:", "history"), (". Next:", None)]


# What is missing


def test_missing_text_is_skipped_and_counted(codec: ScidCodec, tokenizer: Any, model: Any) -> None:
    items = small_world.items(60)
    titles = [title if row < 30 else "" for row, title in enumerate(items["title"].to_pylist())]
    some = CatalogueText.of(pa.table({"item_id": items["item_id"], "title": titles}))
    histories = [np.array([0, 40, 1, 41, 42]), np.array([50, 51, 52])]
    tasks = opened(codec, tokenizer, model, histories, catalogue=some)
    counted = {name: (task.samples, task.skipped) for name, task in tasks.items()}
    assert counted["items_to_title"] == (1, 5)  # only item 1 is a target with a title
    assert counted["titles_to_item"] == (4, 2)
    assert counted["text_to_item"] == (30, 30)
    assert counted["profile_to_user"] == (4, 2)
    assert tokenizer.decode(tasks["items_to_title"].draw(0, 0, 0).target) == f" {titles[1]}</s>"


@pytest.mark.parametrize(
    ("name", "says"),
    [("items_to_title", "title"), ("preference", "telling word"), ("user_to_profile", "SCIDs for users")],
)
def test_a_weighed_task_without_a_sample_says_what_to_do(
    name: str, says: str, codec_dir: Path, tmp_path: Path
) -> None:
    wanted = QUICK.model_copy(update={"tasks": TaskSettings(**{name: 0.5})})  # type: ignore[arg-type]
    with pytest.raises(CannotTrain, match=f"{name} .*{says}.*trainer.sft.tasks.{name} to 0") as found:
        train_sft(codec_dir, small_world.histories(6), wanted, tmp_path / "policy")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "policy").exists()


def test_answers_in_words_need_an_end_token(codec: ScidCodec) -> None:
    endless = tiny_tokenizer(codec)
    endless.eos_token = None
    tasks = opened(codec, endless, tiny_model(len(endless)), rows_of(codec, [6]))
    for name, task in tasks.items():
        if name in IN_WORDS:
            with pytest.raises(CannotTrain, match=f"{name} answers in words.*eos_token"):
                require_samples(name, task)
        else:
            require_samples(name, task)


def test_a_tokenizer_that_splits_scids_and_a_short_context_are_refused(
    codec: ScidCodec, tokenizer: Any
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(tokenizer.get_vocab(), unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.Punctuation()
    splitting = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    with pytest.raises(CannotTrain, match="splits the SCID token"):
        require_whole_scids(splitting, PromptTokens(splitting, codec))
    require_whole_scids(tokenizer, PromptTokens(tokenizer, codec))
    model = tiny_model(len(tokenizer))
    require_context(model, PromptTokens(tokenizer, codec))
    model.config.max_position_embeddings = 60
    with pytest.raises(CannotTrain, match="longer context"):
        require_context(model, PromptTokens(tokenizer, codec))


def test_titles_are_read_as_the_tokenizer_reads_them(codec: ScidCodec, tokenizer: Any, model: Any) -> None:
    task = opened(codec, tokenizer, model, rows_of(codec, [4]), title_tokens=4)["items_to_title"]
    sample = task.draw(0, 0, 0)
    whole = [tuple(text_ids(tokenizer, f" {title}"))[:4] for title in task.words.title]
    assert sample.target[:-1] in whole
