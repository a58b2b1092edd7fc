"""Tasks that tie SCIDs to words: an item's to its text, a user's to the profile."""

import numpy as np

from trainer.sft.data import BoolArray
from trainer.sft.packing import TextSample

from .task import HistoryTask, Moment, Task
from .writing import Ids, Template


class _ItemTask(Task):
    """A task whose candidates are the items of the codec, those that nobody met among them."""

    def _words_of(self, row: int) -> dict[str, Ids]:
        """What there is to say of an item, by slot."""
        said = {"title": self.words.title[row], "text": self.words.text[row], "line": self.words.line[row]}
        groups = self.words.categories[row]
        said["kind"] = ", ".join(groups)
        found = {name: self.writer.text(text) for name, text in said.items() if text}
        if "title" in found:
            found["title"] = self.writer.title(said["title"])
        return found

    def _possible(self) -> BoolArray:
        return np.array([bool(line) for line in self.words.line], dtype=np.bool_)


class TextToItem(_ItemTask):
    """The SCID of an item from its title, its description, or all that is known of it."""

    name = "text_to_item"
    does = "title or description -> SCID"
    lacks = "no item has title, text or categories: load them with `align3gr catalogue load`"
    templates = (
        Template("The id of {line}:", "item"),
        Template("Which item is described here? {line}", "item"),
        Template("Title: {title}. Its id:", "item"),
        Template("An item is called {title}. Point to it:", "item"),
        Template("Text: {text}. Of kind: {kind}. It belongs to", "item"),
        Template("Find the item with this description: {line}", "item"),
    )

    def write(self, candidate: int, rng: np.random.Generator) -> TextSample:
        """Words of the item, its SCID."""
        words = self._words_of(candidate)
        form = self._form(rng, "item", *words)
        return self.writer.sample(form, self.writer.item_answer(candidate), fill=words)


class ItemToText(_ItemTask):
    """The title, the kind or the description of an item from its SCID."""

    name = "item_to_text"
    does = "SCID -> title or description"
    lacks = TextToItem.lacks
    templates = (
        Template("{item} is called", "title"),
        Template("Give the title of {item}:", "title"),
        Template("Describe {item}:", "line"),
        Template("What is known of {item}?", "line"),
        Template("What kind of thing is {item}?", "kind"),
        Template("Tell more about {item}:", "text"),
    )

    def write(self, candidate: int, rng: np.random.Generator) -> TextSample:
        """The item's SCID, words of it."""
        words = self._words_of(candidate)
        form = self._form(rng, "item", *words)
        answer = self.writer.ended(words[form.answer])
        # An item with a token of its own is shown by either name: both are to mean the text.
        return self.writer.sample(form, answer, fill={"item": self.writer.item(candidate, rng, 0.5)})


class _ProfileTask(HistoryTask):
    """A user's profile is a line an item of the history (title, categories, text), as that whose vectors the
    user's SCID is made of (``policies.users``). The history stands in no prompt, nor does the other side."""

    lacks = (
        "the codec has no SCIDs for users, or no item of the histories has words: fit one with "
        "trainer.tokenization.users and load texts with `align3gr catalogue load`"
    )

    def _profile(self, moment: Moment) -> list[Ids]:
        return [self.writer.title(self.words.line[row]) for row in moment.before if self.words.line[row]]

    def _possible(self) -> BoolArray:
        found = self.material.with_history([bool(line) for line in self.words.line])
        return found if self.material.users is not None else np.zeros_like(found)


class ProfileToUser(_ProfileTask):
    """A user's SCID from the profile."""

    name = "profile_to_user"
    does = "profile text -> the user's SCID"
    templates = (
        Template("Profile: {history}. The user's id:", "user"),
        Template("Who has this record? {history}", "user"),
        Template("A user took {history}. Their code:", "user"),
        Template("Give the id of the user described by {history}:", "user"),
    )

    def write(self, candidate: int, rng: np.random.Generator) -> TextSample:
        """Lines of the history, the user's SCID as of its end."""
        moment = self.material.moment(candidate)
        return self.writer.sample(
            self._form(rng, "history", "user"),
            moment.user,
            fill={},
            history=self._profile(moment),
            between=self.writer.between,
        )


class UserToProfile(_ProfileTask):
    """The profile of a user from the SCID: its last lines, as many as a text holds."""

    name = "user_to_profile"
    does = "the user's SCID -> profile text"
    templates = (
        Template("User {user}. Their profile:", "profile"),
        Template("What did {user} take?", "profile"),
        Template("Write the record of {user}:", "profile"),
        Template("{user} is a user who chose", "profile"),
    )

    def write(self, candidate: int, rng: np.random.Generator) -> TextSample:
        """The user's SCID, lines of the history."""
        moment = self.material.moment(candidate)
        answer = self.writer.ended(self.writer.joined(self._profile(moment)))
        return self.writer.sample(self._form(rng, "user", "profile"), answer, fill={}, user=moment.user)
