"""What instances and their router need of others, as they use it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from templated.drivers.code import CodeFile
from templated.drivers.guest import Output
from templated.drivers.guest_functions import Answer, InvokeOrder, Loaded, LoadOrder
from templated.model.clone import CloneState, StartPath
from templated.model.function import Version
from templated.services.functions.traces import Span

Sink = Callable[[Output], None]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request as the function is told of it; `timeout` is in seconds."""

    request: str
    arn: str
    trace: str
    payload: bytes
    timeout: float


class Guest(Protocol):
    """The agent in an instance's guest."""

    async def load(self, order: LoadOrder, timeout: float, sink: Sink) -> Loaded:
        """Mount the code, prove it, and load the handler."""

    async def invoke(self, order: InvokeOrder, timeout: float, sink: Sink) -> Answer:
        """Give the handler one request."""

    async def adjust_clock(self, seconds: float, timeout: float) -> float:
        """Shift the guest's wall clock; returns its time after that."""


class Hypervised(Protocol):
    """The VM of an instance."""

    @property
    def exited(self) -> asyncio.Future[str]:
        """Done when it has ended; its result says how."""

    async def pause(self) -> None:
        """Stop the vCPUs."""

    async def resume(self) -> None:
        """Let the vCPUs run."""


class Housed(Protocol):
    """A VM with its agent."""

    @property
    def agent(self) -> Guest:
        """Its agent."""

    @property
    def machine(self) -> Hypervised:
        """Its hypervisor."""


class Launched(Protocol):
    """A clone that runs, with code attached."""

    @property
    def vm(self) -> Housed:
        """Its VM."""

    @property
    def state(self) -> CloneState:
        """Where it is in its life."""

    @property
    def path(self) -> StartPath:
        """How it came up."""

    @property
    def phases_ms(self) -> dict[str, float]:
        """How long its start took; `attach` is the host's part of attaching the code."""


class Launches(Protocol):
    """Starts and removes the clones that instances are."""

    async def start_instance(
        self, name: str, template: str, code: CodeFile, function: str
    ) -> Launched:
        """Start a clone by the fastest way, with this code on its second disk.

        Raises what a start raises; leaves nothing of it then.
        """

    async def remove(self, name: str) -> None:
        """End it, and give back all that it had. Raises NotFound when there is none."""


class Code(Protocol):
    """The code on this node."""

    async def ensure(self, digest: str) -> CodeFile:
        """The image of this digest, fetched when it has to be."""


class Versions(Protocol):
    """Which functions and versions there are."""

    def resolve(self, name: str, qualifier: str | None) -> Version:
        """The version that serves this request. Raises NotFound."""

    def names(self) -> Sequence[str]:
        """All functions."""

    def reserved(self, name: str) -> int | None:
        """How many requests of a function may run at once, and do whatever others do."""

    def maximum(self, name: str) -> int | None:
        """How many instances a function may have, and so requests that run at once."""


class Watches(Protocol):
    """Is told of each request, on its way: at once, and without raising anything. Times are those
    of `time.perf_counter`."""

    def arrived(self, span: Span) -> None:
        """It came, and is let in."""

    def began(self, span: Span, at: float) -> None:
        """Its handler begins; once more when an instance ended before it had."""

    def ended(self, span: Span, at: float) -> None:
        """It is over, however; it may never have begun."""


Phases = Mapping[str, float]
