"""Prints the reports of the benchmarks for people."""

from __future__ import annotations

from typing import Any

import click

_WIDTH = 14


def show(report: dict[str, Any]) -> None:
    """Print a report on stdout, as its kind wants it."""
    _SHOWN[report["kind"]](report)
    for name, reason in report.get("skipped", {}).items():
        click.echo(f"{name:{_WIDTH}} skipped: {reason}")
    host = report["host"]
    machines = f"QEMU {host['qemu']}, {host['accel']}, " if "qemu" in host else ""
    click.echo(f"host: {machines}{host['cpus']} cores, load before {host['load']:g}")


def _paths(report: dict[str, Any]) -> None:
    _rows(report)
    for name, ratio in report["ratios"].items():
        click.echo(f"{name.replace('_', ' ')}: {ratio:g}")
    if "sustained" in report:
        _sustained(report["sustained"])
    if "cli" in report:
        cli = report["cli"]
        click.echo(f"command line adds: p50 {cli['p50']:g}, p99 {cli['p99']:g} (n = {cli['n']})")
    if "memory" in report:
        for size, row in report["memory"]["restore"].items():
            _row(size, row, "restore only")
        click.echo(f"restore ratio: {report['memory']['ratio']:g}")


def _compare(report: dict[str, Any]) -> None:
    ratios = report["ratios"]
    # In multiples of direct, the path that needs nothing to be ready.
    notes = {name: f"x{ratios.get(f'{name}_to_direct', 0):<8g}" for name in report["paths"]}
    _rows(report, notes)
    for name in report["paths"]:
        click.echo(f"{name:{_WIDTH}} {report['about'][name]}")


def _burst(report: dict[str, Any]) -> None:
    paths = ", ".join(f"{count} {path}" for path, count in report["paths"].items())
    click.echo(f"template {report['template']}, {report['n']} at once ({paths}), milliseconds")
    click.echo(f"all up after {report['wall_ms']:g}: {report['per_second']:g} per second")
    _header()
    _row("request", report["request"], "as the client saw it")
    _row("total", report["total"], "as the daemon timed it")
    click.echo(f"distinct in all: {', '.join(report['distinct'])}")


def _density(report: dict[str, Any]) -> None:
    click.echo(f"template {report['template']}, {report['n']} idle clones by {report['path']}")
    _header()
    for title, key, note in (
        ("PSS", "pss_mib", "MiB each"),
        ("private", "private_mib", "MiB each, which the next one costs too"),
        ("CPU", "cpu_percent", f"% of a core each, over {report['window_s']:g} s"),
        ("start", "start_ms", "ms, daemon's total"),
    ):
        _row(title, report[key], note)
    if report["marginal_mib"] is not None:
        click.echo(f"each after the first adds {report['marginal_mib']:g} MiB to the sum of PSS")
    click.echo(f"available memory fell by {report['available_mib_each']:g} MiB for each")
    click.echo(f"{'clones':>8}{'start ms':>10}{'PSS MiB':>10}{'free MiB':>10}")
    for point in report["growth"]:
        figures = "".join(f"{point[k]:10g}" for k in ("start_ms", "pss_mib", "available_mib"))
        click.echo(f"{point['k']:8d}{figures}")
    if "paused" in report:
        _paused(report["paused"])


def _soak(report: dict[str, Any]) -> None:
    from templated.bench.soak import slower

    kills = report["kills"]
    click.echo(
        f"template {report['template']}, {report['rounds']} rounds, seed {report['seed']}, "
        f"killed: the daemon {kills['daemon']} times, a VM {kills['vm']} times"
    )
    for window in ("first", "last"):
        _header(f"the {window} {report['window']} rounds, milliseconds")
        for name, row in report[window].items():
            if "p50" in row:
                _row(name, row, "")
    click.echo(f"{'':{_WIDTH}}{'first':>10}{'last':>10}   (median)")
    for name, row in report["first"].items():
        if "median" in row:
            last = report["last"][name]["median"]
            click.echo(f"{name:{_WIDTH}}{row['median']:10d}{last:10d}")
    click.echo("last to first: " + ", ".join(f"{k} {v:g}" for k, v in report["ratios"].items()))
    for title in ("lost", "left", "not_flat"):
        click.echo(f"{title.replace('_', ' ')}: {'; '.join(report[title]) or 'nothing'}")
    click.echo(f"slower: {'; '.join(slower(report)) or 'nothing'}")


