"""`egress create | ls | show | switch | rm`: named ways out of the host."""

from __future__ import annotations

from typing import Any

import click

from templated.cli import render
from templated.cli.completion import egress_names
from templated.cli.options import Group, Settings
from templated.client import requests

EXAMPLES = """
templated egress create acme --interface eth1.20 --address 172.20.0.100/24 \\
    --gateway 172.20.0.1 --to 172.20.0.0/16
templated egress ls
templated egress switch acme
templated egress rm acme
"""


@click.group("egress", cls=Group, examples=EXAMPLES)
def egress() -> None:
    """Give clones a way out of the host under one fixed address.

    Templates name it in their file, network: {egress: NAME}. Nothing of it is done when a clone
    starts: its packets are marked by its policy, and forwarders, an active one and a standby, send
    them on. While neither is active, they are dropped.
    """


@egress.command("create", examples=EXAMPLES)
@click.argument("name")
@click.option("--interface", required=True, metavar="IF", help="Of the host, without an address.")
@click.option(
    "--address", required=True, metavar="A/LEN", help="The fixed one, which nobody else may have."
)
@click.option("--gateway", required=True, metavar="G", help="Of that network.")
@click.option("--to", default="", metavar="CIDR,...", help="The networks that it leads to.")
@click.option("--internet", is_flag=True, help="It leads everywhere but to this host's networks.")
@click.option(
    "--forwarders",
    type=click.IntRange(1, 2),
    default=2,
    show_default=True,
    metavar="N",
    help="1: without a standby.",
)
@click.option(
    "--min",
    "least",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Active forwarders at least, each with a standby.",
)
@click.option(
    "--max",
    "most",
    type=click.IntRange(min=1),
    metavar="N",
    help="Active forwarders under load, 8 at most.  [default: as --min]",
)
@click.option(
    "--bandwidth",
    default="256MiB",
    show_default=True,
    metavar="SIZE",
    help="What one of them is to carry a second; above 0.8 of it there is one more.",
)
@click.pass_obj
def create(
    settings: Settings,
    name: str,
    interface: str,
    address: str,
    gateway: str,
    to: str,
    internet: bool,
    forwarders: int,
    least: int,
    most: int | None,
    bandwidth: str,
) -> None:
    """Make an egress; it can be used when this ends. A failure leaves nothing of it.

    With --max, further forwarders come and go with the load: each has a slice of the fixed
    address's ports, new TCP flows go to them in turn, and one that leaves keeps those it has.
    """
    wanted = {
        "name": name,
        "interface": interface,
        "address": address,
        "gateway": gateway,
        "to": [cidr.strip() for cidr in to.split(",") if cidr.strip()],
        "internet": internet,
        "forwarders": forwarders,
        "min": least,
        "max": least if most is None else most,
        "bandwidth": bandwidth,
    }
    _show(settings, settings.client().json(requests.create_egress(wanted)))


@egress.command("ls", examples="templated egress ls\ntemplated egress ls -o json")
@click.pass_obj
def ls(settings: Settings) -> None:
    """List the egresses; ACTIVE are the forwarders that send."""
    views = settings.client().json(requests.list_egresses())
    headers = ("NAME", "INTERFACE", "ADDRESS", "TO", "ACTIVE", "FLOWS", "FAILOVERS", "PROBLEM")
    render.listing(settings, views, headers, _row)


def _row(view: dict[str, Any]) -> tuple[object, ...]:
    flows = sum(lane["flows"] for lane in view["lanes"])
    active = ",".join(str(lane["active"]) for lane in view["lanes"] if lane["active"]) or "-"
    return (
        *(view["name"], view["interface"], view["address"], _to(view), active, flows),
        *(view["failovers"], view["problem"]),
    )


@egress.command("show", examples="templated egress show acme\ntemplated egress show acme -o json")
@click.argument("name", shell_complete=egress_names)
@click.pass_obj
def show(settings: Settings, name: str) -> None:
    """Show one egress, its forwarders and what they count."""
    _show(settings, settings.client().json(requests.show_egress(name)))


@egress.command("switch", examples="templated egress switch acme")
@click.argument("name", shell_complete=egress_names)
@click.pass_obj
def switch(settings: Settings, name: str) -> None:
    """Have the standby take over; flows go on, and no packet is lost."""
    _show(settings, settings.client().json(requests.switch_egress(name)))


@egress.command("rm", examples="templated egress rm acme")
@click.argument("name", shell_complete=egress_names)
@click.pass_obj
def rm(settings: Settings, name: str) -> None:
    """Take an egress away. One that the policy of a template names is not removed."""
    settings.client().json(requests.remove_egress(name))


def _show(settings: Settings, view: dict[str, Any]) -> None:
    if not settings.table:
        render.dump(view, settings)
        return
    render.fields(
        [
            ("name", view["name"]),
            ("interface", view["interface"]),
            ("address", view["address"]),
            ("gateway", view["gateway"]),
            ("to", _to(view)),
            ("state", view["state"]),
            ("lanes", f"{len(view['lanes'])}, {view['min']} to {view['max']}"),
            ("failovers", view["failovers"]),
            ("problem", view["problem"] or "-"),
        ]
    )
    click.echo()
    if view["max"] > 1:
        headers = ("LANE", "STATE", "PORTS", "ACTIVE", "FLOWS", "PER SECOND")
        render.table(headers, map(_lane, view["lanes"]))
        click.echo()
    rows = [
        (f["number"], f["role"], f["since"], f["pid"] or "-", f["flows"], _dropped(f), f["error"])
        for f in view["forwarders"]
    ]
    render.table(("FORWARDER", "ROLE", "SINCE", "PID", "FLOWS", "DROPPED", "ERROR"), rows)


def _to(view: dict[str, Any]) -> str:
    return ",".join(["internet"] * view["internet"] + list(view["to"]))


def _lane(lane: dict[str, Any]) -> tuple[object, ...]:
    ports, active = "{}-{}".format(*lane["ports"]), lane["active"] or "-"
    rate = render.size(lane["rate"])
    return lane["number"], lane["state"], ports, active, lane["flows"], rate


def _dropped(forwarder: dict[str, Any]) -> int:
    return sum(n for name, (n, _) in forwarder["counters"].items() if name.startswith("drop_"))
