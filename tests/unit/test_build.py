"""A template's build over the fake hypervisor: what it leaves, and what it leaves when it fails."""

from __future__ import annotations

import asyncio
import hashlib
import stat
from pathlib import Path

import msgspec
import pytest

from templated.drivers import disk
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.drivers.image.store import Image
from templated.errors import BuildError, HostError, ProbeError, TemplatedError
from templated.model.api import CloneRequest
from templated.model.clone import CloneState, StartPath
from templated.model.spec import AgentProbe, ExecProbe, ImageSpec, MachineSpec, SerialProbe
from templated.services.daemon import Services
from templated.services.machines import generation as generations
from templated.services.reports.operations import Progress
from templated.services.templates import build
from tests.unit.fake_daemon import GENERATION, SPEC, play, until

pytestmark = pytest.mark.usefixtures("no_qemu_img")
BUILT = msgspec.structs.replace(
    SPEC,
    machine=MachineSpec(memory="1MiB"),
    boot_timeout="500ms",
    probes=(AgentProbe(name="up", timeout="1s"),),
)


@pytest.fixture
def no_qemu_img(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk layers are files with the path of the layer below in them."""

    async def create_overlay(target: Path, backing: Path) -> None:
        await asyncio.to_thread(target.write_text, str(backing))

    monkeypatch.setattr(disk, "create_overlay", create_overlay)


def with_image(running: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    """Make the daemon find an image, of which nothing is ever booted."""
    disk = running.context.layout.image_disk("0" * 16)
    disk.parent.mkdir(exist_ok=True)
    paths = [disk, tmp_path / "vmlinuz", tmp_path / "initrd"]
    for path in paths:
        path.write_bytes(path.name.encode())
    image = Image("0" * 16, paths[0], paths[1], paths[2], 0.0, ImageSpec())

    async def ensure(*_: object, **__: object) -> Image:
        return image

    monkeypatch.setattr(running.context.images, "ensure", ensure)
    monkeypatch.setattr(running.context.images, "get", lambda _: image)
    return image


def left(running: Services) -> set[str]:
    """Generations of the template that have files anywhere."""
    layout = running.context.layout
    found = [*layout.generations.glob("t/*"), *layout.shm.glob("t/*")]
    return {path.name for path in found}


async def slots_in_use(running: Services) -> int:
    """Slot directories beside those that are kept ready, once these are complete."""
    slots, layout = running.context.slots, running.context.layout
    await until(lambda: all(len(slots._ready[g]) >= slots._target for g in slots._layers))
    free = {slot.id for slot in await running.context.journal.free_slots()}
    return len({path.name for path in layout.slots.iterdir()} - free)


def test_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves at once, its files are read-only and as the manifest says, and no VM is left."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        image = await asyncio.to_thread(with_image, running, tmp_path, monkeypatch)
        progress = Progress()
        result = await running.templates.build(BUILT, progress)
        generation = running.templates.serving("t")
        assert result == {"template": "t", "generation": generation.id}
        manifest = generation.manifest
        assert manifest.image == image.digest and manifest.accel == "tcg"
        assert [p.name for p in manifest.probes] == ["up"]
        assert [p.name for p in manifest.canary_probes] == ["up"]
        phases = ["image", "accelerator", "boot", "probes", "freeze", "digest", "canary", "keep"]
        assert list(manifest.phases_s) == phases
        for name, path in generation.files().items():
            content = await asyncio.to_thread(path.read_bytes)
            assert manifest.files[name].sha256 == hashlib.sha256(content).hexdigest()
            assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        done = [e.name for e in progress.events if e.type == "phase" and e.state == "done"]
        assert done == phases
        assert fake.running() == [] and await slots_in_use(running) == 0
        (clone,) = await running.clones.create(CloneRequest(name="a"))
        assert clone.generation == generation.id

    play(tmp_path, scenario)


def test_files_that_libvirts_user_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied once the base VM has ended; those of our own VMs need not be."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await asyncio.to_thread(with_image, running, tmp_path, monkeypatch)
        renewed: list[str] = []

        def renew(path: Path) -> None:
            assert all(machine.exited.done() for machine in fake.machines.values())
            generations.renew(path)
            renewed.append(path.name)

        monkeypatch.setattr(build, "renew", renew)
        await running.templates.build(BUILT, Progress())
        assert not renewed
        spec = msgspec.structs.replace(BUILT, hypervisor="libvirt")
        await running.templates.build(spec, Progress())
        assert sorted(renewed) == ["disk.qcow2", "memory"]

    play(tmp_path, scenario)


STEPS = ["spawn", "silence", "nonsense", "identify", "clock", "link", "pause"]


@pytest.mark.parametrize(
    ("step", "after"),
    [
        *((step, 0) for step in [*STEPS, "detach_network", "save", "quit"]),
        *((step, 1) for step in ["spawn", "restore", "resume", "identify", "link"]),
        ("connect", 0),
        ("connect", 1),
    ],
    ids=lambda value: {0: "base", 1: "canary"}.get(value, value),
)
def test_a_failure_anywhere_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: int
) -> None:
    """No file, row, slot or VM of the base VM or of the canary; the one before goes on serving."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await asyncio.to_thread(with_image, running, tmp_path, monkeypatch)
        fake.fail, fake.fail_after = step, after
        with pytest.raises(BuildError) as caught:
            await running.templates.build(BUILT, Progress())
        assert caught.value.message and caught.value.hint and "\n" not in caught.value.message
        assert ("canary" in caught.value.message) == bool(after)
        fake.fail = ""
        assert fake.running() == [] and left(running) == {GENERATION}
        assert await slots_in_use(running) == 0
        assert await running.context.journal.clones() == []
        assert [row.id for row in await running.context.journal.generations()] == [GENERATION]
        assert running.templates.serving("t").id == GENERATION
        await running.templates.build(BUILT, Progress())

    play(tmp_path, scenario)


def test_a_probe_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build ends with its name; the console's last lines are in the progress."""
    failing = ExecProbe(name="works", command=("x",), timeout="50ms", interval="10ms")
    spec = msgspec.structs.replace(BUILT, probes=(*BUILT.probes, failing))

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await asyncio.to_thread(with_image, running, tmp_path, monkeypatch)
        progress = Progress()
        with pytest.raises(ProbeError, match="probe works") as caught:
            await running.templates.build(spec, progress)
        assert caught.value.probe == "works"
        probes = [(e.name, e.state) for e in progress.events if e.type == "probe"]
        assert probes == [
            ("up", "start"),
            ("up", "passed"),
            ("works", "start"),
            ("works", "failed"),
        ]
        assert any(e.message.startswith("console: ") for e in progress.events)
        assert fake.running() == [] and left(running) == {GENERATION}

    play(tmp_path, scenario)


def test_a_console_is_only_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a console showed while booting it does not show again: the canary skips it."""
    console = SerialProbe(name="console", pattern=r"\bup\b", timeout="10s", interval="5ms")
    spec = msgspec.structs.replace(BUILT, probes=(console, *BUILT.probes))

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await asyncio.to_thread(with_image, running, tmp_path, monkeypatch)
        async with asyncio.TaskGroup() as group:
            group.create_task(running.templates.build(spec, Progress()))
            await until(fake.running)
            log = fake.running()[0].launch.places.serial_log
            await asyncio.to_thread(log.write_text, "it is up now\n")
        manifest = running.templates.serving("t").manifest
        assert [p.name for p in manifest.probes] == ["console", "up"]
        assert [p.name for p in manifest.canary_probes] == ["up"]

    play(tmp_path, scenario)


@pytest.mark.parametrize("step", ["connect", "save", "restore", "quit"])
def test_stopped_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A daemon that is stopped gives back what it was building; the next one finds nothing."""

    async def first(running: Services, fake: FakeHypervisor) -> None:
        await asyncio.to_thread(with_image, running, tmp_path, monkeypatch)
        fake.hold(step)
        running.operations.start(
            "build", "t", lambda progress: running.templates.build(BUILT, progress)
        )
        await until(lambda: any(m.held_at for m in fake.running()))

    async def second(running: Services, fake: FakeHypervisor) -> None:
        assert fake.running() == [] and left(running) == {GENERATION}
        assert await slots_in_use(running) == 0
        assert [row.id for row in await running.context.journal.generations()] == [GENERATION]
        assert running.templates.serving("t").id == GENERATION

    play(tmp_path, first, second)


def test_two_builds_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a template at a time; the second is refused and takes nothing from the first."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await asyncio.to_thread(with_image, running, tmp_path, monkeypatch)
        both = (running.templates.build(BUILT, Progress()) for _ in range(2))
        results = await asyncio.gather(*both, return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["Conflict", "dict"]
        assert len(left(running)) == 2

    play(tmp_path, scenario)


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before QEMU could die of a full /dev/shm."""
    spec = msgspec.structs.replace(BUILT, machine=MachineSpec(memory="9999999999GiB"))

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await asyncio.to_thread(with_image, running, tmp_path, monkeypatch)
        with pytest.raises(HostError, match="are free") as caught:
            await running.templates.build(spec, Progress())
        assert "remount" in caught.value.hint and fake.machines == {}
        assert left(running) == {GENERATION}

    play(tmp_path, scenario)


def test_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path `cold` boots, has phases of its own, and fails as the others do."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await asyncio.to_thread(with_image, running, tmp_path, monkeypatch)
        await running.templates.build(BUILT, Progress())
        (clone,) = await running.clones.create(CloneRequest(name="a", path="cold"))
        assert clone.path is StartPath.COLD and clone.state is CloneState.RUNNING
        assert list(clone.phases_ms) == ["allocate", "spawn", "boot", "identify", "link"]
        (machine,) = fake.running()
        assert machine.link_up and machine.launch.boot is not None
        fake.fail = "silence"
        with pytest.raises(TemplatedError, match="phase boot: the guest did not boot"):
            await running.clones.create(CloneRequest(name="b", path="cold"))
        assert [view.name for view in running.clones.views()] == ["a"]
        assert await slots_in_use(running) == 1

    play(tmp_path, scenario)
