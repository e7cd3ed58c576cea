"""A template in memory: its state, its generations, and the one that serves."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from templated.errors import Conflict, HostError
from templated.journal import GenerationRow
from templated.model.generation import (
    TEMPLATE_TRANSITIONS,
    TRANSITIONS,
    GenerationState,
    GenerationView,
    TemplateState,
)
from templated.model.lifecycle import move
from templated.services.machines.generation import Generation, Holder, Leases


@dataclass(eq=False)
class Known:
    """A generation that the journal has, loaded or not."""

    row: GenerationRow
    leases: Leases
    going: bool = False
    """Its files are being removed."""

    def move(self, state: GenerationState) -> None:
        """Change the state. Raises Defect for a move that the table does not have."""
        new = move(TRANSITIONS, self.row.state, state, f"generation {self.row.id}")
        self.row = msgspec.structs.replace(self.row, state=new)

    @property
    def unwanted(self) -> bool:
        """Whether it was kept only for its VMs, and all of them have ended."""
        retired = self.row.state is GenerationState.RETIRED
        return retired and self.leases.free and not self.going


@dataclass(eq=False)
class Template:
    """One template. Whether it is being built is not in its state, as it can serve meanwhile."""

    name: str
    state: TemplateState = TemplateState.UNBUILT
    active: str | None = None
    """The id of the generation that the journal calls active."""
    generation: Generation | None = None
    """The active generation, once it was loaded and verified; None when that failed."""
    problem: str = ""
    """Why it is broken, in one line; empty otherwise."""
    building: bool = False
    known: dict[str, Known] = field(default_factory=dict)
    """All generations, by their ids."""

    def serve(self, generation: Generation) -> None:
        """Clones start from this generation from now on."""
        if self.state is not TemplateState.SERVING:
            self._move(TemplateState.SERVING)
        self.active, self.generation, self.problem = generation.id, generation, ""

    def break_down(self, problem: str) -> None:
        """The active generation cannot be used, for a reason given in one line."""
        if self.state is not TemplateState.BROKEN:
            self._move(TemplateState.BROKEN)
        self.problem = problem

    def remove(self) -> None:
        """From now on nothing starts from it, and no build begins."""
        self._move(TemplateState.REMOVING)

    def _move(self, state: TemplateState) -> None:
        self.state = move(TEMPLATE_TRANSITIONS, self.state, state, f"template {self.name}")

    def require_not_removing(self) -> None:
        """Raises Conflict while its generations are being removed."""
        if self.state is TemplateState.REMOVING:
            raise Conflict(f"template {self.name} is being removed", hint="wait until it is gone")

    def require_serving(self) -> None:
        """Raises HostError with the problem when it is broken, Conflict while it is removed."""
        self.require_not_removing()
        if self.problem:
            raise HostError(self.problem, hint=f"run: templated template build {self.name}")

    def oldest_first(self) -> list[Known]:
        """All generations, in the order in which they were built."""
        return [self.known[key] for key in sorted(self.known)]

    def views(self) -> tuple[GenerationView, ...]:
        """The generations as users see them."""
        return tuple(
            GenerationView(
                id=known.row.id,
                state=known.row.state,
                active=known.row.id == self.active,
                clones=known.leases.count(Holder.CLONE),
                created=known.row.created,
            )
            for known in self.oldest_first()
        )
