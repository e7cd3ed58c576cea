"""One guest that does what it can to the host, beside ten good ones that must not notice."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from templated.drivers.host.procfs import cpu_seconds
from templated.services.upkeep.janitor import SERIAL_LIMIT
from tests.real.conftest import prepare
from tests.real.harness import Daemon

pytestmark = pytest.mark.real

GOOD = tuple(f"good-{number}" for number in range(1, 11))
# In place of the guest's agent: it says one thing without end, another one after each request.
_AGENT = r"""
import os, re, select
port = os.open("/dev/virtio-ports/templated.agent.0", os.O_RDWR)
ok = b'{"id": %d, "ok": true, "result": '
kinds = [
    lambda: b"z",
    lambda: b"{nonsense\n" * 6000,
    lambda: b"x" * 65536,
    lambda: os.urandom(65536),
    lambda: b"\n" * 65536,
    lambda: b'{"id": %d, "error": {"message": "' % number + rb"\u001b[2Ja\n" * 9000 + b'"}}\n',
    lambda: ok % number + b'{"exit_code": ' + b"9" * 900000 + b"}}\n",
    lambda: (ok % (number - 1) + b'{"exit_code": 0}}\n') * 1000,
    lambda: (ok % 1 + b"{}}\n") * 1000,
    lambda: b'{"id": %d, "stream": "stdout", "data": "eA=="}\n' % number * 1000,
]
number, asked = 0, 0
piece = b"\n"
while True:
    if select.select([port], [], [], 0)[0]:
        for found in re.findall(rb'"id": ?(\d+)', os.read(port, 65536)):
            number, asked = int(found), asked + 1
        piece = kinds[asked % len(kinds)]()
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(port, rest) :]
"""
_KINDS = 10
# Before what a command leaves behind.
_LEAVE = """
import os, sys, time
given = sys.stdin.read()
if os.fork():
    os._exit(0)
os.setsid()
for fd in (0, 1, 2):
    os.dup2(os.open("/dev/null", os.O_RDWR), fd)
time.sleep(0.5)
def agents():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if "-ISu" in open(f"/proc/{pid}/cmdline").read().split("\\0"):
            yield int(pid)
"""
_REPLACE = """
open("/agent.py", "w").write(given)
os.rename("/usr/lib/templated/agent", "/usr/lib/templated/agent.old")
os.rename("/agent.py", "/usr/lib/templated/agent")
for pid in agents():
    os.kill(pid, 9)
"""
_LARGE = b"x" * 600_000
_DEAF = """
for pid in agents():
    os.kill(pid, 19)
"""
_CONSOLE = """
if os.fork() == 0:
    line = b"\\x1b[2J\\x00\\xff flood " * 99 + b"\\n"
    console = [os.open(path, os.O_WRONLY) for path in ("/dev/console", "/dev/ttyS0")]
    while True:
        os.write(console[0], line), os.write(console[1], line)
"""
_FLOODS = """
import fcntl, socket, struct
if os.fork() == 0:
    packets = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    while True:
        for port in range(1, 2000):
            try:
                packets.sendto(bytes(1400), ("10.77.0.1", port))
            except OSError:
                pass
if os.fork() == 0:
    while True:  # QEMU reports it: RTC_CHANGE
        for hour in range(24):
            try:
                clock = os.open("/dev/rtc0", os.O_RDONLY)
                fcntl.ioctl(clock, 0x4024700A, struct.pack("9i", 0, 0, hour, 1, 1, 120, 0, 0, 0))
                os.close(clock)
            except OSError:
                time.sleep(1)
with open("/fill", "wb") as file:
    while True:
        file.write(os.urandom(1 << 20))
