"""A round: dataset -> stages (easy, hard) -> evaluation -> gate -> registry -> ledger, resumable anywhere.

One idea: a round is a list of named steps over a state on disk (``round_steps``). Each step is deterministic
in what the state pins, or finds out by itself that it was done before a kill; so redoing an unfinished step
is always right, and a resumed round ends as an uninterrupted one would have.

The parent is the ledger's reference at the round's start, whoever put it there, a rollback included. The
lease is held by the process that runs the round, for as long as it runs.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import torch

from features.catalogue import Catalogue, CatalogueMissing
from features.errors import BadInput
from policies.directory import base_directory, verify
from policies.gate.own import own_checks

from .data_hold import DataHold
from .errors import TrainerError
from .lease import Lease
from .made_with import made_with
from .round_state import RoundsTable, RoundState, ended
from .round_steps import RoundSteps
from .workplace import Workplace

log = logging.getLogger(__name__)

CLOCK_TOLERANCE = timedelta(minutes=5)
"""Clocks that are set by the network step back by seconds; that hurts nobody."""


class NothingToImprove(TrainerError, BadInput):  # noqa: N818 - reads as what it is at the raise site
    """No policy is the reference yet, so there is none to continue from."""


class NoRoundOfSelfPlay(TrainerError, BadInput):  # noqa: N818
    """A self-play stage among the stages of rounds."""


class ClockWentBack(TrainerError, BadInput):  # noqa: N818
    """The machine's clock is behind what was done before."""


class RoundIsOver(TrainerError, BadInput):  # noqa: N818
    """The round to resume has ended."""


def start_round(
    workplace: Workplace, *, seed: int | None = None, device: str | None = None, accept_data: bool = False
) -> RoundState:
    """Run a new round to its end; returns its last state.

    ``seed``: default the settings' plus the round's number; ``device``: default the settings'.
    ``accept_data``: learn from data that left its bounds, too. Raises RoundRunning while another round runs,
    ClockWentBack, NothingToImprove without a reference, PolicyRefused when it is damaged, LogMissing,
    DataHeld, and what the steps raise: an error that is bad input (an empty log, too few likes) ends the
    round as failed, any other leaves it to be resumed.
    """
    with round_lease(workplace):
        state = _first_state(workplace, seed, device, accept_data) if workplace.ranks.leads else None
        workplace.ranks.wait()
        return _run(workplace, state or _newest(workplace.rounds))


def resume_round(workplace: Workplace, round_id: str) -> RoundState:
    """Take up a round that was killed, from its last finished step and with the settings it began with.

    Raises RoundRunning, UnknownRound, RoundIsOver, and what the steps raise.
    """
    with round_lease(workplace):
        state = unfinished(workplace.rounds, round_id, "round")
        return _run(workplace.with_settings(state.settings), state)


@contextmanager
def round_lease(workplace: Workplace) -> Iterator[None]:
    """Held by the leading process for all of them."""
    with Lease(workplace.rounds.directory).held() if workplace.ranks.leads else nullcontext():
        yield


def unfinished(rounds: RoundsTable, round_id: str, command: Literal["round", "curriculum"]) -> RoundState:
    """The state of what is to be resumed; ``command`` starts such. Raises UnknownRound, RoundIsOver."""
    state = rounds.read(round_id)
    if state.status != "running":
        raise RoundIsOver(
            f"{command} {round_id} has ended ({state.outcome or state.status}): start a new one with "
            f"`align3gr {command}`"
        )
    return state


def _newest(rounds: RoundsTable) -> RoundState:
    state = rounds.last()
    if state is None:
        raise TrainerError("the leading process made no round: see what it said")
    return state


