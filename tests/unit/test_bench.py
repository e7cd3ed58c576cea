"""The benchmarks' logic against a stand-in daemon: what they ask for, print and put back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from templated.bench import interrupts, libvirtd, plot
from templated.bench.cli import bench
from templated.bench.compare import measure_compare
from templated.bench.contenders.base import without_defer
from templated.bench.contenders.virsh import domain_xml
from templated.bench.density import memory_of, steps
from templated.bench.paths import in_threads, schedule
from templated.bench.report import show
from templated.bench.session import Session
from templated.bench.stats import summarize, summarize_rows
from templated.cli import exit_codes
from templated.cli.main import main
from templated.drivers.host.procfs import Memory
from templated.drivers.hypervisor.base import Hardware
from templated.errors import HostError, InvalidRequest
from tests.unit.bench_daemon import Fleet, fleet
from tests.unit.cli_daemon import ROOT

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own load is nobody's concern."""
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """A daemon that keeps clones and pools; the environment points at its socket."""
    with fleet(tmp_path / "d.sock") as served:
        monkeypatch.setenv("TEMPLATED_SOCKET", served.socket)
        yield served


def report(capsys: Capture, *arguments: str) -> dict[str, Any]:
    """What `templated bench` prints as JSON."""
    code = main(["-o", "json", "bench", *arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    printed: dict[str, Any] = json.loads(captured.out)
    return printed


def error(capsys: Capture, *arguments: str) -> str:
    """The one error line of a benchmark that must fail, which has a hint."""
    assert main(["bench", *arguments]) != 0
    captured = capsys.readouterr()
    assert captured.out == ""
    first, hint = captured.err.strip().splitlines()
    assert hint.startswith("hint: ")
    return first.removeprefix("templated: error: ")


# Figures


def test_quantiles() -> None:
    assert summarize([1.0]).p99 == 1.0
    assert summarize([3.0, 1.0, 4.0, 2.0]).p50 == 2.5
    assert summarize([10.0, 20.0]).as_dict() == {
        "n": 2,
        "min": 10.0,
        "p50": 15.0,
        "p90": 19.0,
        "p99": 19.9,
        "max": 20.0,
    }
    found = summarize(range(101))
    assert (found.p50, found.p90, found.p99) == (50, 90, 99)


def test_rows_keep_their_order() -> None:
    rows = [{"spawn": 2.0, "total": 5.0, "wall": 9.0}, {"spawn": 4.0, "total": 3.0, "wall": 9.0}]
    summary = summarize_rows(rows)
    assert summary["samples_ms"] == [5.0, 3.0]
    assert summary["phases_p50"] == {"spawn": 3.0}
    assert (summary["n"], summary["p50"], summary["max"]) == (2, 4.0, 5.0)


def test_the_schedule_spreads_every_path_over_the_run() -> None:
    counts = {"floor": 10, "direct": 10, "warm": 40, "cold": 2}
    turns = schedule(counts)
    assert Counter(turns) == counts
    halves = Counter(turns[: len(turns) // 2]), Counter(turns[len(turns) // 2 :])
    for half in halves:
        assert {name: half[name] for name in ("floor", "direct", "warm")} == {
            "floor": 5,
            "direct": 5,
            "warm": 20,
        }
    # Neither of a pair is always the first.
    pairs = [name for name in turns if name in ("floor", "direct")]
    assert set(pairs[::2]) == {"floor", "direct"}
    assert schedule({"warm": 0}) == []


@pytest.mark.parametrize("n", [1, 2, 3, 8, 100])
def test_checkpoints(n: int) -> None:
    found = steps(n)
    assert {1, n} <= found
    assert len(found) <= 9
    assert all(1 <= k <= n for k in found)


def test_memory_of_a_process() -> None:
    memory = memory_of(os.getpid())
    assert 0 < memory.private <= memory.proportional
    with pytest.raises(HostError, match="cannot read /proc"):
        memory_of(1 << 30)


def test_threads_stop_at_the_first_failure() -> None:
    def broken() -> None:
        raise HostError("no luck")

    with pytest.raises(HostError, match="no luck"):
        in_threads([lambda: time.sleep(0.001), broken], 60)
    # Long enough for a thread to begin on a busy host.
    count, seconds = in_threads([lambda: time.sleep(0.001)] * 2, 0.5)
    assert count > 0
    assert seconds >= 0.5


# Paths and pools


def test_paths_sets_pools_and_puts_them_back(daemon: Fleet, capsys: Capture) -> None:
    printed = report(capsys, "paths", "-n", "3", "--cold", "1", "--cli", "0", "--paths",
                     "direct,standby,warm,cold")  # fmt: skip
    assert {name: row["n"] for name, row in printed["paths"].items()} == {
        "direct": 3,
        "standby": 3,
        "warm": 3,
        "cold": 1,
    }
    assert printed["skipped"] == {}
    assert {"cold_to_direct", "cold_to_warm"} <= printed["ratios"].keys()
    assert daemon.puts == [{"standby": 1}, {"warm": 1}, {"reset": True}]
    assert daemon.clones == {}


def test_pools_that_differ_from_the_spec_get_their_own_sizes_back(
    daemon: Fleet, capsys: Capture
) -> None:
    daemon.target = {"standby": 0, "warm": 3}
    report(capsys, "burst", "5", "--path", "warm")
    assert daemon.puts == [{"warm": 5}, {"standby": 0, "warm": 3}]
    report(capsys, "burst", "2", "--path", "warm")
    assert daemon.puts[2:] == [{"standby": 0, "warm": 3}], "a pool that suffices is left alone"


def test_a_pool_that_is_filled_again_while_the_run_goes_on(daemon: Fleet, capsys: Capture) -> None:
    """No start is measured while a member is being made."""
    report(capsys, "paths", "--paths", "warm", "-n", "3", "--cli", "0")
    looks = [request[1] for request in daemon.requests]
    starts = [i for i, path in enumerate(looks) if path == "/v1/clones"][:4]
    assert all(looks[i - 1] == "/v1/pools/python-fn" for i in starts)


def test_a_pool_with_a_problem_is_skipped_with_the_reason(
    daemon: Fleet, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("templated.bench.session.PATIENCE", 0.1)
    daemon.problem = "the host is short of memory"
    printed = report(capsys, "paths", "--paths", "direct,warm", "-n", "1", "--cli", "0")
    assert list(printed["paths"]) == ["direct"]
    assert "short of memory" in printed["skipped"]["warm"]
    assert main(["bench", "paths", "--paths", "direct,warm", "-n", "1", "--cli", "0"]) == 0
    assert "warm           skipped: the pools of python-fn" in capsys.readouterr().out


# Bursts


def test_burst(daemon: Fleet, capsys: Capture) -> None:
    daemon.delay = 0.1
    printed = report(capsys, "burst", "20")
    assert printed["n"] == len(printed["samples_ms"]) == daemon.most == 20
    assert printed["paths"] == {"direct": 20}
    assert printed["request"]["p50"] >= 100
    assert daemon.clones == {}


@pytest.mark.parametrize("key", ["mac", "ip", "hostname", "machine_id", "boot_id"])
def test_a_burst_finds_what_two_share(daemon: Fleet, capsys: Capture, key: str) -> None:
    daemon.same = {key: "the same"}
    assert error(capsys, "burst", "3") == f"3 clones have the same {key}: the same"
    assert daemon.clones == {}


def test_a_burst_that_fails_leaves_nothing(daemon: Fleet, capsys: Capture) -> None:
    daemon.fails_at = 2
    assert error(capsys, "burst", "5") == "no luck: start_failed"
    assert daemon.clones == {}


def test_burst_table(daemon: Fleet, capsys: Capture) -> None:
    assert main(["bench", "burst", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "template python-fn, 2 at once (2 direct), milliseconds"
    assert lines[2].split() == ["n", "p50", "p90", "p99"]
    assert lines[-2] == "distinct in all: uuid, mac, ip, hostname, machine_id, boot_id"
    assert lines[-1].startswith("host: QEMU 7.2.0, tcg, ")


def test_other_work_on_the_host_is_noted(
    daemon: Fleet, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (999.0, 0.0, 0.0))
    assert report(capsys, "burst", "1")["host"]["load"] == 999.0
    assert main(["bench", "burst", "1"]) == 0
    assert "the load is 999 already" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(daemon: Fleet, number: signal.Signals) -> None:
    """What was asked for is removed, also what is still on its way up."""
    daemon.delay = 1.0
    process = subprocess.Popen(
        [sys.executable, "-m", "templated", "bench", "density", "3", "--path", "warm"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    deadline = time.monotonic() + 20
    while not daemon.clones and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == exit_codes.INTERRUPTED, said
    assert daemon.made
    assert daemon.clones == {}
    assert daemon.puts == [{"warm": 1}, {"reset": True}]


# Density


def test_density(daemon: Fleet, capsys: Capture) -> None:
    printed = report(capsys, "density", "4", "--window", "0.1")
    assert daemon.most == 4
    assert [point["k"] for point in printed["growth"]] == [1, 2, 3, 4]
    assert printed["pss_mib"]["n"] == printed["cpu_percent"]["n"] == 4
    assert printed["pss_mib"]["p50"] > 1
    assert "paused" not in printed
    assert daemon.clones == {}


def test_density_beside_paused_vms(daemon: Fleet, capsys: Capture) -> None:
    printed = report(capsys, "density", "1", "--window", "0.1", "--warm", "6", "--starts", "2")
    assert printed["paused"]["paused"] == 6
    assert printed["paused"]["ratio"] == 1.0
    assert printed["marginal_mib"] is None
    assert daemon.puts == [{"warm": 6}, {"reset": True}]
    assert main(["bench", "density", "2", "--window", "0.1", "--warm", "1"]) == 0
    assert "direct beside 1 paused VMs" in capsys.readouterr().out


def test_paused_vms_that_are_there_already(daemon: Fleet, capsys: Capture) -> None:
    daemon.target["warm"] = 2
    assert "has warm VMs already" in error(capsys, "density", "1", "--warm", "3")


# Compare


@dataclass
class _Contender:
    name: str
    broken: str = ""
    about: str = "does nothing"
    log: list[str] = field(default_factory=list)

    @contextmanager
    def opened(self) -> Iterator[Callable[[], dict[str, float]]]:
        self.log.append("open")
        if self.broken == "setup":
            raise HostError("not on this host")
        try:
            yield self._once
        finally:
            self.log.append("close")

    def _once(self) -> dict[str, float]:
        self.log.append("once")
        if self.broken == "later" and self.log.count("once") == 3:
            raise HostError("it broke")
        return {"spawn": 1.0, "total": 2.0 if self.name == "direct" else 3.0}


def _session() -> Session:
    quiet = SimpleNamespace(
        template="t", progress=lambda text: None, pools=SimpleNamespace(settled=lambda: None)
    )
    return cast("Session", quiet)


def test_contenders_in_turn() -> None:
    entered = [_Contender("a"), _Contender("b", "setup"), _Contender("c", "later")]
    entered.append(_Contender("direct"))
    printed = measure_compare(_session(), entered, 4)
    assert printed["skipped"] == {"b": "not on this host", "c": "round 2: it broke"}
    assert {name: row["n"] for name, row in printed["paths"].items()} == {"a": 4, "direct": 4}
    assert printed["ratios"] == {"a_to_direct": 1.5, "direct_to_direct": 1.0}
    # One start more than counts: the first one.
    assert entered[0].log == ["open", *["once"] * 5, "close"]
    assert entered[1].log == ["open"]


def test_a_changed_command_line() -> None:
    line = ["qemu", "-m", "1", "-incoming", "defer", "-vga", "none"]
    assert without_defer(line, ("-loadvm", "x")) == [*line[:3], "-loadvm", "x", *line[5:]]


@pytest.mark.parametrize(
    ("machine", "cpu", "addresses"),
    [("microvm", "qemu64,+arat", 4), ("q35", "qemu64,-svm", 0), ("q35", "host", 0)],
)
def test_domain(tmp_path: Path, machine: str, cpu: str, addresses: int) -> None:
    manifest = SimpleNamespace(
        kernel="/images/a&b/vmlinuz", kernel_cmdline="x='<1>'", qemu=SimpleNamespace(path="/q")
    )
    hardware = Hardware(
        type=machine, memory_bytes=1 << 27, vcpus=2, accel="tcg", cpu=cpu, version="7.2.22"
    )
    generation: Any = SimpleNamespace(hardware=hardware, manifest=manifest)
    domain = ET.fromstring(domain_xml(generation, tmp_path))  # noqa: S314  # ours
    assert domain.get("type") == "qemu"
    assert domain.findtext("os/initrd") == "/images/a&b/initrd"
    assert domain.findtext("os/cmdline") == "x='<1>'"
    assert domain.findtext("memory") == str(1 << 27)
    assert len(domain.findall(".//address[@type='virtio-mmio']")) == addresses
    policies = [feature.get("policy") for feature in domain.findall("cpu/feature")]
    assert policies == {"qemu64,+arat": ["require"], "qemu64,-svm": ["disable"], "host": []}[cpu]


def test_no_libvirt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    with pytest.raises(HostError, match=r"no libvirt: libvirtd, virsh") as caught:
        libvirtd.check_host()
    assert "apt install" in caught.value.hint


def test_libvirt_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path: name)
    monkeypatch.setattr(libvirtd, "_PLACES", {})
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(HostError, match="needs root"):
        libvirtd.check_host()


# Interrupts


@pytest.mark.parametrize(
    ("block", "raised"),
    [
        (interrupts.interruptible, True),
        (interrupts.deferred, True),
        (interrupts.uninterrupted, False),
    ],
)
def test_signals(block: Callable[[], AbstractContextManager[None]], raised: bool) -> None:
    reached = False
    before = signal.getsignal(signal.SIGINT)
    try:
        with block():
            os.kill(os.getpid(), signal.SIGINT)
            reached = True
        ended = False
    except KeyboardInterrupt:
        ended = True
    assert ended == raised
    assert reached == (block is not interrupts.interruptible)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_signal_does_not_disturb_the_cleaning_up() -> None:
    cleaned: list[bool] = []

    def impatient() -> None:
        with interrupts.interruptible():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)
                cleaned.append(True)

    with pytest.raises(KeyboardInterrupt):
        impatient()
    assert cleaned == [True]


def test_signals_in_another_thread() -> None:
    """Only the main thread may handle them; elsewhere there is nothing to do."""
    entered: list[bool] = []

    def work() -> None:
        with interrupts.deferred():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]


# Pictures

_ROW = summarize_rows([{"spawn": 4.0, "restore": 1.0, "total": 5.0}, {"spawn": 6.0, "total": 7.0}])
_COLD = summarize_rows([{"boot": 2800.0, "total": 2801.0}])
_REPORTS: list[dict[str, Any]] = [
    {"kind": "paths", "template": "t", "paths": {"direct": _ROW, "floor": _ROW, "cold": _COLD}},
    {"kind": "paths", "template": "t", "paths": {"direct": _ROW}},
    {"kind": "compare", "template": "t", "paths": {"direct": _ROW, "cold": _COLD}},
    {"kind": "burst", "template": "t", "n": 3, "samples_ms": [1.0, 3.0, 2.0]},
    {
        "kind": "density",
        "template": "t",
        "n": 2,
        "samples_ms": [1.0, 3.0],
        "growth": [{"k": 1, "pss_mib": 30.0}, {"k": 2, "pss_mib": 60.0}],
    },
]


@pytest.mark.parametrize("drawn", _REPORTS, ids=lambda r: f"{r['kind']}{len(r.get('paths', ()))}")
def test_pictures(tmp_path: Path, drawn: dict[str, Any]) -> None:
    for suffix in plot.SUFFIXES:
        plot.check(tmp_path / f"x{suffix}")
        plot.draw(drawn, tmp_path / f"x{suffix}")
    svg = ET.parse(tmp_path / "x.svg").getroot()  # noqa: S314  # ours
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}path"))) > 20
    png = (tmp_path / "x.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(png[16:20], "big") > 800
    assert len(png) > 10_000


def test_a_picture_of_a_run(daemon: Fleet, capsys: Capture, tmp_path: Path) -> None:
    assert main(["bench", "burst", "3", "--plot", str(tmp_path / "x.png")]) == 0
    assert capsys.readouterr().err == f"wrote {tmp_path}/x.png\n"
    assert (tmp_path / "x.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["x.jpg", "x", "missing/x.svg", "."])
def test_a_bad_picture_is_refused_before_any_work(
    daemon: Fleet, capsys: Capture, tmp_path: Path, name: str
) -> None:
    error(capsys, "burst", "2", "--plot", str(tmp_path / name))
    assert daemon.requests == []


def test_no_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HostError, match="--plot needs matplotlib") as caught:
        plot.check(tmp_path / "x.svg")
    assert "templated[plot]" in caught.value.hint
    with pytest.raises(InvalidRequest):
        plot.check(tmp_path / "x.pdf")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["burst", "0"], "0 is not in the range"),
        (["burst", "1001"], "1001 is not in the range"),
        (["burst", "many"], "'many' is not a valid integer"),
        (["density", "0"], "0 is not in the range"),
        (["compare", "-n", "0"], "0 is not in the range"),
        (["compare", "--only", "direct,qemu"], "--only: there is no 'qemu'"),
        (["paths", "--paths", "hot"], "--paths: there is no 'hot'"),
        (["paths", "--paths", "warm", "--warm", "0"], "nothing is left to measure"),
        (["paths", "--paths", "cold", "--memory", "1GiB"], "--memory needs direct clones"),
        (["paths", "--concurrency", "0"], "0 is not in the range"),
        (["burst", "2", "--template", "nope"], "no luck: not_found"),
    ],
)
def test_bad_arguments(daemon: Fleet, capsys: Capture, arguments: list[str], expected: str) -> None:
    assert expected in error(capsys, *arguments)
    assert daemon.made == []


def test_not_enough_memory(daemon: Fleet, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(total=1 << 30, available=300 << 20)
    monkeypatch.setattr("templated.bench.session.read_memory", lambda: memory)
    expected = "5 clones may need 320 MiB, and 300 MiB are available"
    assert error(capsys, "burst", "5") == expected
    assert error(capsys, "density", "5") == expected
    assert daemon.made == []


def test_no_daemon(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPLATED_SOCKET", "/nonexistent")
    assert "the daemon is not running" in error(capsys, "burst", "1")


@pytest.mark.parametrize("name", [None, *bench.commands])
def test_help(capsys: Capture, name: str | None) -> None:
    assert main(["bench", *([name] if name else []), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples:\n  templated bench" in text
    assert "Global options:" in text


def test_policy_report(capsys: Capture) -> None:
    """What is not as it must be is said in lines of its own."""
    row = summarize([10.0, 11.0]).as_dict()
    good = {"without": row, "with": row, "ratio": 1.0}
    report = {
        "kind": "policy",
        "egress": "acme",
        "clones": {
            "warm": {**good, "link_p50": {"without": 0.5, "with": 0.5}},
            "direct": {**good, "ratio": 1.1, "link_p50": {"without": 0.9, "with": 1.2}},
        },
        "functions": {"warm": good},
        "first_connection": {
            "warm": {"tried": 100, "succeeded": 99, **row, "failures": ["timed out"]}
        },
        "host": {"qemu": "7.2", "accel": "kvm", "cpus": 2, "load": 0.1},
    }
    show(report)
    said = capsys.readouterr().out.splitlines()
    assert "first connection by warm: 99 of 100 succeeded at the first try, p50 10.5 ms" in said
    assert [line for line in said if line.startswith("missed: ")] == [
        "missed: clones by direct: 1.1 times as long with a policy",
        "missed: clones by direct: link takes 1.2 ms, 0.9 ms without a policy",
        "missed: first connection by warm: 99 of 100",
    ]
