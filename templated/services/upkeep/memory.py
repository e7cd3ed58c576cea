"""Keeps what scaling has learned over restarts: a few versions a second, so that it costs little,
and all of it in a file every few minutes."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from pathlib import Path

import msgspec

from templated.scaling import Scaler
from templated.scaling.chains import Chains
from templated.services.upkeep import learned

EVERY = 300.0
"""Seconds between two files, at least."""


class Memory:
    """What was learned, as it is written down."""

    def __init__(self, path: Path, scaler: Scaler, chains: Chains) -> None:
        self._path, self._scaler, self._chains = path, scaler, chains
        # Versions that had a request, by key, as they were when their turn came.
        self._parts: dict[str, bytes] = {}
        self._turns: deque[str] = deque()
        self._since: float | None = None

    def note(self, key: str) -> None:
        """Something of this version is to be kept."""
        if key not in self._parts:
            self._parts[key] = b""
            self._turns.append(key)

    def forget(self, key: str) -> None:
        """It is gone."""
        if self._parts.pop(key, None) is not None:
            self._turns.remove(key)

    async def load(self) -> None:
        """Take over what the file has of versions that are there.

        Raises OSError, and ValueError for what is damaged; what of it is not known begins anew.
        """
        for part in await asyncio.to_thread(learned.read, self._path):
            if not isinstance(part, dict):
                raise ValueError("a part of it is none")
            if "functions" in part:
                self._scaler.load(part)
                for key in part["functions"]:
                    if key in self._scaler:
                        self.note(key)
            else:
                self._chains.load(part, time.perf_counter())

    async def tend(self, now: float) -> None:
        """A second has passed: look at some versions, and write the file when it is time.

        Raises OSError when it cannot be written; leaves the one that was then.
        """
        # So many a second that all have had their turn before the next file.
        for _ in range(math.ceil(len(self._turns) / EVERY)):
            self._look(self._turns[0])
            self._turns.rotate(-1)
        if self._since is None or now < self._since:
            self._since = now
        if now - self._since >= EVERY:
            self._since = now
            await self._write()

    def _look(self, key: str) -> None:
        self._parts[key] = msgspec.json.encode(self._scaler.saved([key]))

    async def save(self) -> None:
        """Write all of it as it is now. Raises OSError; leaves the file that was then."""
        for key in self._turns:
            self._look(key)
        await self._write()

    async def _write(self) -> None:
        chains = msgspec.json.encode(self._chains.save(time.perf_counter()))
        parts = [chains, *filter(None, self._parts.values())]
        await asyncio.to_thread(learned.write, self._path, parts)
