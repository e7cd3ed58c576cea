"""A clone in memory: what is known of it in each of its states."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from templated.drivers.code import CodeFile
from templated.journal import CloneRow
from templated.model.clone import TRANSITIONS, CloneState, CloneView, Identity, Slot, StartPath
from templated.model.lifecycle import move
from templated.model.limits import UNLIMITED, Limits
from templated.services.machines.generation import Generation, Lease
from templated.services.machines.vm import Vm


@dataclass(kw_only=True, eq=False)
class Clone:
    """What is known of a clone in every state."""

    name: str
    template: str
    generation_id: str
    path: StartPath
    created: str
    lease: Lease
    limits: Limits = UNLIMITED
    """What its VM may take of the host."""
    function: str = ""
    """Of which function and version it is an instance, as in hello:3; empty for all others."""
    state: CloneState = CloneState.STARTING
    reason: str = ""

    def move(self, state: CloneState, reason: str = "") -> None:
        """Change the state. Raises Defect for a move that the table does not have."""
        self.state = move(TRANSITIONS, self.state, state, f"clone {self.name}")
        self.reason = reason or self.reason

    @property
    def pid(self) -> int | None:
        """The pid of its hypervisor, while the clone owns one."""
        return None

    @property
    def allotted(self) -> Slot | None:
        """Its slot, once it has one."""
        return None

    def view(self) -> CloneView:
        """The clone as users see it; the slot's numbers once it has one."""
        slot = self.allotted
        return CloneView(
            name=self.name,
            template=self.template,
            generation=self.generation_id,
            state=self.state,
            path=self.path,
            pid=self.pid,
            uuid=slot.uuid if slot else "",
            identity=Identity(
                mac=slot.mac if slot else "",
                ip=slot.ip if slot else "",
                hostname=self.name,
                machine_id=slot.machine_id if slot else "",
                boot_id=slot.boot_id if slot else "",
            ),
            phases_ms=self._phases(),
            total_ms=self._total(),
            created=self.created,
            reason=self.reason,
        )

    def _phases(self) -> dict[str, float]:
        return {}

    def _total(self) -> float | None:
        return None


@dataclass(kw_only=True, eq=False)
class Starting(Clone):
    """A name that is taken, on its way up."""

    generation: Generation
    code: CodeFile | None = None
    """What is behind its second disk, as an instance of a function."""
    slot: Slot | None = None
    """Set once a slot is allotted."""

    @property
    def allotted(self) -> Slot | None:
        return self.slot


@dataclass(kw_only=True, eq=False)
class Started(Clone):
    """A clone that the journal has: it runs, or it is dead or being removed."""

    slot: Slot
    phases_ms: dict[str, float] = field(default_factory=dict)
    total_ms: float | None = None

    @property
    def allotted(self) -> Slot:
        return self.slot

    def _phases(self) -> dict[str, float]:
        return self.phases_ms

    def _total(self) -> float | None:
        return self.total_ms


@dataclass(kw_only=True, eq=False)
class Running(Started):
    """A clone with a VM: running, or being removed. One that died is a `Started` again."""

    vm: Vm

    @property
    def pid(self) -> int:
        return self.vm.machine.pid

    def without_vm(self) -> Started:
        """The same clone when its VM has ended."""
        return Started(
            **_facts(self), slot=self.slot, phases_ms=self.phases_ms, total_ms=self.total_ms
        )


def started(starting: Starting, row: CloneRow, vm: Vm) -> Running:
    """The clone that a start has brought up, once the journal has its row."""
    starting.move(CloneState.RUNNING)
    return Running(
        **_facts(starting), slot=row.slot, phases_ms=row.phases, total_ms=row.total_ms, vm=vm
    )


def known(row: CloneRow, lease: Lease, limits: Limits) -> Started:
    """The clone that a row of an earlier daemon describes."""
    return Started(
        name=row.name,
        template=row.template,
        generation_id=row.slot.generation,
        path=row.path,
        created=row.created,
        lease=lease,
        limits=limits,
        state=row.state,
        reason=row.reason,
        slot=row.slot,
        phases_ms=row.phases,
        total_ms=row.total_ms,
    )


def adopted(clone: Started, vm: Vm) -> Running:
    """A clone of an earlier daemon whose VM was found again."""
    return Running(
        **_facts(clone), slot=clone.slot, phases_ms=clone.phases_ms, total_ms=clone.total_ms, vm=vm
    )


def _facts(clone: Clone) -> dict[str, Any]:
    """The fields that a clone keeps from state to state."""
    return {field.name: getattr(clone, field.name) for field in fields(Clone)}
