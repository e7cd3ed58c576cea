"""The clones' state machine over a fake hypervisor: every failure gives everything back."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from templated.drivers.hypervisor import fake as fake_hypervisor
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.drivers.hypervisor.qemu.driver import Qemu
from templated.errors import Busy, Conflict, HostError, InvalidRequest, NotFound, StartError
from templated.model.api import CloneRequest
from templated.model.clone import CloneState, CloneView
from templated.services.daemon import Services
from tests.unit.fake_daemon import GENERATION, configured, daemon, play, run, until

pytestmark = pytest.mark.usefixtures("no_blocking_calls")


async def held(running: Services) -> tuple[int, int, set[str]]:
    """Rows of clones and of slots in use, and directories that belong to no ready slot."""
    journal, layout = running.context.journal, running.context.layout
    slots = running.context.slots  # a slot that is just being made is neither free nor in use
    await until(lambda: all(len(slots._ready[g]) >= slots._target for g in slots._layers))
    free = {slot.id for slot in await journal.free_slots()}
    rows = await journal.clones()
    directories = {p.name for p in (*layout.slots.iterdir(), *layout.sockets.iterdir())}
    return len(rows), len(running.clones), directories - free


@pytest.mark.parametrize(
    ("step", "phase"),
    [
        ("spawn", "spawn"),
        ("connect", "spawn"),
        ("restore", "restore"),
        ("resume", "resume"),
        ("identify", "identify"),
        ("nonsense", "identify"),
        ("silence", "identify"),
        ("clock", "identify"),
        ("link", "link"),
    ],
)
def test_a_failure_at_any_step_gives_everything_back(tmp_path: Path, step: str, phase: str) -> None:
    """No row, directory or machine is left; the error names the phase; the next start works."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        fake.fail = step
        with pytest.raises(StartError) as caught:
            await running.clones.create(CloneRequest(name="a"))
        assert caught.value.phase == phase and "clone a" in caught.value.message
        assert caught.value.hint
        assert await held(running) == (0, 0, set()) and fake.running() == []
        (failures,) = running.context.metrics.failures.collect()
        text = [sample for sample in failures.samples if sample.value]
        assert any(sample.labels["template"] == "t" for sample in text)
        fake.fail = ""
        (clone,) = await running.clones.create(CloneRequest(name="a"))
        assert clone.state is CloneState.RUNNING

    play(tmp_path, scenario)


def test_a_hundred_at_once_share_nothing(tmp_path: Path) -> None:
    """Concurrent requests never get the same number."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        requests = (running.clones.create(CloneRequest(name=f"c-{i}")) for i in range(100))
        clones = [views[0] for views in await asyncio.gather(*requests)]
        for values in (
            {c.uuid for c in clones},
            {c.identity.mac for c in clones},
            {c.identity.ip for c in clones},
            {c.identity.machine_id for c in clones},
            {c.identity.boot_id for c in clones},
            {c.identity.hostname for c in clones},
        ):
            assert len(values) == 100
        assert all(machine.link_up for machine in fake.running())
        await asyncio.gather(*(running.clones.remove(c.name) for c in clones))
        assert await held(running) == (0, 0, set()) and fake.running() == []

    play(tmp_path, scenario)


def test_one_name_two_requests(tmp_path: Path) -> None:
    """Of two requests for a name at the same time exactly one gets it."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        both = (running.clones.create(CloneRequest(name="a")) for _ in range(2))
        results = await asyncio.gather(*both, return_exceptions=True)
        assert sorted(type(r).__name__ for r in results) == ["Conflict", "list"]
        assert len(fake.running()) == 1

    play(tmp_path, scenario)


