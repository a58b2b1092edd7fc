"""Gathers concurrent requests into one decode, without making anyone wait for company.

While one batch is decoded in the worker thread, the next gathers; a lone request starts at once. The event
loop only ever waits, so health and metrics answer while the model works.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from features.errors import ProductError

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class Overloaded(ProductError):  # noqa: N818 - reads as what it is
    """More requests wait than the settings allow, or one waited too long."""


class Batcher(Generic[Ask, Answer]):
    """``submit`` from the event loop; ``decode`` runs in one worker thread, with up to ``size`` asks."""

    def __init__(
        self,
        decode: Callable[[Sequence[Ask]], Sequence[Answer]],
        *,
        size: int,
        queue: int,
        timeout_seconds: float,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """``prepare`` runs once in the worker thread, before its first decode."""
        self._decode, self._size, self._timeout = decode, size, timeout_seconds
        self._waiting: asyncio.Queue[tuple[Ask, asyncio.Future[Answer]]] = asyncio.Queue(queue)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="decode", initializer=prepare)
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to decode; call it from the event loop."""
        self._loop_task = asyncio.create_task(self._run(), name="batching")

    async def stop(self) -> None:
        """End after the batch in work; who still waits is answered Overloaded."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        while not self._waiting.empty():
            _, answer = self._waiting.get_nowait()
            if not answer.done():
                answer.set_exception(Overloaded("the server is stopping; ask another replica"))
        self._worker.shutdown(wait=True)

    async def submit(self, ask: Ask) -> Answer:
        """The answer to ``ask``. Raises Overloaded, or what ``decode`` raises for it."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((ask, answer))
        except asyncio.QueueFull as error:
            raise Overloaded("too many requests wait; try again, or add a replica") from error
        try:
            async with asyncio.timeout(self._timeout):
                return await answer
        except TimeoutError as error:
            raise Overloaded(f"no answer within {self._timeout:g} s; try again, or add a replica") from error

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._size and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            batch = [(ask, answer) for ask, answer in batch if not answer.done()]  # some clients went away
            if batch:
                outcomes = await loop.run_in_executor(self._worker, self._answer, [ask for ask, _ in batch])
                for (_, answer), outcome in zip(batch, outcomes, strict=True):
                    if answer.done():
                        continue
                    if isinstance(outcome, BaseException):
                        answer.set_exception(outcome)
                    else:
                        answer.set_result(outcome)

    def _answer(self, asks: list[Ask]) -> list[Answer | Exception]:
        """Decode together; when that fails decode one by one, so that one bad request fails alone."""
        try:
            return list(self._decode(asks))
        except Exception as error:
            if len(asks) == 1:
                return [error]
            if not isinstance(error, ProductError):  # one of ours says itself what is the matter
                log.exception("decode=failed requests=%d again=one_by_one", len(asks))
        outcomes: list[Answer | Exception] = []
        for ask in asks:
            outcomes += self._answer([ask])
        return outcomes
