"""`templated bench profile`: the code that a clone translates, step by step.

Under TCG the first run of any code is slow, because it is translated then. So the number of
translated blocks and the size of their code show what a step costs, however busy the host is
at the time; milliseconds do not. QMP: `x-query-jit`.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from templated.bench.agents import invoke, load
from templated.bench.bare import Bare, Line
from templated.bench.floor import floor
from templated.bench.functions import HANDLER, PAYLOAD, Functions
from templated.bench.session import Session
from templated.bench.stats import medians
from templated.cli.options import Command, Settings
from templated.cli.render import dump_item
from templated.drivers.guest import Step
from templated.errors import HypervisorError, InvalidRequest
from templated.model.api import Info
from templated.services.machines.generation import Generation
from templated.services.machines.start import REHEARSALS, REHEARSED, REST

_EXAMPLES = """
templated bench profile
templated bench profile -n 10 -o json
"""
_COUNTERS = re.compile(r"gen code size\s+(\d+).*?TB count\s+(\d+)", re.DOTALL)
_IDLE_SECONDS, _PAUSE_SECONDS = 3.0, 1.0
Row = dict[str, float]


@click.command("profile", cls=Command, examples=_EXAMPLES)
@click.option(
    "-n", "count", type=click.IntRange(1, 100), default=5, show_default=True, help="Starts."
)
@click.option("--template", metavar="T", default=None, help="Default: the only one built.")
@click.pass_obj
def profile(settings: Settings, count: int, template: str | None) -> None:
    """Count what a clone translates: at identify, at ping, when idle, at a warm one's claim, and
    at a function's first requests where the template has `code: true`.

    Runs the floor's loop, so it needs no clone, but the template's files: run it as the daemon's
    user. It shows nothing under KVM, which translates nothing.
    """
    session = Session(settings.client(), template, lambda text: None)
    generation = session.generation()
    if generation.manifest.accel != "tcg":
        name, accel = generation.manifest.template, generation.manifest.accel
        raise InvalidRequest(f"{name} runs under {accel}, not TCG", hint="nothing is translated")
    with contextlib.ExitStack() as stack:
        code = None
        if generation.code is not None:
            code = stack.enter_context(Functions(session)).code()
        report = measure(generation, session.info(), count, code)
    if settings.table:
        _print(report)
    else:
        dump_item(report, settings)


def measure(
    generation: Generation, daemon: Info, count: int, code: Path | None = None
) -> dict[str, Any]:
    """Medians over `count` starts: blocks, megabytes of code and milliseconds that a step adds.

    With `code`, an image of the bench's function, also the steps of its first requests."""
    steps: dict[str, list[Row]] = {}

    def note(step: str, row: Row) -> None:
        steps.setdefault(step, []).append(row)

    with floor(generation, daemon) as bare:
        for _ in range(count):
            for kind in (_direct, _claim, _claim_unrehearsed):
                bare.once(lambda vm, kind=kind: kind(vm, _Meter(vm, note)))  # type: ignore[misc]
    if code is not None:
        with floor(replace(generation, placeholder=code), daemon) as bare:
            for _ in range(count):
                bare.once(lambda vm: _function(vm, code, _Meter(vm, note)))
        with floor(generation, daemon) as bare:
            for _ in range(count):
                bare.once(lambda vm: _warm_function(vm, code, _Meter(vm, note)))
    rows = {step: medians(samples) for step, samples in steps.items()}
    return {"template": generation.manifest.template, "n": count, "steps": rows}


class _Meter:
    """Notes what each step of one VM adds."""

    def __init__(self, vm: Bare, note: Callable[[str, Row], None]) -> None:
        self._qmp, self._note = vm.qmp, note

    def __call__(self, name: str, work: Callable[[], object]) -> None:
        blocks, megabytes = _counters(self._qmp)
        begin = time.perf_counter()
        work()
        milliseconds = (time.perf_counter() - begin) * 1000
        now, size = _counters(self._qmp)
        self._note(name, {"blocks": now - blocks, "mb": size - megabytes, "ms": milliseconds})

    def part(self, name: str, milliseconds: float) -> None:
        """Note what the guest itself has timed of a step, and counted no blocks of."""
        self._note(name, {"blocks": 0, "mb": 0, "ms": milliseconds})


def _direct(vm: Bare, step: _Meter) -> None:
    """The steps of a direct clone."""
    step("identify", vm.identify)
    step("identify again", vm.identify)
    step("ping", lambda: vm.agent.ask({"cmd": "ping"}))
    step(f"idle {_IDLE_SECONDS:g} s", lambda: time.sleep(_IDLE_SECONDS))


def _claim(vm: Bare, step: _Meter) -> None:
    """The work of a warm member before it is paused, and then that of its claim."""
    vm.identify()
    step("rehearsal", lambda: _rehearse(vm))
    step(f"rest {REST:g} s", lambda: time.sleep(REST))
    _paused(vm)
    step("claim", lambda: _wake(vm))


def _claim_unrehearsed(vm: Bare, step: _Meter) -> None:
    vm.identify()
    _paused(vm)
    step("claim, not rehearsed", lambda: _wake(vm))


def _function(vm: Bare, code: Path, step: _Meter) -> None:
    """The first requests of a function on a direct clone."""
    vm.identify()
    step("function: load", lambda: load(vm, code, HANDLER))
    for number in ("first", "second", "third"):
        step(f"{number} request", lambda: invoke(vm, PAYLOAD))


def _warm_function(vm: Bare, code: Path, step: _Meter) -> None:
    """The first requests of a function on a warm member."""
    vm.identify()
    step("warm: rehearsal", lambda: vm.agent.ask({"cmd": "rehearse"}))
    _rehearse(vm)
    time.sleep(REST)
    _paused(vm)
    step("warm: exchange", lambda: vm.exchange_code(code))
    step("warm: claim", lambda: _wake(vm))
    loaded: dict[str, float] = {}
    step("warm: load", lambda: loaded.update(load(vm, code, HANDLER)))
    for part in ("mount", "init"):
        step.part(f"warm: its {part}", loaded[f"{part}_ms"])
    for number in ("first", "second"):
        step(f"warm: {number} request", lambda: invoke(vm, PAYLOAD))


def _rehearse(vm: Bare) -> None:
    for name in REHEARSED * REHEARSALS:
        vm.identify(Step.REHEARSAL, name)


def _paused(vm: Bare) -> None:
    vm.qmp.command("stop")
    time.sleep(_PAUSE_SECONDS)


def _wake(vm: Bare) -> None:
    vm.qmp.command("cont")
    vm.identify(Step.CLAIM, "clone")


def _counters(qmp: Line) -> tuple[int, float]:
    """Translated blocks so far, and the megabytes of their code."""
    text = qmp.command("x-query-jit")["human-readable-text"]
    found = _COUNTERS.search(text)
    if found is None:
        raise HypervisorError("this QEMU's x-query-jit tells no counts", hint="use QEMU 7.2")
    return int(found[2]), int(found[1]) / 1e6


def _print(report: dict[str, Any]) -> None:
    click.echo(f"template {report['template']}, medians of {report['n']}; what each step adds")
    click.echo(f"{'step':22}{'blocks':>8}{'MB':>8}{'ms':>9}")
    for name, row in report["steps"].items():
        click.echo(f"{name:22}{row['blocks']:8.0f}{row['mb']:8.2f}{row['ms']:9.1f}")
