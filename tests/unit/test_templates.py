"""Templates: which generation serves, going back, removing, and what a damaged one says."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import sqlite3
from pathlib import Path

import msgspec
import pytest

from templated.drivers.host.procfs import Memory
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.errors import BuildError, Conflict, HostError, InvalidRequest, NotFound
from templated.model.api import BuildRequest, CloneRequest, PoolRequest
from templated.model.clone import StartPath
from templated.model.generation import FileDigest, GenerationState
from templated.services.daemon import Services
from templated.services.machines import generation as generations
from templated.services.machines.generation import MANIFEST_FORMAT, Generation
from templated.services.pools import capacity
from templated.services.reports.operations import Progress
from templated.services.templates import catalog as templates
from templated.services.templates.build import Build
from tests.unit.fake_daemon import GENERATION, SPEC, play, until

pytestmark = pytest.mark.usefixtures("no_blocking_calls")
SECOND = "20260102t000000-abcdef"
THIRD = "20260103t000000-abcdef"


def _copy(running: Services, new: str) -> Path:
    """Files and manifest of another generation, as a build would leave them."""
    layout = running.context.layout
    for place in (layout.generation, layout.frozen):
        shutil.copytree(place("t", GENERATION), place("t", new))
    (layout.frozen("t", new) / "state").write_bytes(new.encode())
    directory = layout.generation("t", new)
    manifest = generations.read_manifest(directory)
    digest = FileDigest(size=len(new), sha256=hashlib.sha256(new.encode()).hexdigest())
    files = {**manifest.files, "state": digest}
    changed = msgspec.structs.replace(manifest, id=new, files=files)
    (directory / "manifest.json").chmod(0o600)
    generations.write_manifest(directory, changed)
    return directory


async def built(running: Services, new: str) -> None:
    """Activate another generation in the way a build does."""
    await asyncio.to_thread(_copy, running, new)
    await running.context.journal.new_generation(new, "t")
    generation = await generations.load(
        running.context.layout, running.context.hypervisor, "t", new
    )
    await running.templates.activate(generation)


async def known(running: Services) -> dict[str, tuple[GenerationState, bool]]:
    """State of each generation of the template, and whether it serves."""
    view = await running.templates.view("t")
    return {g.id: (g.state, g.active) for g in view.generations}


def test_a_new_generation_serves_at_once(tmp_path: Path) -> None:
    """New clones start from it; the one before stays for a rollback, and for its clones."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="old"))
        await built(running, SECOND)
        (new,) = await running.clones.create(CloneRequest(name="new"))
        assert new.generation == SECOND and running.clones.view("old").generation == GENERATION
        ready = GenerationState.READY
        assert await known(running) == {GENERATION: (ready, False), SECOND: (ready, True)}

    play(tmp_path, scenario)


def test_retired_generations_wait_for_their_clones(tmp_path: Path) -> None:
    """The one before the one before goes with its last clone, and not sooner."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="old"))
        await built(running, SECOND)
        await built(running, THIRD)
        assert (await known(running))[GENERATION] == (GenerationState.RETIRED, False)
        layout = running.context.layout
        assert layout.frozen("t", GENERATION).exists()
        await running.clones.remove("old")
        assert set(await known(running)) == {SECOND, THIRD}
        assert not layout.frozen("t", GENERATION).exists()
        assert not layout.generation("t", GENERATION).exists()
        assert {row.id for row in await running.context.journal.generations()} == {SECOND, THIRD}

    play(tmp_path, scenario)


def test_rollback(tmp_path: Path) -> None:
    """The generation before serves again, also after a restart; before the first there is none."""

    async def first(running: Services, fake: FakeHypervisor) -> None:
        with pytest.raises(Conflict, match="no generation before"):
            await running.templates.rollback("t")
        await built(running, SECOND)
        view = await running.templates.rollback("t")
        assert view.active == GENERATION
        (clone,) = await running.clones.create(CloneRequest(name="a"))
        assert clone.generation == GENERATION
        with pytest.raises(NotFound, match="no template other"):
            await running.templates.rollback("other")

    async def second(running: Services, fake: FakeHypervisor) -> None:
        assert running.templates.serving("t").id == GENERATION
        assert running.clones.view("a").generation == GENERATION

    play(tmp_path, first, second)


def test_rollback_to_a_damaged_generation(tmp_path: Path) -> None:
    """It is verified first; the active one goes on serving."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await built(running, SECOND)
        layout = running.context.layout
        for directory in (layout.frozen("t", GENERATION), layout.generation("t", GENERATION)):
            await asyncio.to_thread((directory / "state").unlink)
        with pytest.raises(HostError, match="is missing"):
            await running.templates.rollback("t")
        assert running.templates.serving("t").id == SECOND

    play(tmp_path, scenario)


