"""Times the phases of one start."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from templated.errors import StartError, TemplatedError
from templated.model.clone import Phase


class PhaseClock:
    """Times the phases of one start; knows which one it is in when something fails."""

    def __init__(self, started: float | None = None) -> None:
        """`started` is when the request arrived, by `time.perf_counter`; None: now."""
        self.started = self._began = time.perf_counter() if started is None else started
        self.phases_ms: dict[str, float] = {}
        self.current: Phase = Phase.ALLOCATE

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Time a block as one phase."""
        self.current = phase
        begin = time.perf_counter()
        yield
        self.phases_ms[phase.value] = _ms_since(begin)

    def allotted(self) -> None:
        """End the first phase, ALLOCATE: what the start needs is there.

        It began with the request, or with the way that is being tried.
        """
        self.phases_ms[Phase.ALLOCATE.value] = _ms_since(self._began)

    def again(self) -> None:
        """Begin another way: only its phases count, but the time since the request goes on."""
        self._began = time.perf_counter()
        self.phases_ms.clear()
        self.current = Phase.ALLOCATE

    def total_ms(self) -> float:
        """Milliseconds since the request's arrival."""
        return _ms_since(self.started)

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


def _ms_since(begin: float) -> float:
    return round((time.perf_counter() - begin) * 1000, 3)
