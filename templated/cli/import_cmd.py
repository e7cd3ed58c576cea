"""`template import`: a template's file, made of a domain of libvirt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from templated.cli import render
from templated.cli.completion import domain_names
from templated.cli.options import Settings, command

if TYPE_CHECKING:
    from templated.services.domain_import import Imported

EXAMPLES = """
templated template import --domain web
templated template import --domain "Web (old)" --name web --copy
templated template import --domain web --connect qemu:///session -f ./web.yaml
templated -q template import --domain web -f - | templated template build web -f -
templated template import --domain web -f - -o json | jq -r '.not_carried_over[].what'
"""


@command("import", examples=EXAMPLES)
@click.option(
    "--domain", metavar="NAME", required=True, shell_complete=domain_names,
    help="The domain, which must be shut off.",
)  # fmt: skip
@click.option(
    "--connect", metavar="URI", default="qemu:///system", show_default=True,
    envvar="LIBVIRT_DEFAULT_URI", help="A libvirt of this host; or $LIBVIRT_DEFAULT_URI.",
)  # fmt: skip
@click.option("--name", metavar="TEMPLATE", help="Name of the template. Default: the domain's.")
@click.option(
    "-f", "--file", metavar="FILE", type=click.Path(),
    help="Write the template here; - is stdout. Default: the first template directory.",
)  # fmt: skip
@click.option(
    "--hypervisor", type=click.Choice(["libvirt", "qemu"]), default="libvirt", show_default=True,
    help="Who starts the VMs: with qemu the daemon itself, on its own network.",
)  # fmt: skip
@click.option("--copy", is_flag=True, help="Copy the disk at once, as qcow2.")
@click.option(
    "--config", metavar="FILE", type=click.Path(path_type=Path),
    help="Import for a daemon with this configuration. Default: where serve looks for it.",
)  # fmt: skip
@click.pass_obj
def import_(
    settings: Settings,
    domain: str,
    connect: str,
    name: str | None,
    file: str | None,
    hypervisor: str,
    copy: bool,
    config: Path | None,
) -> None:
    """Write a template's YAML file from a domain of libvirt.

    Disk, memory, vCPUs, firmware and network are taken from it; all that a template cannot have
    is listed, in the file and on stderr. The domain and its disk stay as they are. `template
    build` copies the disk, so the domain must stay shut off until then; with --copy it may run.
    Refused are domains that run, and those with devices of the host. Needs no daemon.
    """
    from templated.drivers.configfile import load_config
    from templated.services.domain_import import Order, import_domain

    order = Order(domain, connect, name, file, copy, hypervisor)
    done = import_domain(order, load_config(config), settings.note)
    if not settings.table:
        render.dump(_view(done, order.domain, order.uri), settings)
    elif done.file is None:
        click.echo(done.text, nl=False)
    else:
        click.echo(done.template if settings.quiet else f"{done.template}: wrote {done.file}")
    _tell(done, settings)


def _view(done: Imported, domain: str, uri: str) -> dict[str, object]:
    return {
        "template": done.template,
        "file": done.file,
        "domain": domain,
        "uri": uri,
        "disk": done.disk,
        "copied": done.copied,
        "spec": done.spec,
        "not_carried_over": [{"what": one.what, "why": one.why} for one in done.leftovers],
    }


def _tell(done: Imported, settings: Settings) -> None:
    if done.leftovers:
        settings.note("not carried over:")
    for one in done.leftovers:
        settings.note(f"  {one.what}: {one.why}")
    if not done.copied:
        settings.note("keep the domain shut off until the template is built")
    if done.file is not None:
        settings.note(f"next: templated template build {done.template}")
