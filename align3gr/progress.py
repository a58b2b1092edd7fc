"""Progress bars of long commands: one a step, on standard error, where a person looks on."""

from typing import Any


class Bars:
    """A context in which ``bars(step, done, total)`` moves that step's bar; silent off a terminal."""

    def __init__(self, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, step: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` of ``step``; a step's first call opens its bar and ends the others."""
        if step not in self._tasks:
            for task in self._tasks.values():
                last = self._bars.tasks[task].total
                self._bars.update(task, completed=last)
            self._tasks[step] = self._bars.add_task(step, total=total, note=note)
        self._bars.update(self._tasks[step], completed=done, total=total, note=note)
