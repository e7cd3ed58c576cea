"""Values by slots of time, of which only the newest are kept."""

from __future__ import annotations

from array import array
from typing import Any


class Ring:
    """One number for each of the last `slots` slots; a slot is an integer that grows with time.

    A slot that is older than the ring reads as 0, and writing to it changes nothing.
    """

    __slots__ = ("_newest", "_values", "slots")

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._values = array("d", bytes(8 * slots))
        self._newest: int | None = None

    def add(self, slot: int, value: float) -> None:
        """Add to what the slot has."""
        if self._reach(slot):
            self._values[slot % self.slots] += value

    def raise_to(self, slot: int, value: float) -> None:
        """Keep the larger of `value` and what the slot has."""
        if self._reach(slot) and value > self._values[slot % self.slots]:
            self._values[slot % self.slots] = value

    def total(self, first: int, last: int) -> float:
        """The sum of the slots from `first` to `last`, both included."""
        if self._newest is None:
            return 0.0
        first, last = max(first, self._newest - self.slots + 1), min(last, self._newest)
        if first > last:
            return 0.0
        begin, end = first % self.slots, last % self.slots + 1
        if begin < end:
            return sum(self._values[begin:end])
        return sum(self._values[begin:]) + sum(self._values[:end])

    def row(self, last: int) -> list[float]:
        """All slots up to `last`, the oldest first."""
        return [self.total(slot, slot) for slot in range(last - self.slots + 1, last + 1)]

    def _reach(self, slot: int) -> bool:
        """Whether the slot is in the ring, which moves on for a new one."""
        newest = self._newest
        if newest is None:
            self._newest = slot
            return True
        if slot > newest:
            for passed in range(max(newest, slot - self.slots) + 1, slot + 1):
                self._values[passed % self.slots] = 0.0
            self._newest = slot
            return True
        return slot > newest - self.slots

    def saved(self) -> dict[str, Any]:
        """For `load`: the slots that are not 0."""
        if self._newest is None:
            return {}
        last = self._newest
        return {
            "last": last,
            "values": {
                str(last - self.slots + 1 + at): value
                for at, value in enumerate(self.row(last))
                if value
            },
        }

    def load(self, data: dict[str, Any]) -> None:
        """Take over what `saved` gave."""
        if data:
            self._reach(int(data["last"]))
            for slot, value in data["values"].items():
                self.add(int(slot), float(value))
