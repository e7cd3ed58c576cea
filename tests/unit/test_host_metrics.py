"""What is looked at in intervals: the host, the VMs, the templates."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from templated.drivers.host.files import Space, file_system
from templated.drivers.host.pressure import Pressure
from templated.drivers.host.procfs import Mapped, anonymous_bytes, mapped_bytes
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.errors import HostError
from templated.model.api import CloneRequest
from templated.services.daemon import Services
from templated.services.reports.egress_metrics import EgressMetrics
from templated.services.reports.events import EventBus
from templated.services.reports.function_metrics import FunctionMetrics
from templated.services.reports.metrics import Metrics
from templated.services.reports.scaling_metrics import ScalingMetrics
from templated.services.upkeep import host_metrics
from templated.services.upkeep.host_metrics import (
    HostMetrics,
    HostReading,
    Sampled,
    VmMeter,
    read_host,
)
from templated.services.upkeep.nets import PolicyMetrics
from tests.unit.fake_daemon import configured, play, until

ROOT = Path(__file__).parents[2]


def exposed(registry: CollectorRegistry) -> str:
    """What a scrape gets."""
    return generate_latest(registry).decode()


def fake_proc(root: Path, pid: int = 7) -> Path:
    """A /proc with one process."""
    (root / str(pid)).mkdir(parents=True)
    rollup = "5-7 ---p [rollup]\nPss: 40 kB\nPrivate_Clean: 1 kB\nPrivate_Dirty: 2 kB\n"
    (root / str(pid) / "smaps_rollup").write_text(rollup)
    (root / str(pid) / "statm").write_text("1000 90 50 1 0 60 0\n")
    return root


def test_usage(tmp_path: Path) -> None:
    """Bytes out of kilobytes and pages."""
    proc = fake_proc(tmp_path)
    assert mapped_bytes(7, proc) == Mapped(40 * 1024, 3 * 1024)
    assert anonymous_bytes(7, proc) == 40 * os.sysconf("SC_PAGE_SIZE")


def test_usage_of_what_is_not_there(tmp_path: Path) -> None:
    """No process, no file, a kernel that does not tell: None."""
    assert mapped_bytes(7, tmp_path) is None
    assert anonymous_bytes(7, tmp_path) is None
    assert file_system(tmp_path / "gone") is None


def test_this_host(tmp_path: Path) -> None:
    """The real files are read; PSS is within what the process has."""
    reading = read_host(configured(tmp_path))
    assert reading.memory is not None and 0 < reading.memory.available <= reading.memory.total
    assert reading.places["state_dir"] is None, "it is not there yet"
    mapped = mapped_bytes(os.getpid())
    assert mapped is not None and mapped.proportional > 1 << 20


def test_what_the_host_does_not_tell() -> None:
    """No series is made up; ratios are between 0 and 1."""
    metrics = HostMetrics(registry := CollectorRegistry())
    places = {"shm_dir": Space(1, 4), "state_dir": None}
    metrics.show_host(HostReading({"cpu": Pressure(12.5, 0.0), "io": None}, None, places))
    text = exposed(registry)
    assert 'templated_host_pressure_ratio{kind="some",resource="cpu"} 0.125' in text
    assert 'resource="io"' not in text and 'place="state_dir"' not in text
    assert 'templated_filesystem_free_bytes{place="shm_dir"} 1.0' in text


@pytest.fixture
def processes() -> Iterator[list[int]]:
    """Pids of three processes that wait."""
    program = "import sys; print(flush=True); sys.stdin.read()"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(3)
    ]
    try:
        for child in children:
            assert child.stdout is not None and child.stdout.readline()
        yield [child.pid for child in children]
    finally:
        for child in children:
            child.communicate(timeout=30)


def test_rounds_are_bounded_and_reach_all(processes: list[int]) -> None:
    """Those who waited longest come first; what was measured before still counts."""
    vms = [Sampled("t", "running", pid) for pid in processes]
    meter = VmMeter(per_round=2)
    meter.round(vms)
    assert len(meter.memory(vms)["t", "running"]) == 2
    meter.round(vms)
    assert len(meter.memory(vms)["t", "running"]) == 3


def test_memory_goes_by_what_a_vm_is_now(processes: list[int]) -> None:
    """A pool's member that became a clone counts as that; what is gone counts no more."""
    meter = VmMeter()
    meter.round([Sampled("t", "warm", pid) for pid in processes])
    now = [Sampled("t", "running", processes[0]), Sampled("u", "warm", processes[1])]
    meter.round(now)
    assert {group: len(sizes) for group, sizes in meter.memory(now).items()} == {
        ("t", "running"): 1,
        ("u", "warm"): 1,
    }
    meter.round([])
    assert meter.memory(now) == {}


