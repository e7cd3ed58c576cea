"""A generation: one frozen, immutable build of a template, and the manifest that describes it."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

from templated.model.network import Addresses
from templated.model.spec import TemplateSpec

GenerationId = Annotated[str, Meta(pattern=r"^[0-9]{8}t[0-9]{6}-[0-9a-f]{6}$(?!\n)")]


class GenerationState(enum.StrEnum):
    """Where a generation is in its life."""

    BUILDING = "building"
    """The base VM is booting, being probed or being saved; a restart of the daemon discards it."""
    READY = "ready"
    """Complete and proven by a canary. A template points at one of these as its active one."""
    RETIRED = "retired"
    """No longer wanted; kept while clones still map its memory, then removed."""


TRANSITIONS: dict[GenerationState, frozenset[GenerationState]] = {
    GenerationState.BUILDING: frozenset({GenerationState.READY}),
    GenerationState.READY: frozenset({GenerationState.RETIRED}),
    GenerationState.RETIRED: frozenset(),
}


class TemplateState(enum.StrEnum):
    """Where a template is in its life. Whether a build is under way is recorded apart from it."""

    UNBUILT = "unbuilt"
    """No generation is active."""
    SERVING = "serving"
    """Clones start from the active generation."""
    BROKEN = "broken"
    """The active generation cannot be used: its files or the host's QEMU are not what was frozen.
    Warm members that have loaded it already still can be claimed."""
    REMOVING = "removing"
    """Its generations are being removed: nothing starts from it and no build begins."""


TEMPLATE_TRANSITIONS: dict[TemplateState, frozenset[TemplateState]] = {
    TemplateState.UNBUILT: frozenset(
        {TemplateState.SERVING, TemplateState.BROKEN, TemplateState.REMOVING}
    ),
    TemplateState.SERVING: frozenset({TemplateState.BROKEN, TemplateState.REMOVING}),
    TemplateState.BROKEN: frozenset({TemplateState.SERVING, TemplateState.REMOVING}),
    # A removal that fails half-way: the rest cannot serve, and can be removed again.
    TemplateState.REMOVING: frozenset({TemplateState.BROKEN}),
}


class FileDigest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen file: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


class ProbeResult(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a probe saw when it passed."""

    name: str
    type: str
    seconds: float
    attempts: int
    saw: str


class QemuVersion(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The QEMU that froze a generation: only the same one restores it."""

    path: str
    version: str


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is known of a generation; written once, beside its disk."""

    format: int
    id: GenerationId
    template: str
    created: str
    spec: TemplateSpec
    image: str
    qemu: QemuVersion
    accel: str
    cpu: str
    command_line: tuple[str, ...]
    kernel: str
    kernel_sha256: str
    kernel_cmdline: str
    files: dict[str, FileDigest]
    """By name: `memory` and `state` in shm_dir, `disk.qcow2` in state_dir."""
    probes: tuple[ProbeResult, ...]
    canary_probes: tuple[ProbeResult, ...]
    phases_s: dict[str, float]
    freeze_lag_s: float
    """Guest seconds between the agent's clock mark and the stop of its vCPU."""
    addresses: Addresses | None = None
    """Those of its VMs, of a template that names a network of libvirt."""
    clone_bytes: int = 0
    """Memory of the host that the canary held for itself once it was identified; 0: unknown."""


class GenerationView(Struct, frozen=True, kw_only=True):
    """A generation as the API and the CLI show it."""

    id: str
    state: GenerationState
    active: bool
    clones: int
    created: str


class TemplateView(Struct, frozen=True, kw_only=True):
    """A template as the API and the CLI show it."""

    name: str
    description: str
    active: str | None
    """The active generation's id; null until the first build succeeds."""
    generations: tuple[GenerationView, ...]
    spec: TemplateSpec | None = None
    manifest: Manifest | None = None
    problem: str = ""
    """Why the template cannot serve now, in one line; empty when it can."""

    def hidden(self) -> TemplateView:
        """The same for who may not read what may be secret: see `SeedSpec.hidden`."""
        manifest = self.manifest
        return replace(
            self,
            spec=self.spec and self.spec.hidden(),
            manifest=manifest and replace(manifest, spec=manifest.spec.hidden()),
        )
