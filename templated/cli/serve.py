"""`serve`: the daemon, in the foreground."""

from __future__ import annotations

from pathlib import Path

import click

from templated.cli.options import command

EXAMPLES = """
templated serve
templated serve --config ./templated.yaml --verbose
systemctl start templated
"""


@command("serve", examples=EXAMPLES)
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Default: /etc/templated/templated.yaml; without root ~/.config/templated/templated.yaml.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log each command that QEMU is given, too.")
def serve(config: Path | None, verbose: bool) -> None:
    """Run the daemon in the foreground, as the systemd unit does.

    The VMs outlive it: after a restart it finds them again. SIGTERM and Ctrl-C end it.
    """
    from templated.api.process import run

    run(config, verbose=verbose)
