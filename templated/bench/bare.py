"""One QEMU with nothing of ours around it: blocking sockets, QMP, and the agent.

The floor and the contenders that restore a frozen generation without the daemon are made of this.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from templated.bench.interrupts import deferred
from templated.drivers.guest import ENTROPY_BYTES, IdentityOrder, Step
from templated.drivers.hypervisor.base import Launch, Places, SavedState
from templated.drivers.hypervisor.qemu.command import (
    CODE_FILE,
    CODE_SET,
    inherited,
    qemu_arguments,
)
from templated.drivers.hypervisor.qemu.features import features
from templated.drivers.hypervisor.qemu.machine import incoming_uri
from templated.drivers.network import Port, make_network
from templated.errors import GuestError, HypervisorError, Timeout
from templated.model.network import AddressPlan, UserNetwork
from templated.services.machines.generation import STATE, Generation

BOUND = 30.0
"""Seconds that any single answer may take."""
_SLOT, _INDEX = "bench", 0
PLAN = AddressPlan(UserNetwork().subnet, b"bench")
Arguments = Callable[[list[str]], list[str]]


class Line:
    """A socket that speaks newline JSON, read with a bound."""

    def __init__(self, path: Path, timeout: float = BOUND) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._file = self._socket.makefile("rb")

    def patience(self, timeout: float) -> None:
        """Set the seconds to wait for each answer from here on."""
        self._socket.settimeout(timeout)

    def send(self, message: dict[str, Any]) -> None:
        """Send one object."""
        try:
            # Without spaces, as the daemon writes it: the agent has a quick way for that.
            self._socket.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            raise HypervisorError(f"the bench's QEMU ended: {error}") from error

    def read(self) -> dict[str, Any]:
        """The next object; Timeout, or HypervisorError when the other end is gone."""
        try:
            line = self._file.readline()
        except TimeoutError:
            waited = self._socket.gettimeout()
            raise Timeout(f"the bench's QEMU did not answer within {waited:g} s") from None
        except OSError as error:
            raise HypervisorError(f"the bench's QEMU ended: {error}") from error
        if not line:
            raise HypervisorError("the bench's QEMU ended")
        decoded: dict[str, Any] = json.loads(line)
        return decoded

    def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """The result of a QMP command; events before its answer are skipped."""
        self.send({"execute": name, "arguments": arguments or {}})
        while "return" not in (answer := self.read()):
            if "error" in answer:
                raise HypervisorError(f"the bench's QEMU: {name}: {answer['error']['desc']}")
        return answer["return"]

    def give(self, descriptor: int) -> None:
        """Send a descriptor, for the next command that takes one."""
        socket.send_fds(self._socket, [b" "], [descriptor])

    def ask(self, request: dict[str, Any]) -> Any:
        """The agent's answer; GuestError when it refuses."""
        number = secrets.randbelow(1 << 30)
        self.send({"id": number, **request})
        while (answer := self.read()).get("id") != number:
            pass
        if not answer.get("ok"):
            raise GuestError(f"the bench's guest refused {request['cmd']}: {answer.get('error')}")
        return answer["result"]

    def close(self) -> None:
        """Disconnect."""
        self._file.close()
        self._socket.close()


class Stopwatch:
    """Phases of one start, in milliseconds since it was made."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self._phases: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self._phases[phase] = (now - self._last) * 1000
        self._last = now

    def row(self) -> dict[str, float]:
        """All phases, and `total`."""
        return {**self._phases, "total": (self._last - self._begin) * 1000}


class Bare:
    """A QEMU that was just spawned. Everything blocks, at most BOUND seconds."""

    def __init__(
        self, places: Places, launch: Launch, child: subprocess.Popen[bytes], watch: Stopwatch
    ) -> None:
        self.places = places
        self.launch = launch
        self._child = child
        self.watch = watch
        self._lines = contextlib.ExitStack()

    def connect(self) -> None:
        """Wait until QMP has greeted."""
        self.agent = self._line(self.places.agent)
        self.qmp = self._line(self.places.control)
        self.qmp.read()
        self.qmp.command("qmp_capabilities")

    def reconnect(self) -> None:
        """A separate QMP connection for the next commands."""
        self.qmp.close()
        self.qmp = self._line(self.places.control)
        self.qmp.read()
        self.qmp.command("qmp_capabilities")

    def ignore_shared(self, on: bool = True) -> None:
        """Whether the memory stays out of the stream."""
        capability = {"capability": "x-ignore-shared", "state": on}
        self.qmp.command("migrate-set-capabilities", {"capabilities": [capability]})

    def restore(self, state: Path) -> None:
        """Load a device state into a QEMU that waits for it, as the daemon does."""
        self.ignore_shared()
        fd = self.launch.state_fd
        saved = SavedState(state, "exec" if fd is None else "fd", fd)
        uri = incoming_uri(saved, features(self.launch.hardware.version))
        self.qmp.command("migrate-incoming", {"uri": uri})
        self.migrated()

    def migrated(self) -> None:
        """Wait for the event that a stream is complete."""
        while (status := self.qmp.read().get("data", {}).get("status")) != "completed":
            if status == "failed":
                raise HypervisorError("the bench's QEMU could not load the state")

    def identify(self, step: Step = Step.IDENTIFY, hostname: str = "bench") -> None:
        """Give the guest an identity and wait for its answer."""
        given = identity(self.launch.uuid, self.launch.mac, step, hostname)
        self.agent.ask({"cmd": "identify", **given})

    def exchange_code(self, image: Path) -> None:
        """Put another image behind the second disk, as the daemon does."""
        with image.open("rb") as file:
            self.qmp.give(file.fileno())
        self.qmp.command("add-fd", {"fdset-id": CODE_SET})
        given = {"driver": "file", "node-name": "code-given", "filename": CODE_FILE}
        self.qmp.command("blockdev-add", {**given, "read-only": True, "locking": "off"})
        drive = {"driver": "raw", "node-name": "code", "read-only": True, "file": "code-given"}
        self.qmp.command("blockdev-reopen", {"options": [drive]})

    def link(self) -> None:
        """Plug the guest's cable."""
        self.qmp.command("set_link", {"name": "nic0", "up": True})

    def quit(self) -> None:
        """End QEMU in an orderly way, with all disk writes done; Timeout when it does not."""
        self.qmp.command("quit")
        try:
            self._child.wait(BOUND)
        except subprocess.TimeoutExpired:
            raise Timeout(f"the bench's QEMU did not end within {BOUND:g} s") from None

    def close(self) -> None:
        """Disconnect."""
        self._lines.close()

    def _line(self, path: Path) -> Line:
        line = Line(path)
        self._lines.callback(line.close)
        return line


