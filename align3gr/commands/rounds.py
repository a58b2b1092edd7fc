"""``align3gr round`` and ``align3gr scheduler``: learning from new feedback, once or on a timetable."""

from typing import TYPE_CHECKING, Any

import typer

from align3gr.console import JsonOption, emit, say, session_of, settings_of

if TYPE_CHECKING:
    from align3gr.settings import Settings
    from trainer.round_state import RoundState
    from trainer.schedule import Surroundings
    from trainer.workplace import Workplace

app = typer.Typer()

STAGE_FACTS = ("samples", "steps", "first", "last", "guard", "chained")


@app.command("round")
def round_(
    context: typer.Context,
    resume: str | None = typer.Option(
        None, help="Take up an unfinished round: its id, or 'last'.", metavar="ROUND"
    ),
    device: str | None = typer.Option(None, help="auto, cpu, cuda or cuda:N; a resume keeps its own."),
    seed: int | None = typer.Option(None, min=0, help="Base of every random number of the round."),
    from_manifest: str | None = typer.Option(
        None,
        help="Do a past round again and compare: its id, or its dataset's. Nothing is registered.",
        metavar="ID",
    ),
    accept_data: bool = typer.Option(
        False, "--accept-data", help="Learn from data that left its bounds (align3gr quality show)."
    ),
    as_json: bool = JsonOption,
) -> None:
    """One round: dataset, easy and hard stage, evaluation, gate, registry, promotion ledger.

    With GPUs it runs under accelerate launch, one process each; on several hosts start it there yourself.
    """
    from align3gr.progress import Bars
    from trainer.ranks import join_ranks, launch_command, launched
    from trainer.rounds import resume_round, start_round

    settings = settings_of(context)
    if from_manifest is not None:
        _again(settings, from_manifest, device, given=resume is not None or seed is not None, as_json=as_json)
        return
    wanted = device or settings.trainer.round.device
    _require_device(wanted)
    if not launched() and (command := launch_command(wanted)):
        import os
        import sys

        os.execv(command[0], [*command, "-m", "align3gr", *sys.argv[1:]])
    ranks = join_ranks(wanted)
    with Bars(shown=not as_json and ranks.leads) as progress:
        workplace = _workplace(settings, ranks=ranks, observe=progress)
        last = workplace.rounds.last()
        if resume is not None:
            state = resume_round(workplace, last.round_id if resume == "last" and last else resume)
        else:
            if last is not None and last.status == "running" and ranks.leads:
                say(f"round {last.round_id} was left unfinished: align3gr round --resume {last.round_id}")
            state = start_round(workplace, seed=seed, device=device, accept_data=accept_data)
    if ranks.leads:
        emit(_facts(state), as_json, lambda: _text(state))


def _again(settings: "Settings", named: str, device: str | None, *, given: bool, as_json: bool) -> None:
    """Reproduce a round; exits with 1 when something came out otherwise."""
    from align3gr.progress import Bars
    from features.errors import BadInput
    from trainer.reproduction import reproduce

    if given:
        raise BadInput("--from-manifest takes everything from the round it names: no --resume, no --seed")
    if device is not None:
        _require_device(device)
    with Bars(shown=not as_json) as progress:
        found = reproduce(_workplace(settings, observe=progress), named, device=device)

    def text() -> str:
        lines = [f"round {found.round_id}: dataset {found.dataset_id}"]
        lines += [f"  not as it was: {cause}" for cause in found.causes]
        lines += [f"  {one.name}: {one.was} then, {one.now} now" for one in found.differences]
        return "\n".join([*lines, "  the same" if found.same else f"  its files: {found.kept}"])

    emit(found.as_dict(), as_json, text)
    if not found.same:
        say(f"round {found.round_id} came out otherwise: {len(found.differences)} facts differ")
        raise typer.Exit(1)


@app.command()
def scheduler(
    context: typer.Context,
    once: bool = typer.Option(False, help="Look once: run what is due now, then end."),
    as_json: bool = JsonOption,
) -> int:
    """Run rounds by cron or interval when enough new feedback has landed; keep the store tidy in between."""
    from policies.settings import CanarySettings
    from trainer.schedule import Scheduler

    settings = settings_of(context)
    child = _RoundProcess(session_of(context).settings_file)
    workplace = _workplace(settings)
    planned = Scheduler(workplace.rounds, settings.schedule, _surroundings(settings, workplace, child))
    if once:
        found = planned.refresh()
        emit({"outcome": found.outcome, "why": found.why, "exit_code": found.exit_code}, as_json)
        return 1 if found.exit_code else 0
    import logging
    import signal

    from apscheduler.schedulers.blocking import BlockingScheduler

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    jobs = BlockingScheduler()
    canary = settings.policies.promotion.canary or CanarySettings()
    planned.attach(jobs, upkeep_every_s=settings.features.upkeep.every_s, canary_every_s=canary.look_s)

    def stop(*_: object) -> None:
        child.stop()
        jobs.shutdown(wait=False)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    say(f"scheduler: first look {planned.first_run():%Y-%m-%d %H:%M:%S} UTC, state in {settings.home}")
    jobs.start()
    return 0