def test_what_served_before_is_kept(tmp_path: Path) -> None:
    """After a rollback and a build, a rollback leads to what served, not to what was left."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await built(running, SECOND)
        await running.templates.rollback("t")
        await built(running, THIRD)
        assert (await running.templates.rollback("t")).active == GENERATION

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("state", b"state", ""),
        ("state", b"STATE", "content of .*state has changed since it was frozen"),
        ("memory", b"longer than it was", "has 18 bytes, frozen were 6"),
        ("memory", None, "memory is missing"),
    ],
)
def test_a_reboot(tmp_path: Path, name: str, content: bytes | None, problem: str) -> None:
    """What shm_dir lost comes back from the disk, when it is still what was frozen."""

    def reboot(running: Services) -> None:
        generation = running.templates.serving("t")
        generation.keep()
        shutil.rmtree(running.context.layout.shm / "t")
        kept = generation.directory / name
        kept.unlink()
        if content is not None:
            kept.write_bytes(content)

    async def before(running: Services, fake: FakeHypervisor) -> None:
        await asyncio.to_thread(reboot, running)

    async def after(running: Services, fake: FakeHypervisor) -> None:
        if problem:
            with pytest.raises(HostError, match=problem):
                running.templates.serving("t")
            return
        frozen = running.templates.serving("t").frozen
        assert {p.name: p.read_bytes() for p in frozen.iterdir()} == {
            "memory": b"memory",
            "state": b"state",
        }
        assert {p.stat().st_mode & 0o777 for p in frozen.iterdir()} == {0o444}
        assert [p.name for p in frozen.parent.iterdir()] == [GENERATION]
        await running.clones.create(CloneRequest(name="a"))

    play(tmp_path, before, after)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("memory", None, "memory is missing"),
        ("memory", b"longer than it was", "has 18 bytes, frozen were 6"),
        ("state", b"STATE", "state has changed since it was frozen"),
        ("disk.qcow2", b"x" * 10, "disk.qcow2 has changed since it was frozen"),
        ("manifest.json", b"{", "manifest.json is damaged"),
        ("manifest.json", b'{"format": 1}', "manifest.json is damaged: .*required field"),
        ("manifest.json", None, "cannot read .*manifest.json: No such file"),
        ("manifest.json", "other format", f"has format 1, not {MANIFEST_FORMAT}"),
    ],
)
def test_a_damaged_generation(
    tmp_path: Path, name: str, content: bytes | str | None, what: str
) -> None:
    """The daemon starts all the same; the template says what is wrong, and nothing is started."""

    def damage(running: Services) -> None:
        layout = running.context.layout
        frozen, directory = layout.frozen("t", GENERATION), layout.generation("t", GENERATION)
        path = (frozen if name in ("memory", "state") else directory) / name
        text = path.read_bytes()
        if content == "other format":
            text = text.replace(b'"format": %d' % MANIFEST_FORMAT, b'"format": 1')
        path.chmod(0o600)
        if content is None:
            path.unlink()
            (directory / name).unlink(missing_ok=True)  # what is kept of it on the disk, too
        else:
            path.write_bytes(content if isinstance(content, bytes) else text)

    async def first(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="a"))
        await asyncio.to_thread(damage, running)

    async def second(running: Services, fake: FakeHypervisor) -> None:
        view = await running.templates.view("t")
        assert view.active == GENERATION
        with pytest.raises(HostError, match=what) as caught:
            await running.clones.create(CloneRequest(name="b"))
        assert view.problem == caught.value.message and "\n" not in view.problem
        assert "template build t" in caught.value.hint
        await running.clones.running("a").agent.ping(5.0)
        await running.clones.remove("a")
        await running.templates.remove("t")

    play(tmp_path, first, second)


def test_a_manifest_without_its_files(tmp_path: Path) -> None:
    """It is damaged as any other, and not a defect of the daemon."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        generation = running.templates.serving("t")
        generation.manifest = msgspec.structs.replace(generation.manifest, files={})
        with pytest.raises(HostError):
            await generation.verify()

    play(tmp_path, scenario)


def test_another_qemu(tmp_path: Path) -> None:
    """A state is only loaded by the QEMU that wrote it."""

    async def first(running: Services, fake: FakeHypervisor) -> None:
        fake.installed = "8.0.0"

    async def second(running: Services, fake: FakeHypervisor) -> None:
        with pytest.raises(HostError, match=r"frozen by QEMU 7\.2\.0, this host has 8\.0\.0"):
            await running.clones.create(CloneRequest(name="a"))
        assert (await running.templates.view("t")).problem

    play(tmp_path, first, second)


