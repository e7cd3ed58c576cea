"""Instances of functions: each a VM with a version's code, which serves one request at a time.

An instance runs while it serves and for a moment after; then its vCPUs are stopped until the next
request, and when none comes for long, it is ended. It never outlives the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator

from templated.drivers.code import CodeFile
from templated.drivers.guest_functions import Answer, InitFailed, InvokeOrder, Loaded, LoadOrder
from templated.errors import (
    Conflict,
    GuestError,
    HypervisorError,
    InvalidRequest,
    NotFound,
    StartError,
    TemplatedError,
    Timeout,
)
from templated.model.clone import StartPath
from templated.model.function import InstanceState, Version, named
from templated.services.functions.environment import environment
from templated.services.functions.instance import (
    InitError,
    Instance,
    NotBegun,
    Timing,
    TooLong,
)
from templated.services.functions.parts import Call, Code, Guest, Launched, Launches
from templated.services.functions.payloads import failure
from templated.services.functions.printed import Printed, Prints
from templated.services.reports.events import EventBus
from templated.services.reports.function_metrics import FunctionMetrics
from templated.services.tasks import Tasks

log = logging.getLogger(__name__)
# A VM that needed longer to wake than this, in seconds, gets its clock set once more.
_LATE = 0.5
_CLOCK_TIMEOUT = 5.0
# How long the end of a VM whose connection broke may take to be known.
_EXIT_TIMEOUT = 1.0
# How long who needs the room of an instance waits for its end.
_REMOVAL_TIMEOUT = 10.0
_UP = (InstanceState.BUSY, InstanceState.IDLE, InstanceState.PAUSED)
_POOLED = (StartPath.WARM, StartPath.STANDBY)


class Instances:
    """All instances of one daemon: how each starts, serves, rests and ends."""

    def __init__(
        self,
        launches: Launches,
        code: Code,
        tasks: Tasks,
        events: EventBus,
        metrics: FunctionMetrics,
        logs: Prints,
        timing: Timing,
        region: str,
        memory: Callable[[str], int | None],
    ) -> None:
        """`memory` is that of a template's guests, in MiB; None when it is not known."""
        self._launches = launches
        self._code = code
        self._tasks = tasks
        self._events = events
        self._metrics = metrics
        self._logs = logs
        self._timing = timing
        self._region = region
        self._memory = memory
        self._all: dict[str, Instance] = {}
        self._closing = asyncio.Event()

    def __iter__(self) -> Iterator[Instance]:
        """All instances, also those that are ending."""
        return iter(list(self._all.values()))

    def up(self) -> int:
        """How many have come up and are not ending."""
        return sum(i.state in _UP for i in self._all.values())

    # --- starting ---------------------------------------------------------------------------

    async def start(
        self,
        version: Version,
        left: Callable[[Instance], None],
        may_end: Callable[[], bool] = lambda: True,
    ) -> Instance:
        """A new instance, whose handler is loaded; the caller gives it a request, or rests it.

        `left` is told when it begins to end; `may_end` is asked when it has rested for long.
        Raises StartError, what a fetch of the code raises, and InitError when the handler cannot
        be loaded. Leaves nothing then, once its clone is removed in the background.
        """
        name = self._name(version.function)
        instance = Instance(name=name, version=version, left=left, may_end=may_end)
        self._all[instance.name] = instance
        try:
            code = await self._launch(instance)
            instance.move(InstanceState.INITIALISING)
            await self._load(instance, code)
        except BaseException as error:
            self.end(instance, str(error) or type(error).__name__)
            raise
        return instance

    def _name(self, function: str) -> str:
        short = re.sub("[^a-z0-9-]", "", function.lower())[:40].strip("-") or "fn"
        while (name := f"{short}-{secrets.token_hex(4)}") in self._all:
            pass
        return name

    async def _launch(self, instance: Instance) -> CodeFile:
        """Bring up its clone, with the code attached."""
        version, begin = instance.version, time.perf_counter()
        label = named(version)
        try:
            code = await self._code.ensure(version.code.digest)
            fetched = time.perf_counter()
            running = await self._launches.start_instance(
                instance.name, version.settings.template, code, label
            )
        except (NotFound, Conflict, InvalidRequest) as error:
            # What the caller named is there: the template or the code is not.
            raise _start_error(instance, error, "start") from error
        swap = running.phases_ms.get("attach", 0.0)
        instance.phases_ms = {
            "start": max(_ms(time.perf_counter() - fetched) - swap, 0.0),
            "attach": _ms(fetched - begin) + swap,
        }
        self._launched(instance, running)
        return code

    def _launched(self, instance: Instance, running: Launched) -> None:
        instance.clone = running
        instance.guest, instance.machine = running.vm.agent, running.vm.machine
        instance.start = "pool" if running.path in _POOLED else "direct"
        instance.machine.exited.add_done_callback(lambda exited: self._exited(instance, exited))

    async def _load(self, instance: Instance, code: CodeFile) -> None:
        """Mount the code, and load the handler."""
        assert instance.guest is not None
        begin, printed = time.perf_counter(), Printed(self._logs, instance.version.function)
        order = LoadOrder(
            uuid=code.uuid,
            runtime=instance.version.settings.runtime,
            handler=instance.version.settings.handler,
            env=self._environment(instance),
            init_timeout=self._timing.init,
        )
        bound = self._timing.init + self._timing.grace
        try:
            with self._working(instance):
                instance.asked = True
                loaded = await instance.guest.load(order, bound, printed.take)
        except InitFailed as error:
            self._init_failed(instance, error.message)
            payload = error.payload or failure("Runtime.InitError", error.message)
            raise InitError(instance, payload, why=error.message) from error
        except Timeout as error:
            why = f"it took longer than {self._timing.init:g} s"
            self._init_failed(instance, why)
            raise InitError(instance, b"", self._timing.init, why) from error
        except GuestError as error:
            raise _start_error(instance, await self._explained(instance, error)) from error
        except NotBegun as error:
            raise _start_error(instance, _ended(instance, instance.gone)) from error
        finally:
            printed.end()
            instance.phases_ms["init"] = _ms(time.perf_counter() - begin)
        self._loaded(instance, loaded, time.perf_counter() - begin)

    def _environment(self, instance: Instance) -> dict[str, str]:
        version = instance.version
        memory = self._memory(version.settings.template)
        return environment(version, instance.name, self._region, memory)

    def _init_failed(self, instance: Instance, why: str) -> None:
        self._events.emit(
            "instance.init_failed",
            instance.version.function,
            version=instance.version.label,
            instance=instance.name,
            reason=why,
        )

    def _loaded(self, instance: Instance, loaded: Loaded, took: float) -> None:
        phases = instance.phases_ms
        swap = phases["attach"]
        phases["attach"] += max(_ms(took) - loaded.init_ms, loaded.mount_ms)
        phases["init"] = loaded.init_ms
        instance.marked = time.monotonic()
        self._metrics.code_attach_seconds.observe((phases["attach"] - swap) / 1000)

    # --- serving ----------------------------------------------------------------------------

    def take(self, instance: Instance) -> None:
        """Take an instance that rests, was just loaded, or has just served, for a request.

        It is the caller's then.
        """
        instance.unset_timer()
        if instance.state is InstanceState.BUSY:
            instance.move(InstanceState.IDLE)
        instance.move(InstanceState.BUSY)

    def rest(self, instance: Instance, *, paused: bool = False) -> None:
        """Let an instance wait: it runs on for a moment, is then paused, and at last ended.

        `paused`: at once, since no burst is expected to go on.
        """
        instance.move(InstanceState.IDLE)
        loop = asyncio.get_running_loop()
        instance.used = loop.time()
        freeze, keep = self._timing.freeze_after, self._timing.keep_alive
        if paused:
            self._freeze(instance)
        elif freeze < keep:
            instance.timer = loop.call_later(freeze, self._freeze, instance)
        else:
            instance.timer = loop.call_later(keep, self._expire, instance)

    async def serve(self, instance: Instance, call: Call, printed: Printed) -> Answer:
        """Give a request to an instance that was taken for it, and wait for the answer.

        Raises NotBegun when the guest never saw it, TooLong after its timeout, GuestError when
        the VM ended in the middle, HypervisorError or Timeout when it could not be woken; leaves
        the instance ending then. Otherwise it is still the caller's, unless its runtime has
        ended (`Answer.ended`).
        """
        try:
            with self._working(instance):
                answer = await self._ask(instance, call, printed)
        except (TooLong, NotBegun) as error:
            self._died(instance, str(error))
            raise
        except TemplatedError as error:
            explained = await self._explained(instance, error)
            self._died(instance, explained.message)
            raise explained from None
        except BaseException:
            self.end(instance, "its request was abandoned")
            raise
        if not answer.begun:
            self._died(instance, "its runtime had ended")
            raise NotBegun(instance.gone)
        instance.marked = time.monotonic()
        instance.served += 1
        if answer.ended:
            self._died(instance, f"its runtime ended: {answer.ended}")
        return answer

    async def _ask(self, instance: Instance, call: Call, printed: Printed) -> Answer:
        instance.asked = False
        if instance.pausing is not None:
            await instance.pausing.wait()
            instance.pausing = None
        guest, machine = instance.guest, instance.machine
        assert guest is not None and machine is not None
        _require_there(instance)
        instance.asked = True
        if not instance.stopped:
            return await _invoke(guest, call, None, printed)
        woken = time.time()
        asking = asyncio.create_task(_invoke(guest, call, woken - instance.lag, printed))
        try:
            await machine.resume()
            instance.stopped = False
            if time.time() - woken > _LATE:
                await _correct_clock(guest)
            return await asking
        finally:
            if not asking.done():
                asking.cancel()
                await asyncio.wait({asking})
            if not asking.cancelled():
                asking.exception()  # of two failures the other one is told

    @contextlib.contextmanager
    def _working(self, instance: Instance) -> Iterator[None]:
        """The current task talks to the guest: it is cancelled when the instance ends.

        Raises GuestError then, with the reason, or NotBegun when the guest was not asked yet.
        """
        task = asyncio.current_task()
        assert task is not None
        _require_there(instance)
        instance.work = task
        try:
            yield
        except asyncio.CancelledError:
            if not instance.gone:
                raise
            task.uncancel()
            if not instance.asked:
                raise NotBegun(instance.gone) from None
            raise _ended(instance, instance.gone) from None
        finally:
            instance.work = None

    async def _explained(self, instance: Instance, error: TemplatedError) -> TemplatedError:
        """The error, or that of the VM's end when that is what it comes from."""
        machine = instance.machine
        if instance.gone:
            return error if instance.gone in error.message else _ended(instance, instance.gone)
        if machine is None or not isinstance(error, GuestError | HypervisorError):
            return error
        if not machine.exited.done():
            await asyncio.wait({machine.exited}, timeout=_EXIT_TIMEOUT)
        if instance.state is InstanceState.ENDING:  # we remove its clone ourselves, meanwhile
            return _ended(instance, instance.gone)
        if machine.exited.done() and not machine.exited.cancelled():
            why = f"its VM {machine.exited.result()}"
            return _ended(instance, "its clone was removed" if instance.taken else why)
        return error

    # --- resting ----------------------------------------------------------------------------

    def pause(self, instance: Instance) -> None:
        """Pause one that rests, before its time; nothing for others."""
        if instance.state is InstanceState.IDLE:
            instance.unset_timer()
            self._freeze(instance)

    def _freeze(self, instance: Instance) -> None:
        instance.move(InstanceState.PAUSED)
        loop = asyncio.get_running_loop()
        instance.timer = loop.call_at(
            instance.used + self._timing.keep_alive, self._expire, instance
        )
        instance.pausing = asyncio.Event()
        self._tasks.spawn(self._pause(instance, instance.pausing), f"pause of {instance.name}")

    async def _pause(self, instance: Instance, done: asyncio.Event) -> None:
        assert instance.machine is not None
        try:
            await instance.machine.pause()
            # Until here its guest ran on, at most.
            instance.lag = time.monotonic() - instance.marked
            instance.stopped = True
        except TemplatedError as error:
            self._died(instance, f"it could not be paused: {error.message}")
        finally:
            done.set()

    def _expire(self, instance: Instance) -> None:
        if instance.may_end():
            self.end(instance, "no request came for long")
            return
        # It is wanted still; asked again, since that may change.
        if instance.state is InstanceState.IDLE:
            self._freeze(instance)
            instance.unset_timer()
        loop = asyncio.get_running_loop()
        instance.timer = loop.call_later(self._timing.keep_alive, self._expire, instance)

    # --- ending -----------------------------------------------------------------------------

    def _exited(self, instance: Instance, exited: asyncio.Future[str]) -> None:
        """Its VM ended: by itself, when nobody ends it."""
        if not exited.cancelled():
            self._died(instance, f"its VM {exited.result()}")

    def _died(self, instance: Instance, how: str) -> None:
        """End an instance that can serve no more, and tell it: nobody wanted it to end.

        Of one whose clone a user removes, clone.removed is told.
        """
        if instance.state is InstanceState.ENDING:
            return
        if instance.taken:
            self.end(instance, "its clone was removed")
            return
        self._events.emit(
            "instance.died",
            instance.version.function,
            version=instance.version.label,
            instance=instance.name,
            reason=how,
        )
        instance.died = True
        self.end(instance, how)

    def end(self, instance: Instance, why: str) -> None:
        """End an instance, and give back all that it had in the background. Idempotent.

        A request that it serves fails with a GuestError that says why.
        """
        if instance.state is InstanceState.ENDING:
            return
        instance.move(InstanceState.ENDING)
        instance.gone = why or "it was ended"
        instance.unset_timer()
        instance.left(instance)
        if instance.work is not None:
            instance.work.cancel()
        self._tasks.spawn(self._give_back(instance), f"removal of {instance.name}")

    async def _give_back(self, instance: Instance) -> None:
        try:
            for pause in (*self._timing.removal_pauses, None):
                # What a daemon that stops leaves is removed by the next one.
                try:
                    await self._launches.remove(instance.name)
                    return
                except NotFound:  # its start has left nothing
                    return
                except TemplatedError as error:
                    log.warning("cannot end instance %s: %s", instance.name, error.message)
                    if pause is None or self._closing.is_set():
                        return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._closing.wait()
        finally:
            self._all.pop(instance.name, None)
            instance.removed.set()

    async def ended(self, instance: Instance) -> None:
        """Wait until what an instance had was given back, or for some time. Raises nothing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REMOVAL_TIMEOUT):
                await instance.removed.wait()

    async def close(self) -> None:
        """End all instances, and wait until what they had was given back. Raises nothing."""
        self._closing.set()
        ending = list(self._all.values())
        for instance in ending:
            self.end(instance, "the daemon ends")
        for instance in ending:
            await instance.removed.wait()


async def _invoke(guest: Guest, call: Call, mark: float | None, printed: Printed) -> Answer:
    """`mark` is the wall clock at the guest's last mark; None: its clock is right."""
    order = InvokeOrder(
        request=call.request,
        arn=call.arn,
        deadline_ms=int((time.time() + call.timeout) * 1000),
        trace=call.trace,
        time=mark,
        payload=call.payload,
    )
    try:
        return await guest.invoke(order, call.timeout, printed.take)
    except Timeout:
        raise TooLong(f"a request took longer than {call.timeout:g} s") from None


async def _correct_clock(guest: Guest) -> None:
    """Set the clock of a guest that was told the time long before it ran."""
    sent = time.time()
    seen = await guest.adjust_clock(0.0, _CLOCK_TIMEOUT)
    await guest.adjust_clock((sent + time.time()) / 2 - seen, _CLOCK_TIMEOUT)


def _require_there(instance: Instance) -> None:
    """Raise NotBegun when the instance is ending, or its VM has ended."""
    if instance.gone:
        raise NotBegun(instance.gone)
    if instance.machine is not None and instance.machine.exited.done():
        raise NotBegun(f"its VM {instance.machine.exited.result()}")


def _ended(instance: Instance, why: str) -> GuestError:
    version = instance.version
    return GuestError(
        f"an instance of {named(version)} ended in the middle: {why}",
        hint=f"see: templated function logs {version.function}",
    )


def _start_error(instance: Instance, error: TemplatedError, phase: str = "attach") -> StartError:
    return StartError(
        f"instance {instance.name}: {error.message}",
        phase=phase,
        reason=error.code,
        hint=error.hint or f"see: templated function logs {instance.version.function}",
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
