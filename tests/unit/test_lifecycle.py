"""States: every table as it is meant, and every move that it does not have tried on its entity."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from templated.drivers.hypervisor import states
from templated.drivers.hypervisor.states import Life, MachineState
from templated.errors import Defect
from templated.journal import CloneRow, GenerationRow, Journal
from templated.model.api import OPERATION_TRANSITIONS, OperationState
from templated.model.clone import TRANSITIONS as CLONES
from templated.model.clone import CloneState, Slot, StartPath
from templated.model.function import EVENT_TRANSITIONS, INSTANCE_TRANSITIONS, InstanceState
from templated.model.generation import TEMPLATE_TRANSITIONS, GenerationState, TemplateState
from templated.model.generation import TRANSITIONS as GENERATIONS
from templated.model.lifecycle import S, Table, move
from templated.services.clones.clone import Started
from templated.services.functions.instance import Instance
from templated.services.machines.generation import Holder, Leases
from templated.services.pools.members import MEMBER_TRANSITIONS, Member, MemberState
from templated.services.templates.template import Known, Template
from tests.unit.fake_daemon import run
from tests.unit.fake_instances import version

# What may follow what, written a second time: a table changes on purpose, or this fails.
MEANT: dict[str, tuple[Table[Any], str]] = {
    "clone": (CLONES, "starting>running running>dead,removing dead>removing removing>"),
    "generation": (GENERATIONS, "building>ready ready>retired retired>"),
    "template": (
        TEMPLATE_TRANSITIONS,
        """unbuilt>broken,removing,serving serving>broken,removing broken>removing,serving
           removing>broken""",
    ),
    "operation": (OPERATION_TRANSITIONS, "running>done,failed done> failed>"),
    "instance": (
        INSTANCE_TRANSITIONS,
        """starting>ending,initialising initialising>busy,ending,idle busy>ending,idle
           idle>busy,ending,paused paused>busy,ending ending>""",
    ),
    "event": (
        EVENT_TRANSITIONS,
        "queued>failed,running running>failed,queued,running failed>",
    ),
    "member": (
        MEMBER_TRANSITIONS,
        "made>discarded,waiting waiting>taken taken>discarded discarded>",
    ),
    "machine": (
        states.TRANSITIONS,
        """spawned>ended,paused,released,running,saved,waiting
           waiting>ended,expecting,loading,released expecting>ended,loading,released
           loading>ended,paused,released paused>ended,released,running,saving
           running>ended,paused,released saving>ended,released,saved saved>ended,released
           released> ended>""",
    ),
}


def slot() -> Slot:
    return Slot(
        id="s",
        index=0,
        generation="g",
        uuid="0" * 36,
        mac="02:00:00:00:00:01",
        ip="10.0.0.3",
        machine_id="a" * 32,
        boot_id="b" * 36,
    )


def clone(state: CloneState) -> Any:
    return Started(
        name="c",
        template="t",
        generation_id="g",
        path=StartPath.DIRECT,
        created="",
        lease=Leases().take(Holder.CLONE),
        state=state,
        slot=slot(),
    )


def generation(state: GenerationState) -> Any:
    row = GenerationRow(id="g", template="t", state=state, created="")
    return SimpleNamespace(known=Known(row, Leases()))


def member(state: MemberState) -> Any:
    vm: Any = SimpleNamespace(slot=slot())
    nothing: Any = None
    lease = Leases().take(Holder.MEMBER)
    return Member(StartPath.WARM, nothing, nothing, vm, lease, state=state)


class Machine(Life):
    """A machine that is nothing but its state."""

    def __init__(self, state: MachineState) -> None:
        self.pid, self._state = 1, state
        self.exited = asyncio.get_running_loop().create_future()

    def last_words(self) -> str:
        return ""


def instance(state: InstanceState) -> Instance:
    return Instance(name="f-1", version=version(), left=lambda _: None, state=state)


Make = Callable[[Any], Any]
ENTITIES: dict[str, tuple[Table[Any], Make, Callable[[Any, Any], None], Callable[[Any], Any]]] = {
    "clone": (CLONES, clone, lambda it, new: it.move(new), lambda it: it.state),
    "generation": (
        GENERATIONS,
        generation,
        lambda it, new: it.known.move(new),
        lambda it: it.known.row.state,
    ),
    "template": (
        TEMPLATE_TRANSITIONS,
        lambda state: Template("t", state=state),
        lambda it, new: it._move(new),
        lambda it: it.state,
    ),
    "member": (MEMBER_TRANSITIONS, member, lambda it, new: it.move(new), lambda it: it.state),
    "instance": (
        INSTANCE_TRANSITIONS,
        instance,
        lambda it, new: it.move(new),
        lambda it: it.state,
    ),
    "machine": (states.TRANSITIONS, Machine, lambda it, new: it._move(new), lambda it: it._state),
}


@pytest.mark.parametrize("name", MEANT)
def test_tables_are_as_they_are_meant(name: str) -> None:
    """Every state has a row, and each row has what it is meant to have."""
    table, text = MEANT[name]
    kind: Any = type(next(iter(table)))
    assert set(table) == set(kind)
    rows = {old.value: ",".join(sorted(n.value for n in after)) for old, after in table.items()}
    assert rows == dict(meant.split(">") for meant in text.split())


def pairs(table: Table[S]) -> list[tuple[S, S]]:
    return [(old, new) for old in table for new in table]


@pytest.mark.parametrize("name", ENTITIES)
def test_a_forbidden_move_is_a_defect_and_changes_nothing(name: str) -> None:
    """Every pair of states is tried on an entity: it moves, or it stays and says so."""

    async def main() -> None:
        table, make, change, state_of = ENTITIES[name]
        for old, new in pairs(table):
            entity = make(old)
            if new in table[old]:
                change(entity, new)
                assert state_of(entity) is new
                continue
            with pytest.raises(Defect, match=f"is {old.value}, it cannot become {new.value}") as e:
                change(entity, new)
            assert e.value.code == "internal" and "\n" not in e.value.message
            assert state_of(entity) is old

    run(main())


def test_operations_end_once() -> None:
    """The table that `Operations` moves by."""
    for old, new in pairs(OPERATION_TRANSITIONS):
        allowed = old is OperationState.RUNNING and new is not old
        if allowed:
            assert move(OPERATION_TRANSITIONS, old, new, "operation o") is new
        else:
            with pytest.raises(Defect, match="operation o is"):
                move(OPERATION_TRANSITIONS, old, new, "operation o")


def test_events_move_by_their_table() -> None:
    """The one that the journal asks."""
    for old, new in pairs(EVENT_TRANSITIONS):
        if new in EVENT_TRANSITIONS[old]:
            assert move(EVENT_TRANSITIONS, old, new, "event e") is new
        else:
            with pytest.raises(Defect, match="event e is"):
                move(EVENT_TRANSITIONS, old, new, "event e")


def test_templates_move_by_what_happens_to_them() -> None:
    """What its methods do in a state that does not allow it."""
    broken = Template("t", state=TemplateState.REMOVING)
    with pytest.raises(Defect, match="template t is removing, it cannot become serving"):
        broken.serve(SimpleNamespace(id="g"))  # type: ignore[arg-type]
    assert broken.active is None and broken.generation is None
    broken.break_down("half of it is gone")
    assert broken.state is TemplateState.BROKEN and broken.problem == "half of it is gone"
    broken.remove()
    with pytest.raises(Defect, match="cannot become removing"):
        broken.remove()


def row(state: CloneState) -> CloneRow:
    return CloneRow(
        name="c",
        slot=slot(),
        template="t",
        state=state,
        path=StartPath.DIRECT,
        created="",
        pid=1,
        pid_start=1,
        phases={},
        total_ms=1.0,
    )


def test_the_journal_writes_no_forbidden_move_of_a_clone(tmp_path: Path) -> None:
    """Each pair of states: written, or refused with the row as it was."""

    async def main() -> None:
        for number, (old, new) in enumerate(pairs(CLONES)):
            journal = Journal(tmp_path / str(number))
            await journal.open()
            await asyncio.to_thread(journal.new_slot, "g", lambda _: slot(), 4)
            await journal.new_clone(row(old))
            if new in CLONES[old] or new is old:
                await journal.clone_state("s", new, "why")
            else:
                with pytest.raises(Defect, match=f"clone c is {old.value}"):
                    await journal.clone_state("s", new, "why")
            (written,) = await journal.clones()
            moved = new in CLONES[old] or new is old
            assert written.state is (new if moved else old)
            assert written.reason == ("why" if moved else "")
            await journal.close()

    run(main())


def test_the_journal_writes_no_forbidden_move_of_a_generation(tmp_path: Path) -> None:
    """A retired generation never serves again, and what is not there is not activated."""

    async def main() -> None:
        journal = Journal(tmp_path / "journal")
        await journal.open()
        with pytest.raises(Defect, match="no generation a"):
            await journal.activate("a", "t")
        await journal.new_generation("a", "t")
        with pytest.raises(Defect, match="generation a is building, it cannot become retired"):
            await journal.generation_state("a", GenerationState.RETIRED)
        await journal.activate("a", "t")
        await journal.activate("a", "t")  # a rollback to what serves is no move
        with pytest.raises(Defect, match="generation a is ready, it cannot become building"):
            await journal.generation_state("a", GenerationState.BUILDING)
        await journal.generation_state("a", GenerationState.RETIRED)
        await journal.new_generation("b", "t")
        await journal.activate("b", "t")
        with pytest.raises(Defect, match="generation a is retired, it cannot become ready"):
            await journal.activate("a", "t")
        assert await journal.active() == {"t": "b"}
        states_now = {found.id: found.state for found in await journal.generations()}
        assert states_now == {"a": GenerationState.RETIRED, "b": GenerationState.READY}
        await journal.close()

    run(main())
