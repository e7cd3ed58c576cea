"""The life of a machine: its states, the same for every hypervisor, and what each allows."""

from __future__ import annotations

import asyncio
import contextlib
import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator

from templated.errors import Defect, HypervisorError
from templated.model.lifecycle import Table, move


class MachineState(enum.Enum):
    """Where a machine is in its life. `TRANSITIONS` says what may follow what."""

    SPAWNED = "spawned"
    """Its process was started, or found again; nothing is known of its VM yet."""
    WAITING = "waiting"
    """It waits for a saved state."""
    EXPECTING = "expecting"
    """As `waiting`, and it has agreed on how the state will be loaded."""
    LOADING = "loading"
    """It loads a state. When that fails it stays in this state, and can no longer be used."""
    PAUSED = "paused"
    """Its vCPUs stand still."""
    RUNNING = "running"
    SAVING = "saving"
    """It writes its state. When that fails it stays in this state, and can no longer be used."""
    SAVED = "saved"
    """Its memory belongs to a generation: it must never run again."""
    RELEASED = "released"
    """It goes on, and this side no longer controls it."""
    ENDED = "ended"


_S = MachineState
_LAST = frozenset({_S.RELEASED, _S.ENDED})
TRANSITIONS: Table[MachineState] = {
    # An adopted one is found in any of these.
    _S.SPAWNED: frozenset({_S.WAITING, _S.PAUSED, _S.RUNNING, _S.SAVED}) | _LAST,
    _S.WAITING: frozenset({_S.EXPECTING, _S.LOADING}) | _LAST,
    _S.EXPECTING: frozenset({_S.LOADING}) | _LAST,
    _S.LOADING: frozenset({_S.PAUSED}) | _LAST,
    _S.PAUSED: frozenset({_S.RUNNING, _S.SAVING}) | _LAST,
    _S.RUNNING: frozenset({_S.PAUSED}) | _LAST,
    _S.SAVING: frozenset({_S.SAVED}) | _LAST,
    _S.SAVED: _LAST,
    _S.RELEASED: frozenset(),
    _S.ENDED: frozenset(),
}
WAITS = frozenset({_S.WAITING, _S.EXPECTING})
LIVE = WAITS | {_S.PAUSED, _S.RUNNING}
"""Its control channel is connected, and its VM can still be used."""
STANDS = WAITS | {_S.PAUSED}
"""Its guest does not run, and can still be used."""
ANSWERS = LIVE | {_S.SAVED}
HELD = frozenset(_S) - {_S.RELEASED}


class Life(ABC):
    """The guard that machines inherit: each method names the states that it is allowed in."""

    pid: int
    exited: asyncio.Future[str]
    _state = MachineState.SPAWNED

    @property
    def state(self) -> MachineState:
        """Where it is. A process that ended by itself shows here at once."""
        ended = self._state is not MachineState.RELEASED and self.exited.done()
        return MachineState.ENDED if ended else self._state

    @abstractmethod
    def last_words(self) -> str:
        """See `templated.drivers.hypervisor.base.Machine`."""

    def _require(self, *allowed: MachineState) -> None:
        """Raises HypervisorError when the process has ended, Defect in a state not `allowed`."""
        state = self.state
        if state is MachineState.ENDED and state not in allowed:
            raise HypervisorError(self._ending())
        if state not in allowed:
            raise Defect(f"VM {self.pid} is {state.value}, which does not allow this")

    def _move(self, new: MachineState) -> None:
        """Change the state. Raises Defect when that must not follow."""
        self._state = move(TRANSITIONS, self._state, new, f"VM {self.pid}")

    def _ending(self) -> str:
        """How the process ended, in one line."""
        words = self.last_words()
        return f"the VM {self.exited.result()}" + (f": {words}" if words else "")

    @contextlib.contextmanager
    def _exit_expires(self, bound: asyncio.Timeout) -> Iterator[None]:
        """End the wait when the process ends. Without a task, as every start waits here."""

        def expire(_: asyncio.Future[str]) -> None:
            with contextlib.suppress(RuntimeError):  # it has been left meanwhile
                bound.reschedule(0.0)

        self.exited.add_done_callback(expire)
        try:
            yield
        finally:
            self.exited.remove_done_callback(expire)

    async def _ends_soon(self) -> bool:
        await asyncio.wait({self.exited}, timeout=0.5)
        return self.exited.done()
