"""`info` and `version`."""

from __future__ import annotations

import click

from templated import __version__
from templated.cli import render
from templated.cli.options import Settings, command
from templated.client import requests

INFO_EXAMPLES = """
templated info
templated info -o json | jq -r .accel
"""


@command("info", examples=INFO_EXAMPLES)
@click.pass_obj
def info(settings: Settings) -> None:
    """Show the daemon: version, accelerator, QEMU, places."""
    body = settings.client().json(requests.info())
    if settings.table:
        render.fields((key.replace("_", " "), _shown(value)) for key, value in body.items())
    else:
        render.dump(body, settings)


def _shown(value: object) -> object:
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items() if one is not None)
    return value


VERSION_EXAMPLES = """
templated version
templated version -o json
"""


@command("version", examples=VERSION_EXAMPLES)
@click.pass_obj
def version(settings: Settings) -> None:
    """Print the version of this command.

    The daemon's is in `templated info`.
    """
    if settings.table:
        click.echo(f"templated {__version__}")
    else:
        render.dump({"version": __version__}, settings)
