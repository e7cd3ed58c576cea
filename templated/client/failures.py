"""Errors for people when a client gets no answer: the same for both clients."""

from __future__ import annotations

import json
import os

from templated.errors import DaemonUnavailable, InvalidRequest, RemoteError, TemplatedError, Timeout
from templated.model.socket import SYSTEM_SOCKET

START_HINT = "start it: systemctl start templated, or: templated serve"
CONNECT_SECONDS = 5.0
_LOG_HINT = "journalctl -u templated may say why"
_BY_STATUS = {
    400: "invalid",
    403: "forbidden",
    404: "not_found",
    405: "invalid",
    409: "conflict",
    413: "invalid",
}


def unreachable(error: OSError, path: str) -> TemplatedError:
    """Why the socket at `path` cannot be connected to."""
    if isinstance(error, FileNotFoundError):
        return DaemonUnavailable(
            f"the daemon is not running: there is no socket {path}", hint=_start_hint(path)
        )
    if isinstance(error, ConnectionRefusedError):
        return DaemonUnavailable(
            f"the daemon is not running: nothing listens on {path}", hint=_start_hint(path)
        )
    if isinstance(error, PermissionError):
        return DaemonUnavailable(
            f"permission denied on the daemon's socket {path}",
            hint="use sudo, or join the group that owns it; to run a daemon of your own: "
            "templated serve",
        )
    if isinstance(error, (TimeoutError, BlockingIOError)):
        return DaemonUnavailable(
            f"the daemon does not accept connections on {path}",
            hint="it may be overloaded or stuck: systemctl status templated",
        )
    if error.errno is None:  # the path does not fit into a socket's address
        return InvalidRequest(f"{path} cannot be a socket: {error}", hint="use a shorter path")
    return DaemonUnavailable(f"{path}: {error.strerror}", hint=_start_hint(path))


def _start_hint(path: str) -> str:
    if path != SYSTEM_SOCKET and os.path.exists(SYSTEM_SOCKET):
        return f"{START_HINT}; for the system's daemon: --socket {SYSTEM_SOCKET}"
    return START_HINT


def no_answer(timeout: float | None) -> Timeout:
    """Nothing came for this many seconds."""
    bound = f" within {timeout:g} s" if timeout else ""
    return Timeout(f"the daemon did not answer{bound}", hint=_LOG_HINT)


def cut_off(error: BaseException) -> DaemonUnavailable:
    """The connection ended before the answer did."""
    return DaemonUnavailable(
        f"the daemon ended the connection: {type(error).__name__}",
        hint=f"it may have been restarted; {_LOG_HINT}",
    )


def reported(status: int, reason: str, body: bytes) -> RemoteError:
    """The error that an answer of a status from 400 on is."""
    try:
        told = json.loads(body)["error"]
        code, message, hint = told["code"], told["message"], told.get("hint", "")
    except (ValueError, KeyError, TypeError):
        return RemoteError(
            _BY_STATUS.get(status, "internal"),
            f"the daemon answered with HTTP status {status} {reason}",
            hint="this command and the daemon may be of different versions: templated info",
            status=status,
        )
    return RemoteError(code, message, hint=hint, status=status)


def nonsense(what: str) -> RemoteError:
    """The error for an answer that does not fit the request."""
    return RemoteError("internal", f"the daemon's answer is {what}", hint="templated info")
