"""Connections with a time limit for headers and a bound for each client: uvicorn has neither."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10
"""Seconds in which a request's line and headers must arrive."""
PER_CLIENT = 64
"""Open connections of one address; further connections are closed at once."""


class BoundedConnection(H11Protocol):
    open_by_client: ClassVar[Counter[str]] = Counter()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting: asyncio.TimerHandle | None = None
        self._address = self.client[0] if self.client else ""
        self.open_by_client[self._address] += 1
        if self.open_by_client[self._address] > PER_CLIENT:
            transport.abort()
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._waiting is not None:
            self._waiting.cancel()
        self.open_by_client[self._address] -= 1
        if not self.open_by_client[self._address]:
            del self.open_by_client[self._address]

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def _watch(self) -> None:
        """Run a timer exactly while headers are awaited."""
        if self.conn.their_state is h11.IDLE:
            if self._waiting is None:
                self._waiting = self.loop.call_later(HEADER_SECONDS, self.timeout_keep_alive_handler)
        elif self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