def test_bad_requests(tmp_path: Path) -> None:
    """They are refused before anything is taken."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        clones = running.clones
        with pytest.raises(InvalidRequest):
            await clones.create(CloneRequest(name="../x"))
        with pytest.raises(NotFound, match="no template other"):
            await clones.create(CloneRequest(name="a", template="other"))
        with pytest.raises(NotFound, match="no clone a"):
            await clones.remove("a")
        await clones.create(CloneRequest(name="a-2"))
        with pytest.raises(Conflict, match="a-2 exists"):
            await clones.create(CloneRequest(name="a", count=3))
        assert len(fake.running()) == 1 and len(clones) == 1

    play(tmp_path, scenario)


def test_a_dead_vm_is_noticed(tmp_path: Path) -> None:
    """The clone is dead, with the reason, keeps its name, and can be removed."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="a"))
        fake.running()[0].end("was killed by SIGKILL")
        while running.clones.view("a").state is CloneState.RUNNING:
            await asyncio.sleep(0.01)
        view = running.clones.view("a")
        assert view.state is CloneState.DEAD and "SIGKILL" in view.reason and view.pid is None
        with pytest.raises(Conflict, match="a is dead"):
            running.clones.running("a")
        await running.clones.remove("a")
        assert await held(running) == (0, 0, set())

    play(tmp_path, scenario)


def test_restart(tmp_path: Path) -> None:
    """What lives is adopted with all that was known of it; what died meanwhile is dead."""
    before: dict[str, Any] = {}

    async def first(running: Services, fake: FakeHypervisor) -> None:
        for name in ("lives", "dies"):
            await running.clones.create(CloneRequest(name=name))
        before["lives"] = running.clones.view("lives")
        before["dies"] = running.clones.view("dies").pid

    async def second(running: Services, fake: FakeHypervisor) -> None:
        assert running.clones.view("lives") == before["lives"]
        await running.clones.running("lives").agent.ping(5.0)
        assert running.clones.view("dies").state is CloneState.RUNNING
        fake.machines[before["dies"]].end("ended")
        while running.clones.view("dies").state is CloneState.RUNNING:
            await asyncio.sleep(0.01)

    async def third(running: Services, fake: FakeHypervisor) -> None:
        assert running.clones.view("dies").state is CloneState.DEAD
        (fresh,) = await running.clones.create(CloneRequest(name="new"))
        assert fresh.identity.ip != before["lives"].identity.ip

    play(tmp_path, first, second, third)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """A changed state is noticed before a VM is started, and told on the template."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        state = running.context.layout.frozen("t", GENERATION) / "state"
        state.write_bytes(b"changed")
        with pytest.raises(StartError, match="cannot be used"):
            await running.clones.create(CloneRequest(name="a"))
        with pytest.raises(HostError, match="frozen were"):
            await running.clones.create(CloneRequest(name="a"))
        assert fake.machines == {} and len(running.clones) == 0

    play(tmp_path, scenario)


def test_template_cannot_go_while_clones_map_it(tmp_path: Path) -> None:
    """`template rm` is refused, and works once the last clone has ended."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="a"))
        with pytest.raises(Conflict, match="1 clones of template t"):
            await running.templates.remove("t")
        await running.clones.remove("a")
        await running.templates.remove("t")
        assert not running.context.layout.generation("t", GENERATION).exists()
        with pytest.raises(NotFound):
            await running.clones.create(CloneRequest(name="a"))

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    "field", ["hostname", "machine_id", "boot_id", "uuid", "mac", "ip", "prefix"]
)
def test_every_part_of_an_identity_is_read_back(tmp_path: Path, field: str) -> None:
    """A guest that keeps any one value of another VM is destroyed."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        fake.fail, fake.mismatch = "identify", field
        with pytest.raises(StartError, match=f"the guest has {field} ") as caught:
            await running.clones.create(CloneRequest(name="a"))
        assert caught.value.reason == "identity"
        assert await held(running) == (0, 0, set()) and fake.running() == []

    play(tmp_path, scenario)


def test_count(tmp_path: Path) -> None:
    """NAME-1 to NAME-N, in order."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        views = await running.clones.create(CloneRequest(name="a", count=5))
        assert [v.name for v in views] == [f"a-{n}" for n in range(1, 6)]
        assert [v.identity.hostname for v in views] == [v.name for v in views]
        assert len({v.identity.ip for v in views}) == 5

    play(tmp_path, scenario)


