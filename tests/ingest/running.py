"""A worker at work in a thread beside the test, and waiting for what it comes to."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

Report = TypeVar("Report", covariant=True)


class Worker(Protocol[Report]):
    """What runs until it is told to stop, and reports then."""

    def run(self) -> Report: ...

    def stop(self) -> None: ...


@contextmanager
def at_work(one: Worker[Report], *, join_s: float) -> Iterator[list[Report | Exception]]:
    """``one`` at work in a thread; its report (or what it raised) is in the list afterwards.

    Told to stop, it must have ended within ``join_s``.
    """
    ended: list[Report | Exception] = []

    def work() -> None:
        try:
            ended.append(one.run())
        except Exception as error:  # noqa: BLE001 - the test looks at it
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield ended
    finally:
        one.stop()
        thread.join(join_s)
        assert not thread.is_alive()


def until(true: Callable[[], object], *, timeout_s: float) -> None:
    """Return when ``true()`` holds; within ``timeout_s`` it must."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.05)
