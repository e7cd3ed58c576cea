"""Our own paths, through the daemon, and the floor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from templated.bench.contenders.base import Once
from templated.bench.floor import floor
from templated.bench.session import POOLED, Row, Session

_ABOUT = {
    "cold": "POST /v1/clones with the path cold: a full boot of the image",
    "direct": "POST /v1/clones with the path direct",
    "standby": "POST /v1/clones with the path standby: QEMU waits already",
    "warm": "POST /v1/clones with the path warm: restored and paused already",
}


@dataclass(frozen=True)
class Ours:
    """A path of the daemon. Timed by the client: from the request to its answer."""

    session: Session
    path: str

    @property
    def name(self) -> str:
        return self.path

    @property
    def about(self) -> str:
        return _ABOUT[self.path]

    @contextmanager
    def opened(self) -> Iterator[Once]:
        if self.path in POOLED:
            self.session.pools.fill(self.path, 1)
        yield self._once

    def _once(self) -> Row:
        row = self.session.start(self.path)
        wall = row.pop("wall")
        return {**row, "total": wall}


@dataclass(frozen=True)
class BareLoop:
    """The floor."""

    session: Session
    name: str = "floor"
    about: str = "what direct does, in a bare loop with no daemon"

    @contextmanager
    def opened(self) -> Iterator[Once]:
        with floor(self.session.generation(), self.session.info()) as bare:
            yield bare.once