def test_one_of_several_fails(tmp_path: Path) -> None:
    """All or nothing: those that came up are removed again, and nothing else is."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="b"))
        fake.fail, fake.fail_after = "restore", 2
        with pytest.raises(StartError, match="phase restore"):
            await running.clones.create(CloneRequest(name="a", count=3))
        assert [v.name for v in running.clones.views()] == ["b"]
        rows, clones, directories = await held(running)
        assert (rows, clones, len(directories)) == (1, 1, 1) and len(fake.running()) == 1

    play(tmp_path, scenario)


def test_limit(tmp_path: Path) -> None:
    """Beyond limits.clones a request takes nothing, not even in part."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        limit = running.context.config.limits.clones
        running.clones._clones.update(dict.fromkeys(map(str, range(limit - 1)), None))  # type: ignore[arg-type]
        with pytest.raises(Busy, match=f"limit of {limit} clones"):
            await running.clones.create(CloneRequest(name="a", count=2))
        assert len(running.clones) == limit - 1
        running.clones._clones.clear()

    play(tmp_path, scenario)


def test_while_it_starts(tmp_path: Path) -> None:
    """The name is taken, the clone is shown as starting, and `rm` and `exec` are refused."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        gate = fake.hold("restore")
        async with asyncio.TaskGroup() as group:
            start = group.create_task(running.clones.create(CloneRequest(name="a")))
            await until(lambda: fake.running() and fake.running()[0].held_at)
            assert running.clones.view("a").state is CloneState.STARTING
            with pytest.raises(Conflict, match="still starting"):
                await running.clones.remove("a")
            with pytest.raises(Conflict, match="a is starting"):
                running.clones.running("a")
            with pytest.raises(Conflict, match="exists already"):
                await running.clones.create(CloneRequest(name="a"))
            gate.set()
        assert start.result()[0].state is CloneState.RUNNING

    play(tmp_path, scenario)


def test_a_restart_in_the_middle_of_a_start(tmp_path: Path) -> None:
    """A daemon that is stopped gives back what it was starting; the next one finds nothing."""

    starts: list[asyncio.Future[list[CloneView]]] = []

    async def first(running: Services, fake: FakeHypervisor) -> None:
        fake.hold("restore")
        for name in "ab":
            starts.append(asyncio.ensure_future(running.clones.create(CloneRequest(name=name))))
        await until(lambda: len([m for m in fake.running() if m.held_at]) == 2)

    async def second(running: Services, fake: FakeHypervisor) -> None:
        assert [start.cancelled() for start in starts] == [True, True]
        assert fake.running() == [] and await held(running) == (0, 0, set())
        fake.hold("restore").set()
        await running.clones.create(CloneRequest(name="a"))

    play(tmp_path, first, second)


def test_an_interrupted_start_is_taken_down(tmp_path: Path) -> None:
    """What a killed daemon left behind half-way is given back, and its name is free."""

    async def first(running: Services, fake: FakeHypervisor) -> None:
        (kept,) = await running.clones.create(CloneRequest(name="kept"))
        journal, slots = running.context.journal, running.context.slots
        layer = running.templates.serving("t").layer
        (row,) = await journal.clones()
        # An older daemon wrote a start down before it was one.
        for name, state in (("half", CloneState.STARTING), ("gone", CloneState.REMOVING)):
            prepared = await slots.make(layer)
            await journal.new_clone(replace(row, name=name, state=state, slot=prepared.slot))
            prepared.close()
        free = await slots.make(layer)
        free.close()
        assert kept.pid is not None

    async def second(running: Services, fake: FakeHypervisor) -> None:
        assert [v.name for v in running.clones.views()] == ["kept"]
        rows, _, directories = await held(running)
        assert (rows, len(directories)) == (1, 1)
        await running.clones.create(CloneRequest(name="half"))

    play(tmp_path, first, second)


def test_strays_are_removed_and_nothing_else(tmp_path: Path) -> None:
    """Directories that no row names go; what lies elsewhere in state_dir stays."""

    async def first(running: Services, fake: FakeHypervisor) -> None:
        (running.context.layout.slots / "stray").mkdir()
        (running.context.layout.sockets / "stray").mkdir()
        (running.context.layout.state / "mine").mkdir()
        await running.clones.create(CloneRequest(name="a"))

    async def second(running: Services, fake: FakeHypervisor) -> None:
        layout = running.context.layout
        assert not (layout.slots / "stray").exists() and not (layout.sockets / "stray").exists()
        assert (layout.state / "mine").is_dir()
        assert running.clones.view("a").state is CloneState.RUNNING

    play(tmp_path, first, second)


def test_a_daemon_of_another_pid_space(tmp_path: Path) -> None:
    """A process with the pid but another start time is not taken for the clone's VM."""

    async def first(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="a"))
        fake.running()[0].started += 1

    async def second(running: Services, fake: FakeHypervisor) -> None:
        view = running.clones.view("a")
        assert view.state is CloneState.DEAD and "while the daemon was away" in view.reason
        assert view.pid is None and len(fake.running()) == 1

    play(tmp_path, first, second)


