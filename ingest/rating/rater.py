"""What a rater is, which events it is asked about, and the event that says its answer.

Stars come first: what the user said in numbers is never read again. Such a review has its level already, and
a second explicit event of the same moment would push the user's own word out of force (of equal times the
later landed wins). So only a review without a value is rated, and its rating is the one event of the two that
has a level: nothing is counted twice.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

from features.interactions import Interaction, Kind
from ingest.settings import RatingSettings

SOURCE = "align3gr-rater"
"""``source`` of every rating we publish. The level rules have no scale of that name, so the default one holds
(the paper's: 1 disliked, 2 and 3 neutral, 4 and 5 liked); one can be set for it."""


class Rater(Protocol):
    """Reads reviews. Invariant: equal ``version``, equal answers."""

    @property
    def version(self) -> str:
        """Name and a hash of all that decides an answer: model or lexicon, prompt, bounds."""

    def rate(self, texts: Sequence[str]) -> list[int | None]:
        """1 (bad) to 5 (good) for each text; None for one that says nothing."""


def rater_of(settings: RatingSettings) -> Rater:
    """The rater that ``settings`` name. Raises RaterUnusable when its package or model is not there."""
    if settings.rater == "lexicon":
        from .lexicon import LexiconRater

        return LexiconRater(settings)
    from .models import CausalRater, ClassifierRater

    return CausalRater(settings) if settings.rater == "causal" else ClassifierRater(settings)


def wants_rating(event: Interaction, settings: RatingSettings) -> bool:
    """Whether ``event`` carries words and no stars."""
    return event.kind in settings.kinds and event.value is None and bool(event.text and event.text.strip())


def rating_of(review: Interaction, stars: int, version: str) -> Interaction:
    """The rating that says what ``review`` says, given by the rater of this ``version``.

    Its id follows from the review's and the rater's version: published twice (a crash, two workers), it is
    one event to every reader, by (user_id, event_id); another version's is another event, which landed later
    and so is the one in force.
    """
    words = f"{review.user_id}\0{review.event_id}\0{version}".encode()
    return Interaction(
        event_id=f"rating-{blake2b(words, digest_size=16).hexdigest()}",
        user_id=review.user_id,
        item_id=review.item_id,
        kind=Kind.RATING,
        occurred_at=review.occurred_at,
        request_id=review.request_id,
        value=float(stars),
        source=SOURCE,
        extra={"rated_event_id": review.event_id, "rater": version},
    )
