"""Processes that outlive the daemon: real ones, watched by their pidfds."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from pathlib import Path

import pytest

from templated.drivers.host.procfs import command_line, cpu_seconds, start_time
from templated.drivers.hypervisor.process import Process
from templated.drivers.hypervisor.qemu import accel
from templated.drivers.hypervisor.qemu.tsc import tsc_khz
from templated.errors import HostError

MARKER = "31.4159"


def test_the_end_is_noticed(tmp_path: Path) -> None:
    """Its exit status, or the signal that killed it."""

    async def main() -> None:
        done = Process.spawn(["sh", "-c", "exit 3"], log=tmp_path / "log", fds=())
        assert await asyncio.wait_for(done.exited, 10) == "ended with 3"
        killed = Process.spawn(["sleep", MARKER], log=tmp_path / "log", fds=())
        killed.kill()
        assert await asyncio.wait_for(killed.exited, 10) == "was killed by SIGKILL"
        killed.kill()  # of a process that is gone: nothing happens

    asyncio.run(main())


def test_a_missing_program(tmp_path: Path) -> None:
    """One line that says what to install."""

    async def main() -> None:
        with pytest.raises(HostError, match="no-such-program is not installed"):
            Process.spawn(["no-such-program"], log=tmp_path / "log", fds=())

    asyncio.run(main())


def test_descriptors_are_inherited(tmp_path: Path) -> None:
    """Under the same number, and no others."""

    async def main() -> None:
        given, other = os.pipe()
        child = Process.spawn(["ls", "/proc/self/fd"], log=tmp_path / "log", fds=(given,))
        await asyncio.wait_for(child.exited, 10)
        seen = (tmp_path / "log").read_text().split()
        assert str(given) in seen and str(other) not in seen
        os.close(given)
        os.close(other)

    asyncio.run(main())


def test_adoption() -> None:
    """Only by pid, start time and marker together; then its end is noticed too."""

    child = subprocess.Popen(["sleep", MARKER])
    while MARKER not in command_line(child.pid):  # exec has returned, its arguments follow
        time.sleep(0.01)

    async def main() -> None:
        started = start_time(child.pid)
        assert started is not None
        assert Process.adopt(child.pid, started + 1, MARKER) is None
        assert Process.adopt(child.pid, started, "another") is None
        assert Process.adopt(child.pid, started, "another", os.geteuid() + 1) is None
        # Whatever its command line shows now, only it can have this user.
        disguised = Process.adopt(child.pid, started, "another", os.geteuid())
        assert disguised is not None
        disguised.close()
        adopted = Process.adopt(child.pid, started, MARKER)
        assert adopted is not None
        adopted.kill()
        assert await asyncio.wait_for(adopted.exited, 10) == "ended"
        child.wait()
        assert start_time(child.pid) is None and command_line(child.pid) == []
        assert cpu_seconds(child.pid) == 0.0
        assert Process.adopt(child.pid, started, MARKER) is None

    asyncio.run(main())


def test_proof_is_remembered_for_this_host_only(tmp_path: Path) -> None:
    """Another QEMU, another host, or nonsense in the file: it is proven again."""
    cache = tmp_path / "proof.json"
    assert accel.recall(cache, "7.2") is None
    for text in ("nonsense", "{}", '{"host": "other", "works": true, "detail": ""}'):
        cache.write_text(text)
        assert accel.recall(cache, "7.2") is None
    cache.write_text(f'{{"host": "{accel.host_key("7.2")}", "works": false, "detail": "x"}}')
    proof = accel.recall(cache, "7.2")
    assert proof is not None and not proof.works
    assert accel.recall(cache, "8.0") is None


def test_tsc() -> None:
    """A plausible frequency, the same each time, or none at all."""
    khz = tsc_khz()
    assert khz is None or 100_000 < khz < 10_000_000
    assert tsc_khz() == khz