def test_an_active_generation_without_a_row(tmp_path: Path) -> None:
    """As a spoiled journal has it: its template is broken, and the daemon starts all the same."""

    async def first(running: Services, fake: FakeHypervisor) -> None:
        path = running.context.layout.journal
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("INSERT INTO templates SELECT 'u', active FROM templates")
        (tmp_path / "u.yaml").write_text("name: u\n")

    async def second(running: Services, fake: FakeHypervisor) -> None:
        assert "no generation" in (await running.templates.view("u")).problem
        assert not (await running.templates.view("t")).problem

    play(tmp_path, first, second)


def test_an_active_generation_that_is_being_built(tmp_path: Path) -> None:
    """As a spoiled journal has it: the daemon does not start, and the files stay."""
    seen: list[Path] = []

    async def first(running: Services, fake: FakeHypervisor) -> None:
        seen.append(running.context.layout.generation("t", GENERATION))
        path = running.context.layout.journal
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("UPDATE generations SET state = 'building'")

    async def second(running: Services, fake: FakeHypervisor) -> None:
        raise AssertionError("it started")

    with pytest.raises(HostError, match="active and yet being built"):
        play(tmp_path, first, second)
    assert (seen[0] / "manifest.json").is_file()


def test_an_unfinished_build_is_removed(tmp_path: Path) -> None:
    """What a killed daemon was building goes; the active generation stays."""

    async def first(running: Services, fake: FakeHypervisor) -> None:
        await asyncio.to_thread(_copy, running, SECOND)
        await running.context.journal.new_generation(SECOND, "t")

    async def second(running: Services, fake: FakeHypervisor) -> None:
        assert set(await known(running)) == {GENERATION}
        assert not running.context.layout.generation("t", SECOND).exists()
        assert not running.context.layout.frozen("t", SECOND).exists()
        await running.clones.create(CloneRequest(name="a"))

    play(tmp_path, first, second)


def test_which_template(tmp_path: Path) -> None:
    """Without a name it is the only one; what is not built, or not there, is said."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        assert running.templates.serving(None).id == GENERATION
        await asyncio.to_thread((tmp_path / "u.yaml").write_text, "name: u\n")
        with pytest.raises(NotFound, match="template u has not been built"):
            running.templates.serving("u")
        with pytest.raises(NotFound, match="no template v") as caught:
            running.templates.serving("v")
        assert "t, u" in caught.value.hint
        assert running.templates.names() == ["t", "u"]
        assert (await running.templates.view("u")).active is None
        await running.templates.remove("t")
        with pytest.raises(NotFound, match="no template has been built yet"):
            running.templates.serving(None)

    play(tmp_path, scenario)


def test_requests_to_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are checked before the work begins."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        prepare = running.templates.prepare_build
        assert (await prepare("x", BuildRequest(spec="name: x"))).name == "x"
        with pytest.raises(InvalidRequest, match="of template y, not of x"):
            await prepare("x", BuildRequest(spec="name: y"))
        with pytest.raises(NotFound, match="no template x"):
            await prepare("x", BuildRequest())
        bad = "name: x\nprobes: [{name: a, type: serial, pattern: '('}]"
        with pytest.raises(InvalidRequest, match=r"\$\.probes\[0\]\.pattern"):
            await prepare("x", BuildRequest(spec=bad))
        with monkeypatch.context() as patched:
            held = asyncio.Event()
            patched.setattr(running.context.hypervisor, "version", held.wait)
            building = asyncio.ensure_future(running.templates.build(SPEC, Progress()))
            await until(running.context.events.recent)
            with pytest.raises(Conflict, match="being built already"):
                await prepare("t", BuildRequest(spec="name: t"))
            with pytest.raises(Conflict, match="being built already"):
                await running.templates.remove("t")
            building.cancel()
            await asyncio.wait({building})
        await prepare("t", BuildRequest(spec="name: t"))

    play(tmp_path, scenario)


class _Built(Build):
    """A build whose VMs are left out: it ends as `end` says."""

    end: Exception | None = None

    async def run(self) -> Generation:
        running = _Built.running
        await asyncio.to_thread(_copy, running, self.id)
        await running.context.journal.new_generation(self.id, "t")
        if self.end is not None:
            raise self.end
        return await generations.load(
            running.context.layout, running.context.hypervisor, "t", self.id
        )

    running: Services


@pytest.mark.parametrize(
    "end",
    [BuildError("no", hint="yes"), OSError("no"), TimeoutError()],
    ids=lambda e: type(e).__name__,
)
def test_a_failed_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Exception) -> None:
    """Nothing of it is left, and the generation before goes on serving."""
    monkeypatch.setattr(templates, "Build", _Built)
    monkeypatch.setattr(_Built, "end", end)

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        monkeypatch.setattr(_Built, "running", running, raising=False)
        with pytest.raises((BuildError, OSError)):
            await running.templates.build(SPEC, Progress())
        assert set(await known(running)) == {GENERATION}
        layout = running.context.layout
        left = [*layout.generations.glob("t/*"), *layout.shm.glob("t/*")]
        assert {path.name for path in left} == {GENERATION}
        assert [row.id for row in await running.context.journal.generations()] == [GENERATION]
        await running.clones.create(CloneRequest(name="a"))
        assert [e.type for e in running.context.events.recent()][:2] == [
            "template.building",
            "template.build_failed",
        ]

    play(tmp_path, scenario)


def test_stopped_while_a_build_is_activated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the journal calls active has its files, whenever the daemon is stopped."""
    monkeypatch.setattr(templates, "Build", _Built)

    async def first(running: Services, fake: FakeHypervisor) -> None:
        monkeypatch.setattr(_Built, "running", running, raising=False)
        retiring = asyncio.Event()

        async def retire(generation: str) -> None:
            retiring.set()
            await asyncio.Event().wait()

        running.templates.on_retired.insert(0, retire)
        build = asyncio.ensure_future(running.templates.build(SPEC, Progress()))
        await retiring.wait()
        build.cancel()
        await asyncio.wait({build})
        running.templates.on_retired.remove(retire)

    async def second(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="a"))

    play(tmp_path, first, second)