"""
# Seconds that the CPU time of a daemon is watched; of a core, what a flood may cost it; and what
# its memory may grow by.
_WINDOW, _SHARE, _GROWTH = 3.0, 0.25, 1.2
# Layer 3 at most: as much as the guest's disk has, and the tables of a qcow2.
_DISK = (1 << 30) + (8 << 20)


def cpu_share(daemon: Daemon) -> float:
    """The part of a core that the daemon takes while nothing is asked of it."""
    assert daemon.process is not None
    begin, before = time.monotonic(), cpu_seconds(daemon.process.pid)
    time.sleep(_WINDOW)
    return (cpu_seconds(daemon.process.pid) - before) / (time.monotonic() - begin)


def memory(daemon: Daemon) -> int:
    """KiB that the daemon has in memory (proc(5): VmRSS)."""
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def check_good(daemon: Daemon) -> None:
    """All ten answer as themselves, and another one starts."""
    for name in GOOD:
        assert daemon.output(name, "hostname").strip() == name
    daemon.client.create_clone("another")
    assert daemon.output("another", "hostname").strip() == "another"
    daemon.client.remove_clone("another")


def refused(daemon: Daemon, name: str) -> str:
    """A command in a guest that gives no good answer: one line that a terminal can show."""
    done = daemon.run("exec", "--timeout", "1", "-n", name, "--", "true", timeout=60)
    (line,) = done.stderr.splitlines()
    assert done.returncode != 0 and line.startswith("templated: error: "), done
    assert line.isprintable() and len(line) < 4500
    return line


def on_disk(daemon: Daemon) -> dict[str, int]:
    """Bytes that each file of the slots takes."""
    return {
        str(path.relative_to(daemon.state)): path.stat().st_blocks * 512
        for path in (daemon.state / "slots").rglob("*")
        if path.is_file()
    }


def console(daemon: Daemon) -> int:
    """Bytes of the longest console, which is the bad guest's."""
    sizes = on_disk(daemon)
    return max(size for name, size in sizes.items() if name.endswith("/serial.log"))


@pytest.fixture(scope="module")
def ten(built: Daemon, image_store: Path) -> Iterator[Daemon]:
    """A daemon with the ten good clones, that has done all kinds of work before."""
    daemon = prepare(Daemon(), image_store)
    try:
        daemon.copy_build(built)
        daemon.start()
        for name in GOOD:
            daemon.client.create_clone(name)
        for name in GOOD[:3]:
            check_good(daemon)
            daemon.cli("exec", name, "--", "md5sum", stdin=_LARGE)
        yield daemon
    finally:
        daemon.close()


@pytest.fixture
def hostile(ten: Daemon) -> Iterator[str]:
    """The bad one. Whatever it did, it can be removed, and the daemon is as big as before."""
    ten.client.create_clone("hostile")
    assert ten.output("hostile", "true") == ""
    quiet, before = cpu_share(ten), memory(ten)
    yield "hostile"
    share, after = cpu_share(ten), memory(ten)
    check_good(ten)
    ten.client.remove_clone("hostile")
    assert share <= quiet + _SHARE
    assert after <= before * _GROWTH


def left_behind(daemon: Daemon, code: str, stdin: bytes = b"") -> None:
    """Run Python in the bad guest that goes on when its command has ended."""
    daemon.cli("exec", "hostile", "--", "python3", "-c", _LEAVE + code, stdin=stdin)


def turn(daemon: Daemon) -> None:
    """Put the flooding agent in the place of the good one, and wait until it is there."""
    left_behind(daemon, _REPLACE, _AGENT.encode())
    for _ in range(50):
        done = daemon.run("exec", "--timeout", "1", "-n", "hostile", "--", "true", timeout=60)
        if done.returncode:
            return
        time.sleep(0.1)
    raise AssertionError("it is still good")


@pytest.mark.timeout(300)
def test_an_agent_that_floods(ten: Daemon, hostile: str) -> None:
    """Blank, nonsense, endless, binary, unknown, doubled, huge and late answers, a byte at a time.

    Each command ends in one line, and the others' go on meanwhile.
    """
    turn(ten)
    said = []
    for number in range(_KINDS):
        said.append(refused(ten, hostile))
        if number % 3 == 0:
            check_good(ten)
            assert cpu_share(ten) <= 2 * _SHARE, said
    assert any("nonsense" in line for line in said), said


