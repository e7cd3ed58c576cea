"""Functions: code with a handler, in versions, reached by aliases; and what invoking one gives."""

from __future__ import annotations

import enum
from typing import Annotated, Any

from msgspec import Meta, Raw, Struct

from templated.model.lifecycle import Table
from templated.model.names import ALIAS_NAME, FUNCTION_NAME
from templated.model.names import LATEST as LATEST
from templated.model.names import check_function_name as check_function_name
from templated.model.names import check_qualifier as check_qualifier
from templated.model.policy import PolicyKeys
from templated.model.spec import TemplateName
from templated.model.units import Duration, seconds

FunctionName = Annotated[str, Meta(pattern=rf"^{FUNCTION_NAME}$(?!\n)")]
AliasName = Annotated[str, Meta(pattern=rf"^{ALIAS_NAME}$(?!\n)")]
EnvName = Annotated[str, Meta(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,127}$(?!\n)")]
Handler = Annotated[str, Meta(pattern=r"^[!-~]{1,128}$(?!\n)")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Weight = Annotated[float, Meta(ge=0, le=1)]

MAX_PAYLOAD = 6 << 20
"""Bytes of a request's payload, and of its answer's."""
MAX_CODE = 250 << 20
"""Bytes of all files of one function's code, and of the archive that it comes in."""
MAX_ENV = 4096
"""Bytes of all names and values of a function's environment."""
LONGEST = 900.0
"""Seconds that one request may take at most."""


class Runtime(enum.StrEnum):
    """What runs the handler in the guest."""

    PYTHON = "python"
    """Ours: a Python that was started before the freeze, and loads MODULE.FUNCTION."""
    PROVIDED = "provided"
    """The code's own executable `bootstrap`, which speaks the Lambda Runtime API."""


class Told(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client of Lambda's API said that means nothing here: it is only told back."""

    role: Annotated[str, Meta(max_length=512)] = ""
    runtime: Annotated[str, Meta(max_length=64)] = ""


class Settings(Struct, frozen=True, kw_only=True):
    """What a version fixes beside its code."""

    handler: Handler
    template: TemplateName
    runtime: Runtime = Runtime.PYTHON
    env: dict[EnvName, str] = {}
    timeout: Duration = "30s"
    description: Annotated[str, Meta(max_length=256)] = ""
    told: Told = Told()

    def __post_init__(self) -> None:
        size = sum(len(name.encode()) + len(value.encode()) for name, value in self.env.items())
        if size > MAX_ENV:
            raise ValueError(f"the environment has {size} bytes, at most {MAX_ENV} are allowed")
        if any("\0" in value for value in self.env.values()):
            raise ValueError("a value of the environment holds a NUL")
        if not 0 < seconds(self.timeout) <= LONGEST:
            raise ValueError(f"timeout must be more than 0s and at most {LONGEST:g}s")


class CodeView(Struct, frozen=True, kw_only=True):
    """A code image: its address, and the bytes of the files in it."""

    digest: Digest
    bytes: Annotated[int, Meta(ge=0)]


class Version(Struct, frozen=True, kw_only=True):
    """Code and settings of a function: what still changes (number 0), or a numbered copy."""

    function: FunctionName
    number: Annotated[int, Meta(ge=0)]
    settings: Settings
    code: CodeView
    created: str
    """RFC 3339, UTC; of $LATEST when it was changed last."""

    @property
    def label(self) -> str:
        """`$LATEST`, or the number."""
        return str(self.number) if self.number else LATEST


def named(version: Version) -> str:
    """A version, as people read it: NAME:LABEL."""
    return f"{version.function}:{version.label}"


class Alias(Struct, frozen=True, kw_only=True):
    """A name for one version, or for two with weights that add up to 1."""

    function: FunctionName
    name: AliasName
    versions: dict[str, Weight]
    """By the label of the version; the first is the one that the alias names."""
    description: Annotated[str, Meta(max_length=256)] = ""


class Provisioned(Struct, frozen=True, kw_only=True):
    """Instances that are kept ready for a numbered version, or for an alias."""

    function: FunctionName
    qualifier: Annotated[str, Meta(min_length=1, max_length=128)]
    count: Annotated[int, Meta(ge=1, le=10000)]
    changed: str
    """RFC 3339, UTC."""


class InstanceState(enum.Enum):
    """Where an instance is in its life."""

    STARTING = "starting"
    """Its clone comes up, and gets its code."""
    INITIALISING = "initialising"
    """Its handler is being loaded."""
    BUSY = "busy"
    """It serves a request."""
    IDLE = "idle"
    """It runs and waits for a request."""
    PAUSED = "paused"
    """It waits for a request with its vCPUs stopped."""
    ENDING = "ending"
    """It is being taken down; nothing is sent to it any more."""


_I = InstanceState
INSTANCE_TRANSITIONS: Table[InstanceState] = {
    _I.STARTING: frozenset({_I.INITIALISING, _I.ENDING}),
    _I.INITIALISING: frozenset({_I.IDLE, _I.BUSY, _I.ENDING}),
    _I.BUSY: frozenset({_I.IDLE, _I.ENDING}),
    _I.IDLE: frozenset({_I.BUSY, _I.PAUSED, _I.ENDING}),
    _I.PAUSED: frozenset({_I.BUSY, _I.ENDING}),
    _I.ENDING: frozenset(),
}


class EventState(enum.Enum):
    """Where an asynchronous event is."""

    QUEUED = "queued"
    """It waits for its turn, or for its next try."""
    RUNNING = "running"
    FAILED = "failed"
    """A dead letter: all tries failed, or it became too old."""


_E = EventState
EVENT_TRANSITIONS: Table[EventState] = {
    # From RUNNING back to RUNNING: the daemon ended meanwhile, and it is tried again.
    _E.QUEUED: frozenset({_E.RUNNING, _E.FAILED}),
    _E.RUNNING: frozenset({_E.RUNNING, _E.QUEUED, _E.FAILED}),
    _E.FAILED: frozenset(),
}


# What the API says and is told


class DeployRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a deploy; what is None stays as it is, or gets its default."""

    handler: Handler | None = None
    template: TemplateName | None = None
    """By default the only one that serves and takes code."""
    runtime: Runtime | None = None
    env: dict[EnvName, str] | None = None
    timeout: Duration | None = None
    description: Annotated[str, Meta(max_length=256)] | None = None
    told: Told | None = None
    """What is empty in it stays as it is, too."""
    network: PolicyKeys | None = None
    """Of the function, for all its versions; keys that are None stay as they are."""


class PublishRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Make a numbered version of `$LATEST`."""

    description: Annotated[str, Meta(max_length=256)] | None = None
    """None: that of `$LATEST`."""
    digest: Digest | None = None
    """The code that `$LATEST` must have; None: any."""


class AliasRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Point an alias at one version, or at two by weight."""

    versions: Annotated[dict[str, Weight], Meta(min_length=1, max_length=2)]
    """By number, or `$LATEST` alone; the first is the one that the alias names."""
    description: Annotated[str, Meta(max_length=256)] | None = None


class ConcurrencyRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Set how many requests of a function may run at once."""

    reserved: Annotated[int, Meta(ge=0, le=10000)] | None
    """None: as many as there may be in all."""


class ScaleRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Set how many instances of a function are kept, and how many there may be."""

    min: Annotated[int, Meta(ge=0, le=10000)] | None = None
    """Of `$LATEST`, kept ready; 0: none, None: as it is."""
    max: Annotated[int, Meta(ge=0, le=10000)] | None = None
    """Of all versions together; 0: no bound of its own, None: as it is."""


class ProvisionRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keep instances ready for a numbered version, or for an alias."""

    count: Annotated[int, Meta(ge=1, le=10000)]


class Readiness(enum.StrEnum):
    """How far instances that are to be kept are; as Lambda words it."""

    READY = "READY"
    IN_PROGRESS = "IN_PROGRESS"
    FAILED = "FAILED"
    """The last tries have failed; they go on, later and later."""


class ProvisionedView(Struct, frozen=True, kw_only=True):
    """What is provisioned for a version or an alias, and what of it is there."""

    qualifier: str
    requested: int
    allocated: int
    """Those that are there, or come up."""
    available: int
    """Those that are there."""
    status: Readiness
    reason: str = ""
    """Why it has failed."""
    changed: str


class UpdateView(Struct, frozen=True, kw_only=True):
    """How requests move to a new `$LATEST`: the one before serves until instances are ready."""

    done: bool
    """Requests go to the new one."""
    wanted: int
    """How many instances are to be ready before."""
    ready: int
    problem: str = ""
    """Why requests go to it though they were not."""


class VersionView(Struct, frozen=True, kw_only=True):
    """A version as users see it. Of the environment the names alone: values may be secrets."""

    function: str
    version: str
    handler: str
    runtime: Runtime
    template: str
    timeout_s: float
    env: tuple[str, ...]
    description: str
    code: CodeView
    created: str


class AliasView(Struct, frozen=True, kw_only=True):
    """An alias as users see it."""

    name: str
    versions: dict[str, float]
    description: str = ""


class FunctionView(Struct, frozen=True, kw_only=True):
    """A function as users see it; the first fields are those of `$LATEST`."""

    name: str
    handler: str
    runtime: Runtime
    template: str
    timeout_s: float
    description: str
    code: CodeView
    versions: tuple[VersionView, ...]
    """`$LATEST` first, then the numbered ones, newest first."""
    aliases: tuple[AliasView, ...]
    reserved: int | None
    """How many of its requests may run at once; None: as many as there may be in all."""
    network: PolicyKeys = PolicyKeys()
    """What it has said of the network; the rest is as its template has it."""
    min: int
    """How many instances of `$LATEST` are kept ready."""
    max: int | None
    """How many instances there may be of all versions; None: it has no bound of its own."""
    provisioned: tuple[ProvisionedView, ...]
    instances: dict[str, int]
    """How many instances it has, by state."""
    update: UpdateView | None = None
    """The last change of `$LATEST`, where one before it had instances."""
    created: str


class InvokeView(Struct, frozen=True, kw_only=True):
    """What invoking a function gave."""

    status: int
    error: str | None
    """`Handled` or `Unhandled` when the function failed; None when it did not."""
    payload: Raw
    """JSON: what the handler returned, or how it failed."""
    version: str
    instance: str
    start: str
    """`warm` when an initialised instance served it, otherwise how its clone came up: `pool` or
    `direct`."""
    phases_ms: dict[str, float]
    """route, start, attach, init, run: those that there were."""
    total_ms: float
    trace: str = ""
    """The root of its trace id: the same for all requests that it led to."""


class Accepted(Struct, frozen=True, kw_only=True):
    """An asynchronous event that was accepted: it is not lost from now on."""

    id: str


class EventView(Struct, frozen=True, kw_only=True):
    """An asynchronous event as users see it."""

    id: str
    function: str
    qualifier: str
    state: EventState
    attempts: int
    """How often it was tried."""
    created: str
    due: str
    """When it is tried next; RFC 3339, UTC."""
    reason: str = ""
    """Why its last try failed."""
    payload: Any = None
