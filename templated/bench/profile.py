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

from templated.cli.options import Settings
from templated.errors import HypervisorError, InvalidRequest

_COUNTERS = re.compile(r"gen code size\s+(\d+).*?TB count\s+(\d+)", re.DOTALL)
_IDLE_SECONDS = 3.0
Row = dict[str, float]


@click.command("profile")
@click.option("-n", "count", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option("--template", metavar="T", default=None, help="Default: the only one built.")
@click.pass_obj
def profile(settings: Settings, count: int, template: str | None) -> None:
    """Count what a clone translates: at identify, at one more, at ping, when idle.

    Runs the floor's loop, so it needs no clone, but the template's files: run it as the daemon's
    user. It tells nothing under KVM, which translates nothing.
    """
    from templated.bench.cli import _only_template
    from templated.bench.paths import Bench

    client = settings.client()
    chosen = template or _only_template(client.get("templates"))
    generation = Bench(client, chosen, lambda text: None).generation(chosen)
    if generation.manifest.accel != "tcg":
        raise InvalidRequest(f"{chosen} runs under {generation.manifest.accel}, not TCG")
    report = measure(generation, count)
    if settings.table:
        _print(report)
    else:
        from templated.cli.render import dump_item

        dump_item(report, settings)


def measure(generation: Any, count: int) -> dict[str, Any]:
    """Medians over `count` starts: blocks, megabytes of code and milliseconds that a step adds."""
    from templated.bench.floor import floor
    from templated.bench.stats import medians

    steps: dict[str, list[Row]] = {}

    def note(step: str, row: Row) -> None:
        steps.setdefault(step, []).append(row)

    with floor(generation, generation.manifest.qemu.path) as bare:
        for _ in range(count):
            bare.once(lambda qmp, agent, identity: _steps(qmp, agent, identity, note))
    rows = {step: medians(samples) for step, samples in steps.items()}
    return {"template": generation.manifest.template, "n": count, "steps": rows}


def _steps(
    qmp: Any, agent: Any, identity: Callable[[], dict[str, Any]], note: Callable[[str, Row], None]
) -> None:
    """The steps of one start, from the resume on."""
    blocks, megabytes = _counters(qmp)

    def step(name: str, work: Callable[[], None]) -> None:
        nonlocal blocks, megabytes
        begin = time.perf_counter()
        work()
        milliseconds = (time.perf_counter() - begin) * 1000
        now, size = _counters(qmp)
        note(name, {"blocks": now - blocks, "mb": size - megabytes, "ms": milliseconds})
        blocks, megabytes = now, size

    def ask(command: str, **arguments: Any) -> None:
        agent.send({"id": 1, "cmd": command, **arguments})
        if not (reply := agent.read()).get("ok"):
            raise HypervisorError(f"the guest refused to {command}: {reply.get('error')}")

    step("identify", lambda: ask("identify", **identity()))
    step("identify again", lambda: ask("identify", **identity()))
    step("ping", lambda: ask("ping"))
    step(f"idle {_IDLE_SECONDS:g} s", lambda: time.sleep(_IDLE_SECONDS))


def _counters(qmp: Any) -> tuple[int, float]:
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
