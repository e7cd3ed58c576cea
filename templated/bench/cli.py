"""The commands of `templated bench`."""

from __future__ import annotations

import sys
from typing import Any

import click

from templated.bench.profile import profile
from templated.cli.options import Group, Settings
from templated.errors import InvalidRequest

_EXAMPLES = """
templated bench paths
templated bench paths -n 50 --cold 5 --memory 1GiB
templated bench paths --template python-fn -o json > figures.json
"""


@click.group(cls=Group, examples=_EXAMPLES)
def bench() -> None:
    """Measure this host: how long each path of a start takes, beside a floor."""


bench.add_command(profile)


@bench.command("paths", examples=_EXAMPLES)
@click.option(
    "-n",
    "count",
    type=click.IntRange(1, 1000),
    default=30,
    show_default=True,
    help="Starts per path.",
)
@click.option(
    "--cold",
    "cold",
    type=click.IntRange(0, 100),
    default=5,
    show_default=True,
    help="Cold boots to compare with.",
)
@click.option(
    "--cli",
    "cli",
    type=click.IntRange(0, 100),
    default=10,
    show_default=True,
    help="Whole `templated clone` processes to time.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    default=None,
    help="Also compare `restore` with a guest of this memory, as in 1GiB.",
)
@click.option("--template", metavar="T", default=None, help="Default: the only one built.")
@click.pass_obj
def paths(
    settings: Settings,
    count: int,
    cold: int,
    cli: int,
    memory: str | None,
    template: str | None,
) -> None:
    """Time cold boots, direct clones and the floor in turn, in one run.

    The floor is a bare loop that spawns QEMU with a clone's command line, restores the same
    state and asks the same agent to identify. It reads the template's files, so run this as
    the daemon's user. Leave the machine otherwise idle.
    """
    from templated.bench.paths import Bench

    client = settings.client()
    chosen = template or _only_template(client.get("templates"))

    def progress(text: str) -> None:
        if not settings.quiet and sys.stderr.isatty():
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)

    report = Bench(client, chosen, progress).paths(count, cold, cli, memory)
    progress("")
    if settings.table:
        _print(report)
    else:
        from templated.cli.render import dump_item

        dump_item(report, settings)


def _only_template(templates: list[dict[str, Any]]) -> str:
    built = [t["name"] for t in templates if t["active"]]
    if len(built) != 1:
        raise InvalidRequest(
            f"{len(built)} templates are built: {', '.join(built) or 'none'}",
            hint="choose one with --template, or build one: templated template build NAME",
        )
    return str(built[0])


def _print(report: dict[str, Any]) -> None:
    click.echo(f"template {report['template']}, milliseconds")
    click.echo(f"{'path':8}{'n':>5}{'p50':>10}{'p90':>10}{'p99':>10}   phases (p50)")
    for name, row in report["paths"].items():
        phases = "  ".join(f"{k} {v:g}" for k, v in row["phases_p50"].items())
        _row(name, row, phases)
    for name, ratio in report["ratios"].items():
        click.echo(f"{name.replace('_', ' ')}: {ratio:g}")
    if "cli" in report:
        cli = report["cli"]
        click.echo(f"command line adds: p50 {cli['p50']:g}, p99 {cli['p99']:g} (n = {cli['n']})")
    if "memory" in report:
        for size, row in report["memory"]["restore"].items():
            _row(size, row, "restore only")
        click.echo(f"restore ratio: {report['memory']['ratio']:g}")


def _row(name: str, row: dict[str, Any], note: str) -> None:
    figures = "".join(f"{row[key]:10.1f}" for key in ("p50", "p90", "p99"))
    click.echo(f"{name:8}{row['n']:5d}{figures}   {note}")
