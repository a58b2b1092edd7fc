"""Where the cases of ``align3gr evaluate`` come from: a held-out file, the log's histories, gate users."""

import gzip
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from features.cases import evaluation_cases
from features.duck import connect
from features.errors import BadInput
from features.histories import histories, items_of_users, seen
from features.interactions import Interaction, InvalidInteraction, decode_interaction
from features.levels import Level, level_of
from features.log import FeedbackLog, LogSnapshot
from trainer.cases import RankingCase, cases_of, leave_one_out
from trainer.slates import SlateCase
from trainer.training_input import training_histories

if TYPE_CHECKING:
    from align3gr.settings import Settings

ENGAGED = frozenset({"click", "rating", "review", "purchase"})


def cases_for(
    settings: "Settings", *, back: int | None, held_out: Path | None, liked_only: bool, users: int | None
) -> tuple[list[SlateCase], list[RankingCase]]:
    """Of the last items of histories (``back``), of a file (``held_out``), or else of gate users.

    Raises BadInput where there are none.
    """
    slates: list[SlateCase] = []
    if back is not None:
        ranking = left_out_cases(settings, back=back)
    elif held_out is not None:
        ranking = held_out_cases(settings, held_out, liked_only=liked_only)
    else:
        slates, ranking = gate_cases(settings)
    return of_users(slates, ranking, users)


def held_out_cases(settings: "Settings", file: Path, *, liked_only: bool) -> list[RankingCase]:
    """A case for each engaged event of ``file``: the history in the log, the event's item as target.

    Raises BadInput when the file cannot be read, holds no such event, or none of its users is in the log.
    """
    targets: list[tuple[str, str]] = []
    for event in _events(file):
        level = level_of(event, settings.features.levels)
        engaged = event.kind in ENGAGED and level != Level.DISLIKED and not liked_only
        if level == Level.LIKED or engaged:
            targets.append((event.user_id, event.item_id))
    if not targets:
        raise BadInput(f"{file} holds no engaged event to look for; write it with `replay --leave-out 1`")
    snapshot = _snapshot(settings)
    users = sorted({user for user, _ in targets})
    history: dict[str, list[str]] = {}
    met: dict[str, list[str]] = {}
    if snapshot.files:
        with connect(settings.features) as con:
            history = items_of_users(histories(con, snapshot, settings.features, user_ids=users))
            met = items_of_users(seen(con, snapshot, users))
    cases = [
        RankingCase(user, tuple(history[user]), item, frozenset(met.get(user, ())))
        for user, item in targets
        if user in history
    ]
    if not cases:
        raise BadInput(f"no user of {file} has a history in the log; replay the rest of the data first")
    return cases


def left_out_cases(settings: "Settings", *, back: int) -> list[RankingCase]:
    """Leave one out over the log: the item ``back`` from the end of each user's history is to be found after
    all before it, which is what is left out of the list. What a user came to dislike is no target.

    Raises BadInput when no history is long enough.
    """
    whole = training_histories(_snapshot(settings), settings.features)
    cases = [case for case, _ in leave_one_out(whole, back=back)]
    if not cases:
        raise BadInput(
            f"no history in the log holds more than {back} items, so nothing is to be found; "
            "ingest more feedback"
        )
    return cases


def gate_cases(settings: "Settings") -> tuple[list[SlateCase], list[RankingCase]]:
    """Slates and organic events of the log's gate users. Raises BadInput when there are none."""
    found = evaluation_cases(
        _snapshot(settings),
        settings.features,
        gate_share=settings.policies.gate.share,
        stop_share=settings.trainer.round.stop_share,
    )
    slates, ranking = cases_of(found.slates, found.ranking)
    if not slates and not ranking:
        raise BadInput("the log holds no case of a gate user yet; evaluate on a file with --held-out")
    return slates, ranking


def of_users(
    slates: Sequence[SlateCase], ranking: Sequence[RankingCase], users: int | None
) -> tuple[list[SlateCase], list[RankingCase]]:
    """The cases of ``users`` users, drawn by a fixed seed; none: all."""
    names = sorted({case.user_id for case in slates} | {case.user_id for case in ranking})
    if users is not None and users < len(names):
        kept = np.random.default_rng(0).permutation(len(names))[:users]
        names = [names[place] for place in kept]
    chosen = set(names)
    return (
        [case for case in slates if case.user_id in chosen],
        [case for case in ranking if case.user_id in chosen],
    )


def _snapshot(settings: "Settings") -> LogSnapshot:
    return FeedbackLog.open(settings.home / "log", create=False).snapshot()


def _events(file: Path) -> list[Interaction]:
    now, events, number = datetime.now(UTC), [], 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    events.append(decode_interaction(line, now=now))
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror or error}") from error
    except InvalidInteraction as error:
        raise BadInput(f"{file} line {number}: {error}; see `align3gr validate {file}`") from error
    return events
