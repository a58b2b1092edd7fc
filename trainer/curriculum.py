"""A curriculum: SFT -> SP-DPO easy, medium, hard -> RF-DPO easy, hard, as one resumable chain.

Each stage's policy is the next one's reference, unless a guard says that the stage did harm: then its
predecessor stays the reference and the chain goes on from there. The record of a chain is that of a round
(``trainer.round_state``), in a table of its own under ``home/curricula``; the steps are in
``curriculum_steps``.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from features.log import LogMissing

from .curriculum_steps import CurriculumSteps
from .errors import CannotTrain
from .lease import Lease
from .round_state import RoundsTable, RoundState
from .rounds import attempt, place_for, require_whole, unfinished
from .workplace import Workplace

log = logging.getLogger(__name__)

SFT_COMES_FIRST = ""
"""A chain's parent before its SFT has made it one."""


@dataclass(frozen=True)
class CurriculumPlace(Workplace):
    """A workplace whose records are those of chains."""

    @property
    def rounds(self) -> RoundsTable:
        """The chains: c0001, c0002, ..."""
        return RoundsTable(self.home / "curricula", prefix="c")


def start_curriculum(
    place: CurriculumPlace,
    *,
    start: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    who: str,
) -> RoundState:
    """Run a new chain to its end; returns its last state.

    ``start``: the registered policy that it starts from; none: SFT makes one first. ``seed``, ``device``:
    default the settings'. Raises RoundRunning while another chain runs, UnknownPolicy, PolicyRefused,
    and what the steps raise: bad input ends the chain as failed, any other error leaves it to be resumed.
    """
    with _lease(place):
        return _run(place, _first_state(place, start, seed, device), who)


def resume_curriculum(place: CurriculumPlace, chain_id: str, *, who: str) -> RoundState:
    """Take up a chain that was killed, from its last finished stage and with the settings it began with.

    Raises RoundRunning, UnknownRound, RoundIsOver, and what the steps raise.
    """
    with _lease(place):
        state = unfinished(place.rounds, chain_id, "curriculum")
        return _run(place.with_settings(state.settings), state, who)


@contextmanager
def _lease(place: CurriculumPlace) -> Iterator[None]:
    with Lease(place.rounds.directory).held():
        yield


def _first_state(
    place: CurriculumPlace, start: str | None, seed: int | None, device: str | None
) -> RoundState:
    """Pin what the chain depends on and give it its number."""
    if start is not None:
        require_whole(place.registry.path(start))
    wanted = place.trainer.round
    try:
        snapshot = place.log().snapshot()
    except LogMissing as error:
        raise CannotTrain(f"{error} (a curriculum learns from the histories in the log)") from error
    where = place_for(device or wanted.device)
    state = place.rounds.create(
        lambda chain_id, number: RoundState(
            round_id=chain_id,
            number=number,
            seed=wanted.seed if seed is None else seed,
            device=where,
            threads=wanted.threads or torch.get_num_threads(),
            parent=start or SFT_COMES_FIRST,
            log_version=snapshot.version,
            feedback=place.count_feedback(snapshot.files),
            started_at=place.clock().isoformat(),
            settings=place.settings_as_json(),
        )
    )
    log.info("curriculum start id=%s from=%s log_version=%d", state.round_id, start, state.log_version)
    return state


def _run(place: Workplace, state: RoundState, who: str) -> RoundState:
    torch.set_num_threads(state.threads)
    with attempt(place, state) as begun:
        return CurriculumSteps(place, begun, who).run()
