"""A clone: its states, its identity, and the phases of its start."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta, Struct

Key = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,63}$(?!\n)")]
"""What becomes a part of a path: a spoiled one must not name another directory."""


class CloneState(enum.StrEnum):
    """Where a clone is in its life. `TRANSITIONS` says what may follow what."""

    STARTING = "starting"
    """It is being started. The journal has its slot, but not the clone yet."""
    RUNNING = "running"
    """The guest has confirmed its identity and its link is up."""
    DEAD = "dead"
    """Its VM ended by itself or was killed from outside; the name is taken until `rm`."""
    REMOVING = "removing"
    """It is being taken down; after that there is no record of it."""


TRANSITIONS: dict[CloneState, frozenset[CloneState]] = {
    # A start that fails leaves no record.
    CloneState.STARTING: frozenset({CloneState.RUNNING}),
    CloneState.RUNNING: frozenset({CloneState.DEAD, CloneState.REMOVING}),
    CloneState.DEAD: frozenset({CloneState.REMOVING}),
    CloneState.REMOVING: frozenset(),
}


class StartPath(enum.StrEnum):
    """How a clone came up."""

    COLD = "cold"
    """A full boot, without a template."""
    DIRECT = "direct"
    """The hypervisor was spawned on request and the generation restored into it."""
    STANDBY = "standby"
    """A hypervisor from the pool was waiting for its state already."""
    WARM = "warm"
    """A VM from the pool was restored, identified for its slot and paused already."""


class Phase(enum.StrEnum):
    """A timed step of a start, in order."""

    ALLOCATE = "allocate"
    ATTACH = "attach"
    """Only of an instance of a function from a pool: its code is put behind the second disk."""
    SPAWN = "spawn"
    BOOT = "boot"
    """Only on the path `cold`, in place of `restore` and `resume`."""
    RESTORE = "restore"
    RESUME = "resume"
    IDENTIFY = "identify"
    LINK = "link"


class Identity(Struct, frozen=True, kw_only=True):
    """The values that no two clones share, as a user sees them."""

    mac: str
    ip: str
    hostname: str
    machine_id: str
    boot_id: str


class Slot(Struct, frozen=True, kw_only=True):
    """All that a clone needs, made ahead of requests and without an owner."""

    id: Annotated[str, Meta(pattern=r"^[0-9a-z]{1,16}$(?!\n)")]
    """Names its directories and its tap."""
    index: Annotated[int, Meta(ge=0)]
    """The number that MAC and IP are computed from."""
    generation: Key
    uuid: Annotated[str, Meta(pattern=r"^[0-9a-f-]{36}$(?!\n)")]
    mac: Annotated[str, Meta(pattern=r"^([0-9a-f]{2}:){5}[0-9a-f]{2}$(?!\n)")]
    ip: Annotated[str, Meta(pattern=r"^[0-9]{1,3}(\.[0-9]{1,3}){3}$(?!\n)")]
    machine_id: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$(?!\n)")]
    boot_id: Annotated[str, Meta(pattern=r"^[0-9a-f-]{36}$(?!\n)")]


class CloneView(Struct, frozen=True, kw_only=True, omit_defaults=False):
    """A clone as the API and the CLI show it."""

    name: str
    template: str
    generation: str
    state: CloneState
    path: StartPath
    pid: int | None
    uuid: str
    identity: Identity
    phases_ms: dict[str, float]
    total_ms: float | None
    created: str
    """RFC 3339, UTC."""
    reason: str = ""
    """Why it is dead; empty otherwise."""
