"""Commands of the product in the lab, over one process there that has its modules imported."""

from __future__ import annotations

import contextlib
import json
import select
import shlex
import subprocess
from typing import Any

from tests.lab.image import HERE
from tests.lab.machine import Lab

_SERVER = "/run/serve_commands.py"
# By the interpreter that the installed command names, whatever the guide has made of it. Isolated,
# since /run has a folder that is called templated as well.
_START = f"exec $(sed -n '1s/^#!//p' $(command -v templated)) -I {_SERVER}"


class Commands:
    """Runs them one after the other. It is started anew after the lab's reboot."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._server: subprocess.Popen[bytes] | None = None

    def run(self, *argv: str, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run `templated` with these arguments. Raises TimeoutExpired."""
        command = shlex.join(["templated", *argv])
        if self._server is None or self._server.poll() is not None:
            self._start()
        server = self._server
        assert server is not None and server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(argv).encode() + b"\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout)[0]:
            self.close()
            raise subprocess.TimeoutExpired(command, timeout)
        answer: list[Any] = json.loads(server.stdout.readline())
        code, out, err = answer
        return subprocess.CompletedProcess(command, code, out, err)

    def _start(self) -> None:
        self.close()
        self._lab.put(_SERVER, (HERE / "serve_commands.py").read_bytes())
        self._server = subprocess.Popen(
            [*self._lab.ssh(), _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def close(self) -> None:
        """End the process; a command that runs goes on."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            for pipe in (self._server.stdin, self._server.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()
            self._server = None
