"""`scale ls | show`: how many instances of functions there should be, and why."""

from __future__ import annotations

from typing import Any

import click

from templated.cli import render
from templated.cli.completion import function_versions
from templated.cli.options import Group, Settings
from templated.client import requests
from templated.model.names import check_function_name, check_qualifier

EXAMPLES = """
templated scale ls
templated scale show hello
templated scale show hello:live --hours 3
"""


@click.group("scale", cls=Group, examples=EXAMPLES)
def scale() -> None:
    """Show how many instances of functions are kept ready, and why.

    The daemon decides each second: by the demand of the last seconds, by a forecast of the next
    minutes, and by what functions call. `templated function scale` sets bounds.
    """


LS_EXAMPLES = """
templated scale ls
templated scale ls --all
templated scale ls -o json
"""


@scale.command("ls", examples=LS_EXAMPLES)
@click.option("--all", "every", is_flag=True, help="Also versions with no instance and no demand.")
@click.pass_obj
def ls(settings: Settings, every: bool) -> None:
    """List demand, forecast and instances by version.

    DEMAND: requests under way, and on average over the last minute. FORECAST: the most at once
    that the next minute is expected to have. DESIRED: instances that the demand of the last
    seconds wants. KEPT: those that there should be; READY: those that there are.
    """
    views = settings.client().json(requests.list_scaling())
    if not settings.table:
        render.dump(views, settings)
        return
    shown = [view for view in views if every or not _idle(view)]
    if settings.quiet:
        for view in shown:
            click.echo(_name(view))
        return
    headers = ("FUNCTION", "VERSION", "DEMAND", "FORECAST", "DESIRED", "KEPT", "READY", "REASON")
    render.table(headers, map(_row, shown))
    if len(shown) < len(views):
        settings.note(f"{len(views) - len(shown)} idle versions are left out: --all")


def _idle(view: dict[str, Any]) -> bool:
    return not (view["requests"] or view["kept"] or view["ready"] or view["starting"])


def _name(view: dict[str, Any]) -> str:
    return f"{view['function']}:{view['version']}"


def _row(view: dict[str, Any]) -> tuple[object, ...]:
    return (
        *(view["function"], view["version"], _demand(view), f"{view['forecast']:.1f}"),
        *(view["desired"], view["kept"], _ready(view), view["reason"]),
    )


def _demand(view: dict[str, Any]) -> str:
    waiting = f", {view['waiting']} wait" if view["waiting"] else ""
    return f"{view['requests']} (mean {view['mean']:.1f}{waiting})"


def _ready(view: dict[str, Any]) -> str:
    return f"{view['ready']} (+{view['starting']})" if view["starting"] else str(view["ready"])


SHOW_EXAMPLES = """
templated scale show hello
templated scale show hello:3
templated scale show hello:live --hours 3
templated scale show hello -o json
"""


@scale.command("show", examples=SHOW_EXAMPLES)
@click.argument("name", metavar="FUNCTION[:VERSION|ALIAS]", shell_complete=function_versions)
@click.option(
    "--hours",
    type=click.IntRange(1, 3),
    default=1,
    show_default=True,
    help="How far back the picture goes.",
)
@click.pass_obj
def show(settings: Settings, name: str, hours: int) -> None:
    """Show one version: what is decided, what is learned of calls, and the last hours.

    Without a version, the one that was asked for last.
    """
    from templated.cli.scale_plot import plot

    function, colon, given = name.partition(":")
    qualifier = check_qualifier(given) if colon else None
    request = requests.show_scaling(check_function_name(function), qualifier=qualifier)
    view = settings.client().json(request)
    if not settings.table:
        render.dump(view, settings)
        return
    if settings.quiet:
        click.echo(_name(view["now"]))
        return
    render.fields(_fields(view))
    if view["calls"]:
        click.echo()
        headers = ("CALLER", "CALLS", "LAG", "PROBABILITY", "FAN-OUT", "RUNS", "KNOWN BY")
        render.table(headers, map(_call, view["calls"]))
    click.echo()
    for line in plot(view["history"]["peak"], view["history"]["ready"], hours):
        click.echo(line)


def _fields(view: dict[str, Any]) -> list[tuple[str, object]]:
    now = view["now"]
    most = "none" if view["max"] is None else view["max"]
    took = f"{view['start_s']:.2f} s" if view["start_s"] else "not seen yet"
    said = f" ({view['forecast']})" if view["forecast"] else ""
    return [
        ("function", now["function"]),
        ("version", now["version"]),
        ("demand", _demand(now)),
        ("forecast", f"{now['forecast']:.1f}{said}"),
        ("desired", now["desired"]),
        ("kept", now["kept"]),
        ("ready", _ready(now)),
        ("reason", now["reason"]),
        ("bounds", f"min {view['min']}, max {most}"),
        ("instance", f"{view['instance_mib']:.0f} MiB, starts in {took}"),
        *([("host", "; ".join(view["short_of"]))] if view["short_of"] else []),
    ]


def _call(call: dict[str, Any]) -> tuple[object, ...]:
    lag = f"{call['lag_s']:.2f} s ({call['earliest_s']:.2f} to {call['latest_s']:.2f})"
    known = "trace" if call["traced"] else "timing"
    sure = f"{call['probability']:.0%}"
    return call["caller"], call["callee"], lag, sure, call["fan_out"], call["runs"], known
