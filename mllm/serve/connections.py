"""Connections that send nothing whole are closed: uvicorn itself waits for a request's headers for ever."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10
"""How long a request's line and headers may take to arrive."""
PER_CLIENT = 64
"""Connections that one address may have open; more are closed at once."""


class BoundedConnection(H11Protocol):
    """uvicorn's connection with a time limit for headers, and a bound on connections by address."""

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
        """A timer runs exactly while headers are awaited."""
        if self.conn.their_state is h11.IDLE:
            if self._waiting is None:
                self._waiting = self.loop.call_later(HEADER_SECONDS, self.timeout_keep_alive_handler)
        elif self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
