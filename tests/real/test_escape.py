"""The escape drill: who has taken over a clone's QEMU reaches nothing but that clone.

The attempts run as the clone's user, with all descriptors that its QEMU holds, under the filter of
system calls that the kernel holds of it, and under Landlock where this host has it; see `drill.py`.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import hashlib
import json
import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import pytest

from templated.drivers.hypervisor import landlock
from templated.drivers.hypervisor.base import Hardware, Launch, Places
from templated.drivers.hypervisor.qemu.driver import Qemu
from templated.model.network import Slirp
from tests.real.conftest import prepare
from tests.real.drill import OPEN_TO_ALL
from tests.real.harness import Daemon

pytestmark = pytest.mark.real

DRILL = Path(__file__).with_name("drill.py")
DONE = "DONE"
_PIDFD_GETFD, _PTRACE = 438, 101
_SEIZE, _INTERRUPT, _DETACH, _GET_FILTER = 0x4206, 0x4207, 17, 0x420C
_LIBC = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: Any) -> int:
    _LIBC.syscall.restype = ctypes.c_long
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return int(_LIBC.syscall(ctypes.c_long(number), *words))


def _filters(pid: int) -> list[str]:
    """The filters of system calls of a process (ptrace(2), PTRACE_SECCOMP_GET_FILTER)."""
    found: list[str] = []
    assert _call(_PTRACE, _SEIZE, pid, 0, 0) == 0
    try:
        assert _call(_PTRACE, _INTERRUPT, pid, 0, 0) == 0
        os.waitpid(pid, 0x40000000)  # __WALL
        while (count := _call(_PTRACE, _GET_FILTER, pid, len(found), 0)) > 0:
            rules = ctypes.create_string_buffer(8 * count)
            assert _call(_PTRACE, _GET_FILTER, pid, len(found), rules) == count
            found.insert(0, base64.b64encode(rules.raw[: 8 * count]).decode())
            if len(found) > 8:
                break
    finally:
        _call(_PTRACE, _DETACH, pid, 0, 0)
    return found


def _role(target: str) -> str:
    """What of a template a descriptor leads to; empty for what is the clone's own."""
    if "templated-memory" in target or target.endswith("/memory"):
        return "template's memory"
    if target.endswith("/state"):
        return "template's state"
    if "/generations/" in target:
        return "template's disk layer 2"
    return "image" if "/images/" in target else ""


def _held(pid: int) -> dict[str, list[int]]:
    """Copies of the descriptors of a QEMU that lead to a template, by what they lead to."""
    found: dict[str, list[int]] = {}
    pidfd = os.pidfd_open(pid)
    for name in os.listdir(f"/proc/{pid}/fd"):
        if role := _role(os.readlink(f"/proc/{pid}/fd/{name}")):
            copy = _call(_PIDFD_GETFD, pidfd, int(name), 0)
            assert copy >= 0, os.strerror(ctypes.get_errno())
            found.setdefault(role, []).append(copy)
    os.close(pidfd)
    return found


def _slot(pid: int) -> str:
    """The slot of the VM that has this process."""
    command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    name = next(word for word in command if word.startswith("guest=templated-"))
    return name.removeprefix("guest=templated-")


def _demoted(uid: int, memory: Path, fds: dict[str, list[int]]) -> list[str]:
    """What starts a program as such a clone's QEMU is started."""
    qemu = Qemu("qemu-system-x86_64", Path("/nonexistent"))
    version = asyncio.run(qemu.version()).version
    launch = Launch(
        slot="drill",
        uuid="",
        mac="",
        hardware=Hardware("microvm", 128 << 20, 1, "tcg", "", version),
        places=Places(Path("/nonexistent"), Path("/nonexistent")),
        memory=memory,
        memory_shared=False,
        disk=Path("/nonexistent"),
        network=Slirp("", "", "", "", restrict=False),
        control_fd=-1,
        agent_fd=-1,
        state_fd=-1,
        opened={memory: fds["template's memory"][0]},
        uid=uid,
    )
    demotion = qemu.demotion(launch)
    assert demotion is not None
    return demotion.command()


def _has_landlock() -> bool:
    """Whether this host can do what the daemon then has to do."""
    known = subprocess.run(["setpriv", "--help"], capture_output=True, check=True).stdout
    return b"--landlock-access" in known and not landlock.kernel_problem()


