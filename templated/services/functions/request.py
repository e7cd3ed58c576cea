"""One request on its way through a function: its phases, its log, and what comes of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from msgspec import Raw

from templated.drivers.guest_functions import Answer
from templated.model.function import InvokeView
from templated.services.functions.crew import Crew
from templated.services.functions.instance import InitError, Instance
from templated.services.functions.parts import Call
from templated.services.functions.payloads import answered, exited, timed_out, timeout_line
from templated.services.functions.printed import Printed
from templated.services.functions.traces import Span


@dataclass(frozen=True)
class Outcome:
    """What an invocation gave: the answer, and the last 4 KiB of the function's log."""

    view: InvokeView
    log: bytes


@dataclass(eq=False, kw_only=True)
class Request:
    """One request on its way."""

    crew: Crew
    call: Call
    span: Span
    printed: Printed
    arrived: float
    """By `time.perf_counter`."""
    phases_ms: dict[str, float] = field(default_factory=dict)
    start: str = "warm"
    begun: bool = False
    """Its log has begun."""

    def routed(self, instance: Instance) -> None:
        """It has this instance, or would have it if its handler could be loaded."""
        phases = {} if instance.initialised else instance.phases_ms
        self.start = "warm" if instance.initialised else instance.start
        route = max(ms_since(self.arrived) - sum(phases.values()), 0.0)
        self.phases_ms = {"route": route, **phases}

    def report(self) -> None:
        """End its log, with the lines that Lambda has there."""
        request, phases = self.call.request, self.phases_ms
        self.printed.end()
        self.printed.line(f"END RequestId: {request}")
        report = f"REPORT RequestId: {request}\tDuration: {phases.get('run', 0.0):.2f} ms"
        if "init" in phases:
            report += f"\tInit Duration: {phases['init']:.2f} ms"
        self.printed.line(report)

    def begin(self) -> float:
        """Begin its log, once; returns the time."""
        if not self.begun:
            label = self.crew.version.label
            self.printed.line(f"START RequestId: {self.call.request} Version: {label}")
            self.begun = True
        return time.perf_counter()

    def failed(self, message: str) -> None:
        """It ended without the function's answer."""
        self.crew.metrics.failed()
        self.printed.end()
        self.printed.line(f"RequestId: {self.call.request} Error: {message}")

    async def answer(self, instance: Instance, answer: Answer) -> Outcome:
        """What comes of the function's answer."""
        payload, failed = await answered(answer.payload)
        if answer.ended and not answer.payload:
            failed = exited(self.call.request, answer.ended)
        error = "Unhandled" if failed else answer.error
        self.report()
        return self._outcome("error" if error else "ok", instance, failed or payload, error)

    def too_long(self, instance: Instance) -> Outcome:
        """What comes of a handler that has passed its timeout."""
        self.report()
        return self._timed_out(instance, self.call.timeout)

    def not_initialised(self, error: InitError) -> Outcome:
        """What comes of a handler that could not be loaded, for this request or shortly before."""
        if error.wait:
            self.start = error.instance.start
            self.phases_ms = {"route": ms_since(self.arrived)}
            self.printed.line(f"The init failed before; it is tried again in {error.wait:.1f} s")
        else:
            self.routed(error.instance)
        self.report()
        if error.timed_out:
            return self._timed_out(error.instance, error.timeout)
        return self._outcome("error", error.instance, error.payload)

    def _timed_out(self, instance: Instance, timeout: float) -> Outcome:
        self.printed.line(timeout_line(self.call.request, timeout))
        return self._outcome("timeout", instance, timed_out(self.call.request, timeout))

    def _outcome(
        self, outcome: str, instance: Instance, payload: bytes, error: str | None = "Unhandled"
    ) -> Outcome:
        total = ms_since(self.arrived)
        phases = {phase: round(ms, 3) for phase, ms in self.phases_ms.items()}
        self.crew.metrics.answered(outcome, self.start, phases, total)
        view = InvokeView(
            status=200,
            error=error,
            payload=Raw(payload),
            version=self.crew.version.label,
            instance=instance.name,
            start=self.start,
            phases_ms=phases,
            total_ms=round(total, 3),
            trace=self.span.root,
        )
        return Outcome(view, self.printed.last)


def ms_since(begin: float) -> float:
    """Milliseconds since a time of `time.perf_counter`."""
    return (time.perf_counter() - begin) * 1000
