"""One instance of a function in memory, and how talking to it can end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from templated.model.clone import CloneState
from templated.model.config import FunctionConfig
from templated.model.function import INSTANCE_TRANSITIONS, InstanceState, Version
from templated.model.lifecycle import move
from templated.model.units import seconds
from templated.services.functions.parts import Guest, Hypervised, Launched


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long instances may take to load, and how long they stay, in seconds."""

    init: float
    freeze_after: float
    keep_alive: float
    grace: float = 2.0
    """Beyond the bound of an init, in which the guest says itself that it was reached."""
    removal_pauses: tuple[float, ...] = (1.0, 5.0, 30.0)
    """Before a removal that failed is tried again."""

    @classmethod
    def of(cls, config: FunctionConfig) -> Timing:
        """As it is configured."""
        return cls(
            init=seconds(config.init_timeout),
            freeze_after=seconds(config.freeze_after),
            keep_alive=seconds(config.keep_alive),
        )


class InitError(Exception):
    """A function's init failed: `payload` says how, as Lambda does. Its instance has ended."""

    def __init__(
        self, instance: Instance, payload: bytes, timeout: float = 0.0, why: str = ""
    ) -> None:
        """`timeout` is what it was allowed, in seconds, when it took longer."""
        super().__init__(f"the init of {instance.name} failed")
        self.instance = instance
        self.why = why
        self.payload = payload
        self.timeout = timeout
        self.wait = 0.0
        """When it is told to a request that came later: seconds until the next try."""

    @property
    def timed_out(self) -> bool:
        """It took too long."""
        return self.timeout > 0

    def again(self, wait: float) -> InitError:
        """The same for a request for which no other init is tried, for so many seconds."""
        error = InitError(self.instance, self.payload, self.timeout, self.why)
        error.wait = wait
        return error


class TooLong(Exception):
    """A handler passed its timeout. Its instance has ended."""


class NotBegun(Exception):
    """An instance ended before it was sent a request that it had been taken for."""


@dataclass(eq=False, kw_only=True)
class Instance:
    """One instance: what is known of it, and who is told when it can no longer be used."""

    name: str
    version: Version
    left: Callable[[Instance], None]
    """Called once, when it begins to end."""
    may_end: Callable[[], bool] = lambda: True
    """Asked when no request has come for long."""
    state: InstanceState = InstanceState.STARTING
    start: str = "direct"
    """How its clone came up: `pool` or `direct`."""
    phases_ms: dict[str, float] = field(default_factory=dict)
    clone: Launched | None = None
    guest: Guest | None = None
    machine: Hypervised | None = None
    served: int = 0
    used: float = 0.0
    """When it was used last, by the loop's clock."""
    marked: float = 0.0
    """When its guest marked its clock last."""
    lag: float = 0.0
    """How long its guest ran between its mark and its pause, in seconds."""
    stopped: bool = False
    """Its vCPUs are stopped."""
    pausing: asyncio.Event | None = None
    """Set when a pause that was begun has ended."""
    timer: asyncio.TimerHandle | None = None
    work: asyncio.Task[object] | None = None
    """What talks to its guest at present; cancelled when the instance ends."""
    asked: bool = False
    """Its guest may have seen what `work` is about."""
    gone: str = ""
    """Why it ended."""
    died: bool = False
    """It ended though nobody wanted that."""
    ahead: bool = False
    """It was started before a request came for it."""
    removed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when all that it had was given back, or cannot be."""

    def move(self, state: InstanceState) -> None:
        """Change the state. Raises Defect for a move that the table does not have."""
        self.state = move(INSTANCE_TRANSITIONS, self.state, state, f"instance {self.name}")

    @property
    def up(self) -> bool:
        """Whether its VM runs, as far as is known."""
        return not self.gone and self.machine is not None and not self.machine.exited.done()

    @property
    def taken(self) -> bool:
        """Whether somebody removes its clone: it does not end by itself then."""
        return self.clone is not None and self.clone.state is CloneState.REMOVING

    @property
    def initialised(self) -> bool:
        """Whether it has served or rested: it was not started for the request that it has."""
        return self.served > 0 or self.used > 0

    def unset_timer(self) -> None:
        """Nothing happens to it by itself any more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
