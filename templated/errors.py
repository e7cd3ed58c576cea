"""Every error that templated raises on purpose.

    TemplatedError              message + hint + a stable code
    ├── ConfigError             a config file or a spec is wrong
    ├── InvalidRequest          a name, an option or an API body is wrong
    ├── Forbidden               the caller lacks the role or the right that this needs
    ├── NotFound                no such clone, template, generation or operation
    ├── Conflict                the name is taken, or the state does not allow the request
    │   └── Changed             what a change was meant for is something else by now
    ├── HostError               the host lacks something: QEMU, space in shm_dir, a permission
    ├── Busy                    a bound on concurrent work is reached
    │   └── Throttled           a function's bound is: which one, and when to try again
    ├── Timeout                 a bounded wait ended
    ├── HypervisorError         QEMU refused, or ended
    ├── GuestError              the agent in the guest answered wrongly or not at all
    │   └── UnfitAgent          it lacks or forbids what is needed: waiting will not help
    ├── IdentityError           the guest did not confirm the identity it was given
    ├── StartError              a clone did not come up: which phase failed, and why
    ├── BuildError              an image or a template build failed
    │   └── ProbeError          a QA probe did not pass
    ├── DaemonUnavailable       nothing answers on the socket
    ├── Defect                  templated itself did what it must never do
    └── RemoteError             an error as the daemon reported it, with the code that it gave

`message` is one line that says what is wrong, `hint` one line that says what to do next.
The API maps `code` to an HTTP status (`templated.api.errors`), the CLI maps it to an exit code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 4000


class TemplatedError(Exception):
    """Base of the tree; never raised itself."""

    code = "internal"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(one_line(message))
        self.message = one_line(message)
        self.hint = one_line(hint)


def one_line(text: str) -> str:
    """`text` without line breaks and what a terminal would obey; the rest of a long one is cut off.

    Much of what errors quote comes from guests and from files.
    """
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return "".join(c if c.isprintable() else " " for c in cut)


class ConfigError(TemplatedError):
    """A configuration or template file is wrong."""

    code = "config"


class InvalidRequest(TemplatedError):
    """A name, an option or an API body is wrong."""

    code = "invalid"


class Forbidden(TemplatedError):
    """The caller lacks the role or the right that this needs."""

    code = "forbidden"


class NotFound(TemplatedError):
    """There is no such thing."""

    code = "not_found"


class Conflict(TemplatedError):
    """The name is taken, or the state does not allow the request."""

    code = "conflict"


class Changed(Conflict):
    """What a change was meant for is something else by now: nothing was changed."""


class HostError(TemplatedError):
    """The host lacks something: QEMU, space, a permission."""

    code = "host"


class Busy(TemplatedError):
    """A bound on concurrent work is reached."""

    code = "busy"


class Throttled(Busy):
    """A bound of functions is reached: `reason` names it, `retry_after` is in seconds.

    Reasons: `queue`, `concurrency`, `reserved`, `max`. Nothing of the request was begun.
    """

    def __init__(self, message: str, *, reason: str, retry_after: float = 1.0, hint: str = ""):
        super().__init__(message, hint=hint)
        self.reason = reason
        self.retry_after = retry_after


class Timeout(TemplatedError):
    """A bounded wait ended."""

    code = "timeout"


class HypervisorError(TemplatedError):
    """QEMU refused, or ended."""

    code = "hypervisor"


class GuestError(TemplatedError):
    """The guest's agent answered wrongly or not at all."""

    code = "guest"


class UnfitAgent(GuestError):
    """The guest's agent lacks or forbids what is needed: it helps nothing to ask it again."""


class IdentityError(TemplatedError):
    """The guest did not confirm the identity it was given."""

    code = "identity"


class StartError(TemplatedError):
    """A clone did not come up. `phase` is the phase that failed, `reason` the cause's code."""

    code = "start_failed"

    def __init__(self, message: str, *, phase: str, reason: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.phase = phase
        self.reason = reason


class BuildError(TemplatedError):
    """An image or a template build failed."""

    code = "build_failed"


class ProbeError(BuildError):
    """A probe did not pass. `probe` is its name."""

    code = "probe_failed"

    def __init__(self, message: str, *, probe: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.probe = probe


class DaemonUnavailable(TemplatedError):
    """Nothing answers on the socket."""

    code = "daemon_unavailable"


class RemoteError(TemplatedError):
    """An error as the daemon reported it: its code, message and hint, and the HTTP status."""

    def __init__(self, code: str, message: str, *, hint: str = "", status: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.status = status


class Defect(TemplatedError):
    """templated itself did what it must never do, such as a move between states that is forbidden.

    The forbidden step was not taken.
    """

    code = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="this is a defect of templated; the daemon's log has more")


@contextmanager
def host_errors(what: str = "the host refuses", hint: str = "") -> Iterator[None]:
    """An OSError of the block as a HostError, where it can come from any call in it."""
    try:
        yield
    except OSError as error:
        where = f", {error.filename}" if error.filename else ""
        raise HostError(f"{what}: {error.strerror or error}{where}", hint=hint) from error
