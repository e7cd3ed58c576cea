"""The bodies of the API, one definition each; the OpenAPI document is made from these."""

from __future__ import annotations

import base64
import enum
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from templated.model.config import ScalingConfig
from templated.model.names import MAX_COUNT
from templated.model.spec import PoolSize


class _Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body: a key that is not known is an error."""


class CloneRequest(_Body, frozen=True, kw_only=True):
    """Make one clone, or NAME-1 to NAME-count."""

    name: str
    template: str | None = None
    """None: the only template that has an active generation."""
    count: Annotated[int, Meta(ge=1, le=MAX_COUNT)] | None = None
    path: Literal["cold", "direct", "standby", "warm"] | None = None
    """Force a path; None takes the fastest that is ready: warm, then standby, then direct."""


class PoolRequest(_Body, frozen=True, kw_only=True):
    """Set the sizes of a template's pools; None leaves a tier as it is."""

    standby: PoolSize | None = None
    warm: PoolSize | None = None
    reset: bool = False
    """Go back to the sizes in the template's spec."""


SizeSource = Literal["template", "set", "scaling"]
"""Who says how many members a pool has: the template's file, `pool set`, or what its functions are
about to need."""


class TierView(Struct, frozen=True, kw_only=True):
    """One tier of a template's pool."""

    target: int
    ready: int


class PoolView(Struct, frozen=True, kw_only=True):
    """The pools of one template."""

    template: str
    standby: TierView
    warm: TierView
    problem: str = ""
    """Why no members are made at present; empty when nothing prevents it."""
    source: SizeSource = "template"


class ImageView(Struct, frozen=True, kw_only=True):
    """An image that the templates of this daemon can boot from."""

    digest: str
    suite: str
    """Empty for a copied file."""
    packages: tuple[str, ...]
    path: str | None = None
    """The file that it is a copy of."""
    size: int
    """Bytes that its disk takes on the host."""
    built_at: str
    """RFC 3339, UTC."""
    templates: tuple[str, ...]
    """The templates whose active generation boots from it."""


class BuildRequest(_Body, frozen=True, kw_only=True):
    """Build a template from its file in template_dirs, or from the YAML given here."""

    spec: str | None = None
    source: str = "the request"
    """The name of the given YAML in errors, such as that of the file it was read from."""


class ExecRequest(_Body, frozen=True, kw_only=True):
    """Run a command in a clone."""

    argv: Annotated[tuple[str, ...], Meta(min_length=1)]
    stdin: str | None = None
    """Base64."""
    timeout: Annotated[float, Meta(gt=0, le=86400)] = 60.0
    """Seconds until the command is killed."""
    env: dict[str, str] = {}


class ExecFrame(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the answer to an exec: output as it comes, then one line with the end."""

    stream: Literal["stdout", "stderr"] | None = None
    data: str = ""
    """Base64."""
    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    error: str | None = None
    """Why the command could not be run, or why its end is not known."""
    done: bool = False

    def content(self) -> bytes:
        """The output that this frame brings; ValueError when `data` is not base64."""
        return base64.b64decode(self.data, validate=True)


class OperationState(enum.StrEnum):
    """Where long work is."""

    RUNNING = "running"
    DONE = "done"
    """It ended well, with `result`."""
    FAILED = "failed"
    """It ended with `error`, also when the daemon was stopped meanwhile."""


OPERATION_TRANSITIONS: dict[OperationState, frozenset[OperationState]] = {
    OperationState.RUNNING: frozenset({OperationState.DONE, OperationState.FAILED}),
    OperationState.DONE: frozenset(),
    OperationState.FAILED: frozenset(),
}


class ErrorInfo(Struct, frozen=True, kw_only=True):
    """What went wrong: a stable code, one line that says what, one that says what to do."""

    code: str
    message: str
    hint: str = ""


class ErrorBody(Struct, frozen=True, kw_only=True):
    """The body of every answer that is not a success."""

    error: ErrorInfo


class Operation(Struct, frozen=True, kw_only=True):
    """Long work, such as a build. Its events are at /v1/operations/ID/events."""

    id: str
    kind: str
    target: str
    state: OperationState
    started: str
    error: ErrorInfo | None = None
    result: dict[str, Any] | None = None


class OperationEvent(Struct, frozen=True, kw_only=True):
    """One step of long work.

    type "phase": `name`, and `state` "start" or "done" with `seconds`.
    type "probe": `name`, `state` "start", "passed" or "failed", `seconds`, and what it `saw`.
    type "log": a line in `message`.
    type "end": the last one; `state` is the operation's, `error` says why it failed.
    """

    time: str
    type: Literal["phase", "probe", "log", "end"]
    name: str = ""
    state: str = ""
    seconds: float | None = None
    message: str = ""
    saw: str = ""
    error: ErrorInfo | None = None
    result: dict[str, Any] | None = None


class Event(Struct, frozen=True, kw_only=True):
    """One thing that happened."""

    time: str
    type: str
    """The kind of event, such as `clone.running` or `generation.active`."""
    subject: str
    """The name of the clone or template."""
    details: dict[str, Any] = {}


class AuditEntry(Struct, frozen=True, kw_only=True):
    """One request that changed something or reached into a guest, or was refused."""

    time: str
    """When it was answered: RFC 3339, UTC."""
    uid: int | None
    """The caller's, from the kernel, as `pid`; None for one who had gone already."""
    pid: int | None
    user: str = ""
    """The name of the uid, empty when it has none."""
    key: str = ""
    """The id of the key by which a request to the gateway was signed; it has no uid."""
    role: str = ""
    action: str
    """The operation's name in the OpenAPI document, or in Lambda's API."""
    target: str = ""
    """The clone, template or operation."""
    detail: str = ""
    """The program of an exec (never its arguments), the path of a file, sizes of a pool."""
    outcome: str
    """`ok`, the code of the error, or `cancelled` for what ended with the daemon."""
    status: int
    """The HTTP status, 0 for what was cancelled."""
    left_out: int = 0
    """How many refusals of this kind came since the one before, and have no entry."""


class Info(Struct, frozen=True, kw_only=True):
    """The daemon."""

    version: str
    pid: int
    accel: str
    qemu_version: str
    state_dir: str
    shm_dir: str
    metrics: str | None
    transport: str
    """`restore.transport`."""
    confine: bool
    clones: int
    scaling: ScalingConfig | None = None
    """`scaling`, as configured."""
