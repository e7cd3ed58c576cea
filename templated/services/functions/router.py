"""Routes requests to instances of functions.

A request gets the instance of its version that was used last. When none is free, a new one is
started for it by the fastest way, and the request is served by whichever comes first: the new one,
or one that comes free before. What nobody waits for any more rests until the next request.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import Raw

from templated.errors import Busy, GuestError, NotFound, StartError, TemplatedError, Throttled
from templated.model.function import LATEST, InvokeView, Version
from templated.services.functions.bounds import Bounds
from templated.services.functions.crew import Crew, Waiter
from templated.services.functions.instance import InitError, Instance, NotBegun, TooLong
from templated.services.functions.instances import Instances
from templated.services.functions.parts import Call, Versions
from templated.services.functions.payloads import (
    answered,
    checked,
    exited,
    timed_out,
    timeout_line,
)
from templated.services.functions.printed import Printed, Prints
from templated.services.reports.function_metrics import FunctionMetrics

log = logging.getLogger(__name__)
# How often a request is given another instance when one ended before it had begun.
_TRIES = 3


@dataclass(frozen=True)
class Outcome:
    """What an invocation gave: the answer, and the last 4 KiB of the function's log."""

    view: InvokeView
    log: bytes


@dataclass(eq=False, kw_only=True)
class _Request:
    """One request on its way."""

    call: Call
    printed: Printed
    arrived: float
    phases_ms: dict[str, float] = field(default_factory=dict)
    start: str = "warm"
    begun: bool = False
    """Its log has begun."""

    def routed(self, instance: Instance) -> None:
        """It has this instance, or would have it if its handler could be loaded."""
        phases = {} if instance.initialised else instance.phases_ms
        self.start = "warm" if instance.initialised else instance.start
        route = max(_ms_since(self.arrived) - sum(phases.values()), 0.0)
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


