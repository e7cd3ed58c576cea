"""`egress create | ls | show | switch | rm`: named ways out of the host."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from templated.cli import render
from templated.cli.completion import egress_names
from templated.cli.options import Group, Settings
from templated.client import requests
from templated.errors import InvalidRequest

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


CREATE_EXAMPLES = """
templated egress create acme --interface eth1.20 --address 172.20.0.100/24 \\
    --gateway 172.20.0.1 --to 172.20.0.0/16
templated egress create -f acme.yaml
"""
_REQUIRED = ("name", "interface", "address", "gateway")


@egress.command("create", examples=CREATE_EXAMPLES)
@click.argument("name", required=False)
@click.option("--interface", metavar="IF", help="Of the host, without an address.")
@click.option("--address", metavar="A/LEN", help="The fixed one, which nobody else may have.")
@click.option("--gateway", metavar="G", help="Of that network.")
@click.option("--to", metavar="CIDR,...", help="The networks that it leads to.")
@click.option("--internet", is_flag=True, help="It leads everywhere but to this host's networks.")
@click.option(
    "--forwarders",
    type=click.IntRange(1, 2),
    metavar="N",
    help="1: without a standby. Default: 2.",
)
@click.option(
    "-f",
    "--file",
    metavar="FILE",
    type=click.Path(),
    help="All of it from this YAML, as with two hosts; - reads stdin.",
)
@click.option(
    "--min",
    type=click.IntRange(min=1),
    metavar="N",
    help="Active forwarders at least, each with a standby. Default: 1.",
)
@click.option(
    "--max",
    type=click.IntRange(min=1),
    metavar="N",
    help="Active forwarders under load, 8 at most. Default: as --min.",
)
@click.option(
    "--bandwidth",
    metavar="SIZE",
    help="What one is to carry a second; above 0.8 of it there is one more. Default: 256MiB.",
)
@click.pass_obj
def create(settings: Settings, /, file: str | None, **options: Any) -> None:
    """Make an egress; it can be used when this ends. A failure leaves nothing of it.

    With --max, further forwarders come and go with the load: each has a slice of the fixed
    address's ports, new TCP flows are spread over them, and one that leaves keeps those it has.

    One between two hosts comes from a file, which is the same on both.
    """
    given = {key: value for key, value in options.items() if value}
    wanted = _asked(given) if file is None else _read(file, given)
    _show(settings, settings.client().json(requests.create_egress(wanted)))


def _asked(given: dict[str, Any]) -> dict[str, Any]:
    if missing := [key for key in _REQUIRED if key not in given]:
        what = "argument 'NAME'" if missing[0] == "name" else f"option '--{missing[0]}'"
        raise click.UsageError(f"Missing {what}.")
    to = [cidr.strip() for cidr in given.get("to", "").split(",") if cidr.strip()]
    return {"max": given.get("min", 1), **given, "to": to}


def _read(file: str, given: dict[str, Any]) -> dict[str, Any]:
    import msgspec

    from templated.drivers.configfile import parse_egress

    if other := next((key for key in given if key != "name"), None):
        raise InvalidRequest(f"-f and --{other} exclude each other", hint="put it into the file")
    source = "stdin" if file == "-" else file
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest(f"{source} is not UTF-8 text") from None
    spec = parse_egress(text, source)
    if spec.name != given.get("name", spec.name):
        raise InvalidRequest(f"the name in {source} is {spec.name}, not {given['name']}")
    wanted: dict[str, Any] = msgspec.to_builtins(spec)
    return wanted


@egress.command("ls", examples="templated egress ls\ntemplated egress ls -o json")
@click.pass_obj
def ls(settings: Settings) -> None:
    """List the egresses; ACTIVE are the forwarders that send."""
    views = settings.client().json(requests.list_egresses())
    names = "NAME INTERFACE ADDRESS TO HOSTS ACTIVE FLOWS FAILOVERS PROBLEM"
    render.listing(settings, views, names.split(), _row)


def _row(view: dict[str, Any]) -> tuple[object, ...]:
    flows = sum(lane["flows"] for lane in view["lanes"])
    active = ",".join(str(lane["active"]) for lane in view["lanes"] if lane["active"]) or "-"
    return (
        *(view["name"], view["interface"], view["address"], _to(view), _hosts(view), active),
        *(flows, view["failovers"], view["problem"]),
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
            *(("host", _host(view, side)) for side, _ in enumerate(view["hosts"], 1)),
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


def _hosts(view: dict[str, Any]) -> str:
    return ",".join(host["address"] for host in view["hosts"]) or "-"


def _host(view: dict[str, Any], side: int) -> str:
    """The host of forwarder `side`."""
    host = view["hosts"][side - 1]
    what = "this one" if side == view["here"] else f"its forwarder {view['peer']}"
    return f"{side}: {host['address']}, clones {host['clones']}, {what}"


def _dropped(forwarder: dict[str, Any]) -> int:
    return sum(n for name, (n, _) in forwarder["counters"].items() if name.startswith("drop_"))
