"""Names of the last seconds."""

from __future__ import annotations

# Names that have passed, before the lists are cut.
_PASSED = 1024


class Recent:
    """Names by when they were added; lists, since all of them are taken at once, and often."""

    def __init__(self, reach: float) -> None:
        """They are kept for `reach` seconds."""
        self._reach = reach
        self._names: list[str] = []
        self._times: list[float] = []
        self._first = 0

    def add(self, name: str, now: float) -> None:
        """Add one that is not among them."""
        self._pass(now)
        self._names.append(name)
        self._times.append(now)

    def names(self, now: float) -> list[str]:
        """Those of the last seconds, the latest last."""
        self._pass(now)
        return self._names[self._first :]

    def _pass(self, now: float) -> None:
        times, first = self._times, self._first
        # What is from the future was added before the clock went back.
        while first < len(times) and not 0 <= now - times[first] < self._reach:
            first += 1
        if first > _PASSED and 2 * first > len(times):
            del self._names[:first], times[:first]
            first = 0
        self._first = first
