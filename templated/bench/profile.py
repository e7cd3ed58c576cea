"""`templated bench profile`: what a clone translates, step by step.

Under TCG the first run of any code is slow, because it is translated then. So the number of
translated blocks and the size of their code tell what a step costs, whatever else the host does
at the time; milliseconds do not. QMP: `x-query-jit`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import click

from templated.bench.bare import Bare, Line
from templated.bench.floor import floor
from templated.bench.session import Session
from templated.bench.stats import medians
from templated.cli.options import Command, Settings
from templated.cli.render import dump_item
from templated.errors import HypervisorError, InvalidRequest
from templated.services.generations import Generation

_EXAMPLES = """
templated bench profile
templated bench profile -n 10 -o json
"""
_COUNTERS = re.compile(r"gen code size\s+(\d+).*?TB count\s+(\d+)", re.DOTALL)
_IDLE_SECONDS = 3.0
Row = dict[str, float]


@click.command("profile", cls=Command, examples=_EXAMPLES)
@click.option(
    "-n", "count", type=click.IntRange(1, 100), default=5, show_default=True, help="Starts."
)
@click.option("--template", metavar="T", default=None, help="Default: the only one built.")
@click.pass_obj
def profile(settings: Settings, count: int, template: str | None) -> None:
    """Count what a clone translates: at identify, at one more, at ping, when idle.

    Runs the floor's loop, so it needs no clone, but the template's files: run it as the daemon's
    user. It tells nothing under KVM, which translates nothing.
    """
    generation = Session(settings.client(), template, lambda text: None).generation()
    if generation.manifest.accel != "tcg":
        name, accel = generation.manifest.template, generation.manifest.accel
        raise InvalidRequest(f"{name} runs under {accel}, not TCG", hint="nothing is translated")
    report = measure(generation, count)
    if settings.table:
        _print(report)
    else:
        dump_item(report, settings)


def measure(generation: Generation, count: int) -> dict[str, Any]:
    """Medians over `count` starts: blocks, megabytes of code and milliseconds that a step adds."""
    steps: dict[str, list[Row]] = {}
    with floor(generation) as bare:
        for _ in range(count):
            bare.once(lambda vm: _steps(vm, lambda s, row: steps.setdefault(s, []).append(row)))
    rows = {step: medians(samples) for step, samples in steps.items()}
    return {"template": generation.manifest.template, "n": count, "steps": rows}


def _steps(vm: Bare, note: Callable[[str, Row], None]) -> None:
    """The steps of one start, from the resume on."""
    blocks, megabytes = _counters(vm.qmp)

    def step(name: str, work: Callable[[], object]) -> None:
        nonlocal blocks, megabytes
        begin = time.perf_counter()
        work()
        milliseconds = (time.perf_counter() - begin) * 1000
        now, size = _counters(vm.qmp)
        note(name, {"blocks": now - blocks, "mb": size - megabytes, "ms": milliseconds})
        blocks, megabytes = now, size

    step("identify", vm.identify)
    step("identify again", vm.identify)
    step("ping", lambda: vm.agent.ask({"cmd": "ping"}))
    step(f"idle {_IDLE_SECONDS:g} s", lambda: time.sleep(_IDLE_SECONDS))


def _counters(qmp: Line) -> tuple[int, float]:
    """Translated blocks so far, and the megabytes of their code."""
    text = qmp.command("x-query-jit")["human-readable-text"]
    found = _COUNTERS.search(text)
    if found is None:
        raise HypervisorError("this QEMU's x-query-jit tells no counts", hint="use QEMU 7.2")
    return int(found[2]), int(found[1]) / 1e6


def _print(report: dict[str, Any]) -> None:
    click.echo(f"template {report['template']}, medians of {report['n']}; what each step adds")
    click.echo(f"{'step':16}{'blocks':>8}{'MB':>8}{'ms':>9}")
    for name, row in report["steps"].items():
        click.echo(f"{name:16}{row['blocks']:8.0f}{row['mb']:8.2f}{row['ms']:9.1f}")