@dataclass(frozen=True)
class Stage:
    """Where QEMUs for one generation are spawned, one at a time, in a directory of its own."""

    generation: Generation
    qemu: str
    directory: Path
    transport: str
    """As `restore.transport` of the daemon."""
    confined: bool
    """As `confine` of the daemon."""

    @property
    def overlay(self) -> Path:
        """Disk layer 3, made by the caller before the clock starts."""
        return self.directory / "disk.qcow2"

    @contextmanager
    def spawned(self, memory: Path | None, edit: Arguments = list) -> Iterator[Bare]:
        """A QEMU with a clone's command line, changed by `edit`; it is ended at the end.

        `memory` is mapped privately; None gives the VM memory of its own. The watch starts
        when the sockets listen and just before the process is made.
        """
        places = Places(self.directory, self.directory)
        with (
            _listening(places.control) as control,
            _listening(places.agent) as agent,
            contextlib.ExitStack() as stack,
        ):
            launch = self._launch(places, memory, control, agent)
            launch = replace(launch, state_fd=self._opened(stack))
            arguments = edit(qemu_arguments(self.qemu, launch))
            with deferred():
                watch = Stopwatch()
                child = _spawn(arguments, inherited(launch))
                stack.callback(_end, child)
            vm = Bare(places, launch, child, watch)
            stack.callback(vm.close)
            yield vm

    def _opened(self, stack: contextlib.ExitStack) -> int | None:
        """The saved state, for a QEMU that inherits it."""
        if self.transport != "fd":
            return None
        state = os.open(self.generation.frozen / STATE, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, state)
        return state

    def _launch(
        self, places: Places, memory: Path | None, control: socket.socket, agent: socket.socket
    ) -> Launch:
        network = make_network(UserNetwork(), PLAN, "bench")
        return Launch(
            slot=_SLOT,
            uuid=str(uuid.uuid4()),
            mac=PLAN.mac(_INDEX),
            hardware=self.generation.hardware,
            places=places,
            memory=memory,
            memory_shared=False,
            disk=self.overlay,
            network=network.attach(Port(_SLOT), _INDEX),
            control_fd=control.fileno(),
            agent_fd=agent.fileno(),
            code=self.generation.code,
            confined=self.confined,
        )


def identity(
    vm: str, mac: str, step: Step = Step.IDENTIFY, hostname: str = "bench"
) -> dict[str, str]:
    """A new identity for the guest of the VM with this UUID, as a request has it."""
    return order(vm, mac, step, hostname).fields()


def order(vm: str, mac: str, step: Step = Step.IDENTIFY, hostname: str = "bench") -> IdentityOrder:
    """A new identity for the guest of the VM with this UUID."""
    return IdentityOrder(
        step=step,
        hostname=hostname,
        machine_id=uuid.uuid4().hex,
        boot_id=str(uuid.uuid4()),
        uuid=vm,
        mac=mac,
        ip=PLAN.ip(_INDEX),
        prefix=PLAN.prefix,
        gateway=PLAN.gateway,
        dns=(),
        time=time.time(),
        entropy=secrets.token_bytes(ENTROPY_BYTES),
    )


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    path.unlink(missing_ok=True)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield listener


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()


def _spawn(arguments: list[str], fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=fds,
        # A terminal's Ctrl-C is for the bench, which then ends this.
        start_new_session=True,
    )