def _workplace(settings: "Settings", **more: Any) -> "Workplace":
    from trainer.workplace import Workplace

    return Workplace(settings.home, settings.features, settings.policies, settings.trainer, **more)


def _surroundings(settings: "Settings", workplace: "Workplace", child: "_RoundProcess") -> "Surroundings":
    from align3gr.retention import age_out_home
    from features.log import LogMissing
    from features.upkeep import keep_up
    from ingest.errors import IngestError
    from ingest.lag import lag
    from trainer.canary import follow
    from trainer.data_hold import DataHold
    from trainer.schedule import Surroundings

    def feedback() -> int:
        try:
            return workplace.count_feedback(workplace.log().snapshot().files)
        except LogMissing:
            return 0

    def waiting() -> int | None:
        try:
            return lag(settings.kafka, settings.home / "log").waiting
        except IngestError as error:
            say(f"scheduler: {error}")
            return None

    def upkeep() -> None:
        try:
            log = workplace.log()
        except LogMissing:
            return
        age_out_home(settings, workplace)
        keep_up(log, settings.home / "datasets", settings.home / "upkeep.lock", settings.features.upkeep)

    def wrong() -> tuple[str, ...]:
        hold = DataHold(settings.home, settings.features, workplace.clock)
        return hold.look(workplace.log().snapshot()).held

    return Surroundings(
        feedback=feedback,
        lag=waiting,
        run_round=child.run,
        upkeep=upkeep,
        clock=workplace.clock,
        canary=lambda: follow(workplace),
        quality=wrong,
    )


class _RoundProcess:
    """Runs ``align3gr round`` as a process of its own: what ends it does not end the scheduler."""

    def __init__(self, settings_file: Any) -> None:
        self._options = [] if settings_file is None else ["--settings", str(settings_file)]
        self._process: Any = None
        self._stopping = False

    def run(self, resume: str | None) -> int:
        """Run it to its end; its exit code, negative when a signal ended it."""
        import subprocess
        import sys

        if self._stopping:
            return 0
        arguments = ["round", "--json", *(["--resume", resume] if resume else [])]
        self._process = subprocess.Popen([sys.executable, "-m", "align3gr", *self._options, *arguments])
        return int(self._process.wait())

    def stop(self) -> None:
        """End a running round; it is resumed when the scheduler comes back."""
        self._stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


def _require_device(wanted: str) -> None:
    """A wrong --device is told apart from a GPU that is not there."""
    import re

    from features.errors import BadInput

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise BadInput(f"device {wanted}: choose auto, cpu, cuda or cuda:N")


def _facts(state: "RoundState") -> dict[str, Any]:
    steps = state.steps
    stages = {
        name: {key: facts[key] for key in STAGE_FACTS if key in facts} or facts
        for name, facts in steps.items()
        if "last" in facts or "skipped" in facts
    }
    return {
        "round": state.round_id,
        "outcome": state.outcome,
        "why": state.message,
        "version": steps["register"]["version"],
        "parent": state.parent,
        "dataset_id": steps["dataset"]["dataset_id"],
        "stages": stages,
        "evaluation": steps["evaluate"],
        "seed": state.seed,
        "device": state.device,
        "started_at": state.started_at,
        "ended_at": state.ended_at,
    }


def _text(state: "RoundState") -> str:
    lines = [f"round {state.round_id}: {state.steps['register']['version']} {state.outcome}: {state.message}"]
    for name, facts in state.steps.items():
        if "skipped" in facts:
            lines.append(f"  {name:<8} skipped: {facts['skipped']}")
        elif "last" in facts:
            first, last = facts["first"], facts["last"]
            lines.append(
                f"  {name:<8} {facts['samples']} samples, {facts['steps']} steps, loss {first['loss']:.3f} "
                f"-> {last['loss']:.3f}, margin {last['rewards/margins']:.2f}"
            )
            lines += [f"    not chained: {why}" for why in facts.get("guard", {}).get("broken", ())]
    return "\n".join(lines)
