"""The pause after a failure: longer with each in a row, and over at once when the process is to stop."""

import time
from collections.abc import Callable

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


def back_off(failures: int, stopping: Callable[[], bool]) -> None:
    """Wait as the ``failures``-th failure in a row (1, 2, ...) asks for, or until ``stopping()``."""
    until = time.monotonic() + _SECONDS[min(failures, len(_SECONDS)) - 1]
    while time.monotonic() < until and not stopping():
        time.sleep(0.05)
