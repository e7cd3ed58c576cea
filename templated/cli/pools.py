"""`pool ls | set`: VMs that are ready ahead of requests."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

import click

from templated.cli import render
from templated.cli.completion import template_names
from templated.cli.options import Group, Settings
from templated.client import requests
from templated.errors import InvalidRequest, Timeout

_POLL_SECONDS = 0.2
TIERS = ("standby", "warm")

EXAMPLES = """
templated pool ls
templated pool set python-fn --warm 8 --standby 4
templated pool set python-fn --warm 8 --wait
templated pool set python-fn --reset   # back to what the template says
"""


@click.group("pool", cls=Group, examples=EXAMPLES)
def pool() -> None:
    """Keep VMs ready, so that a clone need not be started when it is requested.

    A warm VM is restored and has its identity but for the name; it is paused and costs memory, no
    CPU. A standby VM is a hypervisor that waits for its state. `clone` takes a warm one, then a
    standby one, otherwise it starts a new one; PATH in its output says which.
    """


@pool.command("ls", examples="templated pool ls\ntemplated pool ls -o json")
@click.pass_obj
def ls(settings: Settings) -> None:
    """List the pools: members that are ready, and how many there must be."""
    views = settings.client().json(requests.list_pools())
    if not settings.table:
        render.dump(views, settings)
    elif settings.quiet:
        for view in views:
            click.echo(view["template"])
    else:
        _table(views)


@pool.command("set", examples=EXAMPLES)
@click.argument("template", shell_complete=template_names)
@click.option("--standby", type=click.IntRange(0, 10000), metavar="N", help="Members to keep.")
@click.option("--warm", type=click.IntRange(0, 10000), metavar="N", help="Members to keep.")
@click.option("--reset", is_flag=True, help="Go back to the sizes in the template's file.")
@click.option("--wait", is_flag=True, help="Wait until the pools have these sizes.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long --wait waits.",
)
@click.pass_obj
def set_(
    settings: Settings,
    template: str,
    standby: int | None,
    warm: int | None,
    reset: bool,
    wait: bool,
    timeout: float,
) -> None:
    """Set the sizes of a template's pools; they are kept over restarts of the daemon.

    A tier that is not given stays as it is. Sizes that the host cannot hold are refused.
    """
    given = standby is not None or warm is not None
    if given == reset:
        raise InvalidRequest(
            "give sizes or --reset, and not both",
            hint=f"as in: templated pool set {template} --warm 4",
        )
    request = requests.set_pool(template, standby=standby, warm=warm, reset=reset)
    view = settings.client().json(request)
    if wait:
        view = _wait(settings, template, timeout)
    if settings.table:
        _table([view])
    else:
        render.dump(view, settings)


def _wait(settings: Settings, template: str, timeout: float) -> dict[str, Any]:
    """The pools once they have their sizes; Timeout says what prevents it."""
    client, deadline = settings.client(), time.monotonic() + timeout
    show = not settings.quiet and sys.stderr.isatty()
    while True:
        view: dict[str, Any] = client.json(requests.show_pool(template))
        if show:
            click.echo(f"\r\x1b[K{_progress(view)}", nl=False, err=True)
        if all(view[tier]["ready"] == view[tier]["target"] for tier in TIERS):
            break
        if time.monotonic() > deadline:
            raise Timeout(
                f"the pools of {template} are not full after {timeout:g} s: {_progress(view)}",
                hint=view["problem"] or "see: templated pool ls, templated events",
            )
        time.sleep(_POLL_SECONDS)
    if show:
        click.echo("\r\x1b[K", nl=False, err=True)
    return view


def _progress(view: dict[str, Any]) -> str:
    return ", ".join(f"{tier} {_filled(view[tier])}" for tier in TIERS)


def _filled(tier: dict[str, int]) -> str:
    return f"{tier['ready']}/{tier['target']}"


def _table(views: Iterable[dict[str, Any]]) -> None:
    rows = [
        (v["template"], *(_filled(v[tier]) for tier in TIERS), v.get("source"), v["problem"])
        for v in views
    ]
    render.table(("TEMPLATE", "STANDBY", "WARM", "SIZES FROM", "PROBLEM"), rows)
