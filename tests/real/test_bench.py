"""The benchmarks on real virtual machines. No figure is judged, only that it is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from templated.bench.compare import NAMES
from templated.cli import exit_codes
from tests.real.harness import ROOT, Daemon

pytestmark = pytest.mark.real

RESTORED = {"spawn", "restore", "resume", "identify", "link"}


@pytest.fixture
def bench(host: Daemon) -> Iterator[Daemon]:
    """The shared daemon; a benchmark must leave nothing on the host."""
    before = _left()
    yield host
    assert _left() == before
    assert host.json("ls") == []
    # The daemon ends what pools have too much of beside requests.
    deadline = time.monotonic() + 10
    while host.qemus() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert host.qemus() == []


def _left() -> set[str]:
    """Files of benchmarks, and processes that name one; anything of an earlier run included.

    Processes of another namespace are not ours: the tests may run in a Debian 13 at the same time.
    """
    places = [*Path("/tmp").glob("tpl.*"), *Path("/tmp").glob("templated-bench-*")]
    places += Path("/dev/shm").glob("*/templated-bench-*")
    places += Path("/dev/shm").glob("*/*/templated-bench-*")
    found = {str(place) for place in places}
    for entry in Path("/proc").iterdir():
        try:
            if (entry / "ns/pid").readlink() != Path("/proc/self/ns/pid").readlink():
                continue
            line = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "/tmp/tpl." in line or "/tmp/templated-bench-" in line:
            found.add(line.replace("\0", " "))
    return found


def test_paths(bench: Daemon, tmp_path: Path) -> None:
    """Every path and the floor, with the pools that the daemon makes for it."""
    pools = bench.json("pool", "ls")
    report = bench.json("bench", "paths", "-n", "2", "--cold", "1", "--cli", "1",
                        "--sustained", "1", "--plot", str(tmp_path / "x.svg"))  # fmt: skip
    assert report["skipped"] == {}
    assert set(report["paths"]) == {"floor", "direct", "standby", "warm", "cold"}
    assert report["paths"]["floor"]["phases_p50"].keys() == RESTORED
    assert report["paths"]["direct"]["phases_p50"].keys() == RESTORED | {"allocate"}
    assert "boot" in report["paths"]["cold"]["phases_p50"]
    assert report["ratios"].keys() >= {"direct_to_floor", "standby_to_floor", "warm_to_floor"}
    assert report["sustained"]["starts"]["direct"] >= 2
    used = report["sustained"]["cpu_ms_per_start"]
    assert used["direct"]["busy"] > used["direct"]["daemon"] > used["floor"]["daemon"] >= 0
    assert report["cli"]["n"] == 1
    assert (tmp_path / "x.svg").stat().st_size > 0
    assert bench.json("pool", "ls") == pools


def test_direct_and_the_floor(bench: Daemon) -> None:
    report = bench.json("bench", "paths", "--paths", "floor,direct", "-n", "2", "--cli", "0")
    assert set(report["paths"]) == {"floor", "direct"}
    for row in report["paths"].values():
        assert row["n"] == len(row["samples_ms"]) == 2
        assert all(sample > 0 for sample in row["samples_ms"])


@pytest.mark.parametrize("path", ["direct", "standby", "warm"])
def test_burst(bench: Daemon, path: str) -> None:
    report = bench.json("bench", "burst", "3", "--path", path)
    assert report["paths"] == {path: 3}
    assert report["request"]["n"] == 3


def test_density(bench: Daemon) -> None:
    report = bench.json("bench", "density", "2", "--window", "1")
    assert report["pss_mib"]["n"] == 2
    # A clone shares the template's memory: what is its own is less than what it maps.
    assert 0 < report["private_mib"]["p50"] < report["pss_mib"]["p50"]
    assert 0 <= report["cpu_percent"]["p50"] < 100
    assert [point["k"] for point in report["growth"]] == [1, 2]


def test_density_beside_paused_vms(bench: Daemon) -> None:
    report = bench.json("bench", "density", "1", "--window", "0.1", "--warm", "2", "--starts", "1")
    assert report["paused"]["direct_with"]["n"] == 1


def test_neighbours(bench: Daemon) -> None:
    report = bench.json("bench", "neighbours", "2", "--rounds", "2")
    assert report["alone"]["n"] == report["beside"]["n"] == 4
    assert 0 < report["daemon_kib"]["before"] <= 2 * report["daemon_kib"]["most"]


@pytest.mark.long
def test_compare(bench: Daemon) -> None:
    """Every contender brings up the guest, libvirt's too."""
    report = bench.json("bench", "compare", "-n", "1")
    assert report["skipped"] == {}
    assert list(report["paths"]) == list(NAMES)
    for name, row in report["paths"].items():
        assert "identify" in row["phases_p50"], name
    assert report["ratios"]["direct_to_direct"] == 1.0


def test_a_contender_that_cannot_run_is_listed(
    bench: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("templated.bench.libvirtd._path", lambda: "/nonexistent")
    monkeypatch.setenv("TEMPLATED_SOCKET", str(bench.socket))
    report = _compare_here("direct,virsh-restore")
    assert list(report["paths"]) == ["direct"]
    assert report["skipped"]["virsh-restore"].startswith("no libvirt: libvirtd, virsh, unshare")


def _compare_here(names: str) -> dict[str, Any]:
    """`bench compare` in this process, where a test can take libvirt away."""
    from templated.bench.compare import contenders, measure_compare
    from templated.bench.session import session
    from templated.client import Client

    with session(Client(os.environ["TEMPLATED_SOCKET"]), None, lambda text: None) as opened:
        return measure_compare(opened, contenders(opened, names.split(",")), 1)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        (["compare", "--only", "floor,cold", "-n", "50"], 1.5),
        (["compare", "--only", "virsh-restore", "-n", "50"], 2.0),
        (["compare", "--only", "virsh-restore", "-n", "50"], 9.0),
        (["compare", "--only", "incoming-cat,loadvm", "-n", "50"], 2.5),
        (["burst", "5"], 0.6),
        (["paths", "--paths", "floor", "-n", "1", "--cli", "0", "--sustained", "60"], 2.5),
    ],
)
def test_interrupted(bench: Daemon, arguments: list[str], seconds: float) -> None:
    """Ctrl-C at any moment, also twice: VMs, files, clones and a private libvirtd go."""
    command = [sys.executable, "-m", "templated", "--socket", str(bench.socket), "bench"]
    process = subprocess.Popen(
        # The tests may run where SIGINT is ignored.
        ["env", "--default-signal=INT", *command, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)  # an impatient user
    _, said = process.communicate(timeout=60)
    # The second one may come when all is cleaned up and Python ends.
    assert process.returncode in (exit_codes.INTERRUPTED, -signal.SIGINT, 0), said
    assert b"Traceback" not in said


def test_bad_input(bench: Daemon) -> None:
    assert "neither an SVG nor a PNG" in bench.fails("bench", "burst", "1", "--plot", "x.gif")
    assert "no template nope" in bench.fails("bench", "compare", "--template", "nope")
    assert "may need" in bench.fails("bench", "density", "1000")


def test_frozen_files_that_cannot_be_read(bench: Daemon) -> None:
    active = bench.json("template", "show", "python-fn")["active"]
    directory = bench.state / "generations/python-fn" / active
    moved = directory.with_name("moved")
    directory.rename(moved)
    try:
        said = bench.fails("bench", "paths", "--paths", "floor", "-n", "1", "--cli", "0")
    finally:
        moved.rename(directory)
    assert "cannot read" in said
