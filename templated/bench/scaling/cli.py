"""The command `templated bench scaling`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from templated.cli.options import Command, Settings
from templated.errors import InvalidRequest

_EXAMPLES = """
templated bench scaling --trace azure2019-60apps.csv
templated bench scaling --trace azure2019-60apps.csv --cost --plot scaling.svg
templated bench scaling --trace invocations_per_function_md.anon.d01.csv --functions 200
templated bench scaling --cost -o json
AWS_ACCESS_KEY_ID=me AWS_SECRET_ACCESS_KEY=... AWS_DEFAULT_REGION=us-east-1 \\
    templated bench scaling --trace azure2019-60apps.csv --functions 10 --live 144 \\
    --gateway http://127.0.0.1:9178
"""


@click.command("scaling", cls=Command, examples=_EXAMPLES)
@click.option(
    "--trace",
    "trace_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    default=None,
    help="What to replay: a CSV with the header app,memory_mb,m0001,m0002,... (how many instances "
    "an application needs at once in each minute), or one of the Azure Functions trace of 2019 "
    "(HashOwner,HashApp,HashFunction,Trigger,1,2,...: invocations).",
)
@click.option(
    "--functions",
    metavar="N",
    type=click.IntRange(min=1),
    default=None,
    help="Only the first N of the trace. Default: all.",
)
@click.option(
    "--duration",
    metavar="SECONDS",
    type=click.FloatRange(0.001, 3600),
    default=1.0,
    show_default=True,
    help="How long an invocation takes, where the trace has invocations.",
)
@click.option(
    "--by-memory",
    is_flag=True,
    help="Count GiB-minutes, and decide by memory. Default: all instances count the same.",
)
@click.option(
    "--live",
    metavar="SPEED",
    type=click.FloatRange(0.1, 1000),
    default=None,
    help="Instead, replay a part of it on real VMs, so many minutes of the trace in one.",
)
@click.option(
    "--begin",
    metavar="MINUTE",
    type=click.IntRange(0, 100_000),
    default=0,
    show_default=True,
    help="Where that part begins.",
)
@click.option(
    "--minutes",
    metavar="N",
    type=click.IntRange(1, 100_000),
    default=None,
    help="How many minutes of the trace it has. Default: what goes by in ten minutes.",
)
@click.option(
    "--gateway",
    metavar="URL",
    default=None,
    help="Where requests go with --live: the daemon's gateway, by boto3, which needs a key of it.",
)
@click.option("--template", metavar="T", default=None, help="With --live. Default: the only one.")
@click.option("--cost", is_flag=True, help="Also measure the CPU that deciding takes.")
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    default=None,
    help="Write a picture too: an .svg or a .png. Needs matplotlib.",
)
@click.pass_obj
def scaling(
    settings: Settings,
    trace_file: Path | None,
    functions: int | None,
    duration: float,
    by_memory: bool,
    live: float | None,
    begin: int,
    minutes: int | None,
    gateway: str | None,
    template: str | None,
    cost: bool,
    plot: Path | None,
) -> None:
    """Replay a trace on a virtual clock: cold starts against memory held.

    The daemon's own scaling decides, over its whole range of prices, and others do over theirs:
    fixed keep-alive, Knative's algorithm, the hybrid histogram of "Serverless in the Wild", a
    clamp with a spare instance, and an oracle, which knows when to end what is idle but starts
    nothing ahead. What is kept for a minute is decided before it; what it needs beyond is a cold
    start; held are all that were kept and those. Our price is chosen on one half of the
    functions and shown for the other half, and for all.

    Starts nothing, and needs no daemon. A day of 60 applications takes one or two minutes.

    With --live the requests of a part of the trace go to functions on real VMs, through the
    gateway of the daemon that runs, and the daemon scales. What a minute needs comes at once and
    takes a quarter of it. The same requests go through a simulation with the daemon's settings:
    the report has the cold starts of both.
    """
    from templated.bench import plot as pictures
    from templated.bench.progress import ProgressLine
    from templated.bench.scaling.cost import measure_cost
    from templated.bench.scaling.live import Plan, replay_live
    from templated.bench.scaling.measure import measure
    from templated.bench.scaling.picture import draw
    from templated.bench.scaling.show import show
    from templated.bench.scaling.trace import read
    from templated.bench.session import session

    if trace_file is None and not cost:
        raise InvalidRequest("nothing to measure", hint="name a --trace, or ask for the --cost")
    if live is not None and (trace_file is None or gateway is None):
        raise InvalidRequest("--live needs a --trace and a --gateway", hint="see the examples")
    if plot is not None:
        pictures.check(plot)
        if live is not None and not cost:
            raise InvalidRequest("--live draws nothing", hint="leave out --plot")
    progress = ProgressLine(settings)
    report: dict[str, Any] = {"kind": "scaling"}
    try:
        if trace_file is not None:
            trace = read(trace_file, duration=duration, first=functions)
            if live is None:
                report |= measure(trace, by_memory, progress)
            else:
                plan = Plan(live, begin, minutes or math.ceil(10 * live), gateway or "")
                with session(settings.client(), template, progress) as opened:
                    report["live"] = replay_live(opened, trace, plan)
                    report["host"] = opened.host()
        if cost:
            report["cost"] = measure_cost(progress)
    finally:
        progress.end()
    if settings.table:
        show(report)
    else:
        from templated.cli.render import dump_item

        dump_item(report, settings)
    if plot is not None:
        draw(report, plot)
        settings.note(f"wrote {plot}")
