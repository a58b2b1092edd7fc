"""``align3gr demo``: the whole loop on this machine, on worlds with known tastes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align3gr.console import JsonOption, emit, say

if TYPE_CHECKING:
    from align3gr.demo.defaults import DemoOptions
    from align3gr.demo.state import DemoState

app = typer.Typer()


@app.command()
def demo(
    seeds: int = typer.Option(1, min=1, max=1000, help="Worlds to run, one after the other."),
    rounds: int = typer.Option(4, min=1, max=100, help="Rounds of RF-DPO in each world."),
    home: Path = typer.Option(Path("demo-run"), help="Where its state and its report lie."),
    first_seed: int | None = typer.Option(None, min=0, help="First world (default: one nobody tuned on)."),
    fresh: bool = typer.Option(False, "--fresh", help="Start anew, whatever an earlier run left."),
    as_json: bool = JsonOption,
) -> None:
    """Recommend, react, Kafka, ingest, RF-DPO, gate, promote: four rounds, then a table and a report.

    A run that was stopped goes on where it was; one that has finished shows its results again.
    """
    _quiet()
    import signal

    from align3gr.demo.defaults import FIRST_SEED, DemoOptions
    from align3gr.demo.figures import DemoFigures
    from align3gr.demo.report import write_report

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    first = FIRST_SEED if first_seed is None else first_seed
    worlds: list[tuple[Path, DemoState]] = []
    with _alone(home), _Progress(shown=not as_json) as progress:
        for seed in range(first, first + seeds):
            folder = home / f"world-{seed}"
            progress.world = f"world {seed}" if seeds > 1 else ""
            worlds.append((folder, _run(folder, DemoOptions(seed, rounds=rounds), fresh, progress)))
    figures = DemoFigures.of([state for _, state in worlds])
    report = home / "report.html"
    write_report(report, worlds)
    facts = {**figures.as_dict(), "report": str(report)}
    emit(facts, as_json, lambda: f"{figures.table()}\nreport: {report}")


def _run(folder: Path, options: "DemoOptions", fresh: bool, progress: "_Progress") -> "DemoState":
    import shutil
    import time

    from align3gr.demo.loop import WorldDemo
    from align3gr.demo.state import NAME, DemoState, read_state
    from features.errors import BadInput

    if fresh and (folder / NAME).exists():
        shutil.rmtree(folder)
    state = read_state(folder)
    if state is None:
        if folder.exists() and any(folder.iterdir()):
            raise BadInput(f"{folder} holds something that is no demo: choose another --home")
        state = DemoState(options.as_dict(), time.time())
        state.write(folder)
    elif state.options != options.as_dict():
        raise BadInput(f"{folder} holds a demo with other options: add --fresh, or choose another --home")
    elif state.finished:
        say(f"{folder} holds a finished demo: these are its results; --fresh runs it again")
    return WorldDemo(folder, state, options, progress).run()


class _alone:  # noqa: N801 - reads as a clause, with _alone(home)
    """Two demos in one folder would end each other's broker: the second is told so."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def __enter__(self) -> None:
        import fcntl

        from features.errors import BadInput

        self._home.mkdir(parents=True, exist_ok=True)
        self._file = (self._home / ".lock").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadInput(
                f"another demo runs in {self._home}: wait for it, or choose another --home"
            ) from error

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Progress:
    """What is being done: a bar on a terminal, a line a part elsewhere; nothing with --json."""

    def __init__(self, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.world = ""
        self._console = Console(stderr=True)
        self._lines = shown and not self._console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn(),
            console=self._console, disable=not (shown and self._console.is_terminal),
        )  # fmt: skip
        self._current: tuple[str, Any] | None = None

    def __enter__(self) -> "_Progress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        name = f"{self.world} {what}".strip()
        if self._current is None or self._current[0] != name:
            self._finish()
            self._current = (name, self._bars.add_task(name, total=None))
            if self._lines:
                say(name)
        if total:
            self._bars.update(self._current[1], completed=done, total=total)

    def _finish(self) -> None:
        if self._current is not None:
            self._bars.update(self._current[1], total=1, completed=1)


def _quiet() -> None:
    """Libraries' own progress bars and advice have no place between ours."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("kafka").setLevel(logging.ERROR)
