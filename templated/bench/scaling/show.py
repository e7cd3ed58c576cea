"""Prints the report of `bench scaling` for people."""

from __future__ import annotations

from typing import Any

import click

from templated.bench.scaling.measure import REFERENCE
from templated.cli.render import table


def show(report: dict[str, Any]) -> None:
    """Tables on stdout."""
    if "curves" in report:
        _show_curves(report)
    if "live" in report:
        _show_live(report["live"])
    if "cost" in report:
        _show_cost(report["cost"])


def _show_curves(report: dict[str, Any]) -> None:
    click.echo(
        f"trace {report['trace']}: {report['functions']} functions, {report['minutes']} minutes, "
        f"{report['needed']} {report['unit']} needed"
    )
    click.echo(f"cold starts with at most so many {report['unit']} held:")
    names = list(report["curves"])
    rows = [
        [row["budget"], *("-" if row[name] is None else row[name] for name in names)]
        for row in report["table"]
    ]
    table(["held", *names], rows)
    reference = report["reference"]
    key = held_key(report)
    click.echo(
        f"fixed {REFERENCE} min: {_figures(reference)}; needed for as few cold starts by: "
        + ", ".join(
            f"{name} {_least(points, reference['cold'], key)}"
            for name, points in report["curves"].items()
        )
    )
    for choice in report["chosen"]:
        _show_choice(choice)


def _show_choice(choice: dict[str, Any]) -> None:
    click.echo(f"chosen on the {choice['on']} function: {choice['setting']}")
    click.echo(f"  the others: {_figures(choice['others'])}")
    click.echo(f"  the others, fixed {REFERENCE} min: {_figures(choice['others_reference'])}")
    click.echo(f"  all: {_figures(choice['all'])}")


def _figures(row: dict[str, Any]) -> str:
    return (
        f"{row['cold']} cold, {row['held']} instance-minutes, {row['gib_minutes']:g} GiB-minutes, "
        f"active functions' starts {row['active_warm_percent']:.2f} % warm"
    )


def held_key(report: dict[str, Any]) -> str:
    """The name of what a report measures memory by."""
    return "held" if report["unit"] == "instance-minutes" else "gib_minutes"


def _least(points: list[dict[str, Any]], cold: int, key: str) -> float | str:
    return min((p[key] for p in points if p["cold"] <= cold), default="never")


def _show_live(live: dict[str, Any]) -> None:
    click.echo(
        f"trace {live['trace']}: {live['minutes']} minutes from minute {live['begin']}, "
        f"{live['speed']:g} in one; {live['requests']} requests, {live['errors']} failed"
    )
    if live["last_error"]:
        click.echo(f"  the last one: {live['last_error']}")
    table(
        ["function", "requests", "cold, simulated", "cold, on VMs"],
        [list(row.values()) for row in live["rows"]],
    )
    click.echo(
        f"cold starts: {live['cold_live']}, the simulation said {live['cold_simulated']} "
        f"({live['off_percent']:+g} %), with {live['start_ms']:g} ms for a start and "
        f"{live['instance_mib']:g} MiB for an instance"
    )
    late, took = live["late_ms"], live["beyond_handler_ms"]
    click.echo(f"sent late by, in ms: p50 {late['p50']:g}, p99 {late['p99']:g}, n = {late['n']}")
    if took:
        click.echo(f"beyond the handler, in ms: p50 {took['p50']:g}, p99 {took['p99']:g}")


def _show_cost(cost: dict[str, Any]) -> None:
    click.echo("CPU of one round each second:")
    table(
        ["functions", "ms", "% of a core", "us each", "% of a core, memory short", "us a change"],
        [
            [
                row["functions"],
                f"{row['round_ms']:.2f}",
                f"{row['core_percent']:.2f}",
                f"{row['us_each']:.2f}",
                f"{row['short_core_percent']:.2f}",
                f"{row['event_us']:.1f}",
            ]
            for row in cost["rows"]
        ],
    )
    if cost["growth"] is not None:
        click.echo(f"each function costs {cost['growth']:g} times as much among the most of them")
