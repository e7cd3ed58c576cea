"""Generations on disk and in shm_dir: find, verify, describe, remove.

`Generation` is what the start path needs, read and checked once. On the path itself only stat(2)
runs: a file whose size, inode or modification time changed since is digested again.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from templated.drivers.hypervisor.base import Hardware, SavedState
from templated.errors import HostError
from templated.model.generation import FileDigest, Manifest
from templated.model.units import size_bytes
from templated.services.machines.slots import Layer
from templated.services.places import Layout

MANIFEST_FORMAT = 3
"""2: the frozen agent takes its identity in one packed field."""
DISK, EMPTY, MANIFEST, MEMORY, STATE = (
    "disk.qcow2",
    "empty.qcow2",
    "manifest.json",
    "memory",
    "state",
)
Stamp = tuple[int, int, int]


@dataclass
class Generation:
    """A frozen generation whose files were verified against its manifest."""

    manifest: Manifest
    directory: Path
    frozen: Path
    stamps: dict[Path, Stamp] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def memory(self) -> Path:
        return self.frozen / MEMORY

    @property
    def layer(self) -> Layer:
        return Layer(self.id, self.directory / EMPTY)

    @property
    def hardware(self) -> Hardware:
        machine = self.manifest.spec.machine
        return Hardware(
            type=machine.type,
            memory_bytes=size_bytes(machine.memory),
            vcpus=machine.vcpus,
            accel=self.manifest.accel,
            cpu=self.manifest.cpu,
        )

    def state(self, transport: str) -> SavedState:
        """The saved device state; for the transport `fd` its file is opened by the caller."""
        return SavedState(self.frozen / STATE, transport)

    def files(self) -> dict[str, Path]:
        """The frozen files, by their names in the manifest."""
        names = {MEMORY: self.frozen, STATE: self.frozen, DISK: self.directory}
        return {name: directory / name for name, directory in names.items()}

    def changed(self) -> list[str]:
        """Names of frozen files that are not what was last verified. Costs one stat each."""
        return [name for name, path in self.files().items() if _stamp(path) != self.stamps[path]]

    def runs_on(self) -> bool:
        """Whether VMs that have loaded their state still have all they use. Costs some stats.

        Memory and disk are read by VMs that run; the saved state is not.
        """
        return set(self.changed()) <= {STATE}

    async def verify(self) -> None:
        """Digest all frozen files; HostError names the first one that is not as it was frozen.

        Blocks nothing: hashing runs in a thread.
        """
        for name, path in self.files().items():
            expected = self.manifest.files.get(name)
            if expected is None:
                raise _damaged(self, f"its manifest says nothing of {name}")
            before = _stamp(path)
            if before is None:
                raise _damaged(self, f"{path} is missing")
            size = path.stat().st_size
            if size != expected.size:
                raise _damaged(self, f"{path} has {size} bytes, frozen were {expected.size}")
            if (await digest_file(path)).sha256 != expected.sha256:
                raise _damaged(self, f"the content of {path} has changed since it was frozen")
            self.stamps[path] = before


def _damaged(generation: Generation, what: str) -> HostError:
    template = generation.manifest.template
    return HostError(
        f"generation {generation.id} of {template} cannot be used: {what}",
        hint=f"run: templated template build {template} (or: template rollback {template})",
    )


def _stamp(path: Path) -> Stamp | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_ino, status.st_mtime_ns


async def digest_file(path: Path) -> FileDigest:
    """Size and SHA-256 of a file; HostError when it cannot be read."""

    def work() -> FileDigest:
        try:
            with open(path, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
                return FileDigest(size=os.fstat(content.fileno()).st_size, sha256=digest)
        except OSError as error:
            raise HostError(f"cannot read {path}: {error.strerror}") from error

    return await asyncio.to_thread(work)


def freeze_file(path: Path) -> None:
    """Make a file read-only for good."""
    path.chmod(stat.S_IRUSR | stat.S_IRGRP)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a generation; HostError, naming the field, when it is not one."""
    path = directory / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise HostError(f"{path} is damaged: {error}", hint="build the template again") from error
    if manifest.format != MANIFEST_FORMAT:
        raise HostError(
            f"{path} has format {manifest.format}, not {MANIFEST_FORMAT}",
            hint="build the template again",
        )
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest durably, under its name only when complete."""
    partial = directory / (MANIFEST + ".part")
    with open(partial, "wb") as out:
        out.write(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        out.flush()
        os.fsync(out.fileno())
    partial.rename(directory / MANIFEST)
    freeze_file(directory / MANIFEST)


async def load(layout: Layout, template: str, generation: str) -> Generation:
    """Read and verify a generation; HostError when it cannot be used."""
    directory = layout.generation(template, generation)
    manifest = await asyncio.to_thread(read_manifest, directory)
    loaded = Generation(manifest, directory, layout.frozen(template, generation))
    await loaded.verify()
    return loaded


async def remove_files(layout: Layout, template: str, generation: str) -> None:
    """Delete everything of a generation. Clones that still map its memory keep their mapping."""
    for directory in (
        layout.frozen(template, generation),
        layout.generation(template, generation),
    ):
        await asyncio.to_thread(shutil.rmtree, directory, True)
        try:
            await asyncio.to_thread(directory.parent.rmdir)
        except OSError:
            pass  # other generations of this template are there