def drill(daemon: Daemon) -> dict[str, str]:
    """Start two clones, and play the escape from one of them. Returns what came of each attempt."""
    # As open as the places of an installed daemon: what its own directories let through counts.
    for directory in (daemon.places, daemon.places / "run"):
        directory.chmod(0o755)
    for name in ("evil", "victim"):
        daemon.cli("clone", name, "--template", "python-fn")
    evil, victim = (daemon.json("show", name) for name in ("evil", "victim"))
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{evil['pid']}/status").read_text().splitlines()
        if ":\t" in line
    )
    uid = int(status["Uid"].split()[0])
    manifest = daemon.json("template", "show", "python-fn")["manifest"]
    frozen = daemon.shm / "python-fn" / manifest["id"]
    slot = daemon.state / "slots" / _slot(victim["pid"])
    sockets = daemon.places / "run/vm" / slot.name
    assert daemon.process is not None
    fds = _held(evil["pid"])
    order = {
        "filters": _filters(evil["pid"]),
        "fds": fds,
        "paths": {
            "template's memory": str(frozen / "memory"),
            "template's state": str(frozen / "state"),
            "template's disk layer 2": str(
                daemon.state / "generations/python-fn" / manifest["id"] / "disk.qcow2"
            ),
            "template's manifest": str(
                daemon.state / "generations/python-fn" / manifest["id"] / "manifest.json"
            ),
            "image": str(daemon.state / "images" / manifest["image"] / "disk.qcow2"),
            "other clone's disk": str(slot / "disk.qcow2"),
            "other clone's console": str(slot / "serial.log"),
            "journal": str(daemon.state / "journal.sqlite"),
            "audit log": str(daemon.state / "audit.jsonl"),
        },
        "processes": {"other clone": victim["pid"], "daemon": daemon.process.pid},
        "sockets": {
            "other clone's QMP": str(sockets / "qmp"),
            "other clone's agent": str(sockets / "agent"),
            "daemon": str(daemon.socket),
        },
    }
    passed = [fd for some in fds.values() for fd in some]
    try:
        demoted = [] if uid == os.geteuid() else _demoted(uid, frozen / "memory", fds)
        # Landlock lets it read no checkout and no virtual environment.
        python = [os.path.realpath(sys.executable), "-I", "-c", DRILL.read_text()]
        done = subprocess.run(
            [*demoted, *python],
            input=json.dumps(order).encode(),
            pass_fds=passed,
            cwd="/",
            stdout=subprocess.PIPE,
            check=True,
            timeout=120,
        )
    finally:
        for fd in passed:
            os.close(fd)
    found: dict[str, str] = json.loads(done.stdout)
    for attempt, result in found.items():
        print(f"{attempt:60} {result}")
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives VMs users of their own")
def test_an_escape_reaches_nothing(host: Daemon) -> None:
    """Each attempt is refused; the template is what it was, and the other clone goes on.

    Without Landlock it can do what every user of the host may.
    """
    found = drill(host)
    open_to_all = {f"host: {name}" for name, _ in OPEN_TO_ALL}
    done = {attempt for attempt, result in found.items() if result == DONE}
    assert done == (set() if _has_landlock() else open_to_all)
    reached = {attempt.partition(":")[0] for attempt in found}
    assert {"template's memory", "template's disk layer 2", "image", "host"} <= reached
    manifest = host.json("template", "show", "python-fn")["manifest"]
    memory = host.shm / "python-fn" / manifest["id"] / "memory"
    digest = hashlib.sha256(memory.read_bytes()).hexdigest()
    assert digest == manifest["files"]["memory"]["sha256"]
    assert host.cli("exec", "victim", "--", "echo", "well") == "well\n"
    host.cli("clone", "later", "--template", "python-fn")
    assert host.cli("exec", "later", "--", "echo", "well") == "well\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives VMs users of their own")
def test_without_confinement_the_same_drill_succeeds(built: Daemon, image_store: Path) -> None:
    """So that the drill shows something: as root, most of it works."""
    with closing(Daemon(confine=False)) as daemon:
        prepare(daemon, image_store)
        daemon.copy_build(built)
        daemon.start()
        found = drill(daemon)
        reached = {attempt for attempt, result in found.items() if result == DONE}
        assert {"journal: open to write", "other clone: ptrace", "host: mount"} <= reached
        # A sealed copy holds for root, too.
        memory = [attempt for attempt in reached if attempt.startswith("template's memory: write")]
        assert memory == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives VMs users of their own")
@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("transport", ["fd", "exec"])
def test_a_vm_opens_only_its_own(copied: Daemon, transport: str) -> None:
    """QEMU itself is told to open a file of the host's: where there is Landlock, it cannot."""
    copied.config["restore"] = {"transport": transport}
    copied.start()
    slot = _slot(copied.json("clone", "told")["pid"])
    assert ("VMs may open what every user" in copied.log) is not _has_landlock()
    copied.stop()  # it has the one connection that QEMU takes
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(copied.places / "run/vm" / slot / "qmp"))
        with connection.makefile("rw") as qmp:
            _told(qmp, "qmp_capabilities")
            for number, file in enumerate(("/etc/passwd", "/etc/group", "/proc/self/maps")):
                options = {"driver": "file", "filename": file, "read-only": True}
                said = _told(qmp, "blockdev-add", {**options, "node-name": f"opened{number}"})
                assert ("Permission denied" in said) is _has_landlock(), said
    copied.start()
    assert copied.cli("exec", "told", "--", "echo", "well") == "well\n"


def _told(qmp: IO[str], command: str, arguments: dict[str, Any] | None = None) -> str:
    """What QEMU answers to a command."""
    qmp.write(json.dumps({"execute": command, "arguments": arguments or {}}) + "\n")
    qmp.flush()
    return next(line for line in qmp if line.startswith(('{"return"', '{"error"')))
