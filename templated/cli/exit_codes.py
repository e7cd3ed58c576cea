"""The exit codes of `templated`, and which error gets which. The man pages print these tables."""

from __future__ import annotations

OK = 0
FAILED = 1
USAGE = 2
NOT_FOUND = 3
CONFLICT = 4
NO_DAEMON = 5
HOST = 6
TIMEOUT = 7
BUSY = 8
FORBIDDEN = 9
EXEC_TIMEOUT = 124
EXEC_NOT_FOUND = 127
INTERRUPTED = 130
BROKEN_PIPE = 141

_BY_ERROR = {
    "invalid": USAGE,
    "config": USAGE,
    "not_found": NOT_FOUND,
    "conflict": CONFLICT,
    "daemon_unavailable": NO_DAEMON,
    "host": HOST,
    "timeout": TIMEOUT,
    "busy": BUSY,
    "forbidden": FORBIDDEN,
}

MEANINGS: tuple[tuple[str, str], ...] = (
    (str(OK), "Done."),
    (str(FAILED), "Failed: a start, a build, a probe, QEMU or the guest; or a defect."),
    (str(USAGE), "A wrong option, name, configuration file or template file."),
    (str(NOT_FOUND), "There is no such clone, template, generation, operation or file."),
    (str(CONFLICT), "The name is taken, or the state does not allow the request."),
    (str(NO_DAEMON), "The daemon cannot be reached on its socket."),
    (str(HOST), "The host lacks something: QEMU, space, a permission."),
    (str(TIMEOUT), "A bounded wait ended."),
    (str(BUSY), "A bound on concurrent work is reached; try again."),
    (str(FORBIDDEN), "The daemon refuses this caller, who lacks a role or a right."),
    (str(INTERRUPTED), "Ended by Ctrl-C."),
    (str(BROKEN_PIPE), "The reader of the output has gone away, as in a pipe into head."),
)

EXEC_MEANINGS: tuple[tuple[str, str], ...] = (
    ("N", "The guest command's own exit code; the codes below apply when it did not run."),
    (str(EXEC_TIMEOUT), "The command was ended after --timeout seconds."),
    ("126", "The command was found but cannot be executed."),
    (str(EXEC_NOT_FOUND), "The command was not found in the guest."),
    ("128+N", "The command was ended by signal N."),
)


def for_error(code: str) -> int:
    """The exit code for an error's `code`; FAILED for a code that is not listed."""
    return _BY_ERROR.get(code, FAILED)
