"""The floor: what one start costs with nothing of ours around it.

A bare loop with blocking sockets: spawn QEMU with a clone's command line, restore the same state
over QMP, ask the same agent to identify, plug the link. No journal, no API, no overlay to make
(one is made before the clock starts), no event loop. What the daemon needs beyond this is ours.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from templated.drivers.disk import copy_overlay
from templated.drivers.guest import ENTROPY_BYTES, Identity
from templated.drivers.hypervisor.base import Launch, Places
from templated.drivers.hypervisor.command import qemu_arguments
from templated.drivers.hypervisor.process import use_small_pages
from templated.drivers.network import Port, make_network
from templated.errors import HypervisorError
from templated.model.network import AddressPlan, UserNetwork
from templated.services.generations import Generation

_BOUND = 30.0
_SLOT = "benchfloor"
_INDEX = 0


class Line:
    """A socket that speaks newline JSON, read with a bound."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_BOUND)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        """Send one object."""
        # Compact, as the daemon writes: QEMU reads QMP by the byte, the agent knows the shape.
        self._socket.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def read(self) -> dict[str, Any]:
        """The next object; HypervisorError when the other end is gone."""
        line = self._file.readline()
        if not line:
            raise HypervisorError("the floor's QEMU ended")
        decoded: dict[str, Any] = json.loads(line)
        return decoded

    def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """A QMP command; returns its answer. Events before it are passed over."""
        self.send({"execute": name, "arguments": arguments or {}})
        while "return" not in (answer := self.read()):
            if "error" in answer:
                raise HypervisorError(f"the floor: {name}: {answer['error']}")
        return answer["return"]

    def close(self) -> None:
        """Disconnect."""
        self._file.close()
        self._socket.close()


After = Callable[[Line, Line, Callable[[], dict[str, str]]], None]
"""Called with QMP, the agent, and what makes an identity for it."""


@dataclass(frozen=True)
class Floor:
    """A loop over one generation, in a directory of its own."""

    generation: Generation
    qemu: str
    transport: str
    directory: Path

    def once(self, after: After | None = None) -> dict[str, float]:
        """One start; milliseconds per phase, and `total`. `after` takes over at the resume."""
        places = Places(self.directory, self.directory)
        overlay = self.directory / "disk.qcow2"
        copy_overlay(self.generation.layer.empty, overlay)
        with _listening(places.qmp) as qmp, _listening(places.agent) as agent:
            launch = self._launch(places, overlay, qmp, agent)
            marks = [time.perf_counter()]
            child = _spawn(qemu_arguments(self.qemu, launch), qmp, agent)
            lines: list[Line] = []
            try:
                self._start(places, launch, lines, marks, after)
            finally:
                for line in lines:
                    line.close()
                child.kill()
                child.wait()
        names = ("spawn", "restore", "resume", "identify", "link")
        phases = {n: (marks[i + 1] - marks[i]) * 1000 for i, n in enumerate(names)}
        return {**phases, "total": (marks[-1] - marks[0]) * 1000}

    def _launch(
        self, places: Places, overlay: Path, qmp: socket.socket, agent: socket.socket
    ) -> Launch:
        plan = AddressPlan(UserNetwork().subnet, b"bench")
        netdev, _ = make_network(UserNetwork(), plan, "bench").netdev(Port(_SLOT), _INDEX)
        return Launch(
            slot=_SLOT,
            uuid=str(uuid.uuid4()),
            mac=plan.mac(_INDEX),
            hardware=self.generation.hardware,
            places=places,
            memory=self.generation.memory,
            memory_shared=False,
            disk=overlay,
            netdev=netdev,
            qmp_fd=qmp.fileno(),
            agent_fd=agent.fileno(),
        )

    def _start(
        self,
        places: Places,
        launch: Launch,
        lines: list[Line],
        marks: list[float],
        after: After | None,
    ) -> None:
        agent, qmp = Line(places.agent), Line(places.qmp)
        lines += [agent, qmp]
        qmp.read()
        qmp.command("qmp_capabilities")
        marks.append(time.perf_counter())
        capability = {"capability": "x-ignore-shared", "state": True}
        qmp.command("migrate-set-capabilities", {"capabilities": [capability]})
        qmp.command("migrate-incoming", {"uri": f"exec:exec cat {self.generation.frozen}/state"})
        while qmp.read().get("data", {}).get("status") != "completed":
            pass
        marks.append(time.perf_counter())
        qmp.command("cont")
        marks.append(time.perf_counter())
        if after is not None:
            after(qmp, agent, lambda: _identity(launch))
            marks += [time.perf_counter()] * 2
            return
        agent.send({"id": 1, "cmd": "identify", **_identity(launch)})
        if not agent.read().get("ok"):
            raise HypervisorError("the floor's guest refused its identity")
        marks.append(time.perf_counter())
        qmp.command("set_link", {"name": "nic0", "up": True})
        marks.append(time.perf_counter())


@contextmanager
def floor(generation: Generation, qemu: str) -> Iterator[Floor]:
    """A floor on temporary places, which are removed at the end."""
    use_small_pages()  # as the daemon does
    directory = Path(tempfile.mkdtemp(prefix="templated-floor-"))
    try:
        yield Floor(generation, qemu, "exec", directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    path.unlink(missing_ok=True)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield listener


def _spawn(
    arguments: list[str], qmp: socket.socket, agent: socket.socket
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(qmp.fileno(), agent.fileno()),
    )


def _identity(launch: Launch) -> dict[str, str]:
    plan = AddressPlan(UserNetwork().subnet, b"bench")
    return Identity(
        hostname="floor",
        machine_id=uuid.uuid4().hex,
        boot_id=str(uuid.uuid4()),
        uuid=launch.uuid,
        mac=launch.mac,
        ip=plan.ip(_INDEX),
        prefix=plan.prefix,
        gateway=plan.gateway,
        dns=(),
        time=time.time(),
        entropy=secrets.token_bytes(ENTROPY_BYTES),
    ).fields()
