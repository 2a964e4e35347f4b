"""The queue before the model: one answer after the other, and a client that leaves frees its place."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

from fastapi import Request

from mllm.serve.schemas import ApiError

T = TypeVar("T")


class RequestQueue:
    """Runs one request at a time, in the order of arrival; `seconds` limits one answer."""

    def __init__(self, seconds: float) -> None:
        self._turn = asyncio.Lock()
        self._seconds = seconds

    @property
    def busy(self) -> bool:
        return self._turn.locked()

    async def run(self, work: Callable[[threading.Event], Iterator[T]]) -> AsyncIterator[T]:
        """Yield the items of `work(cancel)`, which runs in a thread when its turn has come.

        `cancel` is set when the reader leaves and when the time is up. The turn ends with the work, not with the
        reading, so a client that reads slowly delays nobody.
        """
        loop, cancel, end = asyncio.get_running_loop(), threading.Event(), object()
        items: asyncio.Queue[Any] = asyncio.Queue()  # `end` follows the last item

        def in_thread() -> None:
            for item in work(cancel):
                loop.call_soon_threadsafe(items.put_nowait, item)

        async def produce() -> None:
            try:
                async with self._turn:
                    timer = loop.call_later(self._seconds, cancel.set)
                    working = asyncio.ensure_future(asyncio.to_thread(in_thread))
                    try:
                        await asyncio.shield(working)
                    finally:  # the thread of a reader that left keeps its turn until it sees `cancel`
                        await asyncio.wait({working})
                        timer.cancel()
            finally:
                items.put_nowait(end)

        producer = asyncio.create_task(produce())
        try:
            while (item := await items.get()) is not end:
                yield item
            await producer  # raises the error of the work
        finally:
            cancel.set()
            producer.cancel()


async def unless_gone(request: Request, result: Awaitable[T]) -> T:
    """Await `result`; cancel it and raise ApiError 499 if the client leaves first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    waited, left = asyncio.ensure_future(result), asyncio.create_task(gone())
    try:
        await asyncio.wait({waited, left}, return_when=asyncio.FIRST_COMPLETED)
        if not waited.done():
            raise ApiError(499, "the client has left")
        return waited.result()
    finally:
        waited.cancel()
        left.cancel()
