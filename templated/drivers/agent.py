"""The agent in a guest, whichever it is: services use nothing else of one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Protocol

from templated.drivers.guest import (
    Agent,
    Confirmation,
    ExecResult,
    IdentityOrder,
    Output,
    Sink,
)
from templated.drivers.guest_functions import Answer, InvokeOrder, Loaded, LoadOrder
from templated.drivers.qga.agent import GaAgent
from templated.model.spec import AgentKind


class GuestAgent(Protocol):
    """A connection to one guest's agent. `close` ends it; every wait is bounded by the caller.

    Every coroutine but `close` raises Timeout, or GuestError when the agent reports an error or
    the connection ends: UnfitAgent when no other try can do better.
    """

    marked: float
    """When the guest set its mark, from which its clock will be set, on the monotonic clock."""
    asked: float
    """The host's wall clock when `adjust_clock` last asked for the guest's."""

    @property
    def connected(self) -> bool:
        """Whether the host's end of its port is open, as far as is known."""

    @property
    def absence(self) -> str:
        """What may be wrong with a guest whose agent never answers."""

    async def connect(self) -> None:
        """Connect to the hypervisor's end of the port, which says nothing about the guest."""

    async def close(self) -> None:
        """End the connection; requests under way fail with GuestError. Idempotent."""

    async def ping(self, timeout: float) -> None:
        """Have it answer, and find out whether it can do what is needed."""

    async def settle(self, timeout: float) -> None:
        """Wait until the guest's boot does nothing more to what an identity is made of."""

    async def identify(self, timeout: float, identity: IdentityOrder) -> Confirmation:
        """Give the guest its identity; returns what it then reads back, and sets the mark."""

    async def adjust_clock(self, seconds: float, timeout: float) -> float:
        """Shift the guest's wall clock; returns its time after that."""

    async def quiesce(self, timeout: float) -> None:
        """Prepare the guest to be frozen: nothing unique is left in it. Sets the mark."""

    def exec(
        self,
        argv: list[str],
        *,
        timeout: float,
        stdin: bytes | None = None,
        env: dict[str, str] | None = None,
    ) -> AsyncGenerator[Output | ExecResult, None]:
        """Run a command in the guest: its output, and at last how it ended."""

    async def put(self, path: str, content: bytes, mode: int, timeout: float) -> None:
        """Write a file in the guest; it appears under its name only when it is complete."""

    async def get(self, path: str, timeout: float) -> bytes:
        """Read a file of the guest. Its parts come within `timeout` seconds each."""

    async def load(self, order: LoadOrder, timeout: float, sink: Sink | None = None) -> Loaded:
        """Attach a function's code and start it."""

    async def invoke(self, order: InvokeOrder, timeout: float, sink: Sink | None = None) -> Answer:
        """Give the function one request, and wait for its answer."""

    async def rehearse_code(self, timeout: float) -> None:
        """Do once what a function's start and a request do, with the code that is there."""


def guest_agent(kind: AgentKind, path: Path) -> GuestAgent:
    """The agent of a guest whose port is at `path`, not connected yet."""
    return GaAgent(path) if kind == "qemu-ga" else Agent(path)
