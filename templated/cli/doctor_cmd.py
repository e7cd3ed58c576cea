"""`doctor`: what this host can and cannot do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from templated.cli import exit_codes, render
from templated.cli.options import Settings, command

EXAMPLES = """
templated doctor
templated doctor -o json | jq '.[] | select(.status != "PASS")'
"""


@command("doctor", examples=EXAMPLES)
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Check for a daemon with this configuration. Default: where serve looks for it.",
)
@click.pass_obj
@click.pass_context
def doctor(context: click.Context, settings: Settings, config: Path | None) -> None:
    """Check what this host can and cannot do.

    Each check is PASS, WARN or FAIL, each problem with what to do about it. Needs no
    daemon. The exit code is 1 when a check failed.
    """
    from templated.drivers.configfile import load_config
    from templated.services.doctor import run_checks

    checks = [
        {key: str(getattr(check, key)) for key in ("name", "status", "detail", "fix")}
        for check in run_checks(load_config(config))
    ]
    if settings.table:
        _print(checks, settings)
    else:
        render.dump(checks, settings)
    failed = any(check["status"] == "FAIL" for check in checks)
    context.exit(exit_codes.FAILED if failed else exit_codes.OK)


def _print(checks: list[dict[str, Any]], settings: Settings) -> None:
    width = max((len(check["name"]) for check in checks), default=0)
    for check in checks:
        status = check["status"]
        if settings.quiet and status == "PASS":
            continue
        detail = render.printable(check["detail"])
        click.echo(f"{render.state(status)}  {check['name']:{width}}  {detail}")
        if check["fix"] and status != "PASS":
            click.echo(f"{'':{width + 8}}fix: {render.printable(check['fix'])}")
    sys.stdout.flush()
    counts = {s: sum(c["status"] == s for c in checks) for s in ("PASS", "WARN", "FAIL")}
    settings.note(", ".join(f"{count} {status}" for status, count in counts.items()))
