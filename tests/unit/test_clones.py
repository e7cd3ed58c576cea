"""The clones' state machine over a fake hypervisor: every failure gives everything back."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blockbuster import blockbuster_ctx

from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.errors import Conflict, HostError, InvalidRequest, NotFound, StartError
from templated.journal import Journal
from templated.model.api import CloneRequest
from templated.model.clone import CloneState
from templated.model.config import Config, defaults
from templated.model.generation import FileDigest, Manifest, QemuVersion
from templated.model.spec import IdentitySpec, TemplateSpec
from templated.services import generations
from templated.services.daemon import Foundation, Services, services
from templated.services.places import Layout

GENERATION = "20260101t000000-abcdef"
SPEC = TemplateSpec(name="t", start_timeout="2s", identity=IdentitySpec(timeout="500ms"))


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """A blocking call of ours on the event loop fails the test."""
    with blockbuster_ctx("templated") as watch:
        # Looking at local files takes microseconds, less than a thread would.
        for name in ("os.stat", "os.access", "os.scandir", "os.listdir"):
            watch.functions[name].deactivate()
        # When the journal closes, nothing else runs any more.
        lock = watch.functions["threading.Lock.acquire"]
        lock.can_block_in("templated/journal.py", "close")
        yield


def configured(tmp_path: Path) -> Config:
    """A configuration below a test's directory, with a QEMU that only knows its version."""
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho QEMU emulator version 7.2.0\n")
    qemu.chmod(0o755)
    places = {
        "state_dir": str(tmp_path / "s"),
        "runtime_dir": str(tmp_path / "r"),
        "shm_dir": str(tmp_path / "m"),
        "template_dirs": [str(tmp_path)],
        "accel": "tcg",
        "qemu": str(qemu),
        "metrics": None,
        "slots": {"ready": 2},
    }
    return msgspec.convert({**defaults({}, 1), **places}, Config)


def freeze(config: Config) -> None:
    """Write a generation as a build would leave it, with a few bytes in each file."""
    layout = Layout(config)
    directory, frozen = layout.generation("t", GENERATION), layout.frozen("t", GENERATION)
    directory.mkdir(parents=True)
    frozen.mkdir(parents=True)
    files = {}
    for path in (frozen / "memory", frozen / "state", directory / "disk.qcow2"):
        path.write_bytes(path.name.encode())
        digest = hashlib.sha256(path.name.encode()).hexdigest()
        files[path.name] = FileDigest(size=len(path.name), sha256=digest)
    (directory / "empty.qcow2").write_bytes(b"empty")
    manifest = Manifest(
        format=generations.MANIFEST_FORMAT,
        id=GENERATION,
        template="t",
        created="2026-01-01T00:00:00Z",
        spec=SPEC,
        image="none",
        qemu=QemuVersion(path="qemu", version="7.2.0"),
        accel="tcg",
        cpu="qemu64",
        command_line=("qemu",),
        kernel="vmlinuz",
        kernel_sha256="",
        kernel_cmdline="",
        files=files,
        probes=(),
        canary_probes=(),
        phases_s={},
        freeze_lag_s=0.0,
    )
    generations.write_manifest(directory, manifest)


async def activate(config: Config) -> None:
    """Write the rows that a build would have written."""
    journal = Journal(Layout(config).journal)
    await journal.open()
    await journal.new_generation(GENERATION, "t")
    await journal.activate(GENERATION, "t")
    await journal.close()


@asynccontextmanager
async def daemon(config: Config, fake: FakeHypervisor) -> AsyncIterator[Services]:
    """All services over the fake."""
    foundation = await asyncio.to_thread(Foundation, config, fake)
    try:
        async with services(foundation) as running:
            yield running
    finally:
        foundation.close()


Scenario = Callable[[Services, FakeHypervisor], Coroutine[Any, Any, None]]


def play(tmp_path: Path, *scenarios: Scenario) -> None:
    """Run scenarios one after the other, each on a restarted daemon with the same machines."""
    config = configured(tmp_path)

    async def main() -> None:
        fake = FakeHypervisor()
        async with asyncio.timeout(60):
            (await asyncio.to_thread(Foundation, config, fake)).close()
            await asyncio.to_thread(freeze, config)
            await activate(config)
            for scenario in scenarios:
                async with daemon(config, fake) as running:
                    await scenario(running, fake)
        for machine in fake.running():
            await machine.destroy()

    asyncio.run(main())


async def held(running: Services) -> tuple[int, int, set[str]]:
    """Rows of clones and of slots in use, and directories that belong to no ready slot."""
    journal, layout = running.context.journal, running.context.layout
    free = {slot.id for slot, _ in await journal.free_slots()}
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
