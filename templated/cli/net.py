"""`net ls | show | trace | apply`: what clones may send, and what becomes of it."""

from __future__ import annotations

from typing import Any

import click

from templated.cli import render
from templated.cli.completion import clone_names, template_names
from templated.cli.options import Group, Settings
from templated.client import requests
from templated.model.names import check_clone_name

EXAMPLES = """
templated net ls
templated net show python-fn
templated net trace fn-123 10.1.2.3:443
templated net apply python-fn   # after its file has changed
"""


@click.group("net", cls=Group, examples=EXAMPLES)
def net() -> None:
    """Show the network policies of templates and functions, and what they do.

    A template's is in its file: network: {egress, allow, peers, publish, limits}. It holds from the
    build on, or from `net apply`, for all clones of the template at once. Over it stands what a
    function has said: see `function network`.
    """


@net.command("ls", examples="templated net ls\ntemplated net ls -o json")
@click.pass_obj
def ls(settings: Settings) -> None:
    """List the policies, with what they let pass and dropped since the daemon began."""
    views = settings.client().json(requests.list_policies())
    headers = ("POLICY", "EGRESS", "ALLOW", "PEERS", "SENT", "RECEIVED", "DROPPED", "PROBLEM")
    render.listing(settings, views, headers, _row)


def _row(view: dict[str, Any]) -> tuple[object, ...]:
    allow = view["allow"]
    named = {"none": "-"}.get(view["egress"], "all")
    shown = named if not allow else allow[0] + (f" +{len(allow) - 1}" if len(allow) > 1 else "")
    passed = (view[way]["packets"] for way in ("sent", "received"))
    dropped = sum(view["dropped"].values())
    return _named(view), view["egress"], shown, view["peers"], *passed, dropped, view["problem"]


def _named(view: dict[str, Any]) -> str:
    """A template's name, or as in `hello on python-fn`."""
    return f"{view['name']} on {view['template']}" if view["function"] else str(view["name"])


@net.command("show", examples="templated net show python-fn\ntemplated net show fn-123 -o json")
@click.argument("name", metavar="TEMPLATE|FUNCTION|CLONE", shell_complete=template_names)
@click.pass_obj
def show(settings: Settings, name: str) -> None:
    """Show one policy in full, by its template, its function, or a clone that it holds for."""
    view = settings.client().json(requests.show_policy(name))
    if not settings.table:
        render.dump(view, settings)
        return
    limits = ", ".join(f"{key} {value}" for key, value in view["limits"].items() if value)
    render.fields(
        [
            *([("function", view["name"])] if view["function"] else []),
            ("template", view["template"]),
            ("egress", view["egress"]),
            ("allow", ", ".join(view["allow"]) or "all that it leads to"),
            ("peers", view["peers"]),
            ("publish", ", ".join(_published(view)) or "none"),
            ("limits", limits or "none"),
            *((way, _passed(view[way])) for way in ("sent", "received")),
            *((f"dropped: {reason}", number) for reason, number in view["dropped"].items()),
            *([("problem", view["problem"])] if view["problem"] else []),
        ]
    )


def _published(view: dict[str, Any]) -> list[str]:
    held = view["published"]
    return [f"{port} to {held[port]}" if port in held else port for port in view["publish"]]


def _passed(counted: dict[str, int]) -> str:
    return f"{counted['packets']} packets, {counted['bytes']} bytes"


TRACE_EXAMPLES = """
templated net trace fn-123 10.1.2.3            # a ping
templated net trace fn-123 10.1.2.3:443
templated net trace fn-123 10.1.2.3:53/udp -o json
"""


@net.command("trace", examples=TRACE_EXAMPLES)
@click.argument("name", metavar="CLONE", shell_complete=clone_names)
@click.argument("target", metavar="ADDRESS[:PORT[/PROTO]]")
@click.pass_obj
def trace(settings: Settings, name: str, target: str) -> None:
    """Say what would happen to a packet from a clone, step by step, and why.

    It is the first packet of a connection, by tcp unless PROTO says udp; without a port it is a
    ping. Nothing is sent: the rules that the kernel has are followed, and its routes are asked.
    """
    request = requests.trace_packet(check_clone_name(name), target)
    view = settings.client().json(request)
    if not settings.table:
        render.dump(view, settings)
        return
    if not settings.quiet:
        headers = ("STEP", "VERDICT", "WHY", "COUNTED AS")
        render.table(headers, map(_step, view["steps"]))
    click.echo("passes" if view["passes"] else "dropped")


def _step(step: dict[str, Any]) -> tuple[object, ...]:
    return step["at"], "pass" if step["passes"] else "drop", step["says"], step["counter"]


@net.command("apply", examples="templated net apply python-fn")
@click.argument("template", shell_complete=template_names)
@click.pass_obj
def apply(settings: Settings, template: str) -> None:
    """Put the policy in force that a template's file has now.

    It holds for all its clones from one packet to the next, running ones too; nothing is built or
    restarted, and a connection that it no longer allows ends.
    """
    settings.client().json(requests.apply_policy(template))
    settings.note(f"the policy of {template} is in force")
