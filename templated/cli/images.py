"""`image build | ls | rm`: disk layer 1, made on this host and without the daemon."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from templated.cli import render
from templated.cli.options import Group, Settings

if TYPE_CHECKING:
    from templated.model.config import Config

EXAMPLES = """
templated image build python-fn
templated image ls
systemctl start templated-image@python-fn
"""

_config = click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The daemon's configuration. Default: where serve looks for it.",
)


@click.group("image", cls=Group, examples=EXAMPLES)
def image() -> None:
    """Make the images that templates boot from.

    `template build` makes a missing image by itself. Under systemd the daemon has not the rights
    for that; then this command does it, as the unit templated-image@NAME or by hand as root.
    """


def _load(config: Path | None) -> Config:
    from templated.drivers.configfile import load_config

    return load_config(config)


@image.command("build", examples=EXAMPLES)
@click.argument("name")
@_config
@click.pass_obj
def build(settings: Settings, name: str, config: Path | None) -> None:
    """Make the image of the template NAME, unless it is there."""
    import asyncio

    from templated.drivers.configfile import load_template
    from templated.drivers.image.store import ImageStore

    loaded = _load(config)
    spec = load_template(loaded.template_dirs, name)
    store = ImageStore(Path(loaded.state_dir))
    made = asyncio.run(store.ensure(spec.image, on_progress=settings.note))
    render.dump_item({"digest": made.digest, "disk": str(made.disk)}, settings)


@image.command("ls", examples=EXAMPLES)
@_config
@click.pass_obj
def ls(settings: Settings, config: Path | None) -> None:
    """List the images on this host."""
    from templated.drivers.image.store import ImageStore

    images = [
        {
            "digest": found.digest,
            "built": datetime.fromtimestamp(found.built_at, UTC).isoformat(timespec="seconds"),
            "mib": found.disk.stat().st_blocks * 512 >> 20,
        }
        for found in ImageStore(Path(_load(config).state_dir)).list()
    ]
    if settings.table:
        render.table(["DIGEST", "BUILT", "MIB"], [list(row.values()) for row in images])
        sys.stdout.flush()
    else:
        render.dump(images, settings)
