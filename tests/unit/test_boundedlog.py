"""Logs that a guest can fill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from templated.drivers import boundedlog
from templated.services.upkeep import janitor

_FLOOD = """
import os, sys
from templated.drivers.boundedlog import bound_files
bound_files()
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
failed = 0
for i in range(200):
    try:
        os.write(log, b"%07d\\n" % i * 8192)
    except OSError:
        failed += 1
print(failed)
"""


def flood(path: Path) -> int:
    """Append 12.5 MiB as QEMU does; how many of 200 writes failed."""
    child = [sys.executable, "-c", _FLOOD, str(path)]
    return int(subprocess.run(child, check=True, capture_output=True).stdout)


def append(path: Path, data: bytes) -> None:
    """Write to a log as QEMU does."""
    with open(path, "ab") as log:
        log.write(data)


def test_the_kernel_keeps_the_bound(tmp_path: Path) -> None:
    """At once, and the writer goes on; when it was cut, it has room again."""
    log = tmp_path / "serial.log"
    boundedlog.make(log)
    assert (boundedlog.length(log), boundedlog.end(log, 100)) == (0, b"")
    append(log, b"one\ntwo\n")
    assert (boundedlog.length(log), boundedlog.end(log, 5)) == (8, b"\ntwo\n")
    assert boundedlog.end(log, 100) == b"one\ntwo\n"
    assert flood(log) > 100
    assert boundedlog.length(log) == boundedlog.LIMIT
    assert log.stat().st_blocks * 512 <= boundedlog.LIMIT + 65536
    boundedlog.cut(log)
    assert boundedlog.length(log) == 0
    assert len((tmp_path / "serial.log.1").read_bytes()) == 256 << 10
    append(log, b"new\n")
    assert boundedlog.end(log, 100) == b"new\n"


def test_only_logs_that_are_half_full_are_cut(tmp_path: Path) -> None:
    """The janitor's look; one of an earlier daemon, that begins at 0, is cut too."""
    for name in ("short", "long", "old"):
        (tmp_path / name).mkdir()
    short, full = tmp_path / "short/serial.log", tmp_path / "long/qemu.log"
    for log in (short, full):
        boundedlog.make(log)
    append(short, b"x\n")
    flood(full)
    old = tmp_path / "old/serial.log"
    old.write_bytes(b"y" * (5 << 20))
    janitor._sweep(tmp_path)
    assert [boundedlog.length(log) for log in (short, full, old)] == [2, 0, 0]


def test_a_process_that_may_not_have_such_files() -> None:
    """Is told so in one line."""
    work = (
        "import resource; from templated.drivers import boundedlog\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))\n"
        "from templated.errors import HostError\n"
        "try: boundedlog.bound_files()\n"
        "except HostError as error: print(error.message, '|', error.hint)\n"
    )
    child = subprocess.run([sys.executable, "-c", work], check=True, capture_output=True)
    said = child.stdout.decode()
    assert "may have 1073741824 bytes" in said and "LimitFSIZE" in said