def test_cpu_time_is_counted_once(processes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a VM that began under this daemon, and of an older one only what it adds."""
    young, old, _ = processes
    spent = {young: 2.0, old: 50.0}
    monkeypatch.setattr(host_metrics, "cpu_seconds", lambda pid: spent[pid])
    starts = {young: 20, old: 5}
    monkeypatch.setattr(host_metrics, "start_time", lambda pid: starts.get(pid, 10))
    vms = [Sampled("t", "running", young), Sampled("u", "running", old)]
    meter = VmMeter()
    assert meter.round(vms) == {"t": 2.0, "u": 0.0}
    spent.update({young: 2.5, old: 51.0})
    assert meter.round(vms) == {"t": 0.5, "u": 1.0}


def test_what_the_daemon_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates, limits and clones, without anyone asking; a failing look does not end it."""
    monkeypatch.setattr(host_metrics, "INTERVAL", 0.01)
    reads = iter([OSError("once")])

    def fail_once(config: object) -> HostReading:
        for error in reads:
            raise error
        return HostReading({}, None, {})

    monkeypatch.setattr(host_metrics, "read_host", fail_once)
    # The fake's pids are nobody's: ours stands for all.
    monkeypatch.setattr(host_metrics, "mapped_bytes", lambda pid: Mapped(1000, 0))

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="a", count=2))
        registry = running.context.metrics.registry
        labels = '{state="running",template="t"}'
        await until(lambda: f"templated_clone_memory_bytes{labels} 2000.0" in exposed(registry))
        text = exposed(registry)
        assert f"templated_clone_memory_measured{labels} 2.0" in text
        assert 'templated_template_serving{template="t"} 1.0' in text
        assert 'templated_template_generations{state="ready",template="t"} 1.0' in text
        assert "templated_clone_starts_limit 8.0" in text
        assert 'templated_events_total{type="clone.running"} 2.0' in text
        # Before anything was made for the pools.
        assert 'templated_pool_target{template="t",tier="warm"} 0.0' in text
        assert 'templated_pool_size{template="t",tier="standby"} 0.0' in text
        generation = running.templates.serving("t")
        await asyncio.to_thread((generation.frozen / "state").unlink)
        with pytest.raises(HostError):
            await running.templates.check(generation, loads_state=True)
        await until(lambda: 'serving{template="t"} 0.0' in exposed(registry))

    play(tmp_path, scenario)


def test_no_clone_name_in_a_label() -> None:
    """Nothing has a label that would grow with the clones."""
    metrics = all_metrics()
    labels = {name for collector in collectors(metrics.registry) for name in collector[2]}
    known = {"template", "path", "phase", "reason", "state", "tier", "resource", "kind", "place"}
    known |= {
        "limit",
        "direction",
        "generation",
        "accel",
        "qemu_version",
        "probe",
        "type",
        "version",
        "python_version",
        "function",
        "outcome",
        "start",
        "layer",
        "what",
        "egress",
        "forwarder",
    }
    assert labels == known


def all_metrics() -> Metrics:
    """All that a daemon serves, with those of the host and of functions."""
    metrics = Metrics()
    HostMetrics(metrics.registry)
    FunctionMetrics(metrics.registry)
    ScalingMetrics(metrics.registry)
    PolicyMetrics(metrics.registry)
    EgressMetrics(metrics.registry)
    return metrics


def collectors(registry: CollectorRegistry) -> list[tuple[str, str, tuple[str, ...]]]:
    """Name, type and labels of all metrics of ours."""
    found = [c for c in registry._collector_to_names if isinstance(c, MetricWrapperBase)]
    return [
        (c._name + ("_total" if c._type == "counter" else ""), str(c._type), tuple(c._labelnames))
        for c in found
    ]


def documented() -> list[tuple[str, str, tuple[str, ...]]]:
    """The table of metrics in the operator's guide: of ours, and of the process."""
    text = (ROOT / "docs/operators-guide.md").read_text()
    section = text[text.index("### All metrics") :]
    rows = re.findall(
        r"^\| ([a-z_]+) \| (counter|gauge|histogram) \| ([a-z_, ]*)\|", section, re.MULTILINE
    )
    return [
        (n, kind, tuple(x.strip() for x in labels.split(",") if x.strip()))
        for n, kind, labels in rows
    ]


def test_the_guide_lists_every_metric_and_no_other() -> None:
    """Names, types and labels, in both directions."""
    metrics = all_metrics()
    ours = collectors(metrics.registry)
    table = documented()
    assert len(table) == len(set(table))
    assert {row for row in table if row[0].startswith("templated_")} == set(ours)
    exported = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in metrics.registry.collect()
    }
    assert {row[0] for row in table} == exported | {name for name, _, _ in ours}


def test_the_guide_lists_every_event() -> None:
    """All types that are emitted, and no other."""
    sources = (ROOT / "templated/services").rglob("*.py")
    emitted = {
        kind
        for path in sources
        for kind in re.findall(r'events\.emit\(\s*"([a-z._]+)"', path.read_text())
    }
    text = (ROOT / "docs/operators-guide.md").read_text()
    text = text[text.index("`templated events` prints") : text.index("### All metrics")]
    listed = set(
        re.findall(
            r"\b(?:clone|template|generation|pool|function|instance|scaling|network|egress)\.[a-z_]+",
            text,
        )
    )
    assert emitted == listed


def test_starts_in_progress_end_with_the_block() -> None:
    """Also when the start fails."""
    metrics = Metrics()
    with contextlib.suppress(ValueError), metrics.starting(3):
        assert "templated_clone_starts_in_progress 3.0" in exposed(metrics.registry)
        raise ValueError
    assert "templated_clone_starts_in_progress 0.0" in exposed(metrics.registry)


def test_what_may_fail_begins_at_zero() -> None:
    """The first failure is then an increase."""
    metrics = Metrics()
    metrics.expect("t")
    text = exposed(metrics.registry)
    assert 'templated_clone_failures_total{reason="identity",template="t"} 0.0' in text
    assert 'templated_pool_misses_total{template="t",tier="warm"} 0.0' in text


def test_events_are_counted_also_without_followers() -> None:
    """By type; a bus without a counter works as well."""
    metrics = Metrics()
    bus = EventBus(metrics.events)
    bus.emit("clone.dead", "a")
    EventBus().emit("clone.dead", "a")
    assert 'templated_events_total{type="clone.dead"} 1.0' in exposed(metrics.registry)
