"""Where the daemon's socket is. Imports nothing heavy: clients begin here."""

from __future__ import annotations

import os
from collections.abc import Mapping

SYSTEM_RUNTIME = "/run/templated"
SOCKET = "templated.sock"
LOG_HEADER = "X-Templated-Log"
"""Of the answer to an invocation with `tail`: the end of the function's log, in base64."""
SYSTEM_SOCKET = f"{SYSTEM_RUNTIME}/{SOCKET}"


def default_runtime(env: Mapping[str, str], uid: int) -> str:
    """The daemon's runtime_dir: root's, or that of the XDG Base Directory Specification."""
    if uid == 0:
        return SYSTEM_RUNTIME
    return os.path.join(env.get("XDG_RUNTIME_DIR") or f"/tmp/templated-{uid}", "templated")


def default_socket(env: Mapping[str, str] = os.environ, uid: int | None = None) -> str:
    """The socket that a client talks to: TEMPLATED_SOCKET, or the default place."""
    uid = os.geteuid() if uid is None else uid
    return env.get("TEMPLATED_SOCKET") or os.path.join(default_runtime(env, uid), SOCKET)
