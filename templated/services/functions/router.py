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

from templated.errors import GuestError, TemplatedError, Throttled
from templated.model.function import LATEST, Version, named
from templated.services.functions.bounds import Bounds
from templated.services.functions.crew import Tallies
from templated.services.functions.crews import Crews, closing
from templated.services.functions.instance import InitError, NotBegun, TooLong
from templated.services.functions.instances import Instances
from templated.services.functions.parts import Call, Versions, Watches
from templated.services.functions.payloads import checked
from templated.services.functions.printed import Printed, Prints
from templated.services.functions.request import Outcome, Request, ms_since
from templated.services.functions.traces import Traces
from templated.services.reports.function_metrics import FunctionMetrics

log = logging.getLogger(__name__)
# How often a request is given another instance when one ended before it had begun.
_TRIES = 3


class Router:
    """All requests of one daemon."""

    def __init__(
        self,
        versions: Versions,
        instances: Instances,
        crews: Crews,
        bounds: Bounds,
        metrics: FunctionMetrics,
        logs: Prints,
        *,
        arns: str = "arn:aws:lambda:us-east-1:000000000000:function",
    ) -> None:
        """`arns` is what the ARNs of functions begin with."""
        self._versions = versions
        self._instances = instances
        self._bounds = bounds
        self._metrics = metrics
        self._logs = logs
        self._arns = arns
        self._crews = crews
        self._requests: set[asyncio.Task[Outcome]] = set()
        self._closing = False
        self._traces = Traces()
        self.watchers: list[Watches] = []
        """Who is told of each request."""
        self.tallies: list[Tallies] = []
        """Who counts the requests of each version."""
        metrics.count(self._count_instances, self._count_requests)

    async def invoke(
        self,
        name: str,
        qualifier: str | None,
        payload: bytes,
        *,
        trace: str = "",
        request: str | None = None,
    ) -> Outcome:
        """Run one request; a function that fails is an outcome, too. `trace` is the header that
        came with it, whatever it is.

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
            crew = self._crews.of(self._versions.resolve(name, qualifier))
        except BaseException:
            self._bounds.leave(name, shared=shared)
            raise
        span = self._traces.begin(name, trace, arrived)
        call = Call(
            request=request or str(uuid.uuid4()),
            arn=f"{self._arns}:{name}:{qualifier}" if qualifier else f"{self._arns}:{name}",
            trace=span.header,
            payload=payload,
            timeout=crew.timeout,
        )
        printed = Printed(self._logs, name)
        entered = Request(crew=crew, call=call, span=span, printed=printed, arrived=arrived)
        for watcher in self.watchers:
            watcher.arrived(span)
        # From here on it goes on without its caller, too.
        crew.running += 1
        task = asyncio.create_task(self._let_in(entered, shared=shared))
        self._requests.add(task)
        task.add_done_callback(self._ended)
        for tally in self.tallies:
            tally.came(crew)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Outcome]) -> None:
        self._requests.discard(task)
        # Its caller may have gone, who else would be told.
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TemplatedError):
            log.error("a request failed", exc_info=error)

    async def _enter(self, name: str) -> bool:
        """Whether a request that is let in has a part of what is shared."""
        if self._closing:
            raise closing()
        try:
            shared = self._bounds.enter(name)
            if shared is None:
                shared = await self._bounds.wait(name)
        except Throttled as error:
            self._metrics.throttles.labels(name, error.reason).inc()
            raise
        return shared

    async def _let_in(self, request: Request, *, shared: bool) -> Outcome:
        crew = request.crew
        try:
            return await self._run(request)
        except TemplatedError as error:
            request.failed(error.message)
            raise
        finally:
            crew.running -= 1
            for tally in self.tallies:
                tally.went(crew)
            self._over(request)
            self._crews.done(crew)
            self._bounds.leave(crew.version.function, shared=shared)

    def _over(self, request: Request) -> None:
        self._traces.end(request.span)
        now = time.perf_counter()
        for watcher in self.watchers:
            watcher.ended(request.span, now)

    async def _run(self, request: Request) -> Outcome:
        why = ""
        for _ in range(_TRIES):
            try:
                return await self._serve(request)
            except NotBegun as error:
                why = str(error)
            except InitError as error:
                return request.not_initialised(error)
        version = request.crew.version
        raise GuestError(
            f"no instance of {named(version)} stays up: {why}",
            hint=f"see: templated function logs {version.function}",
        )

    async def _serve(self, request: Request) -> Outcome:
        crew = request.crew
        instance = await self._crews.get(crew)
        request.routed(instance)
        begin = request.begin()
        for watcher in self.watchers:
            watcher.began(request.span, begin)
        for tally in self.tallies:
            tally.began(crew)
        try:
            answer = await self._instances.serve(instance, request.call, request.printed)
        except TooLong:
            request.phases_ms["run"] = ms_since(begin)
            return request.too_long(instance)
        request.phases_ms["run"] = ms_since(begin)
        if not instance.gone:
            self._crews.offer(crew, instance)
        return await request.answer(instance, answer)

    # --- what changes -----------------------------------------------------------------------

    def changed(self, version: Version) -> None:
        """A version is new, or `$LATEST` is another one from now on (`Registry.on_changed`)."""
        self._metrics.expect(version)
        self._crews.changed(version)

    async def removed(self, function: str, number: int | None) -> None:
        """A version is gone, or with None all of a function (`Registry.on_removed`).

        Requests that run go on to their end, those that wait for an instance fail. Raises
        nothing; returns when the instances that rested have ended.
        """
        ending = self._crews.removed(function, number)
        self._metrics.forget(function, None if number is None else str(number or LATEST))
        for instance in ending:
            await self._instances.ended(instance)

    async def close(self) -> None:
        """End all instances, and let no request in; those under way fail. Raises nothing."""
        self._closing = True
        self._bounds.close(closing())
        await self._crews.close()
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
        for crew in self._crews:
            found[crew.version.function, crew.version.label] += crew.running
        return found
