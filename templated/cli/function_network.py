"""`function network`: what a function's instances may send, and be sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from templated.cli import render
from templated.cli.completion import function_names
from templated.cli.options import Settings, command
from templated.client import requests
from templated.errors import InvalidRequest
from templated.model.names import check_function_name

_EXAMPLES = """
templated function network hello                              # show it
templated function network hello --egress acme --allow 10.1.0.0/16:443
templated function network hello --limit bandwidth=10MiB --limit connections=100
templated function network hello --reset                      # as its template has it
"""
_LIMITS = ("bandwidth", "packets", "connections")


def network_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of a function's network policy, for a deploy, too."""
    for option in (
        click.option("--limit", "limits", metavar="KEY=VALUE", multiple=True,
                     help="For each instance: bandwidth=10MiB, packets=N or connections=N."),
        click.option("--peers", type=click.Choice(["isolated", "open"]),
                     help="Whether its instances reach each other."),
        click.option("--allow", metavar="CIDR[:PORT[/PROTO]]", multiple=True,
                     help="Of what the egress leads to, these alone; all of them are replaced."),
        click.option("--egress", metavar="none|nat|NAME", help="Its way out of the host."),
    ):  # fmt: skip
        function = option(function)
    return function


def said(
    egress: str | None, allow: tuple[str, ...], peers: str | None, limits: tuple[str, ...]
) -> dict[str, Any] | None:
    """The keys of the policy that options give; None when they give none."""
    given = {"egress": egress, "allow": list(allow), "peers": peers, "limits": _limits(limits)}
    return {key: value for key, value in given.items() if value} or None


def _limits(given: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in given:
        key, _, value = text.partition("=")
        if key not in _LIMITS or not value or (key != "bandwidth" and not value.isdecimal()):
            raise InvalidRequest(
                f"--limit takes KEY=VALUE, not {text!r}",
                hint="as in bandwidth=10MiB, packets=1000, or connections=100",
            )
        found[key] = value if key == "bandwidth" else int(value)
    return found


@command("network", examples=_EXAMPLES)
@click.argument("name", shell_complete=function_names)
@network_options
@click.option("--reset", is_flag=True, help="First forget what was said before.")
@click.pass_obj
def network(
    settings: Settings,
    name: str,
    egress: str | None,
    allow: tuple[str, ...],
    peers: str | None,
    limits: tuple[str, ...],
    reset: bool,
) -> None:
    """Set the network policy of a function, or show what it has said.

    It stands over its template's, key by key, and holds for all versions, for instances that run
    from one packet to the next; none is restarted. What is not given stays as it is.
    """
    check_function_name(name)
    keys = said(egress, allow, peers, limits)
    if keys or reset:
        request = requests.set_function_network(name, keys or {}, reset=reset)
    else:
        request = requests.show_function(name)
    view = settings.client().json(request)
    if settings.table:
        shown = fields(view["network"])
        render.fields(shown or [("network", "as its template has it")])
    else:
        render.dump(view["network"], settings)


def fields(keys: dict[str, Any]) -> list[tuple[str, object]]:
    """What a function has said of the network, a line each."""
    limits = keys.get("limits") or {}
    shown = {
        "egress": keys.get("egress"),
        "allow": ", ".join(keys.get("allow") or ()),
        "peers": keys.get("peers"),
        "limits": ", ".join(f"{key} {value}" for key, value in limits.items() if value),
    }
    return [(key, value) for key, value in shown.items() if value]