def test_a_broken_file_is_shown(tmp_path: Path) -> None:
    """A template that has only a broken file is listed, with what is wrong."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await asyncio.to_thread((tmp_path / "u.yaml").write_text, "name: u\nx: 1\n")
        view = await running.templates.view("u")
        assert "unknown field" in view.problem

    play(tmp_path, scenario)


def test_a_member_that_is_being_made_holds_its_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retired generation is removed when the last VM that loads it has ended, and not before."""
    monkeypatch.setattr(capacity, "read_memory", lambda: Memory(64 << 30, 32 << 30))
    monkeypatch.setattr(capacity, "read_pressure", lambda _: None)

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        gate = fake.hold("restore")
        await running.pools.set("t", PoolRequest(warm=1))
        await until(lambda: fake.running() and fake.running()[0].held_at)
        del fake._holds["restore"]
        frozen = running.context.layout.frozen("t", GENERATION)
        await built(running, SECOND)
        await built(running, THIRD)
        assert (await known(running))[GENERATION] == (GenerationState.RETIRED, False)
        assert frozen.exists()
        gate.set()
        while set(await known(running)) != {SECOND, THIRD}:
            await asyncio.sleep(0.005)
        assert not frozen.exists()
        await until(lambda: not running.pools.missing(("t", StartPath.WARM)))

    play(tmp_path, scenario)


def test_a_removal_that_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left serves nobody, says why, and can be removed again."""

    async def full(*_: object) -> None:
        raise HostError("the journal cannot be used: disk full")

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(running.context.journal, "drop_generation", full)
            with pytest.raises(HostError, match="disk full"):
                await running.templates.remove("t")
        with pytest.raises(HostError, match=r"its removal did not end: .*disk full"):
            await running.clones.create(CloneRequest(name="a"))
        assert "disk full" in (await running.templates.view("t")).problem
        await running.templates.remove("t")
        assert await known_or_none(running) is None
        assert await running.context.journal.generations() == []

    play(tmp_path, scenario)


async def known_or_none(running: Services) -> dict[str, tuple[GenerationState, bool]] | None:
    try:
        return await known(running)
    except NotFound:
        return None


def test_nothing_starts_while_a_template_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clones, builds and a second removal are refused in one line until it is gone."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        go = asyncio.Event()
        drop = running.context.journal.drop_generation

        async def slowly(generation_id: str) -> None:
            await go.wait()
            await drop(generation_id)

        monkeypatch.setattr(running.context.journal, "drop_generation", slowly)
        removing = asyncio.ensure_future(running.templates.remove("t"))
        await asyncio.sleep(0.05)
        for refused in (
            running.clones.create(CloneRequest(name="a")),
            running.templates.build(SPEC, Progress()),
            running.templates.remove("t"),
            running.templates.rollback("t"),
        ):
            with pytest.raises(Conflict, match="template t is being removed"):
                await refused
        go.set()
        await removing
        assert running.clones.views() == [] and running.pools.views() == []

    play(tmp_path, scenario)
