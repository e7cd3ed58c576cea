"""What VMs are promised of the host, so that no more are started than it is to hold.

A promise is what a VM may come to use, and not what it uses: clones share most of their memory, so
without a bound in the configuration nothing is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from templated.errors import Busy
from templated.model.spec import TemplateSpec
from templated.model.units import size_bytes


@dataclass(frozen=True)
class Promise:
    """What one VM of a template may come to use; `vms`: how many of them there may be."""

    template: str
    memory: int
    disk: int
    vms: int | None

    @classmethod
    def of(cls, spec: TemplateSpec) -> Promise:
        """The memory of its limits, or else the guest's; the disk of them, or else the image's."""
        memory = size_bytes(spec.limits.memory or spec.machine.memory)
        disk = size_bytes(spec.limits.disk or spec.image.size)
        return cls(spec.name, memory, disk, spec.limits.vms)


class Admission:
    """Counts promises by slot, and refuses what would be too much."""

    def __init__(self, memory: int | None = None, disk: int | None = None) -> None:
        """Bounds on the bytes of all promises together; None: there is none."""
        self._bounds = {"memory": memory, "disk": disk}
        self._held: dict[str, Promise] = {}
        self._dead: set[str] = set()
        self._vms: Counter[str] = Counter()
        self._total: Counter[str] = Counter()

    @contextmanager
    def entering(self, promise: Promise | None) -> Iterator[Callable[[str], None]]:
        """Count a VM whose slot is being made, until the block ends or `hold` names its slot.

        Raises Busy when it would be too much; counts nothing then.
        """
        if promise is None:
            yield lambda _: None
            return
        self.require(promise)
        self._count(promise, 1)
        try:
            yield lambda slot_id: self.hold(slot_id, promise)
        finally:
            self._count(promise, -1)

    def hold(self, slot_id: str, promise: Promise) -> None:
        """Count the VM of a slot, without a question, until `release`."""
        self._held[slot_id] = promise
        self._count(promise, 1)

    def died(self, slot_id: str) -> None:
        """The VM of a slot has ended; until `release` only its disk counts. Idempotent."""
        if slot_id in self._held and slot_id not in self._dead:
            self._dead.add(slot_id)
            self._count(replace(self._held[slot_id], disk=0), -1)

    def release(self, slot_id: str) -> None:
        """A slot is given back. Idempotent."""
        self.died(slot_id)
        self._dead.discard(slot_id)
        promise = self._held.pop(slot_id, None)
        if promise is not None:
            self._total["disk"] -= promise.disk

    def _count(self, promise: Promise, number: int) -> None:
        self._vms[promise.template] += number
        self._total["memory"] += number * promise.memory
        self._total["disk"] += number * promise.disk

    def require(self, promise: Promise, count: int = 1) -> None:
        """Raises Busy, with the sums, when so many more VMs would be too many."""
        present = self._vms[promise.template]
        if promise.vms is not None and present + count > promise.vms:
            raise Busy(
                f"{_some(count)} more of {promise.template} would be too many: there are "
                f"{present}, members of its pools among them, and its limits.vms is {promise.vms}",
                hint="remove clones, make its pools smaller, or change the template and build it",
            )
        for what, bound in self._bounds.items():
            wanted = count * getattr(promise, what)
            if bound is not None and self._total[what] + wanted > bound:
                raise Busy(
                    f"{_some(count)} of {promise.template} may come to use {_mib(wanted)} of "
                    f"{what}, and "
                    f"{_mib(self._total[what])} of the {_mib(bound)} of limits.{what} are promised "
                    "to others",
                    hint=f"remove clones, make pools smaller, or raise limits.{what} in the "
                    "configuration",
                )


def _some(count: int) -> str:
    return "1 VM" if count == 1 else f"{count} VMs"


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"
