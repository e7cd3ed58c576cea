"""`image build | ls`: the images that templates boot from; built here, without the daemon."""

from __future__ import annotations

from pathlib import Path

import click

from templated.cli import render
from templated.cli.options import Group, Settings
from templated.client import requests

EXAMPLES = """
templated image build python-fn
templated image ls
systemctl start templated-image@python-fn
"""


@click.group("image", cls=Group, examples=EXAMPLES)
def image() -> None:
    """Make the images that templates boot from.

    `template build` makes a missing image by itself. Under systemd the daemon has not the rights
    for that; then this command does it, as the unit templated-image@NAME or by hand as root.
    """


BUILD_EXAMPLES = """
templated image build python-fn
systemctl start templated-image@python-fn
"""


@image.command("build", examples=BUILD_EXAMPLES)
@click.argument("name")
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The daemon's configuration. Default: where serve looks for it.",
)
@click.pass_obj
def build(settings: Settings, name: str, config: Path | None) -> None:
    """Make the image of the template NAME, unless it is there."""
    import asyncio

    from templated.drivers.configfile import load_config, load_template
    from templated.drivers.image.store import ImageStore

    loaded = load_config(config)
    spec = load_template(loaded.template_dirs, name)
    store = ImageStore(Path(loaded.state_dir))
    made = asyncio.run(store.ensure(spec.image, on_progress=settings.note))
    render.dump_item({"digest": made.digest, "disk": str(made.disk)}, settings)


LS_EXAMPLES = """
templated image ls
templated image ls -o json | jq -r '.[] | select(.templates == []) | .digest'
"""


@image.command("ls", examples=LS_EXAMPLES)
@click.pass_obj
def ls(settings: Settings) -> None:
    """List the daemon's images."""
    views = settings.client().json(requests.list_images())
    if settings.table and settings.quiet:
        for view in views:
            click.echo(view["digest"])
        return
    images = [
        {
            "digest": view["digest"],
            "built": view["built_at"],
            "mib": view["size"] >> 20,
            "suite": view["suite"],
            "packages": view["packages"],
            "path": view.get("path"),
            "templates": view["templates"],
        }
        for view in views
    ]
    if settings.table:
        columns = ("digest", "built", "mib")
        render.table(
            [name.upper() for name in columns],
            [[row[name] for name in columns] for row in images],
        )
    else:
        render.dump(images, settings)
