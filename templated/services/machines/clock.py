"""Times the phases of one start."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from templated.errors import StartError, TemplatedError
from templated.model.clone import Phase


class PhaseClock:
    """Times the phases of one start; knows which one it is in when something fails."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.phases_ms: dict[str, float] = {}
        self.current: Phase = Phase.ALLOCATE

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Time a block as one phase; a phase that is entered again adds up."""
        self.current = phase
        begin = time.perf_counter()
        yield
        spent = (time.perf_counter() - begin) * 1000
        self.phases_ms[phase.value] = round(self.phases_ms.get(phase.value, 0.0) + spent, 3)

    def again(self) -> None:
        """Begin another way: only its phases count, but the time since the request goes on."""
        self.phases_ms.clear()

    def total_ms(self) -> float:
        """Milliseconds since the request's arrival."""
        return round((time.perf_counter() - self.started) * 1000, 3)

    def failure(self, error: BaseException) -> StartError:
        """What went wrong, and where."""
        if isinstance(error, TemplatedError):
            message, hint, reason = error.message, error.hint, error.code
        else:
            message, hint, reason = f"{type(error).__name__}: {error}", "", "internal"
        return StartError(
            f"the start failed in phase {self.current.value}: {message}",
            phase=self.current.value,
            reason=reason,
            hint=hint,
        )