def _first_state(workplace: Workplace, seed: int | None, device: str | None, accept_data: bool) -> RoundState:
    """Pin what the round depends on and give it its number."""
    played = [stage.name for stage in workplace.trainer.preference.stages if stage.selfplay]
    if played:
        raise NoRoundOfSelfPlay(
            f"stage {played[0]} plays against itself, and a round learns from feedback: move it from "
            "trainer.preference.stages to trainer.curriculum.stages and run `align3gr curriculum`"
        )
    _require_clock(workplace)
    parent = workplace.ledger.reference()
    if parent is None:
        raise NothingToImprove(
            "no policy is the reference yet: make a base policy with `align3gr sft`, then "
            "`align3gr policy promote` it"
        )
    require_whole(workplace.registry.path(parent))
    own_checks(workplace.policies.gate.checks)  # one that is missing is told before anything is trained
    wanted = workplace.trainer.round
    snapshot = workplace.log().snapshot()
    if not accept_data:
        DataHold(workplace.home, workplace.features, workplace.clock).require(snapshot)
    feedback = workplace.count_feedback(snapshot.files)
    place = place_for(device or wanted.device)
    state = workplace.rounds.create(
        lambda round_id, number: RoundState(
            round_id=round_id,
            number=number,
            seed=wanted.seed + number if seed is None else seed,
            device=place,
            threads=wanted.threads or torch.get_num_threads(),
            parent=parent,
            log_version=snapshot.version,
            feedback=feedback,
            started_at=workplace.clock().isoformat(),
            settings=workplace.settings_as_json(),
            catalogue_revision=_catalogue_revision(workplace),
            made_with=made_with(),
        )
    )
    log.info("round start round=%s parent=%s log_version=%d", state.round_id, state.parent, state.log_version)
    return state


def _catalogue_revision(workplace: Workplace) -> int | None:
    try:
        return Catalogue.open(workplace.home / "catalogue", create=False).revision
    except CatalogueMissing:
        return None  # the first step says so


def _require_clock(workplace: Workplace) -> None:
    """A clock that went backwards would order rounds, ledger and windows wrongly. Raises ClockWentBack."""
    last = workplace.rounds.last()
    now = workplace.clock()
    if last is not None and now + CLOCK_TOLERANCE < datetime.fromisoformat(last.started_at):
        raise ClockWentBack(
            f"the clock says {now:%Y-%m-%d %H:%M:%S}, but round {last.round_id} began at "
            f"{last.started_at[:19].replace('T', ' ')}: set this machine's clock, then start the round again"
        )


def require_whole(policy: Path) -> None:
    """A damaged parent, or base of it, is refused before a dataset is built. Raises PolicyRefused."""
    base = base_directory(policy, verify(policy))
    if base != policy:
        verify(base)


def place_for(wanted: str) -> str:
    """The torch device of ``wanted`` (auto, cpu, cuda, cuda:N). Raises BadInput for a GPU that is missing."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput(
            f"device {wanted}: torch sees no GPU here; use --device cpu, or install torch for CUDA"
        )
    return wanted


def run_threads(state: RoundState) -> None:
    """Torch as the round's numbers depend on it."""
    torch.set_num_threads(state.threads)
    if state.device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS adds up in a fixed order with it


def _run(workplace: Workplace, state: RoundState) -> RoundState:
    run_threads(state)
    workplace.ranks.wait()  # everyone has read the state before the first step changes it
    if not workplace.ranks.leads:
        return RoundSteps(workplace, state).run_together()
    with attempt(workplace, state) as begun:
        return RoundSteps(workplace, begun).run()


@contextmanager
def attempt(workplace: Workplace, state: RoundState) -> Iterator[RoundState]:
    """One more attempt at the steps, which run inside; when they are done, the registry shows the ledger.

    Bad input ends the round as failed; any other error leaves it to be resumed.
    """
    rounds = workplace.rounds
    begun = rounds.write(replace(state, attempts=state.attempts + 1))
    try:
        yield begun
    except BadInput as error:
        so_far = rounds.read(state.round_id)
        rounds.write(ended(so_far, "failed", workplace.clock(), outcome=None, message=str(error)))
        raise
    workplace.registry.mirror(workplace.ledger)
