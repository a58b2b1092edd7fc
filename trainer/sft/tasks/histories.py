"""Tasks that start from a history: the next item in other words than SCIDs, and what a user likes."""

import numpy as np

from trainer.sft.data import BoolArray
from trainer.sft.packing import TextSample

from .task import HistoryTask
from .writing import Template


def _forms(answer: str, *prompts: str) -> tuple[Template, ...]:
    return tuple(Template(prompt, answer) for prompt in prompts)


class TitlesToItem(HistoryTask):
    """The next item from the titles of the history; items without a title are not shown."""

    name = "titles_to_item"
    does = "history as titles -> SCID of the next item"
    lacks = "no item of the histories has a title: load titles with `align3gr catalogue load`"
    templates = _forms(
        "item",
        "[User {user}. ]Chosen so far, oldest first: {history}. The next choice:",
        "These were taken one after the other[ by {user}]: {history}. What follows them?",
        "In the order they were picked: {history}[, by user {user}]. Name the next pick:",
        "[For {user}: ]somebody liked {history}. Offer what they will want now:",
        "A list to be continued[ for {user}]: {history}; and then",
    )

    def write(self, candidate: int, rng: np.random.Generator) -> TextSample:
        """Titles of the history, SCID of the target."""
        moment = self.material.moment(candidate)
        titles = [self.writer.title(self.words.title[row]) for row in moment.before if self.words.title[row]]
        answer = self.writer.item_answer(moment.target)
        form = self._form(rng, "history", "item")
        return self._asked(form, moment, answer, titles, between=self.writer.between)

    def _possible(self) -> BoolArray:
        return self.material.with_history([bool(title) for title in self.words.title])


class ItemsToTitle(HistoryTask):
    """The title of the next item from the SCIDs of the history."""

    name = "items_to_title"
    does = "history as SCIDs -> title of the next item"
    lacks = "no target in the histories has a title: load titles with `align3gr catalogue load`"
    templates = _forms(
        "title",
        "{history}[{user}] What is the next one called?",
        "After {history}[, user {user}] chooses something. Its title:",
        "[User {user}. ]The history is {history}. Say in words what comes next:",
        "These ids were met in this order: {history}[, by {user}]. Title of the one that follows:",
        "[{user} ]took {history}. Give the name of the next item:",
    )

    def write(self, candidate: int, rng: np.random.Generator) -> TextSample:
        """SCIDs of the history, title of the target."""
        moment = self.material.moment(candidate)
        answer = self.writer.ended(self.writer.title(self.words.title[moment.target]))
        return self._asked(self._form(rng, "history", "title"), moment, answer, self._items(moment, rng))

    def _possible(self) -> BoolArray:
        return self.material.with_target([bool(title) for title in self.words.title])


class MixedHistory(HistoryTask):
    """The next item from a history in which each item is shown by title or by SCID, at even odds."""

    name = "mixed_history"
    does = "history, each item as title or as SCID -> SCID of the next item"
    lacks = "no item of the histories has a title: load titles with `align3gr catalogue load`"
    templates = _forms(
        "item",
        "[User {user}. ]Chosen so far, some by name and some by id: {history}. The next choice:",
        "Names and ids of what was taken, oldest first: {history}[, by {user}]. What follows?",
        "A history of mixed entries: {history}[ of user {user}]. Continue it with one id:",
        "[{user}: ]{history}. Which item comes after these?",
        "Everything picked until now is {history}[, and the user is {user}]. Next:",
    )

    def write(self, candidate: int, rng: np.random.Generator) -> TextSample:
        """Each item of the history by one of its two names, SCID of the target."""
        moment = self.material.moment(candidate)
        shown = [
            self.writer.title(self.words.title[row])
            if by_title and self.words.title[row]
            else self.writer.item(row, rng, self.writer.spell_items)
            for row, by_title in zip(moment.before, rng.random(len(moment.before)) < 0.5, strict=True)
        ]
        answer = self.writer.item_answer(moment.target)
        form = self._form(rng, "history", "item")
        return self._asked(form, moment, answer, shown, between=self.writer.between)

    def _possible(self) -> BoolArray:
        return self.material.with_history([bool(title) for title in self.words.title])


class IntentionToItem(HistoryTask):
    """The item of a wish (``ItemWords.wish``), asked for alone or behind a history."""

    name = "intention_to_item"
    does = "a wish or query made of the target's words, with or without the history -> SCID of the target"
    lacks = (
        "no target in the histories has a category or a telling word: load texts with "
        "`align3gr catalogue load`"
    )
    templates = _forms(
        "item",
        "Somebody searches for {wish}. The item that fits:",
        "Wanted: {wish}. Offer one item:",
        "[User {user}. ]Chosen so far: {history}. Now in mind: {wish}. The item to offer:",
        "{history}[{user}] came before. The search now reads: {wish}. Which item is meant?",
        "A request for {wish}[, from user {user}], who took {history}. Answer with an item:",
    )

    def write(self, candidate: int, rng: np.random.Generator) -> TextSample:
        """A wish for the target, SCID of the target."""
        moment = self.material.moment(candidate)
        form = self._form(rng, "history", "wish", "item")
        fill = {"wish": self.writer.text(self.words.wish(moment.target, rng))}
        answer = self.writer.item_answer(moment.target)
        return self._asked(form, moment, answer, self._items(moment, rng), fill=fill)

    def _possible(self) -> BoolArray:
        return self.material.with_target([self.words.can_wish(row) for row in range(len(self.words))])


class Preference(HistoryTask):
    """What the user of a history prefers, in words (``ItemWords.preference``)."""

    name = "preference"
    does = "history as SCIDs -> categories and words that stand out in it"
    lacks = (
        "no item of the histories has a category or a telling word: load texts with `align3gr catalogue load`"
    )
    templates = _forms(
        "preference",
        "{history}[{user}] What does this user like?",
        "Someone[, {user},] chose {history}. Their taste in a few words:",
        "[User {user}. ]History: {history}. Preferences:",
        "Describe what {history} have in common[ for {user}]:",
        "The taste behind {history}[, user {user}], as categories and words:",
    )

    def write(self, candidate: int, rng: np.random.Generator) -> TextSample:
        """SCIDs of the history, words for what stands out in it."""
        moment = self.material.moment(candidate)
        answer = self.writer.ended(self.writer.text(self.words.preference(moment.before)))
        return self._asked(self._form(rng, "history", "preference"), moment, answer, self._items(moment, rng))

    def _possible(self) -> BoolArray:
        return self.material.with_history([self.words.can_wish(row) for row in range(len(self.words))])