def test_removed_twice_at_once(tmp_path: Path) -> None:
    """Both requests end well or say that there is no such clone, and the slot is given back."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="a"))
        both = (running.clones.remove("a") for _ in range(2))
        results = await asyncio.gather(*both, return_exceptions=True)
        assert all(r is None or isinstance(r, NotFound) for r in results)
        assert await held(running) == (0, 0, set())

    play(tmp_path, scenario)


def test_what_goes_on_without_the_daemon(tmp_path: Path) -> None:
    """Clones do, instances of functions do not."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        for name in "ab":
            await running.clones.create(CloneRequest(name=name))
        running.clones.running_clones()[0].function = "f:1"
        assert (len(running.clones), running.clones.lasting()) == (2, 1)

    play(tmp_path, scenario)


def test_removed_while_its_vm_ends(tmp_path: Path) -> None:
    """Who asks for it in the middle waits with the first one; it is told once, and one is free."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        (clone,) = await running.clones.create(CloneRequest(name="a"))
        end = fake.hold("destroy")
        first = asyncio.create_task(running.clones.remove("a"))
        await until(lambda: any(machine.held_at == "destroy" for machine in fake.machines.values()))
        others = [asyncio.create_task(running.clones.remove("a")) for _ in range(3)]
        await asyncio.sleep(0.02)
        assert not first.done() and not any(other.done() for other in others)
        end.set()
        await asyncio.gather(first, *others)
        assert await held(running) == (0, 0, set())
        told = [event.type for event in running.context.events.recent()]
        assert told.count("clone.removed") == 1
        (again,) = await running.clones.create(CloneRequest(name="a"))
        assert again.uuid != clone.uuid

    play(tmp_path, scenario)


def states(running: Services) -> dict[str, float]:
    """What the gauge of clones says now."""
    gauges = running.context.metrics.registry.collect()
    samples = [s for gauge in gauges if gauge.name == "templated_clones" for s in gauge.samples]
    return {sample.labels["state"]: sample.value for sample in samples}


def test_the_gauge_counts_what_there_is(tmp_path: Path) -> None:
    """By state; a state without clones has no series."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="a", count=3))
        assert states(running) == {"running": 3}
        fake.running()[0].end("ended")
        await until(lambda: states(running) == {"running": 2, "dead": 1})
        for name in ("a-1", "a-2", "a-3"):
            await running.clones.remove(name)
        assert states(running) == {}

    play(tmp_path, scenario)