class Router:
    """All requests of one daemon."""

    def __init__(
        self,
        versions: Versions,
        instances: Instances,
        bounds: Bounds,
        metrics: FunctionMetrics,
        logs: Prints,
        *,
        arns: str = "arn:aws:lambda:us-east-1:000000000000:function",
    ) -> None:
        self._versions = versions
        self._instances = instances
        self._bounds = bounds
        self._metrics = metrics
        self._logs = logs
        self._arns = arns
        self._crews: dict[tuple[str, int], Crew] = {}
        self._retired: set[Crew] = set()
        self._requests: set[asyncio.Task[Outcome]] = set()
        self._starts: set[asyncio.Task[None]] = set()
        self._closing = False
        metrics.count(self._count_instances, self._count_requests)

    # --- requests ---------------------------------------------------------------------------

    async def invoke(
        self,
        name: str,
        qualifier: str | None,
        payload: bytes,
        *,
        trace: str = "",
        request: str | None = None,
    ) -> Outcome:
        """Run one request; a function that fails is an outcome, too.

        A caller that goes away gives up its turn while it waits for one; after that the request
        goes on to its end. Raises InvalidRequest, NotFound, Throttled before anything was begun;
        StartError, HostError and what else keeps an instance from starting; GuestError or
        HypervisorError when the instance ended in the middle. Leaves no instance busy.
        """
        arrived = time.perf_counter()
        payload = await checked(payload)
        shared = await self._enter(name)
        try:
            # Only now: it may have waited, and the version is of the moment at which it begins.
            crew = self._crew(self._versions.resolve(name, qualifier))
        except BaseException:
            self._bounds.leave(name, shared=shared)
            raise
        call = Call(
            request=request or str(uuid.uuid4()),
            arn=f"{self._arns}:{name}:{qualifier}" if qualifier else f"{self._arns}:{name}",
            trace=trace,
            payload=payload,
            timeout=crew.timeout,
        )
        entered = _Request(call=call, printed=Printed(self._logs, name), arrived=arrived)
        # From here on it goes on without its caller, too.
        crew.running += 1
        task = asyncio.create_task(self._let_in(crew, entered, shared=shared))
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        return await asyncio.shield(task)

    async def _enter(self, name: str) -> bool:
        """Whether a request that is let in has a part of what is shared."""
        if self._closing:
            raise _closing()
        try:
            shared = self._bounds.enter(name)
            if shared is None:
                await self._bounds.wait(name)
        except Throttled as error:
            self._metrics.throttles.labels(name, error.reason).inc()
            raise
        return shared is not False

    async def _let_in(self, crew: Crew, request: _Request, *, shared: bool) -> Outcome:
        try:
            return await self._run(crew, request)
        except TemplatedError as error:
            crew.metrics.failed()
            request.printed.end()
            request.printed.line(f"RequestId: {request.call.request} Error: {error.message}")
            raise
        finally:
            crew.running -= 1
            self._forget(crew)
            self._bounds.leave(crew.version.function, shared=shared)

    async def _run(self, crew: Crew, request: _Request) -> Outcome:
        why = ""
        for _ in range(_TRIES):
            try:
                instance = self._taken(crew) or await self._awaited(crew)
                request.routed(instance)
                return await self._serve(crew, instance, request)
            except NotBegun as error:
                why = str(error)
            except InitError as error:
                return self._not_initialised(crew, error, request)
        raise GuestError(
            f"no instance of {_named(crew.version)} stays up: {why}",
            hint=f"see: templated function logs {crew.version.function}",
        )

    async def _serve(self, crew: Crew, instance: Instance, request: _Request) -> Outcome:
        call, printed = request.call, request.printed
        if not request.begun:
            printed.line(f"START RequestId: {call.request} Version: {crew.version.label}")
            request.begun = True
        begin = time.perf_counter()
        try:
            answer = await self._instances.serve(instance, call, printed)
        except TooLong:
            request.phases_ms["run"] = _ms_since(begin)
            request.report()
            printed.line(timeout_line(call.request, call.timeout))
            payload = timed_out(call.request, call.timeout)
            return self._outcome(crew, instance, request, "timeout", payload)
        if not instance.gone:
            self._offer(crew, instance)
        request.phases_ms["run"] = _ms_since(begin)
        payload, failed = await answered(answer.payload)
        if answer.ended and not answer.payload:
            failed = exited(call.request, answer.ended)
        error = "Unhandled" if failed else answer.error
        request.report()
        outcome = "error" if error else "ok"
        return self._outcome(crew, instance, request, outcome, failed or payload, error)

    def _not_initialised(self, crew: Crew, error: InitError, request: _Request) -> Outcome:
        """The outcome of a request whose instance could not load the handler."""
        call, instance = request.call, error.instance
        request.routed(instance)
        request.report()
        payload = error.payload
        if error.timed_out:
            payload = timed_out(call.request, error.timeout)
            request.printed.line(timeout_line(call.request, error.timeout))
        outcome = "timeout" if error.timed_out else "error"
        return self._outcome(crew, instance, request, outcome, payload)

    def _outcome(
        self,
        crew: Crew,
        instance: Instance,
        request: _Request,
        outcome: str,
        payload: bytes,
        error: str | None = "Unhandled",
    ) -> Outcome:
        total = _ms_since(request.arrived)
        phases = {phase: round(ms, 3) for phase, ms in request.phases_ms.items()}
        crew.metrics.answered(outcome, request.start, phases, total)
        view = InvokeView(
            status=200,
            error=error,
            payload=Raw(payload),
            version=crew.version.label,
            instance=instance.name,
            start=request.start,
            phases_ms=phases,
            total_ms=round(total, 3),
        )
        return Outcome(view, request.printed.last)

    # --- instances --------------------------------------------------------------------------

    def _crew(self, version: Version) -> Crew:
        """The crew of a version as it is now; that of an earlier `$LATEST` retires."""
        key = version.function, version.number
        crew = self._crews.get(key)
        if crew is not None and (crew.version is version or crew.version == version):
            return crew
        if crew is not None:
            self._retire(crew)
        crew = self._crews[key] = Crew(version, self._metrics.expect(version))
        return crew

    def _taken(self, crew: Crew) -> Instance | None:
        """An instance that rests, the one that was used last."""
        while crew.resting:
            instance = crew.resting.pop()
            if instance.up:
                self._instances.take(instance)
                return instance
        return None

    async def _awaited(self, crew: Crew) -> Instance:
        """The instance that comes free first, or the new one that is started if need be."""
        if self._closing:
            raise _closing()
        waiter: Waiter = asyncio.get_running_loop().create_future()
        crew.waiting.append(waiter)
        if crew.starting < len(crew.waiting):
            self._begin(crew)
        return await waiter

    def _offer(self, crew: Crew, instance: Instance) -> None:
        """An instance is free: for who waits longest, or to rest."""
        waiter = crew.waiter()
        if waiter is not None:
            self._instances.take(instance)
            waiter.set_result(instance)
        elif crew.retired or self._closing:
            self._instances.end(instance, f"{_named(crew.version)} is no longer served by it")
        else:
            self._instances.rest(instance)
            crew.resting.append(instance)

    def _begin(self, crew: Crew) -> None:
        """Start an instance, for the request that waits last."""
        if self._instances.up() + len(self._starts) >= self._bounds.concurrency:
            self._evict()
        crew.starting += 1
        crew.metrics.cold_starts.inc()
        task = asyncio.create_task(self._start(crew), name=f"instance of {_named(crew.version)}")
        self._starts.add(task)
        task.add_done_callback(self._starts.discard)

    async def _start(self, crew: Crew) -> None:
        try:
            outcome = await self._started(crew)
            if _crowded(outcome) and (victim := self._evict()):
                await victim.removed.wait()
                outcome = await self._started(crew)
        finally:
            crew.starting -= 1
            self._forget(crew)
        if isinstance(outcome, Instance):
            self._offer(crew, outcome)
        elif len(crew.waiting) > crew.starting and (waiter := crew.waiter()):
            waiter.set_exception(outcome)
        else:  # who waited was served by another one
            log.warning("no new instance of %s: %s", _named(crew.version), outcome)

    async def _started(self, crew: Crew) -> Instance | BaseException:
        def left(instance: Instance) -> None:
            if instance in crew.resting:
                crew.resting.remove(instance)

        work = self._instances.start(crew.version, left)
        (outcome,) = await asyncio.gather(work, return_exceptions=True)
        if isinstance(outcome, Instance) and outcome.gone:
            return NotBegun(outcome.gone)
        return outcome

    def _evict(self) -> Instance | None:
        """End the instance that has rested longest, of whichever function, to make room."""
        oldest = [crew.resting[0] for crew in self._crews.values() if crew.resting]
        if not oldest:
            return None
        victim = min(oldest, key=lambda instance: instance.used)
        self._instances.end(victim, "another function needs the room")
        return victim

    # --- what changes -----------------------------------------------------------------------

    def changed(self, version: Version) -> None:
        """A version is new, or `$LATEST` is another one from now on (`Registry.on_changed`)."""
        self._metrics.expect(version)
        crew = self._crews.get((version.function, version.number))
        if crew is not None and crew.version != version:
            del self._crews[version.function, version.number]
            self._retire(crew)

    async def removed(self, function: str, number: int | None) -> None:
        """A version is gone, or with None all of a function (`Registry.on_removed`).

        Requests that run go on to their end, those that wait for an instance fail. Raises
        nothing; returns when the instances that rested have ended.
        """
        gone = [
            crew
            for key, crew in self._crews.items()
            if key[0] == function and number in (None, key[1])
        ]
        ending: list[Instance] = []
        for crew in gone:
            del self._crews[function, crew.version.number]
            ending += crew.resting
            self._retire(crew)
            while waiter := crew.waiter():
                waiter.set_exception(_removed(crew.version))
        self._metrics.forget(function, None if number is None else str(number or LATEST))
        for instance in ending:
            await instance.removed.wait()

    def _retire(self, crew: Crew) -> None:
        crew.retired = True
        self._retired.add(crew)
        for instance in list(crew.resting):
            self._instances.end(instance, f"{_named(crew.version)} has changed, or is gone")
        self._forget(crew)

    def _forget(self, crew: Crew) -> None:
        if crew.retired and crew.idle:
            self._retired.discard(crew)

    async def close(self) -> None:
        """End all instances, and let no request in; those under way fail. Raises nothing."""
        self._closing = True
        self._bounds.close(_closing())
        for crew in (*self._crews.values(), *self._retired):
            while waiter := crew.waiter():
                waiter.set_exception(_closing())
        starts = set(self._starts)
        for start in starts:
            start.cancel()
        if starts:
            await asyncio.wait(starts)
        await self._instances.close()
        if self._requests:
            await asyncio.wait(set(self._requests))

    # --- showing ----------------------------------------------------------------------------

    def counts(self, name: str) -> Mapping[str, int]:
        """How many instances a function has, by the value of their state."""
        return Counter(i.state.value for i in self._instances if i.version.function == name)

    def _count_instances(self) -> Mapping[tuple[str, ...], int]:
        found: Counter[tuple[str, ...]] = Counter()
        for instance in self._instances:
            version = instance.version
            found[version.function, version.label, instance.state.value] += 1
        return found

    def _count_requests(self) -> Mapping[tuple[str, ...], int]:
        found: Counter[tuple[str, ...]] = Counter()
        for crew in (*self._crews.values(), *self._retired):
            found[crew.version.function, crew.version.label] += crew.running
        return found


def _named(version: Version) -> str:
    return f"{version.function}:{version.label}"


def _crowded(outcome: object) -> bool:
    """Whether a start failed because the host, or a limit, has no room for another VM."""
    if isinstance(outcome, StartError):
        return outcome.reason == Busy.code
    return isinstance(outcome, Busy)


def _removed(version: Version) -> NotFound:
    return NotFound(
        f"{_named(version)} was removed while the request waited", hint="see: templated function ls"
    )


def _closing() -> Busy:
    return Busy("the daemon is ending", hint="try again in a moment")


def _ms_since(begin: float) -> float:
    return (time.perf_counter() - begin) * 1000
