"""One guest that does what it can to the host, beside ten good ones that must not notice."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from templated.drivers import boundedlog
from templated.drivers.host.procfs import cpu_seconds
from templated.errors import RemoteError
from tests.real.harness import Daemon

GOOD = tuple(f"good-{number}" for number in range(1, 11))
# In place of the guest's agent: it says one thing without end, another one after each request.
_AGENT = r"""
import os, re
port = os.open("/dev/virtio-ports/templated.agent.0", os.O_RDWR | os.O_NONBLOCK)
number, asked = 0, 0
def kinds(n):
    output = b'{"id": %d, "stream": "stdout", "data": "eA=="}\n' % n
    return [
        b"\n" * 65536,
        b"{nonsense\n" * 6000,
        b'{"id": 1, "ok": true, "result": {}}\n' * 1500,
        b"x" * 65536,
        os.urandom(65536),
        output * 1000,
        b'{"id": %d, "ok": true, "result": {"exit_code": ' % n + b"9" * 900000 + b"}}\n",
        b'{"id": %d, "ok": true, "result": {"exit_code": 0}}\n' % (n - 1),
        b'{"id": %d, "ok": false, "error": {"message": "' % n + b"\\u001b[2Ja\\n" * 9000 + b'"}}\n',
        b"z",
    ]
while True:
    try:
        for found in re.findall(rb'"id": ?(\d+)', os.read(port, 65536)):
            number, asked = int(found), asked + 1
    except OSError:
        pass
    for piece in kinds(number)[asked % 10 :][:1] * 20:
        try:
            os.write(port, piece)
        except OSError:
            pass
"""
# Started by a command and left behind by it.
_REPLACE = """
import os, subprocess, sys, time
with open("/agent.py", "w") as file:
    file.write(sys.stdin.read())
if os.fork() == 0:
    os.setsid()
    for fd in (0, 1, 2):
        os.dup2(os.open("/dev/null", os.O_RDWR), fd)
    time.sleep(0.5)
    os.rename("/usr/lib/templated/agent", "/usr/lib/templated/agent.old")
    os.rename("/agent.py", "/usr/lib/templated/agent")
    for pid in os.listdir("/proc"):
        try:
            words = open(f"/proc/{pid}/cmdline").read()
        except OSError:
            continue
        if "/usr/lib/templated/agent" in words:
            os.kill(int(pid), 9)
"""
