"""`forwarder run`: the process of one forwarder of an egress, which the daemon starts."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from templated.cli.options import Group

EXAMPLES = """
templated forwarder run /run/templated/egress/acme-1
systemctl status 'templated-forwarder@*'
"""


@click.group("forwarder", cls=Group, examples=EXAMPLES, hidden=True)
def forwarder() -> None:
    """What forwards and translates for an egress, in namespaces of its own."""


@forwarder.command("run", examples=EXAMPLES)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def run(directory: Path) -> None:
    """Run the forwarder that DIRECTORY describes, as the unit and the daemon do.

    It goes on when the daemon ends. SIGTERM ends it, and takes away what it made.
    """
    import logging

    from templated.drivers.egress.program import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    sys.exit(serve(directory))
