"""A daemon's services over the fake hypervisor, with a template that was never really built."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from templated.drivers.cgroups import ControlGroups
from templated.drivers.hypervisor.base import Hypervisor
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.journal import Journal
from templated.model.config import Config, defaults
from templated.model.generation import FileDigest, Manifest, QemuVersion
from templated.model.spec import IdentitySpec, TemplateSpec
from templated.services.daemon import Installation, Services, services
from templated.services.machines import generation as generations
from templated.services.places import Layout

GENERATION = "20260101t000000-abcdef"
GROUPS = ControlGroups("a fake has no processes")
SPEC = TemplateSpec(name="t", start_timeout="2s", identity=IdentitySpec(timeout="500ms"))


def configured(tmp_path: Path, **changes: Any) -> Config:
    """A configuration below a test's directory, with a QEMU that only knows its version."""
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho QEMU emulator version 7.2.0\n")
    qemu.chmod(0o755)
    places = {
        "state_dir": str(tmp_path / "s"),
        "runtime_dir": str(tmp_path / "r"),
        "socket": str(tmp_path / "r/templated.sock"),
        "shm_dir": str(tmp_path / "m"),
        "template_dirs": [str(tmp_path)],
        "accel": "tcg",
        "qemu": str(qemu),
        "metrics": None,
        "slots": {"ready": 2},
    }
    return msgspec.convert({**defaults({}, 1), **places, **changes}, Config)


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
    image = layout.image_disk("none")
    image.parent.mkdir(parents=True)
    image.write_bytes(b"image")
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
async def daemon(config: Config, fake: Hypervisor) -> AsyncIterator[Services]:
    """All services over the fake."""
    installation = await asyncio.to_thread(Installation, config, fake, GROUPS)
    try:
        async with services(installation) as running:
            yield running
    finally:
        installation.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait until something has become true; the bound is the test's."""
    while not condition():
        await asyncio.sleep(0.005)


Scenario = Callable[[Services, FakeHypervisor], Coroutine[Any, Any, None]]


def play(tmp_path: Path, *scenarios: Scenario, within: float = 60, **changes: Any) -> None:
    """Run scenarios one after the other, each on a restarted daemon with the same machines.

    All of them within so many seconds; `changes` are to the configuration.
    """
    config = configured(tmp_path, **changes)

    async def main() -> None:
        fake = FakeHypervisor()
        async with asyncio.timeout(within):
            (await asyncio.to_thread(Installation, config, fake, GROUPS)).close()
            await asyncio.to_thread(freeze, config)
            await activate(config)
            for scenario in scenarios:
                async with daemon(config, fake) as running:
                    await scenario(running, fake)
        await fake.close()

    asyncio.run(main())


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run one test on an event loop of its own, at most 20 s."""

    async def main() -> None:
        async with asyncio.timeout(20):
            await work

    asyncio.run(main())