def _policy(report: dict[str, Any]) -> None:
    from templated.bench.policies import goals

    click.echo(f"egress {report['egress']}, milliseconds")
    for kind in ("clones", "functions"):
        _header()
        for path, row in report[kind].items():
            _row(path, row["without"], f"{kind}, no policy")
            _row("", row["with"], f"with one: x{row['ratio']:g}")
    for path, row in report.get("first_connection", {}).items():
        done = f"{row['succeeded']} of {row['tried']} succeeded at the first try"
        click.echo(f"first connection by {path}: {done}, p50 {row['p50']:g} ms")
        for failure in row["failures"]:
            click.echo(f"    {failure}")
    for line in goals(report):
        click.echo(f"missed: {line}")


def _egress(report: dict[str, Any]) -> None:
    from templated.bench.egress import ROUNDS, goals

    click.echo(f"{report['flows']} TCP flows, longest silence of each, milliseconds")
    click.echo(f"{'':34}{'lost':>6}{'p50':>9}{'p99':>9}{'max':>9}")
    for key, what in ROUNDS.items():
        row = report[key]
        figures = "".join(f"{row[name]:9.1f}" for name in ("p50", "p99", "max"))
        click.echo(f"{what:34}{row['flows_lost']:6d}{figures}")
    bulk = report["throughput"]
    click.echo(
        f"throughput: {bulk['egress_gbit']:g} Gbit/s, by hand {bulk['by_hand_gbit']:g}; "
        f"ratio {bulk['ratio']:g}"
    )
    scaling, lanes = report["scaling"], report["lanes_throughput"]
    click.echo(
        f"1 to 3 lanes after {scaling['grown_s']:g} s of load, and back, under {scaling['flows']}"
        f" flows: {scaling['flows_lost']} lost, longest silence p99 {scaling['p99']:g} ms;"
        f" {scaling['flows_of_lanes']} in each lane as the others drained"
    )
    click.echo(
        f"two active forwarders: {lanes['two_gbit']:g} Gbit/s, one {lanes['one_gbit']:g};"
        f" ratio {lanes['ratio']:g}"
    )
    click.echo(f"made in {report['create_s']:g} s; {report['churn']['rounds']} times again")
    if clones := report.get("clones"):
        paths = ", ".join(f"{number} {path}" for path, number in clones["paths"].items())
        click.echo(f"{clones['starts']} clones ({paths}) sent {clones['packets']} packets")
    seen, wrong = report["packets_seen"], report["wrong_sources"]
    click.echo(f"captured outside: {seen} packets, {wrong} of a wrong source")
    for line in goals(report):
        click.echo(f"missed: {line}")


def _neighbours(report: dict[str, Any]) -> None:
    click.echo(
        f"template {report['template']}, commands in {report['clones']} clones, "
        f"{report['rounds']} rounds, milliseconds"
    )
    _header()
    _row("alone", report["alone"], "")
    _row("beside", report["beside"], "a clone that floods CPU, console, disk and agent")
    click.echo("beside to alone: " + ", ".join(f"{k} {v:g}" for k, v in report["ratios"].items()))
    memory = report["daemon_kib"]
    click.echo(f"the daemon's memory: {memory['before']} KiB, at most {memory['most']} KiB")