@pytest.mark.timeout(300)
def test_floods_of_console_clock_packets_and_disk(ten: Daemon, hostile: str) -> None:
    """The others go on, and what it fills keeps its bound."""
    left_behind(ten, _CONSOLE + _FLOODS)
    for _ in range(5):
        check_good(ten)
        assert all(size <= _DISK for size in on_disk(ten).values())
    assert console(ten) > 0
    assert ten.cli("logs", hostile, "-n", "5")


@pytest.mark.timeout(300)
@pytest.mark.long
def test_a_guest_that_does_not_listen(ten: Daemon, hostile: str) -> None:
    """What it does not take is not piled up in the daemon, and does not keep it from ending."""
    left_behind(ten, _DEAF)
    for _ in range(12):
        done = ten.run("exec", "--timeout", "0.1", hostile, "--", "cat", stdin=_LARGE)
        if "does not take" in done.stderr:
            break
    assert "does not take" in done.stderr, done
    check_good(ten)
    ten.stop()
    ten.start()
    check_good(ten)
    refused(ten, hostile)


@pytest.mark.timeout(300)
@pytest.mark.long
def test_a_restart_beside_a_flood(ten: Daemon, hostile: str) -> None:
    """The next daemon adopts all of them, and cuts the console that nobody has looked at."""
    left_behind(ten, _CONSOLE + _REPLACE, _AGENT.encode())
    ten.stop(signal.SIGKILL)
    for _ in range(900):
        if console(ten) > SERIAL_LIMIT:
            break
        time.sleep(0.1)
    ten.start()
    check_good(ten)
    refused(ten, hostile)
    assert ten.json("show", hostile)["state"] == "running"
    for _ in range(300):
        if console(ten) < SERIAL_LIMIT:
            break
        time.sleep(0.1)
    assert console(ten) < SERIAL_LIMIT  # cut, so that it shows what is new
    assert ten.cli("logs", hostile, "-n", "5")


_HOTPLUG = r"""
import ctypes, mmap
libc = ctypes.CDLL(None)
assert libc.iopl(3) == 0
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes.fromhex("89fa89f0eec3"))  # out dx, al; ret
code.seek(64)
code.write(bytes.fromhex("89fa89f0eeebfd"))  # the same without end
first = ctypes.addressof(ctypes.c_char.from_buffer(code))
out, forever = (ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int)(first + at) for at in (0, 64))
for port, value in ((0xCD8, 0), (0xCD8, 0), (0xCDD, 2)):
    out(port, value)
forever(0xCE0, 0)  # QEMU reports each: ACPI_DEVICE_OST
"""


@pytest.mark.timeout(300)
def test_a_flood_of_events(fresh: Daemon) -> None:
    """A q35 guest can have QEMU report to the daemon without end: its VM is ended."""
    machine = "machine:\n  type: q35\n  memory: 128MiB\n  vcpus: 1"
    fresh.variant("q35", machine, without_probes=True)
    fresh.start()
    fresh.build("q35")
    for name in ("hostile", "good"):
        fresh.client.create_clone(name)
    assert fresh.output("good", "hostname") == "good\n"
    before = memory(fresh)
    left_behind(fresh, _HOTPLUG)
    for _ in range(600):
        assert fresh.output("good", "hostname") == "good\n"
        if fresh.client.show_clone("hostile").state == "dead":
            break
        time.sleep(0.1)
    assert "its guest causes events without end" in fresh.log
    assert memory(fresh) <= before * _GROWTH
    assert "is dead" in fresh.fails("exec", "-n", "hostile", "--", "true")
    fresh.cli("rm", "hostile")
