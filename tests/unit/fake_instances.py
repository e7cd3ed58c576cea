"""Functions without VMs: launches, machines and guests that are in memory, as tests want them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry

from templated.drivers.code import CodeFile
from templated.drivers.guest import Output
from templated.drivers.guest_functions import Answer, InvokeOrder, Loaded, LoadOrder
from templated.errors import NotFound, Timeout
from templated.model.clone import CloneState, StartPath
from templated.model.function import CodeView, Settings, Version
from templated.services.functions.backoff import Pace
from templated.services.functions.bounds import Bounds
from templated.services.functions.crews import Crews
from templated.services.functions.instance import Instance, Timing
from templated.services.functions.instances import Instances
from templated.services.functions.parts import Sink
from templated.services.functions.request import Outcome
from templated.services.functions.router import Router
from templated.services.functions.starts import Room
from templated.services.reports.events import EventBus
from templated.services.reports.function_metrics import FunctionMetrics
from templated.services.tasks import Tasks
from tests.unit.fake_daemon import run

T = TypeVar("T")
Handler = Callable[["FakeGuest", InvokeOrder], Awaitable[Answer]]
NEVER = 1000.0


def version(name: str = "f", number: int = 0, *, code: str = "a", timeout: str = "30s") -> Version:
    """A version whose code is one letter."""
    return Version(
        function=name,
        number=number,
        settings=Settings(handler="app.handler", template="t", timeout=timeout),
        code=CodeView(digest=code * 64, bytes=1),
        created="2026-01-01T00:00:00Z",
    )


class FakeVersions:
    """Functions, in place of the registry."""

    def __init__(self, *versions: Version) -> None:
        self.found = {(v.function, v.label): v for v in versions}
        self.numbers: dict[str, int | None] = {}
        self.most: dict[str, int] = {}
        self.least: dict[str, int] = {}

    def resolve(self, name: str, qualifier: str | None) -> Version:
        """The version of this label."""
        try:
            return self.found[name, qualifier or "$LATEST"]
        except KeyError:
            raise NotFound(f"there is no {name}:{qualifier}") from None

    def current(self, version: Version) -> bool:
        """Whether it is there."""
        return self.found.get((version.function, version.label)) == version

    def names(self) -> list[str]:
        """All functions."""
        return sorted({name for name, _ in self.found})

    def latest(self, name: str) -> Version:
        """`$LATEST`."""
        return self.found[name, "$LATEST"]

    def versions(self, name: str) -> list[Version]:
        """The numbered ones."""
        return [v for v in self.found.values() if v.function == name and v.number]

    def kept(self, version: Version) -> int:
        """As a test has set it."""
        return self.least.get(version.function, 0)

    def reserved(self, name: str) -> int | None:
        """As a test has set it."""
        if name not in self.names():
            raise NotFound(f"there is no function {name}")
        return self.numbers.get(name)

    def maximum(self, name: str) -> int | None:
        """As a test has set it."""
        return self.most.get(name)


class FakeMachine:
    """A VM that is nothing but its state; a test holds its steps up by `gates`."""

    def __init__(self) -> None:
        self.exited: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.running = True
        self.steps: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.fail: dict[str, Exception] = {}

    async def pause(self) -> None:
        """Stop."""
        await self._step("pause")
        assert self.running
        self.running = False

    async def resume(self) -> None:
        """Go on."""
        assert not self.running
        await self._step("resume")
        self.running = True

    async def _step(self, name: str) -> None:
        self.steps.append(name)
        if name in self.gates:
            await self.gates[name].wait()
        await asyncio.sleep(0)
        if name in self.fail:
            raise self.fail[name]

    def end(self, how: str = "was killed by SIGKILL") -> None:
        """It dies."""
        if not self.exited.done():
            self.exited.set_result(how)


async def echo(guest: FakeGuest, order: InvokeOrder) -> Answer:
    """Answers with what it was sent, a moment later."""
    await asyncio.sleep(0)
    return Answer(payload=order.payload, error=None, ended="")


class FakeGuest:
    """An agent: it serves one request at a time, and checks that."""

    def __init__(self, machine: FakeMachine, world: World) -> None:
        self.machine = machine
        self.world = world
        self.orders: list[InvokeOrder] = []
        self.loads: list[LoadOrder] = []
        self.busy = False
        self.shifts: list[float] = []

    async def load(self, order: LoadOrder, timeout: float, sink: Sink) -> Loaded:
        """Load, as the test says."""
        self.loads.append(order)
        sink(Output("stdout", b"loading\n"))
        await self._bounded(self.world.load(self, order), timeout)
        return Loaded(mount_ms=1.5, init_ms=0.0)

    async def invoke(self, order: InvokeOrder, timeout: float, sink: Sink) -> Answer:
        """Answer, as the test says; a VM that does not run answers when it does."""
        assert not self.busy, "two requests at once"
        self.busy = True
        try:
            self.orders.append(order)
            self.world.served[order.request] += 1
            while not self.machine.running:
                await asyncio.sleep(0)
            sink(Output("stdout", b"printed by " + order.payload + b"\n"))
            return await self._bounded(self.world.handler(self, order), timeout)
        finally:
            self.busy = False

    async def adjust_clock(self, seconds: float, timeout: float) -> float:
        """Note it."""
        self.shifts.append(seconds)
        return 0.0

    async def _bounded(self, work: Awaitable[T], timeout: float) -> T:
        try:
            async with asyncio.timeout(timeout):
                return await work
        except TimeoutError:
            raise Timeout("the guest did not answer") from None


class FakeVm:
    """A machine and its agent."""

    def __init__(self, world: World) -> None:
        self.machine = FakeMachine()
        self.agent = FakeGuest(self.machine, world)


@dataclass
class FakeClone:
    """A clone that runs."""

    name: str
    vm: FakeVm
    path: StartPath
    phases_ms: dict[str, float]
    function: str
    state: CloneState = CloneState.RUNNING


async def loaded(_: FakeGuest, __: LoadOrder) -> None:
    """A load that works."""


@dataclass
class World:
    """All fakes of one test, and the router over them."""

    versions: FakeVersions
    """Or a registry."""
    concurrency: int = 100
    queue: int = 1000
    freeze_after: float = NEVER
    keep_alive: float = NEVER * 10
    init: float = 5.0
    ahead: int = 4
    pace: float = NEVER
    """The wait after the first failure; a longer one later."""
    path: StartPath = StartPath.WARM
    handler: Handler = echo
    load: Callable[[FakeGuest, LoadOrder], Awaitable[None]] = loaded
    start: Callable[[str], Awaitable[None]] | None = None
    """What a start does before its clone is there."""
    remove_fails: list[Exception] = field(default_factory=list)
    clones: dict[str, FakeClone] = field(default_factory=dict)
    made: list[FakeClone] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    logged: dict[str, bytes] = field(default_factory=dict)
    ensured: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tasks = Tasks()
        self.events = EventBus()
        self.registry = CollectorRegistry()
        self.metrics = FunctionMetrics(self.registry)
        timing = Timing(
            init=self.init,
            freeze_after=self.freeze_after,
            keep_alive=self.keep_alive,
            grace=0.0,
            removal_pauses=(0.0, 0.0),
        )
        self.instances = Instances(
            *(self, self, self.tasks, self.events, self.metrics, self, timing, "us-east-1"),
            memory=lambda _: 512,
        )
        self.bounds = Bounds(self.versions, self.concurrency, self.queue)
        room = Room(
            most=self.concurrency,
            at_once=8,
            ahead=self.ahead,
            of_function=self.versions.maximum,
            pace=Pace(first=self.pace, longest=self.pace * 30, random=lambda: 1.0),
        )
        current = self.versions.current
        self.crews = Crews(self.instances, self.events, self.metrics, room, current)
        self.router = Router(
            *(self.versions, self.instances, self.crews, self.bounds, self.metrics, self)
        )

    # what the parts need

    async def ensure(self, digest: str) -> CodeFile:
        """The code is always there."""
        self.ensured.append(digest)
        return CodeFile(digest=digest, path=Path("/code"), uuid="u" * 32)

    async def start_instance(
        self, name: str, template: str, code: CodeFile, function: str
    ) -> FakeClone:
        """A clone, at once."""
        await asyncio.sleep(0)
        if self.start is not None:
            await self.start(name)
        clone = FakeClone(name, FakeVm(self), self.path, {"attach": 0.001}, function)
        self.clones[name] = clone
        self.made.append(clone)
        return clone

    async def remove(self, name: str) -> None:
        """End it."""
        await asyncio.sleep(0)
        if self.remove_fails:
            raise self.remove_fails.pop()
        if name not in self.clones:
            raise NotFound(f"there is no clone {name}")
        self.clones.pop(name).vm.machine.end("was ended")

    def append(self, function: str, data: bytes) -> None:
        """The log."""
        self.logged[function] = self.logged.get(function, b"") + data

    # what tests do

    async def ask(self, payload: object = None, name: str = "f", **options: Any) -> Outcome:
        """One request."""
        qualifier = options.pop("qualifier", None)
        return await self.router.invoke(name, qualifier, json.dumps(payload).encode(), **options)

    def asking(
        self, payload: object = None, name: str = "f", **options: Any
    ) -> asyncio.Task[Outcome]:
        """One request, beside the test."""
        return asyncio.create_task(self.ask(payload, name, **options))

    def instance(self, name: str) -> Instance:
        """An instance by its name."""
        return next(i for i in self.instances if i.name == name)

    def states(self) -> dict[str, int]:
        """Instances by state."""
        return dict(Counter(i.state.value for i in self.instances))

    def counted(self, name: str, **labels: str) -> float | None:
        """A metric."""
        return self.registry.get_sample_value(name, labels)


class Held:
    """A handler that answers when the test lets it."""

    def __init__(self) -> None:
        self.waiting: dict[str, asyncio.Future[Answer]] = {}

    async def __call__(self, guest: FakeGuest, order: InvokeOrder) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.waiting[order.payload.decode()] = future
        return await future

    def answer(self, payload: object, value: object = None, **fields: Any) -> None:
        """Let the request with this payload have an answer."""
        key = json.dumps(payload)
        fields = {"payload": json.dumps(value).encode(), "error": None, "ended": "", **fields}
        self.waiting.pop(key).set_result(Answer(**fields))

    def fail(self, payload: object, error: Exception) -> None:
        """Let it fail."""
        self.waiting.pop(json.dumps(payload)).set_exception(error)


Scenario = Callable[[World], Coroutine[Any, Any, None]]


def play(scenario: Scenario, *versions: Version, **settings: Any) -> World:
    """Run a scenario; afterwards the router is closed, and nothing must be left."""
    worlds: list[World] = []
    numbers, most = settings.pop("reserved", {}), settings.pop("most", {})

    async def main() -> None:
        found = FakeVersions(*(versions or (version(),)))
        found.numbers.update(numbers)
        found.most.update(most)
        world = World(found, **settings)
        worlds.append(world)
        await scenario(world)
        await world.router.close()
        await world.tasks.end()
        assert world.clones == {} and list(world.instances) == []
        assert world.bounds._running == {} and world.bounds._shared == 0
        assert not world.router._crews._starts and not world.router._requests

    run(main())
    return worlds[0]


async def settle(rounds: int = 20) -> None:
    """Let everything that is ready happen."""
    for _ in range(rounds):
        await asyncio.sleep(0)