def _invoke(report: dict[str, Any]) -> None:
    click.echo(f"functions on template {report['template']}, milliseconds")
    _header("phases (p50)")
    first, attach = report.get("first", {}), report.get("attach", {})
    rows = {
        "paused": report.get("paused"),
        "bare claim": report.get("claim"),
        "first, pool": first.get("pool"),
        "first, direct": first.get("direct"),
        "direct clone": first.get("clone"),
        "attach 100 KB": attach.get("100 KB"),
        "attach 200 MB": attach.get("200 MB"),
        **{way: report.get("gateway", {}).get(way) for way in ("boto3", "socket")},
    }
    for name, row in rows.items():
        if row is not None:
            phases = row.get("phases_p50", {})
            _row(name, row, "  ".join(f"{k} {v:g}" for k, v in phases.items()))
    for title, group, key in (
        ("paused to bare claim", report, "paused_to_claim"),
        ("first, direct to direct clone", first, "direct_to_clone"),
        ("attach, 200 MB to 100 KB", attach, "large_to_small"),
        ("boto3 adds (p50)", report.get("gateway", {}), "adds_p50"),
    ):
        if key in group:
            click.echo(f"{title}: {group[key]:g}")
    if found := report.get("sustained"):
        rates = ", ".join(f"{way} {rate:g}" for way, rate in found["per_second"].items())
        click.echo(
            f"sustained, {found['instances']} instances: {rates} per second; "
            f"functions to agents: {found['functions_to_agents']:g}"
        )
        each = ", ".join(
            f"{way} {cpu['busy']:g} (the daemon {cpu['daemon']:g}, this client {cpu['bench']:g})"
            for way, cpu in found["cpu_ms_per_request"].items()
        )
        click.echo(f"CPU of the whole host per request, ms: {each}")
    if found := report.get("shifted"):
        click.echo(
            f"weights 0.9 and 0.1: {found['second']} of {found['n']} by the second, "
            f"{found['deviation_sigma']:g} standard deviations off; while the alias moved "
            f"{found['while_moving']} requests, {found['errors_while_moving']} errors; "
            f"{found['new']} by the new version, {found['new_warm_percent']} % of them by an "
            "initialised instance"
        )
    if found := report.get("step"):
        _step(found)


def _step(found: dict[str, Any]) -> None:
    click.echo(
        f"{found['requests']} requests at once of {found['seconds_each']:g} s each, to a function "
        "without an instance, until all are served:"
    )
    _row("empty pools", found["empty"], f"to a warm pool: {found['empty_to_pool']:g}")
    _row("pools follow", found["followed"], f"to a warm pool: {found['followed_to_pool']:g}")
    _row("warm pool", found["pool"], "")
    if found["desired"]:
        _row("desired right", found["desired"], f"never: {found['never_desired']}")


def _paused(report: dict[str, Any]) -> None:
    click.echo(f"direct beside {report['paused']} paused VMs, milliseconds")
    _row("without", report["direct_without"], "")
    _row("with", report["direct_with"], f"{report['available_mib_each']:g} MiB per paused VM")
    click.echo(f"with to without: {report['ratio']:g}")


def _sustained(report: dict[str, Any]) -> None:
    rates = ", ".join(f"{name} {rate:g}" for name, rate in report["per_second"].items())
    click.echo(
        f"sustained, {report['concurrency']} at once, {report['seconds']:g} s each: "
        f"{rates} per second; direct to floor: {report['direct_to_floor']:g}"
    )
    each = ", ".join(
        f"{name} {cpu['busy']:g} (the daemon {cpu['daemon']:g}), idle {cpu['idle']:g}"
        for name, cpu in report["cpu_ms_per_start"].items()
    )
    click.echo(f"CPU of the whole host per start, ms: {each}")


def _rows(report: dict[str, Any], notes: dict[str, str] | None = None) -> None:
    click.echo(f"template {report['template']}, milliseconds")
    _header("phases (p50)" if notes is None else "to direct, phases (p50)")
    for name, row in report["paths"].items():
        phases = "  ".join(f"{k} {v:g}" for k, v in row["phases_p50"].items())
        _row(name, row, (notes or {}).get(name, "") + phases)


def _header(note: str = "") -> None:
    line = f"{'':{_WIDTH}}{'n':>5}{'p50':>10}{'p90':>10}{'p99':>10}   {note}"
    click.echo(line.rstrip())


def _row(name: str, row: dict[str, Any], note: str) -> None:
    figures = "".join(f"{row[key]:10.1f}" for key in ("p50", "p90", "p99"))
    click.echo(f"{name:{_WIDTH}}{row['n']:5d}{figures}   {note}".rstrip())


_SHOWN = {
    "paths": _paths,
    "compare": _compare,
    "burst": _burst,
    "density": _density,
    "neighbours": _neighbours,
    "policy": _policy,
    "egress": _egress,
    "invoke": _invoke,
    "soak": _soak,
}