def test_the_gauge_forgets_a_start_that_failed(tmp_path: Path) -> None:
    """A start under way is counted when another clone comes up, and must not stay."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        gate = fake.hold("restore")
        fake.fail = "restore"
        failing = asyncio.ensure_future(running.clones.create(CloneRequest(name="a")))
        await until(lambda: fake.running() and fake.running()[0].held_at)
        fake.fail = ""
        del fake._holds["restore"]
        await running.clones.create(CloneRequest(name="b"))
        gate.set()
        with pytest.raises(StartError):
            await failing
        assert states(running) == {"running": 1}

    play(tmp_path, scenario)


def test_a_name_used_again_while_its_dead_clone_is_buried(tmp_path: Path) -> None:
    """The new clone's row says running, so that the next daemon adopts its VM."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="a"))
        gate = fake.hold("destroy")
        (dead,) = fake.running()
        dead.end("ended")
        await until(lambda: dead.held_at)
        del fake._holds["destroy"]
        await running.clones.remove("a")
        await running.clones.create(CloneRequest(name="a"))
        gate.set()
        await until(lambda: not dead.held_at)
        await asyncio.sleep(0.1)
        (row,) = await running.context.journal.clones()
        assert row.state is CloneState.RUNNING

    play(tmp_path, scenario)


def test_a_caller_that_goes_away(tmp_path: Path) -> None:
    """All or nothing holds for whoever asked and did not wait."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        gate = fake.hold("restore")
        fake.fail, fake.fail_after = "restore", 1
        asking = asyncio.ensure_future(running.clones.create(CloneRequest(name="a", count=2)))
        await until(lambda: len(fake.running()) == 2)
        asking.cancel()
        gate.set()
        await until(lambda: len(fake.running()) < 2)
        for _ in range(50):
            await asyncio.sleep(0.01)
        assert running.clones.views() == []

    play(tmp_path, scenario)


def test_another_qemu_than_the_one_that_froze(tmp_path: Path) -> None:
    """QEMU was upgraded under a running daemon: it is told before a state is loaded into it."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        fake.installed = "8.0.0"
        with pytest.raises(StartError, match=r"frozen by QEMU 7\.2\.0"):
            await running.clones.create(CloneRequest(name="a"))

    play(tmp_path, scenario)


def test_an_orphan_that_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It keeps its slot, so that nobody gets its address, until a restart can end it."""
    monkeypatch.setattr(fake_hypervisor, "REPLY_TIMEOUT", 0.1)
    left: list[str] = []

    async def slots(running: Services) -> set[str]:
        return {slot.id for slot in await running.context.journal.free_slots()}

    async def interrupted(running: Services, fake: FakeHypervisor) -> None:
        generation = running.templates.serving("t")
        prepared = await running.context.slots.make(generation.layer)
        fake.spawn(running.context.starter.launch(prepared, generation.hardware))
        prepared.close()
        left.append(prepared.slot.id)
        fake.hold("destroy")

    async def stuck(running: Services, fake: FakeHypervisor) -> None:
        assert left[0] in await slots(running)
        assert running.context.layout.vm(left[0]).directory.is_dir()
        assert f"slot {left[0]} stays: no destroy within 0.1 s" in caplog.text
        fake.let_go()

    async def ended(running: Services, fake: FakeHypervisor) -> None:
        assert left[0] not in await slots(running) and not fake.running()

    play(tmp_path, interrupted, stuck, ended)


def test_an_orphaned_process_is_ended(tmp_path: Path) -> None:
    """A VM that was started and whose pid nobody wrote down is found by its UUID; no other is."""
    config = configured(tmp_path)
    command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]

    def child(uuid: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*command, f"uuid={uuid}", uuid], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        return process

    async def interrupted(running: Services, fake: FakeHypervisor) -> None:
        prepared = await running.context.slots.make(running.templates.serving("t").layer)
        prepared.close()
        uuids.append(prepared.slot.uuid)

    async def restart() -> None:
        async with daemon(config, Qemu(config.qemu, tmp_path / "proof")) as running:
            assert running.clones.views() == []

    uuids: list[str] = []
    play(tmp_path, interrupted)
    ours, other = child(uuids[0]), child("6f1c3a52-0000-4000-8000-000000000001")
    try:
        run(restart())
        assert ours.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()
